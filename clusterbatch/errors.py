"""Errors that a user can act on: one line each, and an exit code that says who has to act."""

from __future__ import annotations


class ClusterbatchError(Exception):
    """Base of the errors whose message is meant for users; the command line prints it without a stack trace."""

    exit_code = 1


class UsageError(ClusterbatchError, ValueError):
    """The configuration or the command line asks for something impossible. Exit code 2."""

    exit_code = 2


class OtherWorkError(UsageError):
    """A place holds what another configuration made or began; `--force` replaces it."""


class DataError(ClusterbatchError, ValueError):
    """The corpus, a collection or an artifact is missing, damaged or not what it claims to be. Exit code 3."""

    exit_code = 3


class InfrastructureError(ClusterbatchError):
    """Storage, network or cluster does not do what it should, or another run holds the workspace. Exit code 4.

    Trying again later may help.
    """

    exit_code = 4


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type's name if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def root_cause(error: BaseException) -> BaseException:
    """Return the `ClusterbatchError` that Ray (or Python's chaining) wrapped, otherwise `error` itself."""
    seen: set[int] = set()
    queue: list[BaseException | None] = [error]
    while queue:
        current = queue.pop(0)
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, ClusterbatchError) and type(current).__module__ == __name__:
            return current
        # Ray keeps the original in `cause`; Ray Train in `worker_failures`, by rank.
        queue.extend([getattr(current, "cause", None), current.__cause__, current.__context__])
        queue.extend((getattr(current, "worker_failures", None) or {}).values())
    return error

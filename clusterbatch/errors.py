"""Errors that a user can act on: one line each, and an exit code that says who has to act."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


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


@contextmanager
def about(key: str) -> Iterator[None]:
    """Put a configuration key before the message of a `ClusterbatchError` raised inside that does not begin with it."""
    try:
        yield
    except ClusterbatchError as error:
        if not key or str(error).startswith(f"{key}: "):
            raise
        raise type(error)(f"{key}: {error}") from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type's name if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def root_cause(error: BaseException) -> BaseException:
    """Return the `ClusterbatchError` that an error was raised from, possibly through Ray's wrappers, or `error` itself.

    Causes that errors name come first, at any depth. Python also remembers what was being handled when an error was
    raised (`__context__`), which may have been dealt with and have nothing to do with it: that counts only for errors
    of Ray, which raises its own in place of others, and only if it is not suppressed.
    """
    seen: set[int] = set()
    named: list[BaseException | None] = [error]
    remembered: list[BaseException | None] = []
    while named or remembered:
        current = named.pop(0) if named else remembered.pop(0)
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, ClusterbatchError) and type(current).__module__ == __name__:
            return current
        # Ray keeps the original in `cause`; Ray Train in `worker_failures`, by rank.
        named.extend([getattr(current, "cause", None), current.__cause__])
        named.extend((getattr(current, "worker_failures", None) or {}).values())
        if type(current).__module__.split(".")[0] == "ray" and not current.__suppress_context__:
            remembered.append(current.__context__)
    return error


def last_line(error: BaseException) -> str:
    """Return the last line of the message of what an error was raised from, or the error's type if it has none."""
    lines = [line for line in str(root_cause(error)).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__

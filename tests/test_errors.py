"""The cause that is named for an error which wraps, follows or replaces others."""

from __future__ import annotations

from clusterbatch.errors import DataError, InfrastructureError, OtherWorkError, root_cause


class Wrapper(RuntimeError):
    """An error that keeps others, as Ray's and Ray Train's do."""

    def __init__(self, cause: BaseException | None = None, failures: dict[int, BaseException] | None = None) -> None:
        super().__init__("wrapped")
        self.cause = cause
        self.worker_failures = failures


class RayError(RuntimeError):
    """As one that Ray raises in place of another."""


RayError.__module__ = "ray.exceptions"


def caught(error: BaseException, *, while_handling: BaseException, suppressed: bool = False) -> BaseException:
    """Return `error` as it is after having been raised while another one was handled."""
    try:
        try:
            raise while_handling
        except type(while_handling):
            if suppressed:
                raise error from None
            raise error  # noqa: B904
    except type(error) as raised:
        return raised


def test_causes_that_wrappers_keep_are_found_at_any_depth() -> None:
    cause = DataError("broken file")
    assert root_cause(cause) is cause
    assert root_cause(Wrapper(Wrapper(Wrapper(cause)))) is cause
    assert root_cause(Wrapper(failures={0: KeyError("other"), 1: Wrapper(cause)})) is cause
    chained = RuntimeError("outside")
    chained.__cause__ = Wrapper(cause)
    assert root_cause(chained) is cause


def test_an_error_that_was_dealt_with_is_not_the_cause() -> None:
    handled = OtherWorkError("holds training run made with another configuration")
    cause = InfrastructureError("cannot reach the storage")
    # The true cause is deeper than the one that was handled.
    failed = caught(Wrapper(Wrapper(Wrapper(cause))), while_handling=handled)
    assert failed.__context__ is handled
    assert root_cause(failed) is cause
    bug = caught(KeyError("a bug"), while_handling=handled)
    assert root_cause(bug) is bug


def test_what_ray_replaces_is_the_cause_unless_it_is_suppressed() -> None:
    cause = DataError("broken file")
    assert root_cause(caught(RayError("actor died"), while_handling=cause)) is cause
    suppressed = caught(RayError("actor died"), while_handling=cause, suppressed=True)
    assert root_cause(suppressed) is suppressed
    named = InfrastructureError("cannot reach the storage")
    replaced = caught(RayError("actor died"), while_handling=cause)
    replaced.__cause__ = Wrapper(named)
    replaced.__suppress_context__ = False
    assert root_cause(replaced) is named


def test_circles_end() -> None:
    first, second = Wrapper(), Wrapper()
    first.cause, second.cause = second, first
    assert root_cause(first) is first

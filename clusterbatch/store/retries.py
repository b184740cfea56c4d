"""Failures of storage: which are transient, how long they are retried, and one line for the others."""

from __future__ import annotations

import asyncio
import http.client
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

from clusterbatch.config import StorageConfig
from clusterbatch.errors import ClusterbatchError, InfrastructureError, first_line
from clusterbatch.log import say

Result = TypeVar("Result")

_TRANSIENT_STATUS = {408, 429, 500, 502, 503, 504}
_TRANSIENT_CODES = {
    "SlowDown",
    "InternalError",
    "ServiceUnavailable",
    "RequestTimeout",
    "TooManyRequests",
    "Throttling",
    # The body was damaged or cut in transit to the server.
    "BadDigest",
    "IncompleteBody",
    "XAmzContentSHA256Mismatch",
}
_CREDENTIALS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired"}
_CLOCK = {"RequestTimeTooSkewed", "RequestExpired", "RequestNotYetValid"}
_FIRST_PAUSE = 0.2
_LONGEST_PAUSE = 15.0
# An endpoint that has never answered in this process is more likely misspelt than overloaded.
_ATTEMPTS_AT_STRANGERS = 3
# Seconds that a repeated attempt may take although the budget is nearly spent: it must be able to say what is wrong.
_LEAST_PATIENCE = 1.0
# Seconds of failures that are not worth a line; after that, the seconds between two lines, at least.
_SILENT_SECONDS = 5.0
_SECONDS_BETWEEN_LINES = 30.0

_answered: set[str | None] = set()
# Called at every repeated attempt of this process; runtime.metrics counts them.
observers: list[Callable[[], None]] = []


def with_retries(place: str, storage: StorageConfig, call: Callable[[float], Result]) -> Result:
    """Return `call(seconds)`, tried again after transient failures: 429, 500, 503, resets, time-outs.

    `seconds` is how long the attempt may wait for an answer. Tried at most `storage.attempts` times and until
    `storage.retry_budget` seconds are spent, with growing pauses: `call` must not retry on its own. 403 and 404 are
    never tried again: FileNotFoundError if a file is missing, otherwise InfrastructureError with one line.
    """
    started = time.monotonic()
    patience = storage.connect_timeout + storage.read_timeout
    attempts = 0
    while True:
        attempts += 1
        left = storage.retry_budget - (time.monotonic() - started)
        try:
            result = call(patience if attempts == 1 else min(patience, max(left, _LEAST_PATIENCE)))
        except ClusterbatchError:
            raise
        except Exception as error:
            failure = _failure(error)
            if failure is None:
                raise
            if isinstance(error, FileNotFoundError) and not failure.bucket_missing:
                _answered.add(storage.endpoint_url)
                raise
            if failure.answered:
                _answered.add(storage.endpoint_url)
            limit = storage.attempts
            if failure.unreachable and storage.endpoint_url not in _answered:
                limit = min(limit, _ATTEMPTS_AT_STRANGERS)
            pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**attempts) * random.uniform(0.5, 1.0)
            spent = time.monotonic() - started
            if not failure.transient or attempts >= limit or spent + pause > storage.retry_budget:
                raise InfrastructureError(failure.line(place, storage, attempts, spent)) from error
            for observer in observers:
                observer()
            _outages.failed(storage, failure.reason, time.time() - spent)
            time.sleep(pause)
        else:
            _answered.add(storage.endpoint_url)
            _outages.answered(storage)
            return result


class _Outages:
    """Tell the user that this process waits for storage; one line now and then, however many threads wait."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._since: dict[str | None, float] = {}
        self._said: dict[str | None, float] = {}

    def failed(self, storage: StorageConfig, reason: str, since: float) -> None:
        """Note that an attempt has failed and will be repeated; the first one of its request began at `since`."""
        endpoint, now = storage.endpoint_url, time.time()
        with self._lock:
            since = self._since.setdefault(endpoint, since)
            if now - since < _SILENT_SECONDS or now - self._said.get(endpoint, 0.0) < _SECONDS_BETWEEN_LINES:
                return
            self._said[endpoint] = now
        at = datetime.fromtimestamp(since, UTC).strftime("%H:%M:%S")
        say(
            f"storage   {_endpoint(storage)} not reachable ({reason}), trying again since {at} UTC",
            level="warning",
            seconds=round(now - since, 1),
        )

    def answered(self, storage: StorageConfig) -> None:
        if not self._since:
            return
        with self._lock:
            since = self._since.pop(storage.endpoint_url, None)
            said = self._said.pop(storage.endpoint_url, None)
        if since is not None and said is not None:
            say(f"storage   {_endpoint(storage)} answers again, after {time.time() - since:.0f} s")


_outages = _Outages()


class _Failure:
    """A failed request: what the server or the connection said, without anything that might be secret."""

    def __init__(
        self,
        reason: str,
        *,
        transient: bool = False,
        unreachable: bool = False,
        answered: bool = False,
        code: str = "",
    ) -> None:
        self.reason = reason
        self.transient = transient
        self.unreachable = unreachable
        self.answered = answered
        self.code = code

    @property
    def bucket_missing(self) -> bool:
        return self.code == "NoSuchBucket"

    def line(self, place: str, storage: StorageConfig, attempts: int, seconds: float) -> str:
        bucket = place.removeprefix("s3://").split("/", 1)[0]
        endpoint = _endpoint(storage)
        if self.bucket_missing:
            return f"{place}: bucket {bucket} does not exist at {endpoint}"
        if self.unreachable:
            return f"{place}: cannot reach {endpoint} ({self.reason}); bucket {bucket}, {attempts} attempts"
        tried = f", {attempts} attempts in {seconds:.0f} s" if attempts > 1 else ""
        return f"{place}: {self.reason} (bucket {bucket} at {endpoint}{tried})"


def _endpoint(storage: StorageConfig) -> str:
    """Return what messages call the service. An address in the environment may hold secrets: only its host is shown."""
    if storage.endpoint_url:
        return storage.endpoint_url
    parts = urlsplit(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "")
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}" if parts.netloc else "AWS"


def _failure(error: BaseException) -> _Failure | None:
    """Return the failure behind an error; None if it is none of storage: a bug, to be shown with its traceback."""
    for cause in _chain(error):
        library = type(cause).__module__.split(".")[0]
        response = getattr(cause, "response", None)
        if isinstance(response, dict) and "Error" in response:
            return _of_answer(response)
        name = type(cause).__name__
        if name in ("NoCredentialsError", "PartialCredentialsError"):
            return _Failure("no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile or role")
        if name == "SSLError" and library in ("botocore", "aiobotocore"):
            return _Failure("its certificate is not trusted; storage.ca_file names another authority", unreachable=True)
        if name in ("EndpointConnectionError", "ConnectTimeoutError", "ProxyConnectionError"):
            reason = "no answer to the connection" if name == "ConnectTimeoutError" else "connection refused or no host"
            return _Failure(reason, transient=True, unreachable=True)
        if library in ("botocore", "aiobotocore"):
            # Its HTTP errors are resets, broken bodies and time-outs, its parser fails at answers damaged in transit;
            # others are parameters it does not accept.
            transient = any(base.__name__ in _PASSING for base in type(cause).__mro__)
            return _Failure(f"{name}: {first_line(cause)}" if not transient else name, transient=transient)
        if isinstance(cause, TimeoutError):
            return _Failure("no answer in time", transient=True)
        if library in ("aiohttp", "fsspec") or isinstance(cause, _CONNECTION_ERRORS):
            return _Failure(name, transient=True)
    if isinstance(error, PermissionError):
        return _Failure("access denied")
    if isinstance(error, OSError):
        return _Failure(error.strerror or first_line(error))
    return None


_PASSING = ("HTTPClientError", "ResponseParserError")
_CONNECTION_ERRORS = (ConnectionError, TimeoutError, asyncio.TimeoutError, http.client.IncompleteRead)


def _of_answer(response: dict[str, Any]) -> _Failure:
    code = str(response["Error"].get("Code", ""))
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code in _TRANSIENT_CODES or status in _TRANSIENT_STATUS:
        return _Failure(f"the server answers {status} {code}".rstrip(), transient=True, answered=True, code=code)
    if code in _CREDENTIALS:
        return _Failure(f"access denied, the credentials are not accepted ({code})", answered=True, code=code)
    if code in _CLOCK:
        return _Failure(f"access denied, the clocks of this machine and the server differ ({code})", answered=True)
    if status in (401, 403):
        return _Failure(f"access denied ({code or status})", answered=True, code=code)
    if status == 404:
        return _Failure("not found", answered=True, code=code)
    # The server's own words may repeat what was signed; its code does not.
    return _Failure(f"the server refuses: {status} {code}".rstrip(), answered=True, code=code)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__

"""Filter of Swift's proxy that keeps what it knows of accounts and buckets in its process, as a memcached would.

Without one it asks for both again with every request. Swift's interpreter imports this file by itself.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any


class Cache:
    """Interface of `swift.common.memcached.MemcacheRing` over a dictionary."""

    def __init__(self) -> None:
        self._values: dict[str, tuple[str, float]] = {}

    def set(self, key: str, value: Any, time: float = 0, **options: Any) -> None:
        self._values[key] = (json.dumps(value), _end(time))

    def get(self, key: str, **options: Any) -> Any:
        value, end = self._values.get(key, ("null", 0.0))
        return json.loads(value) if end > time.monotonic() else None

    def incr(self, key: str, delta: int = 1, time: float = 0, **options: Any) -> int:
        value = max(0, (self.get(key) or 0) + delta)
        self.set(key, value, time)
        return value

    def decr(self, key: str, delta: int = 1, time: float = 0, **options: Any) -> int:
        return self.incr(key, -delta, time)

    def delete(self, key: str, server_key: str | None = None) -> None:
        self._values.pop(key, None)

    def set_multi(self, mapping: Mapping[str, Any], server_key: str, time: float = 0, **options: Any) -> None:
        for key, value in mapping.items():
            self.set(key, value, time)

    def get_multi(self, keys: Iterable[str], server_key: str) -> list[Any]:
        return [self.get(key) for key in keys]


def _end(seconds: float) -> float:
    return time.monotonic() + seconds if seconds else float("inf")


def filter_factory(global_config: Mapping[str, str], **options: str) -> Callable[[Any], Any]:
    """Return what paste.deploy puts around the rest of the pipeline."""
    cache = Cache()

    def around(application: Any) -> Any:
        def answer(environment: dict[str, Any], start_response: Any) -> Any:
            environment["swift.cache"] = cache
            return application(environment, start_response)

        return answer

    return around

"""A cache that forgets what was used least recently: bounded by count and by memory, for any number of threads."""

import collections
import os
import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple


class CacheInfo(NamedTuple):
    """What a cache has done since it was made or cleared, and what it holds."""

    hits: int
    misses: int
    maxsize: int
    currsize: int
    """Things held."""
    nbytes: int
    """Their memory."""


class Lru:
    """Things by key. The least recently used go when there are more than `maxsize` of them, or more than `max_bytes` in
    all; what is larger than `max_bytes` by itself is made each time.

    What several threads ask for at once is made once. `maxsize` and `max_bytes` may be set at any time.
    """

    def __init__(self, maxsize: int, max_bytes: int):
        for name, n in (("maxsize", maxsize), ("max_bytes", max_bytes)):
            if not isinstance(n, int) or isinstance(n, bool) or n < 1:
                raise ValueError(
                    f"{name} must be an integer of at least 1, got {n!r}; where no cache is wanted, use none"
                )
        self.maxsize = maxsize
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._held: collections.OrderedDict[Hashable, tuple[Any, int]] = (
            collections.OrderedDict()
        )  # last used at the end
        self._making: dict[Hashable, threading.Event] = {}
        self._hits = self._misses = self._nbytes = 0
        _every.add(self)

    def get(
        self,
        key: Hashable,
        make: Callable[[], Any],
        nbytes: Callable[[Any], int],
        usable: Callable[[Any], bool] = lambda value: True,
    ) -> Any:
        """What is held under the key or, if it is not or is not usable any more, `make()`, which is held from then on.

        nbytes: how much memory it takes to hold it, key included.
        """
        while True:
            with self._lock:
                value, _ = self._held.get(key, (None, 0))
                if value is not None and usable(value):
                    self._hits += 1
                    self._held.move_to_end(key)
                    return value
                made = self._making.get(key)
                if made is None:
                    self._misses += 1
                    self._forget(key)
                    made = self._making[key] = threading.Event()
                    break
            made.wait()  # somebody else is at it
        try:
            value = make()
            self._hold(key, value, nbytes(value))
        finally:
            with self._lock:
                self._making.pop(key, made).set()  # a fork, if it was within `make`, has none
        return value

    def _hold(self, key: Hashable, value: Any, nbytes: int) -> None:
        with self._lock:
            if nbytes > self.max_bytes:
                return
            self._held[key] = value, nbytes
            self._nbytes += nbytes
            while len(self._held) > self.maxsize or self._nbytes > self.max_bytes:
                self._forget(next(iter(self._held)))

    def _forget(self, key: Hashable) -> None:
        self._nbytes -= self._held.pop(key, (None, 0))[1]

    def info(self) -> CacheInfo:
        """Hits and misses so far, and what is held."""
        with self._lock:
            return CacheInfo(self._hits, self._misses, self.maxsize, len(self._held), self._nbytes)

    def clear(self) -> None:
        """Forgets all, and counts from 0 again."""
        with self._lock:
            self._held.clear()
            self._hits = self._misses = self._nbytes = 0

    def _after_fork(self) -> None:
        """In the child, whose only thread is the one that forked: nobody else holds the lock, or is at it."""
        self._lock = threading.Lock()
        self._making.clear()


_every: weakref.WeakSet[Lru] = weakref.WeakSet()


def _renew() -> None:
    for cache in list(_every):
        cache._after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_renew)

"""A queue behind one response stream, which wakes up when the call or the server ends."""

import threading
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

import grpc

from services.common.errors import Reason, ServiceError
from services.common.rpc.interceptor import stopping

T = TypeVar("T")
_MOST_WAITING = 1024


class Feed(Generic[T]):
    """Messages for one watcher. The servicer pushes from any thread and yields from the feed in the RPC's own.

    Iteration ends when the caller hangs up or `close` is called, and raises UNREACHABLE when the server
    stops or the watcher falls `_MOST_WAITING` messages behind: it then dials again and reads the state afresh.
    """

    def __init__(self, context: grpc.ServicerContext) -> None:
        self._waiting: deque[T] = deque()
        self._changed = threading.Condition()
        self._ended = False
        self._refusal: ServiceError | None = None
        self._stopping = stopping(context)
        self._stopping.add(self._stop)
        if not context.add_callback(self.close):
            self.close()

    def push(self, message: T) -> None:
        """Add a message; nothing happens when the feed has ended."""
        with self._changed:
            if not self._ended:
                self._waiting.append(message)
            late = len(self._waiting) > _MOST_WAITING
            self._changed.notify()
        if late:
            self.fail(ServiceError(Reason.UNREACHABLE, "this watcher is too slow: dial again"))

    def replace(self, message: T) -> None:
        """Like `push`, but what still waits is dropped: for a state of which only the newest counts."""
        with self._changed:
            self._waiting.clear()
        self.push(message)

    def fail(self, refusal: ServiceError) -> None:
        """End the stream now, with this refusal."""
        with self._changed:
            self._refusal, self._ended = refusal, True
            self._changed.notify()

    def close(self) -> None:
        """End the stream after what waits."""
        self._stopping.remove(self._stop)
        with self._changed:
            self._ended = True
            self._changed.notify()

    @property
    def ended(self) -> bool:
        """Whether nothing more can be pushed."""
        return self._ended

    def _stop(self) -> None:
        self.fail(ServiceError(Reason.UNREACHABLE, "the server is stopping: dial again in a moment"))

    def __iter__(self) -> Iterator[T]:
        while True:
            with self._changed:
                while not self._waiting and not self._ended:
                    self._changed.wait()
                if self._refusal is not None:
                    raise self._refusal
                if not self._waiting:
                    return
                message = self._waiting.popleft()
            yield message

"""What one process still has to say on a stream that it keeps open: bounded, and over when the stream is."""

import threading
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

from services.common.errors import Reason, ServiceError

T = TypeVar("T")
_MOST_WAITING = 2  # messages may hold a chunk each: whoever makes them waits for the line


class Outbox(Generic[T]):
    """Messages in order; gRPC takes them by iterating, in a thread of its own, until `close`."""

    def __init__(self, first: T) -> None:
        self._waiting = deque([first])
        self._changed = threading.Condition()
        self._closed = False

    def put(self, message: T) -> None:
        """Hand `message` to the line, once there is room. Raises UNREACHABLE when the stream has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._waiting) < _MOST_WAITING)
            if self._closed:
                raise ServiceError(Reason.UNREACHABLE, "the stream has ended: the other side asks again on the next")
            self._waiting.append(message)
            self._changed.notify_all()

    def close(self) -> None:
        """Nothing more goes out; a waiting `put` raises."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def __iter__(self) -> Iterator[T]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or bool(self._waiting))
                if self._closed:
                    return
                message = self._waiting.popleft()
                self._changed.notify_all()
            yield message

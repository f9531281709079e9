"""One stream that a dialling site holds open: what comes is handed on, a lost line is dialled again."""

import logging
import threading
from collections.abc import Callable
from secrets import SystemRandom
from typing import Generic, TypeVar

from services.common.errors import Reason, ServiceError
from services.common.rpc.channel import Stream

_log = logging.getLogger(__name__)
_FIRST_WAIT, _LONGEST_WAIT = 0.2, 10.0
T = TypeVar("T")


class Watch(Generic[T]):
    """A thread, until `stop` is set: `begin` dials, `take` gets each message, `connected` hears of them and of the end.

    A stream that brought anything is dialled again at once, others with growing, random waits.
    """

    def __init__(
        self,
        begin: Callable[[], Stream[T]],
        take: Callable[[T], None],
        stop: threading.Event,
        connected: Callable[[bool], None],
    ) -> None:
        self._begin, self._take, self._stop, self._connected = begin, take, stop, connected
        self._stream: Stream[T] | None = None
        self._known = False  # something came: to the other side this process is the site
        self._refusal: ServiceError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="watch")

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def check(self) -> None:
        """Raise CONFLICT where another process stood in this site's place, RuntimeError after a fault of ours."""
        if not self._thread.is_alive() and not self._stop.is_set():
            raise self._refusal or RuntimeError("the watching has ended by itself; the log says why")

    def join(self) -> None:
        """Wait for its end, after `stop` was set and the connection closed."""
        self._thread.join(timeout=5)

    def redial(self) -> None:
        """End this stream; another follows, which says what is true now. From any thread."""
        stream = self._stream
        if stream is not None:
            stream.cancel()

    def _run(self) -> None:
        wait = _FIRST_WAIT
        while not self._stop.is_set():
            came, error = self._once()
            if error is not None:
                if error.reason is Reason.CONFLICT and not self._known:
                    self._refusal = error
                    return
                if came:
                    _log.info("the aggregator's stream ended: %s", error.detail)
                else:
                    _log.warning("the aggregator cannot be watched: %s", error.detail)
            wait = _FIRST_WAIT if came else wait
            self._stop.wait(SystemRandom().uniform(wait / 2, wait))
            wait = min(2 * wait, _LONGEST_WAIT)

    def _once(self) -> tuple[bool, ServiceError | None]:
        came = False
        try:
            with self._begin() as messages:
                self._stream = messages
                for message in messages:
                    self._connected(True)
                    came = self._known = True
                    self._take(message)
        except ServiceError as error:
            return came, error
        finally:
            self._stream = None
            self._connected(False)
        return came, None

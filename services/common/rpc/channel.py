"""Dialling out: one connection to the aggregator, deadlines on every call, refusals back as ServiceError."""

from __future__ import annotations  # grpc classes are generic in their stubs only

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from secrets import SystemRandom
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import grpc

from services.common.errors import Reason, ServiceError
from services.common.rpc.errors import CODES, from_rpc_error
from services.common.rpc.leaf import Leaf, LeafFiles, LeafWatch
from services.common.rpc.outbox import Outbox
from services.common.rpc.server import MAX_MESSAGE_BYTES
from services.common.rpc.traffic import Counted

Request = TypeVar("Request")
Response = TypeVar("Response")
S = TypeVar("S")

_FIRST_WAIT, _LONGEST_WAIT = 0.2, 10.0
_OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 10_000),
    ("grpc.use_local_subchannel_pool", 1),  # a renewed leaf needs a connection of its own
]


def dial(address: str, server_name: str, leaf: Leaf, root: bytes, proxy: str | None = None) -> grpc.Channel:
    """A channel to the aggregator at `address`, which must prove `server_name` under `root` (PEM), and nothing else.

    `proxy` is an HTTPS forward proxy, http://host:port; without it the environment's proxies are not used.
    """
    options = [*_OPTIONS, ("grpc.ssl_target_name_override", server_name)]
    options.append(("grpc.http_proxy", proxy) if proxy else ("grpc.enable_http_proxy", 0))
    credentials = grpc.ssl_channel_credentials(root, leaf.key, leaf.certificate)
    return Counted(grpc.secure_channel(address, credentials, options))


_stubs: WeakKeyDictionary[grpc.Channel, dict[Any, Any]] = WeakKeyDictionary()


def stub(cls: Callable[[grpc.Channel], S], channel: grpc.Channel) -> S:
    """The generated stub `cls` of `channel`, made at its first use: making one registers every RPC of the service."""
    found = _stubs.setdefault(channel, {})
    if cls not in found:
        found[cls] = cls(channel)
    made: S = found[cls]
    return made


@dataclass
class _Line:
    """A channel, the generation of the leaf that it shows, and the calls that still use it."""

    channel: grpc.Channel
    generation: int
    calls: int = 0


class Caller:
    """Calls over a connection that is made anew when the leaf's files change. Thread-safe.

    Every method takes `seconds`, the deadline of the whole call, retries included, and raises ServiceError.
    The connection is dropped by `close`, which ends all calls and waits with UNREACHABLE.
    """

    def __init__(self, connect: Callable[[Leaf], grpc.Channel], leaf: LeafFiles) -> None:
        self._connect = connect
        self._leaf = LeafWatch(leaf)
        self._lock = threading.Lock()
        self._closed = threading.Event()
        now = self._leaf.current()
        self._line = _Line(connect(now), now.generation)
        self._retired: list[_Line] = []
        self._random = SystemRandom()

    def unary(
        self,
        pick: Callable[[grpc.Channel], grpc.UnaryUnaryMultiCallable[Request, Response]],
        request: Request,
        *,
        seconds: float,
    ) -> Response:
        """One request, one answer: `caller.unary(lambda c: stub(KeyShareServiceStub, c).Greet, request, seconds=10)`.

        Repeated with growing, random waits while the answer is UNAVAILABLE and time is left.
        """
        return self._repeated(lambda channel, left: pick(channel)(request, timeout=left), seconds)

    def upload(
        self,
        pick: Callable[[grpc.Channel], grpc.StreamUnaryMultiCallable[Request, Response]],
        requests: Iterator[Request],
        *,
        seconds: float,
    ) -> Response:
        """A stream of requests, one answer. Never repeated here: ask how far it came, then send the rest.

        An exception of `requests` itself comes out as it is.
        """
        fault: list[BaseException] = []

        def watched() -> Iterator[Request]:
            # grpc would log the exception and say only "UNKNOWN: Exception iterating requests!".
            try:
                yield from requests
            except Exception as error:
                fault.append(error)
                raise

        try:
            with self._channel() as channel, _translated():
                return pick(channel)(watched(), timeout=seconds)
        except ServiceError:
            if fault:
                raise fault[0] from None
            raise

    def stream(
        self,
        pick: Callable[[grpc.Channel], grpc.UnaryStreamMultiCallable[Request, Response]],
        request: Request,
        *,
        seconds: float,
    ) -> Stream[Response]:
        """One request, a stream of answers, to be used as a context manager. Never repeated here."""
        return Stream(self, lambda channel: pick(channel)(request, timeout=seconds))

    def converse(
        self,
        pick: Callable[[grpc.Channel], grpc.StreamStreamMultiCallable[Request, Response]],
        outbox: Outbox[Request],
        *,
        seconds: float,
    ) -> Stream[Response]:
        """Answers to a stream of requests that goes on as long as they do. Its end closes `outbox`."""

        def begin(channel: grpc.Channel) -> Any:
            call: Any = pick(channel)(iter(outbox), timeout=seconds)
            if not call.add_callback(outbox.close):
                outbox.close()
            return call

        return Stream(self, begin)

    def close(self) -> None:
        """End all calls, also from another thread, and the connection."""
        self._closed.set()
        with self._lock:
            lines = [self._line, *self._retired]
            self._retired = []
        for line in lines:
            line.channel.close()

    def _repeated(self, call: Callable[[grpc.Channel, float], Response], seconds: float) -> Response:
        end = time.monotonic() + seconds
        longest = _FIRST_WAIT
        refused: ServiceError | None = None
        while True:
            try:
                with self._channel() as channel, _translated():
                    return call(channel, max(0.001, end - time.monotonic()))
            except ServiceError as error:
                if error.reason is not Reason.UNREACHABLE:
                    refused = error
                elif refused is not None and time.monotonic() >= end:
                    # The last try was cut off by the deadline: what the server said before tells more.
                    raise refused from None
                wait = self._random.uniform(longest / 2, longest)
                late = time.monotonic() + wait >= end
                passing = CODES[error.reason] is grpc.StatusCode.UNAVAILABLE and not late
                if not passing or self._closed.wait(wait):
                    raise
            longest = min(2 * longest, _LONGEST_WAIT)

    @contextmanager
    def _channel(self) -> Iterator[grpc.Channel]:
        """The channel of the newest leaf; an older one is closed when its last call has ended."""
        line = self._enter()
        try:
            yield line.channel
        finally:
            with self._lock:
                line.calls -= 1
                done = [old for old in self._retired if not old.calls]
                self._retired = [old for old in self._retired if old.calls]
            for old in done:
                old.channel.close()

    def _enter(self) -> _Line:
        leaf = self._leaf.current()
        idle: _Line | None = None
        with self._lock:
            if self._closed.is_set():
                raise ServiceError(Reason.UNREACHABLE, "this process is stopping")
            if leaf.generation > self._line.generation:
                if self._line.calls:
                    self._retired.append(self._line)
                else:
                    idle = self._line
                self._line = _Line(self._connect(leaf), leaf.generation)
            self._line.calls += 1
            line = self._line
        if idle is not None:
            idle.channel.close()
        return line


class Stream(Generic[Response]):
    """The answers of one call: `with caller.stream(...) as answers: for answer in answers: ...`."""

    def __init__(self, caller: Caller, begin: Callable[[grpc.Channel], Any]) -> None:
        self._scope = caller._channel()
        self._begin = begin
        self._answers: Any = None

    def cancel(self) -> None:
        """End the call from any thread; the iteration then raises UNREACHABLE."""
        self._answers.cancel()

    def __enter__(self) -> Stream[Response]:
        channel = self._scope.__enter__()
        try:
            with _translated():
                self._answers = self._begin(channel)
        except BaseException:
            self._scope.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *failure: object) -> None:
        self._answers.cancel()
        self._scope.__exit__(None, None, None)

    def __iter__(self) -> Iterator[Response]:
        with _translated():
            yield from self._answers


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error) from None
    except ValueError as error:
        # grpc's word for a channel that another thread has closed.
        if "closed channel" not in str(error):
            raise
        raise ServiceError(Reason.UNREACHABLE, "this process is stopping") from None

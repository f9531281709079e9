"""What every call passes before a servicer sees it, and what every refusal passes on its way out.

In this order: who calls (from the leaf alone), may that role call this, is that member over its share of
threads; only then are the request's bytes parsed. Deny by default.
"""

from __future__ import annotations  # grpc classes are generic in their stubs only

import logging
import threading
import time
from collections import Counter as Tally
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import grpc
from google.protobuf.message import DecodeError
from prometheus_client import Counter, Gauge, Histogram

from services.common.clock import Clock
from services.common.errors import Reason, ServiceError
from services.common.ids import Role
from services.common.rpc.authority import AUTHORITY
from services.common.rpc.certificates import check_leaf, load_leaf
from services.common.rpc.errors import CODES, abort
from services.common.rpc.members import Members

_log = logging.getLogger(__name__)
_MOST_CALLS_OF_ONE_PEER = 16  # a member may not take all threads from the others

_CALLS = Counter("wardround_rpc_calls_total", "RPCs ended at this server, by outcome", ["method", "outcome"])
_SECONDS = Histogram(
    "wardround_rpc_seconds",
    "Time of RPCs at this server; streams last as long as they are open",
    ["method"],
    buckets=(0.005, 0.02, 0.1, 0.5, 2, 10, 60, 600),
)
_BYTES = Counter("wardround_rpc_bytes_total", "Message bytes at this server", ["method", "direction"])
_OPEN = Gauge("wardround_rpc_open", "RPCs now being served", ["method"])


@dataclass(frozen=True)
class Peer:
    """Who calls: proved by the certificate, or `operator local` on the Unix socket."""

    role: Role
    id: str


class Stopping:
    """Lets a server end the streams that would wait for ever."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._hooks: set[Callable[[], None]] = set()
        self._stopped = False

    def add(self, hook: Callable[[], None]) -> None:
        """Call `hook` when the server stops: at once if it does already."""
        with self._lock:
            if not self._stopped:
                self._hooks.add(hook)
                return
        hook()

    def remove(self, hook: Callable[[], None]) -> None:
        """Forget `hook`."""
        with self._lock:
            self._hooks.discard(hook)

    def stop(self) -> None:
        """Call every hook, once."""
        with self._lock:
            self._stopped = True
            hooks, self._hooks = self._hooks, set()
        for hook in hooks:
            hook()


@dataclass(frozen=True)
class _Call:
    peer: Peer
    stopping: Stopping


_calls: WeakKeyDictionary[grpc.ServicerContext, _Call] = WeakKeyDictionary()
_calls_lock = threading.Lock()


def peer(context: grpc.ServicerContext) -> Peer:
    """Who makes this call; only for contexts that came through the interceptor."""
    return _call(context).peer


def stopping(context: grpc.ServicerContext) -> Stopping:
    """The stop signal of the server of this call."""
    return _call(context).stopping


def _call(context: grpc.ServicerContext) -> _Call:
    with _calls_lock:
        return _calls[context]


class _Measures:
    """The series of one method, looked up once."""

    def __init__(self, method: str) -> None:
        self.method = method
        self.open, self.seconds, self.well = _OPEN.labels(method), _SECONDS.labels(method), _CALLS.labels(method, "OK")


Authenticate = Callable[[grpc.ServicerContext], Peer]
"""Says who calls; raises UNKNOWN_MEMBER or NOT_PERMITTED."""


def by_certificate(members: Callable[[], Members], own: tuple[Role, str], clock: Clock) -> Authenticate:
    """Authentication over mutual TLS. `own` is the serving site: operators' leaves must come from its root."""

    def authenticate(context: grpc.ServicerContext) -> Peer:
        # The stubs say bytes; grpc gives a list of them.
        chain: Any = context.auth_context().get("x509_pem_cert")
        if not chain:
            raise ServiceError(Reason.NOT_PERMITTED, "no client certificate: dial with mutual TLS")
        leaf, named = load_leaf(chain[0])
        known = members()
        roots = known.roots.get(own if named.role is Role.OPERATOR else (named.role, named.id))
        if named.consortium != known.consortium or roots is None:
            raise ServiceError(
                Reason.UNKNOWN_MEMBER,
                f"the charter does not list {named.role.value} {named.id} of consortium {named.consortium}: "
                "compare the charter digests of both sites",
            )
        check_leaf(leaf, roots, clock.now_ms())
        return Peer(named.role, named.id)

    return authenticate


def as_local_operator(context: grpc.ServicerContext) -> Peer:
    """Authentication on the Unix socket: whoever may open its file is the site's operator."""
    return Peer(Role.OPERATOR, "local")


class Gate(grpc.ServerInterceptor):
    """Authenticates, authorises, measures, and turns every exception into a refusal that says no more than it may."""

    def __init__(self, authenticate: Authenticate, stop_signal: Stopping) -> None:
        self._authenticate = authenticate
        self._stopping = stop_signal
        self._lock = threading.Lock()
        self._open: Tally[Peer] = Tally()
        self._handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wrap the handler of a known method; an unknown one stays UNIMPLEMENTED."""
        method = handler_call_details.method
        if method not in self._handlers:
            handler = continuation(handler_call_details)
            if handler is None:
                return None
            self._handlers[method] = self._wrapped(method, handler)
        return self._handlers[method]

    def _wrapped(self, method: str, handler: Any) -> Any:
        received, sent = _BYTES.labels(method, "received"), _BYTES.labels(method, "sent")
        measures = _Measures(method)

        def parse(data: bytes) -> Any:
            received.inc(len(data))
            try:
                return handler.request_deserializer(data)
            except DecodeError:
                raise ServiceError(
                    Reason.MALFORMED, f"the request of {method} is not the message it should be"
                ) from None

        def serialize(message: Any) -> bytes:
            data: bytes = handler.response_serializer(message)
            sent.inc(len(data))
            return data

        def read(request: Any) -> Any:
            return map(parse, request) if handler.request_streaming else parse(request)

        def answer(request: Any, context: grpc.ServicerContext) -> Any:
            with self._guard(measures, context):
                behaviour = handler.stream_unary if handler.request_streaming else handler.unary_unary
                return behaviour(read(request), context)

        def answers(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            with self._guard(measures, context):
                behaviour = handler.stream_stream if handler.request_streaming else handler.unary_stream
                yield from behaviour(read(request), context)

        makers: dict[tuple[bool, bool], Callable[..., Any]] = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }
        make = makers[handler.request_streaming, handler.response_streaming]
        # No deserializer: a stranger's bytes are parsed only after `_admit`.
        return make(answers if handler.response_streaming else answer, None, serialize)

    @contextmanager
    def _guard(self, measures: _Measures, context: grpc.ServicerContext) -> Iterator[None]:
        method, started, outcome = measures.method, time.perf_counter(), "OK"
        caller: Peer | None = None
        refusal: ServiceError | None = None
        measures.open.inc()
        try:
            caller = self._admit(method, context)
            yield
        except ServiceError as error:
            refusal = error
            level = logging.ERROR if error.reason is Reason.INTERNAL else logging.INFO
            _log.log(level, "refused", extra=_facts(method, caller, error), exc_info=level == logging.ERROR)
        except (GeneratorExit, grpc.RpcError):  # the caller hung up
            outcome = grpc.StatusCode.CANCELLED.name
            raise
        except Exception as error:
            if not context.is_active():  # whatever it was, nobody hears it: the caller hung up in between
                outcome = grpc.StatusCode.CANCELLED.name
            refusal = ServiceError(Reason.INTERNAL, str(error))
            _log.exception("failed", extra=_facts(method, caller, refusal))
        finally:
            if refusal is not None and outcome == "OK":
                outcome = CODES[refusal.reason].name
            measures.open.dec()
            (measures.well if outcome == "OK" else _CALLS.labels(method, outcome)).inc()
            measures.seconds.observe(time.perf_counter() - started)
            if caller is not None:
                self._leave(caller)
        if refusal is not None:
            abort(context, refusal)

    def _admit(self, method: str, context: grpc.ServicerContext) -> Peer:
        caller = self._authenticate(context)
        if caller.role not in AUTHORITY.get(method, frozenset()):
            raise ServiceError(
                Reason.NOT_PERMITTED, f"{caller.role.value} {caller.id} may not call {method}: another role does that"
            )
        with self._lock:
            if self._open[caller] >= _MOST_CALLS_OF_ONE_PEER:
                raise ServiceError(
                    Reason.UNREACHABLE,
                    f"{caller.role.value} {caller.id} has {_MOST_CALLS_OF_ONE_PEER} calls open already: "
                    "end one, or stop the second process with this certificate",
                )
            self._open[caller] += 1
        with _calls_lock:
            _calls[context] = _Call(caller, self._stopping)
        return caller

    def _leave(self, caller: Peer) -> None:
        with self._lock:
            self._open[caller] -= 1
            if not self._open[caller]:
                del self._open[caller]


def _facts(method: str, caller: Peer | None, error: ServiceError) -> dict[str, str]:
    named = {"caller_role": caller.role.value, "caller_id": caller.id} if caller is not None else {}
    return {"method": method, "reason": error.reason.value, "detail": error.detail, **named}

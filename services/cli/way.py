"""The way from a site to its aggregator, as the service will go it: name, proxy, TLS, and whether it is known there."""

import socket
from typing import Any

from services.common.clock import SystemClock
from services.common.documents.charter import LoadedCharter
from services.common.errors import Reason, ServiceError
from services.common.ids import Role
from services.common.rpc.certificates import server_name
from services.common.rpc.channel import Caller, dial
from services.common.rpc.leaf import LeafFiles
from wardround.keyshare.v1 import keyshare_pb2, keyshare_pb2_grpc
from wardround.round.v1 import round_pb2, round_pb2_grpc

_SECONDS = 20.0
_SKEW_WARNED, _SKEW_REFUSED = 5.0, 60.0  # seconds; round keys and leaves are dated to the minute


class Way:
    """Checks in order; each raises ServiceError or returns what it found good ("?" before a warning)."""

    def __init__(self, config: Any, role: Role, charter: LoadedCharter | None) -> None:
        """`config` of a hospital or pod; without its charter nobody could say whom to trust."""
        self._config = config
        self._role = role
        self._charter = charter
        self._there: tuple[bytes, ...] | None = None  # the aggregator's charters, once it has answered
        self._skew = 0.0

    def resolve(self) -> str:
        """The name of the aggregator, or of the proxy that leads to it."""
        config = self._config
        address = config.aggregator if config.proxy is None else config.proxy.removeprefix("http://")
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal():
            raise ServiceError(Reason.INVALID_DOCUMENT, f"the address {address!r} is not host:port: correct it")
        try:
            found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        except OSError as error:
            raise ServiceError(
                Reason.UNREACHABLE,
                f"{host} has no address here ({error.strerror or error}): correct it, or open DNS to this site",
            ) from None
        return f"{host} is {found[0][4][0]}" + ("" if config.proxy is None else ", the proxy")

    def greet(self) -> str:
        """Through the proxy, if any, with TLS both ways: the aggregator proves its name, and knows this site."""
        config, charter = self._config, self._charter
        if charter is None:
            raise ServiceError(Reason.INVALID_DOCUMENT, "not tried without a usable charter: see above")
        aggregator = charter.document.aggregator
        name, root = server_name(aggregator.id, charter.document.consortium), aggregator.tls_root.encode()
        leaf = LeafFiles(config.tls.certificate, config.tls.key)
        caller = Caller(lambda pair: dial(config.aggregator, name, pair, root, config.proxy), leaf)
        clock = SystemClock()
        try:
            begun = clock.now_ms()
            time, self._there = self._ask(caller)
            self._skew = (time - (begun + clock.now_ms()) / 2) / 1000
        except ServiceError as error:
            if error.reason is not Reason.UNREACHABLE:
                raise
            _, _, port = config.aggregator.rpartition(":")
            raise ServiceError(
                Reason.UNREACHABLE,
                f"{config.aggregator} cannot be reached as {name} ({error.detail}): open outbound TCP {port} to it, "
                "pass TLS through, and compare the charters' TLS roots",
            ) from None
        finally:
            caller.close()
        return f"{name} at {config.aggregator} answers and knows {self._role.value} {config.id}"

    def clocks(self) -> str:
        """Certificates and round keys are dated."""
        self._greeted()
        words = f"the aggregator's is {abs(self._skew):.1f} s {'ahead' if self._skew > 0 else 'behind'}"
        if abs(self._skew) > _SKEW_REFUSED:
            raise ServiceError(Reason.OUT_OF_BOUND, f"{words}, at most {_SKEW_REFUSED:.0f}: set both by NTP")
        return f"?{words}: set both by NTP" if abs(self._skew) > _SKEW_WARNED else words

    def charters(self) -> str:
        """Both sides must have pinned the same bytes, or no round finds them together."""
        there = self._greeted()
        assert self._charter is not None  # noqa: S101  # it was greeted with one
        own = self._charter.digest
        if own not in there:
            theirs = ", ".join(digest.hex()[:12] for digest in there)
            raise ServiceError(
                Reason.BAD_DIGEST,
                f"the aggregator has pinned {theirs}, this site {own.hex()[:12]}: compare the files by their words",
            )
        return f"{own.hex()[:12]}… is pinned at the aggregator, too"

    def _greeted(self) -> tuple[bytes, ...]:
        if self._there is None:
            raise ServiceError(Reason.UNREACHABLE, "not known, since the aggregator was not reached")
        return self._there

    def _ask(self, caller: Caller) -> tuple[int, tuple[bytes, ...]]:
        """(the aggregator's clock in Unix ms, its charters)."""
        if self._role is Role.HOSPITAL:
            of_round = caller.unary(
                lambda channel: round_pb2_grpc.RoundCoordinationServiceStub(channel).Greet,
                round_pb2.GreetRequest(),
                seconds=_SECONDS,
            )
            return of_round.time_ms, tuple(of_round.charters)
        of_pods = caller.unary(
            lambda channel: keyshare_pb2_grpc.KeyShareServiceStub(channel).Greet,
            keyshare_pb2.GreetRequest(),
            seconds=_SECONDS,
        )
        return of_pods.time_ms, tuple(of_pods.charters)

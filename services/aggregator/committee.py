"""The pods at the other end of their Watch streams: command numbers, refusals, and P-11's marks.

All of it is volatile: after a restart pods dial again and everything still open is asked again. One lock; nothing
here calls out while holding it but pushing to feeds.
"""

import itertools
import logging
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from services.aggregator import metrics
from services.aggregator.orders import Key, Order
from services.aggregator.round import Phase, State, subject
from services.common.errors import Reason, ServiceError
from services.common.rpc.feed import Feed
from services.common.rpc.signed import to_wire
from services.common.secagg.messages import Signed
from services.common.secagg.roster import Roster
from wardround.keyshare.v1.keyshare_pb2 import DeliverForm, HighWaterOrder, MarkForm, NonceForm, WatchResponse

_log = logging.getLogger(__name__)
_AGAIN_MS = 1_000
_LOST_MS = 60_000  # an answer that has not come by now was lost on its way: ask again
_SMALL = frozenset({"commit", "lock", "abandon"})  # orders that a pod works off at once
_RELAY_MS = 60_000  # a pod that is live is checked again before a Propose when its last check is older than this
_PASSING = frozenset(
    {
        Reason.UNREACHABLE,
        Reason.STORAGE,
        Reason.INTERNAL,
        Reason.WRONG_PHASE,
        Reason.BELOW_QUORUM,
        Reason.BELOW_COHORT,
        Reason.STALE_VERSION,
    }
)
"""Refusals after which the same question is asked again a little later."""


@dataclass
class _Relay:
    """P-11 for one pod: its nonce, the others' marks about it, and for which of them it was told."""

    nonce: bytes = b""
    marks: dict[str, Signed] = field(default_factory=dict)


@dataclass
class _Link:
    """One pod's present (or last) Watch stream."""

    feed: Feed[WatchResponse]
    boot: bytes
    live: bool
    charters: tuple[bytes, ...]
    sent: dict[Key, int] = field(default_factory=dict)  # when (Unix ms)
    refused: dict[Key, tuple[Reason, int]] = field(default_factory=dict)
    relay: _Relay | None = None
    relayed: int = 0


class Committee:
    """Who is there, what was asked, what was refused. Thread-safe. `changed` is called after every change."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._lock = threading.Lock()
        self._links: dict[str, _Link] = {}
        self._commands: dict[int, tuple[str, Key]] = {}
        self._about = ""
        self._numbers = itertools.count(secrets.randbits(48))  # an answer to an earlier life's command matches nothing

    def join(self, pod: str, feed: Feed[WatchResponse], boot: bytes, live: bool, charters: tuple[bytes, ...]) -> None:
        """A pod dialled; an older stream of the same process ends.

        Raises CONFLICT while another process of the same identity is connected: of two releases of one pod the second
        is refused. A process that died frees its place as its connection ends, at the latest by keep-alive.
        """
        with self._lock:
            before = self._links.get(pod)
            if before is not None and before.boot != boot and not before.feed.ended:
                _log.error("two processes with one identity", extra={"pod": pod})
                raise ServiceError(
                    Reason.CONFLICT,
                    f"another process with the identity of {pod} is connected: a pod runs once, so stop this one or "
                    "that one (two releases of one site?); one that died is given up within 80 s",
                )
            self._links[pod] = _Link(feed, boot, live, charters)
            self._commands = {number: asked for number, asked in self._commands.items() if asked[0] != pod}
        if before is not None:
            before.feed.close()
        self._changed()

    def left(self) -> None:
        """A pod's stream ended (its feed says which)."""
        self._changed()

    def ask_again(self) -> None:
        """Answers were forgotten before they were stored: whatever is still open is asked anew.

        Answers to earlier commands match nothing from now on: they would be judged against a state that went back.
        """
        with self._lock:
            self._commands.clear()
            for link in self._links.values():
                link.sent.clear()
                link.refused.clear()

    def asked(self, pod: str, command: int) -> Key:
        """What this command asked of this pod. Raises NOT_FOUND for a number of another pod, stream or life."""
        with self._lock:
            found = self._commands.get(command)
            if found is None or found[0] != pod:
                raise ServiceError(
                    Reason.NOT_FOUND,
                    f"command {command} is not open for {pod}: dial again, it is asked anew if it must be",
                )
            return found[1]

    def refuse(self, pod: str, command: int, reason: str, detail: str, at: int) -> None:
        """A pod refused a command, or its answer did not hold."""
        key = self.asked(pod, command)
        known = Reason(reason) if reason in list(Reason) else Reason.INTERNAL
        metrics.POD_REFUSALS.labels(key[0], known.value).inc()
        _log.warning("pod refused", extra={"pod": pod, "order": key[0], "reason": known.value, "detail": detail[:300]})
        with self._lock:
            link = self._links[pod]
            link.refused[key] = (known, at)
            if known is Reason.NOT_LIVE and key[0] == "commit":
                link.live, link.relay = False, None
        self._changed()

    def took_nonce(self, pod: str, nonce: bytes) -> None:
        """A pod's nonce for the others' marks."""
        with self._lock:
            self._links[pod].relay = _Relay(nonce)
        self._changed()

    def took_mark(self, asking: str, answering: str, nonce: bytes, mark: Signed) -> None:
        """Another pod's mark about `asking`, verified."""
        with self._lock:
            link = self._links.get(asking)
            if link is not None and link.relay is not None and link.relay.nonce == nonce:
                link.relay.marks[answering] = mark
        self._changed()

    def took_live(self, pod: str, at: int) -> None:
        """The pod has taken the marks: it signs from now on."""
        with self._lock:
            link = self._links[pod]
            link.live, link.relay, link.relayed = True, None, at
            for key in [key for key, (reason, _) in link.refused.items() if reason is Reason.NOT_LIVE]:
                del link.refused[key]
                link.sent.pop(key, None)
        self._changed()

    def reports(self) -> dict[str, tuple[bytes, ...]]:
        """Charter digests that each connected pod holds."""
        with self._lock:
            return {pod: link.charters for pod, link in self._links.items() if not link.feed.ended}

    def live(self) -> frozenset[str]:
        """Connected pods that sign."""
        with self._lock:
            return frozenset(pod for pod, link in self._links.items() if link.live and not link.feed.ended)

    def standing(self, state: State) -> tuple[frozenset[str], frozenset[str]]:
        """(able, lost) for the present phase, as `round.Tick` wants them."""
        about = subject(state).hex()
        able, lost = set(), set()
        with self._lock:
            for pod, link in self._links.items():
                hits = {
                    reason
                    for key, (reason, _) in link.refused.items()
                    if key[1] == about and (key[0] == "abandon") == (state.phase is Phase.ABANDONING)
                }
                final = hits - _PASSING
                if state.phase in (Phase.PROPOSED, Phase.ABANDONING):
                    final -= {Reason.NOT_LIVE}
                if final:
                    lost.add(pod)
                if link.live and not link.feed.ended and not hits:
                    able.add(pod)
        return frozenset(able), frozenset(lost)

    def send(
        self, orders: Mapping[str, list[Order]], about: str, roster: Roster, at: int, relay_all: bool
    ) -> int | None:
        """Push whatever was not asked yet; `relay_all` = a Propose is near. Returns when to call again, if by time.

        `about`: the subject of the open attempt.
        """
        again: list[int] = []
        with self._lock:
            relay = self._relay_orders(roster, at, relay_all)
            if about != self._about:
                self._about = about
                self._forget({order.key for wanted in orders.values() for order in wanted} | {o.key for _, o in relay})
            for pod, order in relay:
                self._push(pod, order, at)
            for pod, wanted in orders.items():
                link = self._links.get(pod)
                if link is None or link.feed.ended:
                    continue
                for order in wanted:
                    refusal = link.refused.get(order.key)
                    if refusal is not None and refusal[0] in _PASSING:
                        if at < refusal[1] + _AGAIN_MS:
                            again.append(refusal[1] + _AGAIN_MS)
                            continue
                        del link.refused[order.key]
                        link.sent.pop(order.key, None)
                    due = link.sent.get(order.key, at) + _LOST_MS
                    if order.key[0] in _SMALL and due <= at:
                        del link.sent[order.key]
                    elif order.key[0] in _SMALL:
                        again.append(due)
                    self._push(pod, order, at)
        return min(again, default=None)

    def _forget(self, open_now: set[Key]) -> None:
        """Drop what was asked about attempts that are over: a service runs for years."""

        def over(key: Key) -> bool:
            return key[1] != self._about and key not in open_now

        for link in self._links.values():
            for key in filter(over, list(link.sent)):
                del link.sent[key]
            for key in filter(over, list(link.refused)):
                del link.refused[key]
        self._commands = {number: asked for number, asked in self._commands.items() if not over(asked[1])}

    def _push(self, pod: str, order: Order, at: int) -> None:
        link = self._links[pod]
        if order.key in link.sent:
            return
        link.sent[order.key] = at
        number = next(self._numbers)
        self._commands[number] = (pod, order.key)
        message = WatchResponse()
        message.CopyFrom(order.make())
        message.command = number
        link.feed.push(message)

    def _relay_orders(self, roster: Roster, at: int, relay_all: bool) -> list[tuple[str, Order]]:
        """P-11: nonce, marks, delivery; for pods that are not live, and before Propose for those checked long ago."""
        present = {pod.id for pod in roster.pods if pod.id in self._links and not self._links[pod.id].feed.ended}
        found: list[tuple[str, Order]] = []
        for pod in sorted(present):
            link = self._links[pod]
            if link.live and link.relay is None and not (relay_all and at - link.relayed > _RELAY_MS):
                continue
            if link.relay is None:
                link.relay = _Relay()
                link.relayed = at
            if not link.relay.nonce:
                found.append((pod, _high_water(("nonce", link.boot.hex(), str(link.relayed)), nonce=NonceForm())))
                continue
            nonce = link.relay.nonce
            for other in sorted(present - {pod} - set(link.relay.marks)):
                key = ("mark", nonce.hex(), pod, str(link.relayed))
                found.append((other, _high_water(key, mark=MarkForm(nonce=nonce, asking=pod))))
            if len(link.relay.marks) >= roster.committee.quorum - 1:
                key = ("deliver", nonce.hex(), ",".join(sorted(link.relay.marks)), str(link.relayed))
                marks = [to_wire(link.relay.marks[other]) for other in sorted(link.relay.marks)]
                found.append((pod, _high_water(key, deliver=DeliverForm(marks=marks))))
        return found


def _high_water(
    key: Key, *, nonce: NonceForm | None = None, mark: MarkForm | None = None, deliver: DeliverForm | None = None
) -> Order:
    message = WatchResponse(high_water=HighWaterOrder(nonce=nonce, mark=mark, deliver=deliver))
    return Order(key, lambda: message)

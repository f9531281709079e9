"""The hospital's loop: watch the aggregator, take part, never give up on a lost connection.

Two threads: one holds the watch stream (the hospital counts as enrolled while it is open, also during hours of
training), the caller's own does all the work. What failed is tried again with growing waits; what was refused stays
refused until the aggregator's claim or the policy changes.
"""

import logging
import threading
from collections.abc import Callable
from functools import partial
from secrets import SystemRandom

from services.common.errors import Reason, ServiceError
from services.common.rpc.channel import Stream
from services.common.rpc.watch import Watch
from services.hospital_node import metrics
from services.hospital_node.client import AggregatorClient, Phase, RoundState, round_state
from services.hospital_node.participate import Participation
from services.hospital_node.ports import Consents, Progress
from wardround.round.v1 import round_pb2

_log = logging.getLogger(__name__)
_FIRST_WAIT, _LONGEST_WAIT = 0.2, 30.0
_TICK = 10.0  # seconds between two looks at the site's own documents
_RETRIED = frozenset(
    {
        Reason.UNREACHABLE,
        Reason.STORAGE,
        Reason.STALE_VERSION,
        Reason.WRONG_PHASE,
        Reason.BELOW_QUORUM,
        Reason.NOT_FOUND,
        Reason.BAD_DIGEST,
        Reason.INTERNAL,
    }
)
_DECLINED = frozenset({Reason.POLICY_REFUSES, Reason.BUDGET_EXHAUSTED})


class Latest:
    """The newest claim of the aggregator. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._state: RoundState | None = None
        self._version = 0

    def put(self, state: RoundState) -> None:
        """Take a newer claim."""
        with self._changed:
            self._state = state
            self._version += 1
            self._changed.notify_all()

    def wake(self) -> None:
        """Let the waiter look around, also one that only begins to wait after this."""
        with self._changed:
            self._version += 1
            self._changed.notify_all()

    def get(self) -> tuple[int, RoundState | None]:
        """(version, claim); the version grows with every claim and every `wake`."""
        with self._changed:
            return self._version, self._state

    def wait(self, seen: int, seconds: float) -> None:
        """Return when the version is no more `seen`, or after `seconds`."""
        with self._changed:
            if self._version == seen:
                self._changed.wait(seconds)


class Node:
    """One hospital at work until `stop` is called."""

    def __init__(
        self,
        participation: Participation,
        client: AggregatorClient,
        consents: Consents,
        report: Callable[[Progress], None],
    ) -> None:
        self._participation = participation
        self._client = client
        self._consents = consents
        self._report = report
        self._stop = threading.Event()
        self._latest = Latest()
        self._watched: tuple[bytes, ...] = ()  # the charters that the aggregator was told of
        self._watch = Watch(self._begin, self._heard, self._stop, metrics.connected)
        self._refused: tuple[RoundState, bytes, int] | None = None
        self._counted: tuple[tuple[bytes, int], Reason] | None = None
        self._declined: set[tuple[bytes, int]] = set()
        self._failed: set[tuple[bytes, int]] = set()

    def stop(self) -> None:
        """Let `run` end soon; safe in a signal handler (the condition's lock is re-entrant)."""
        self._stop.set()
        self._latest.wake()

    def look_again(self) -> None:
        """What this hospital's own people decided has changed: what was refused may be allowed now. From any thread."""
        self._latest.wake()

    def run(self) -> None:
        """Work until `stop` is called; every refusal and fault is handled here."""
        self._watch.start()
        wait = _FIRST_WAIT
        while not self._stop.is_set():
            version, state = self._latest.get()
            pause = _TICK
            decided: tuple[bytes, int] = (b"", 0)
            try:
                decided = self._decided()  # before the work: what is decided during it is looked at afterwards
                charters = tuple(self._consents.charters())
                if self._watched not in ((), charters):  # P-26: tell the aggregator which are pinned now
                    self._watch.redial()
                metrics.unpinned(state is not None and bool(state.study) and state.charter not in charters)
                metrics.halted(state is not None and self._participation.store.halted(state.study) is not None)
                if state is not None and self._is_news(state, decided):
                    self._participation.advance(state, partial(self._is_over, state))
                wait = _FIRST_WAIT
            except ServiceError as error:
                if error.reason in _RETRIED:
                    self._say("retrying", error)
                    pause, wait = SystemRandom().uniform(wait / 2, wait), min(2 * wait, _LONGEST_WAIT)
                elif state is None:
                    self._say("refused", error)
                else:
                    self._refuse(state, decided, error)
            except Exception:
                _log.exception("a fault of this program: the round is left alone until the aggregator's state changes")
                if state is not None:
                    self._refuse(state, decided, ServiceError(Reason.INTERNAL, "a fault of this program; see the log"))
            self._latest.wait(version, pause)
        self._client.close()
        self._watch.join()

    def _heard(self, answer: round_pb2.WatchRoundsResponse) -> None:
        self._latest.put(round_state(answer))

    def _begin(self) -> Stream[round_pb2.WatchRoundsResponse]:
        self._watched = tuple(self._consents.charters())
        return self._client.watch(self._watched)

    def _is_news(self, state: RoundState, decided: tuple[bytes, int]) -> bool:
        if (state.study, state.round) in self._failed:
            return False
        return self._refused != (state, *decided)

    def _decided(self) -> tuple[bytes, int]:
        """What the hospital's own people decide: the policy's digest, and how many alarms they acknowledged.

        The digest is empty while the policy on the disk cannot be used, so that a mended one is news.
        """
        acknowledgements = self._participation.store.acknowledgements()
        try:
            return self._consents.policy().digest, acknowledgements
        except ServiceError:
            return b"", acknowledgements

    def _is_over(self, state: RoundState) -> bool:
        """Whether work on the round of `state` has lost its purpose."""
        now = self._latest.get()[1]
        other = now is not None and (
            (now.study, now.round) != (state.study, state.round)
            or now.closed_round >= state.round
            or now.phase in (Phase.CLOSING, Phase.FINISHED)
        )
        return other or self._stop.is_set()

    def _refuse(self, state: RoundState, decided: tuple[bytes, int], error: ServiceError) -> None:
        """Say why, once; tell the aggregator only what cannot depend on patients' data (P-6)."""
        place = (state.study, state.round)
        self._refused = (state, *decided)
        if (place, error.reason) != self._counted:
            self._counted = place, error.reason
            metrics.refused(error.reason)
        metrics.halted(self._participation.store.halted(state.study) is not None)
        # While it works on images a fault may follow from them, and its moment tells how many were drawn.
        at_images = self._participation.progress.phase == "training"
        self._say("refused", error)
        if error.reason in metrics.DATA_REASONS:
            # A new draw on the same images would fail again, and its absence again: this round is left.
            self._failed.add(place)
        elif (error.reason in _DECLINED or (error.reason is Reason.INTERNAL and not at_images)) and (
            place not in self._declined
        ):
            self._decline(state, error.reason)

    def _decline(self, state: RoundState, reason: Reason) -> None:
        """Let the aggregator not wait until the deadline."""
        try:
            self._client.decline(state.study, state.round, reason)
            self._declined.add((state.study, state.round))
        except ServiceError as unsaid:
            _log.warning("the aggregator could not be told: %s", unsaid.detail)

    def _say(self, phase: str, error: ServiceError) -> None:
        _log.warning("%s: %s", phase, error.detail, extra={"reason": error.reason.value})
        progress = self._participation.progress
        progress.phase, progress.detail = phase, error.detail
        if error.reason in metrics.DATA_REASONS:
            progress.phase, progress.detail = "waiting", "this round is left; the log says why"
        self._report(progress)

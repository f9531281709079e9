"""Drives the rounds of the plan: ONE thread takes commands, decides, stores, then asks the pods what is open.

After every command and at every alarm it derives from the state what follows; so a process killed at any point goes
on where its log ends. Commands that wait together are stored in one transaction. Nobody is answered and nothing is
asked before the hard facts behind it are on the disk (`facts.SOFT` says which may wait).
"""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from services.aggregator import facts as f
from services.aggregator import metrics
from services.aggregator.committee import Committee
from services.aggregator.orders import orders
from services.aggregator.plan import Plan
from services.aggregator.round import Answer, Phase, State, Tick, alarms, decide, subject
from services.aggregator.study_run import StudyRun
from services.common.clock import Clock
from services.common.errors import Reason, ServiceError
from services.common.observe.process import LOOK, show_charters

_log = logging.getLogger(__name__)
_SOFT_MS = 50  # soft facts reach the disk within this even when nothing hard follows
_FAULT_SECONDS = 1.0
_TELL_SECONDS = 60.0


@dataclass(frozen=True)
class Snapshot:
    """The published state: everything in it that must be on the disk is there."""

    run: StudyRun
    state: State
    plan: Plan
    closed_round: int
    waiting: str
    connected: frozenset[str]  # pods, signing or not
    live: frozenset[str]  # pods that are connected and sign
    watching: frozenset[str]  # hospitals

    @property
    def around(self) -> tuple[object, ...]:
        """What may change while the state stays."""
        return self.run, self.plan, self.waiting, self.connected, self.live, self.watching


class Enrolment:
    """Which hospitals watch rounds now, and which charters they report. Thread-safe."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._lock = threading.Lock()
        self._watching: dict[object, tuple[str, tuple[bytes, ...]]] = {}

    def join(self, token: object, hospital: str, charters: tuple[bytes, ...]) -> None:
        """A hospital watches; `token` stands for this one stream."""
        with self._lock:
            self._watching[token] = (hospital, charters)
        self._changed()

    def leave(self, token: object) -> None:
        """That stream ended."""
        with self._lock:
            self._watching.pop(token, None)
        self._changed()

    def reports(self) -> dict[str, tuple[bytes, ...]]:
        """Charter digests that each watching hospital holds."""
        with self._lock:
            return dict(self._watching.values())


class Coordinator:
    """The thread. `tell` is for everybody else; watchers are told of every published change."""

    def __init__(self, run: StudyRun, plan: Plan, clock: Clock, next_run: Callable[[bytes], StudyRun]) -> None:
        """`run` may be of an older plan with an open round; `next_run` makes that of the plan once it is over."""
        self.run = run
        self._next_run = next_run
        self.committee = Committee(self.poke)
        self.enrolment = Enrolment(self.poke)
        self._plan = plan
        self._clock = clock
        self._condition = threading.Condition()
        self._queue: list[tuple[f.Fact | Answer, Future[None]]] = []
        self._poked = True
        self._stopping = False
        self._awake = 0
        self._held: set[tuple[str, int]] = set()
        self._held_of = b""  # the M that `_held` is about
        self._watchers: dict[object, Callable[[Snapshot], None]] = {}
        self._snapshot = self._look()
        self._tallied = b""  # the M whose tally was begun last: once for each
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="conclude")
        self._thread = threading.Thread(target=self._loop, name="coordinator", daemon=True)

    def start(self) -> None:
        """Begin; what was open before is asked again as pods dial."""
        self._awake = self.now()
        self.run.scrub()
        self._thread.start()
        LOOK.watch(self._show)

    def stop(self) -> None:
        """Store what is left and end."""
        LOOK.forget(self._show)
        with self._condition:
            self._stopping = True
            self._condition.notify()
        self._thread.join()
        self._pool.shutdown(wait=True, cancel_futures=True)

    @property
    def snapshot(self) -> Snapshot:
        """The newest published state."""
        return self._snapshot

    def now(self) -> int:
        """Unix milliseconds."""
        return self._clock.now_ms()

    def follow(self, plan: Plan) -> None:
        """Run `plan` from now on; an open round of another study ends first."""
        with self._condition:
            self._plan = plan
        self.poke()

    def poke(self) -> None:
        """Something outside the log changed (a pod dialled, say): look again."""
        with self._condition:
            self._poked = True
            self._condition.notify()

    def tell(self, *facts: f.Fact | Answer) -> None:
        """Hand in facts and wait until all stand. Raises the refusal of the first that does not (`round.decide`)."""
        futures: list[Future[None]] = [Future() for _ in facts]
        with self._condition:
            if self._stopping:
                raise ServiceError(Reason.UNREACHABLE, "the aggregator is stopping: try again in a moment")
            self._queue.extend(zip(facts, futures, strict=True))
            self._condition.notify()
        for future in futures:
            try:
                future.result(_TELL_SECONDS)
            except TimeoutError:
                raise ServiceError(Reason.UNREACHABLE, "the aggregator is busy: try again") from None

    def holds(self, manifest: bytes, pod: str, pieces: list[int]) -> None:
        """This pod's sums of these pieces lie on our disk."""
        with self._condition:
            if self._held_of != manifest:
                self._held, self._held_of = set(), manifest
            self._held.update((pod, piece) for piece in pieces)
            self._poked = True
            self._condition.notify()

    def watch(self, token: object, told: Callable[[Snapshot], None]) -> None:
        """Call `told` now and after every change, until `unwatch`; it must not block."""
        with self._condition:
            self._watchers[token] = told
            told(self._snapshot)

    def unwatch(self, token: object) -> None:
        """Stop telling."""
        with self._condition:
            self._watchers.pop(token, None)

    def _loop(self) -> None:
        alarm: int | None = None
        while True:
            with self._condition:
                if not (self._queue or self._poked or self._stopping):
                    wait = None if alarm is None else max(0.0, (alarm - self.now()) / 1000)
                    self._condition.wait(wait)
                batch, self._queue = self._queue, []
                idle = not (batch or self._poked)
                self._poked = False
                if self._stopping:
                    break
            try:
                alarm = self._turn(batch, flush=idle)
            except Exception:
                # A failing disk, or a fault of ours: what was decided and not stored is forgotten, and tried again.
                _log.exception("the coordinator could not go on; it starts again from the log")
                self.run.reload()
                self.committee.ask_again()
                for _, future in batch:
                    if not future.done():
                        future.set_exception(ServiceError(Reason.STORAGE, "not stored: try again in a moment"))
                alarm = self.now() + int(_FAULT_SECONDS * 1000)
        for _, future in batch:
            future.set_exception(ServiceError(Reason.UNREACHABLE, "the aggregator is stopping: try again in a moment"))
        self.run.store_facts()

    def _turn(self, batch: list[tuple[f.Fact | Answer, Future[None]]], flush: bool) -> int | None:
        done: list[tuple[Future[None], ServiceError | None]] = []
        hard = flush
        for fact, future in batch:
            try:
                hard |= self._apply(decide(self.run.state, self.run.rules, fact))
                done.append((future, None))
            except ServiceError as error:
                done.append((future, error))
        for _ in range(1000):  # every pass moves the state; the bound only guards against a fault of ours
            more = self._advance()
            if not more:
                break
            hard |= self._apply(more)
        if hard:
            self.run.store_facts()
        for future, refusal in done:
            if refusal is None:
                future.set_result(None)
            else:
                future.set_exception(refusal)
        again = self._publish()
        times = [time for time in alarms(self.run.state, self.run.rules, self._awake) if time > self.now()]
        if again is not None:
            times.append(again)
        if self.run.unstored:
            times.append(self.now() + _SOFT_MS)
        return min(times, default=None)

    def _apply(self, found: tuple[f.Fact, ...]) -> bool:
        """Fold facts in; whether one of them must be on the disk before anybody hears of it."""
        for fact in found:
            self.run.take(fact)
        return any(not isinstance(fact, f.SOFT) for fact in found)

    def _advance(self) -> tuple[f.Fact, ...]:
        """What follows now: from time and the pods' standing, or by our own hand (open, propose, conclude)."""
        run, at = self.run, self.now()
        able, lost = self.committee.standing(run.state)
        found = decide(run.state, run.rules, Tick(at, able, lost, self._awake))
        if found:
            return found
        if run.state.phase in (Phase.IDLE, Phase.FINISHED) and run.study.digest != self._plan.study.digest:
            run.store_facts()
            self.run = self._next_run(self._plan.study.digest)
            return ()
        if run.state.phase is Phase.IDLE:
            opened = run.open_round(
                self._plan, self.committee.reports(), self.committee.live(), self.enrolment.reports(), at
            )
            return () if opened is None else decide(run.state, run.rules, opened)
        if run.state.phase is Phase.TRAINING and at >= run.state.train_until:
            proposed = run.propose(self.committee.live(), at)
            return () if proposed is None else decide(run.state, run.rules, proposed)
        if run.state.phase is Phase.VERIFIED and self._tallied != run.state.M and self._all_held(run.state):
            self._tallied = run.state.M
            self._pool.submit(self._conclude, run.state)
        return ()

    def _all_held(self, state: State) -> bool:
        with self._condition:
            if not state.chosen:
                return True
            wanted = {(pod, piece) for piece, pod in enumerate(state.chosen)}
            return self._held_of == state.M and wanted <= self._held

    def _conclude(self, state: State) -> None:
        """In its own thread: a tally may take seconds, and the pods' answers must not wait for it."""
        try:
            with metrics.UNMASK_SECONDS.time():
                fact = self.run.conclude(state, self.now())
            self.tell(fact)
        except Exception as error:  # a failing disk, or a fault of ours: tried again
            _log.error("the round could not be concluded yet: %s", error, exc_info=not isinstance(error, ServiceError))
            threading.Event().wait(_FAULT_SECONDS)
            if self._tallied == state.M:
                self._tallied = b""
            self.poke()

    def _publish(self) -> int | None:
        run = self.run
        with self._condition:
            held = frozenset(self._held) if self._held_of == run.state.M else frozenset()
            before, now = self._snapshot, self._look()
            # The state is compared by identity: equality would walk every submission of every hospital.
            if before.state is not now.state or before.around != now.around:
                self._snapshot = now
                for told in list(self._watchers.values()):
                    told(self._snapshot)
        relay = run.state.phase in (Phase.IDLE, Phase.TRAINING)
        asked = orders(run.state, run.rules, run.study.digest, run.total_bytes, held, partial(run.offered, run.state))
        return self.committee.send(asked, subject(run.state).hex(), run.rules.roster, self.now(), relay)

    def _look(self) -> Snapshot:
        run, connected = self.run, frozenset(self.committee.reports())
        live, watching = self.committee.live(), frozenset(self.enrolment.reports())
        return Snapshot(run, run.state, self._plan, run.closed_round, run.waiting, connected, live, watching)

    def _show(self) -> None:
        """For scrapers, in their threads: from the published state."""
        shown = self._snapshot
        run, roster = shown.run, shown.run.rules.roster
        metrics.show_study(run.study, run.figures)
        metrics.show_state(shown.state)
        metrics.show_history(roster, shown.state, run.cohort, run.newest)
        show_charters(tuple(run.charters().values()))
        metrics.show_members(roster, run.charters(), self.committee.reports(), self.enrolment.reports())
        metrics.TARGET.set(shown.plan.target)
        metrics.COHORT_MINIMUM.set(run.rules.minimum)
        metrics.PODS_LIVE.set(len(shown.live))

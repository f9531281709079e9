"""What hospitals ask: rounds, studies, manifests, results, models (protocol.md §4 step 4)."""

from collections.abc import Callable, Iterator

import grpc

from services.aggregator import facts as f
from services.aggregator.coordinator import Coordinator, Snapshot
from services.aggregator.plan import adopted
from services.aggregator.round import Phase, State
from services.aggregator.store import Store
from services.aggregator.study_run import Link, StudyRun
from services.common.errors import Reason, ServiceError
from services.common.rpc.feed import Feed
from services.common.rpc.interceptor import peer
from services.common.rpc.signed import to_wire
from services.common.secagg.messages import ZERO_DIGEST
from wardround.model.v1 import model_pb2, model_pb2_grpc
from wardround.round.v1 import round_pb2, round_pb2_grpc

_BLOCK = 1 << 20
_MOST_LINKS = 200  # of a ListResults answer: a caller far behind asks again from the last one
_MOST_BYTES = 3 << 20
_PHASES = {
    Phase.IDLE: round_pb2.ROUND_PHASE_IDLE,
    Phase.TRAINING: round_pb2.ROUND_PHASE_TRAINING,
    Phase.PROPOSED: round_pb2.ROUND_PHASE_TRAINING,
    Phase.ENDORSING: round_pb2.ROUND_PHASE_TRAINING,
    Phase.COLLECTING: round_pb2.ROUND_PHASE_COLLECTING,
    Phase.FINISHED: round_pb2.ROUND_PHASE_FINISHED,
}
"""Every other phase is CLOSING: too late to submit."""


def view(snapshot: Snapshot, model_bytes: Callable[[bytes], int]) -> round_pb2.WatchRoundsResponse:
    """The state as hospitals see it; `model_bytes` gives the size of a model file."""
    run, state = snapshot.run, snapshot.state
    phase = _PHASES.get(state.phase, round_pb2.ROUND_PHASE_CLOSING)
    model = state.model or bytes.fromhex(run.study.document.model.initial)
    shown = round_pb2.WatchRoundsResponse(
        phase=phase,
        charter=state.charter or run.rules.roster.charter,
        study=run.study.digest,
        round=state.round,
        attempt=state.attempt,
        model=model,
        model_bytes=model_bytes(model),
        previous_result=state.previous_result or ZERO_DIGEST,
        closed_round=snapshot.closed_round,
    )
    if phase in (round_pb2.ROUND_PHASE_COLLECTING, round_pb2.ROUND_PHASE_CLOSING):
        shown.manifest = state.M
        shown.phase_ends = state.deadline
        if phase == round_pb2.ROUND_PHASE_COLLECTING:
            shown.endorsed.CopyFrom(_endorsed(state))
        return shown
    if phase == round_pb2.ROUND_PHASE_TRAINING:
        shown.phase_ends = state.train_until
    if run.links:
        shown.newest_result.CopyFrom(_linked(run.links[-1]))
        shown.newest_result_after = run.links[-2].round if len(run.links) > 1 else 0
    return shown


def _endorsed(state: State) -> round_pb2.GetManifestResponse:
    return round_pb2.GetManifestResponse(
        manifest=state.manifest,
        endorsements=[to_wire(state.endorsements[pod]) for pod in state.pods if pod in state.endorsements],
        abandons=state.abandoned,
    )


def _linked(link: Link) -> round_pb2.ResultLink:
    return round_pb2.ResultLink(
        result=to_wire(link.result),
        manifest=link.manifest,
        endorsements=[to_wire(endorsement) for endorsement in link.endorsements],
        certificate=link.certificate,
    )


class RoundCoordination(round_pb2_grpc.RoundCoordinationServiceServicer):
    """Every answer is from the published state: what a hospital acts on is on the disk."""

    def __init__(self, coordinator: Coordinator, store: Store, runs: "Runs") -> None:
        self._coordinator = coordinator
        self._store = store
        self._runs = runs
        self._sizes: dict[bytes, int] = {}
        self._shown: tuple[Snapshot, round_pb2.WatchRoundsResponse, bytes] | None = None

    def WatchRounds(  # noqa: N802, D102  # gRPC's names
        self, request: round_pb2.WatchRoundsRequest, context: grpc.ServicerContext
    ) -> Iterator[round_pb2.WatchRoundsResponse]:
        caller, feed = peer(context), Feed[round_pb2.WatchRoundsResponse](context)
        charters = tuple(digest for digest in request.charters[:4] if len(digest) == 32)
        coordinator = self._coordinator
        last: list[bytes] = []

        def told(snapshot: Snapshot) -> None:
            if last and snapshot.state.phase not in _PHASES and caller.id in snapshot.state.submissions:
                return  # whose update is here is asked for nothing before the round or the attempt is over
            if self._shown is None or self._shown[0] is not snapshot:  # one for all watchers
                viewed = view(snapshot, self._size)
                self._shown = snapshot, viewed, viewed.SerializeToString()
            _, shown, text = self._shown
            if last != [text]:
                last[:] = [text]
                feed.replace(shown)

        coordinator.watch(feed, told)
        coordinator.enrolment.join(feed, caller.id, charters)
        try:
            yield from feed
        finally:
            coordinator.enrolment.leave(feed)
            coordinator.unwatch(feed)

    def _size(self, model: bytes) -> int:
        if model not in self._sizes:
            if not self._store.blobs.has(model):  # an initial model that has not been pushed yet
                return 0
            self._sizes = {model: self._store.blobs.path(model).stat().st_size}
        return self._sizes[model]

    def GetStudy(  # noqa: N802, D102
        self, request: round_pb2.GetStudyRequest, context: grpc.ServicerContext
    ) -> round_pb2.GetStudyResponse:
        if request.digest not in adopted(self._store):
            raise ServiceError(Reason.NOT_FOUND, f"no study {request.digest.hex()[:16]}… ran or runs here")
        with self._store.blobs.open(request.digest) as file:
            return round_pb2.GetStudyResponse(study=file.read())

    def GetManifest(  # noqa: N802, D102
        self, request: round_pb2.GetManifestRequest, context: grpc.ServicerContext
    ) -> round_pb2.GetManifestResponse:
        snapshot = self._coordinator.snapshot
        state = snapshot.state
        open_now = state.phase not in (Phase.IDLE, Phase.FINISHED, Phase.TRAINING, Phase.PROPOSED, Phase.ENDORSING)
        if request.study != snapshot.run.study.digest or request.round != state.round or not open_now:
            raise ServiceError(Reason.WRONG_PHASE, f"round {request.round} has no endorsed manifest now: watch rounds")
        return _endorsed(state)

    def ListResults(  # noqa: N802, D102
        self, request: round_pb2.ListResultsRequest, context: grpc.ServicerContext
    ) -> round_pb2.ListResultsResponse:
        answer = round_pb2.ListResultsResponse()
        for link in self._runs.of(request.study).links:
            if link.round <= request.after_round:
                continue
            item = _linked(link)
            if len(answer.links) >= _MOST_LINKS or answer.ByteSize() + item.ByteSize() > _MOST_BYTES:
                break
            answer.links.append(item)
        return answer

    def DeclineRound(  # noqa: N802, D102
        self, request: round_pb2.DeclineRoundRequest, context: grpc.ServicerContext
    ) -> round_pb2.DeclineRoundResponse:
        snapshot = self._coordinator.snapshot
        if request.study == snapshot.run.study.digest and request.round == snapshot.state.round:
            reason = request.reason if request.reason in list(Reason) else Reason.INTERNAL.value
            self._coordinator.tell(f.Declined(self._coordinator.now(), peer(context).id, reason))
        return round_pb2.DeclineRoundResponse()

    def Greet(  # noqa: N802, D102
        self, request: round_pb2.GreetRequest, context: grpc.ServicerContext
    ) -> round_pb2.GreetResponse:
        held = self._coordinator.snapshot.run.charters().values()
        return round_pb2.GreetResponse(time_ms=self._coordinator.now(), charters=held)


class Runs:
    """The study in force from the coordinator, any other that ran here from its log."""

    def __init__(self, coordinator: Coordinator, make: Callable[[bytes], StudyRun], store: Store) -> None:
        self._coordinator = coordinator
        self._make = make
        self._store = store

    def of(self, study: bytes) -> StudyRun:
        """Raises NOT_FOUND for a study that never ran here."""
        run = self._coordinator.snapshot.run
        if run.study.digest == study:
            return run
        if study not in adopted(self._store):
            raise ServiceError(Reason.NOT_FOUND, f"study {study.hex()[:16]}… never ran here: check the digest")
        return self._make(study)


class ModelDistribution(model_pb2_grpc.ModelDistributionServiceServicer):
    """Model files by digest, resumable by offset."""

    def __init__(self, coordinator: Coordinator, store: Store) -> None:
        self._coordinator = coordinator
        self._store = store

    def FetchModel(  # noqa: N802, D102
        self, request: model_pb2.FetchModelRequest, context: grpc.ServicerContext
    ) -> Iterator[model_pb2.FetchModelResponse]:
        if request.digest not in self._coordinator.snapshot.run.models:
            raise ServiceError(Reason.NOT_FOUND, f"no model {request.digest.hex()[:16]}… of the study in force")
        with self._store.blobs.open(request.digest) as file:
            total = file.seek(0, 2)
            if request.offset > total:
                raise ServiceError(Reason.MALFORMED, f"offset {request.offset} is behind the end, byte {total}")
            file.seek(request.offset)
            first = True
            while (block := file.read(_BLOCK)) or first:
                yield model_pb2.FetchModelResponse(chunk=block, total=total if first else 0)
                first = False

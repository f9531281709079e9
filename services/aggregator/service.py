"""The aggregator put together: store, charters, plan, coordinator, servicers. `__main__` and tests start it here."""

from collections.abc import Iterator, Mapping
from typing import Self

from services.aggregator.administration import Administration, PlanServicer
from services.aggregator.charters import Charters
from services.aggregator.config import Config
from services.aggregator.coordinator import Coordinator
from services.aggregator.evidence import File, evidence
from services.aggregator.hospitals import ModelDistribution, RoundCoordination, Runs
from services.aggregator.plan import Plans, adopted, stored_study
from services.aggregator.pods import KeyShare
from services.aggregator.round import Phase
from services.aggregator.store import Store
from services.aggregator.study_run import Patience, StudyRun
from services.aggregator.submission import UpdateSubmission
from services.common.clock import Clock, SystemClock
from services.common.documents.site import load_signer
from services.common.errors import Reason, ServiceError
from services.common.ids import Role
from services.common.observe.http import Health
from services.common.observe.process import announce, certificate_now
from services.common.rpc.leaf import LeafFiles, check_own_leaf
from services.common.rpc.server import RunningServer, Servicer, serve
from services.common.store.durable import replace_file
from wardround.admin.v1.admin_pb2_grpc import (
    add_AdministrationServiceServicer_to_server,
    add_PlanServiceServicer_to_server,
)
from wardround.keyshare.v1.keyshare_pb2_grpc import add_KeyShareServiceServicer_to_server
from wardround.model.v1.model_pb2_grpc import add_ModelDistributionServiceServicer_to_server
from wardround.round.v1.round_pb2_grpc import add_RoundCoordinationServiceServicer_to_server
from wardround.submission.v1.submission_pb2_grpc import add_UpdateSubmissionServiceServicer_to_server

CONDITIONS = ("log", "certificate", "listener")
_SPARE_WORKERS = 32


class Aggregator:
    """The running service. Raises ServiceError when it cannot start; `stop` loses nothing."""

    def __init__(self, config: Config, health: Health, clock: Clock | None = None) -> None:
        self.config = config
        self._clock = clock or SystemClock()
        self.store = Store(config.state)
        try:
            self._start(health)
        except BaseException:
            self.store.close()
            raise

    def _start(self, health: Health) -> None:
        config = self.config
        self.charters = Charters(config, self.store.blobs)
        self._signer = load_signer(config.identity_key)
        pinned = self.charters.pinned.current
        if self._signer.public != pinned.roster.aggregator.key:
            raise ServiceError(
                Reason.INVALID_DOCUMENT, f"{config.identity_key} is not the charter's key of {config.id}"
            )
        leaf = LeafFiles(config.tls.certificate, config.tls.key)
        check_own_leaf(leaf, Role.AGGREGATOR, config.id, pinned, self._clock.now_ms())
        health.look("certificate", lambda: certificate_now(leaf.certificate, self._clock.now_ms()))
        self.plans = Plans(config, self.store, lambda: self.charters.pinned.current, health)
        plan = self.plans.adopt()
        run = self._unfinished(plan.study.digest) or self._run(plan.study.digest)
        self.coordinator = Coordinator(run, plan, self._clock, self._run)
        health.set("log", True, f"{run.study.document.name}: round {run.state.round}, {run.state.phase.value}")
        members = len(pinned.document.pods) + len(pinned.document.hospitals)
        announce(Role.AGGREGATOR.value, config.id, config.tls.certificate)
        self.coordinator.start()
        try:
            self.server: RunningServer = serve(
                self._servicers(),
                self.charters.members,
                (Role.AGGREGATOR, config.id),
                leaf,
                address=config.listen,
                max_workers=3 * members + _SPARE_WORKERS,
                clock=self._clock,
            )
        except BaseException:
            self.coordinator.stop()
            raise
        host = config.listen.rpartition(":")[0]
        replace_file(config.state / "listen.address", [f"{host}:{self.server.port}".encode()])
        health.set("listener", True, f"{host}:{self.server.port}")

    def stop(self, grace: float = 10) -> None:
        """Take no more calls, store what is left, give the folder back."""
        self.server.stop(grace)
        self.coordinator.stop()
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.stop(1)

    def _run(self, study: bytes) -> StudyRun:
        config = self.config
        patience = Patience(
            int(config.grace_seconds * 1000), int(config.patience_seconds * 1000), config.most_abandoned
        )
        return StudyRun(self.store, self.charters, self._signer, stored_study(self.store, study), patience)

    def _unfinished(self, planned: bytes) -> StudyRun | None:
        """The newest other study whose round is still open: it ends first (a rollout in mid-round loses nothing)."""
        for study in reversed(adopted(self.store)):
            if study == planned:
                continue
            run = self._run(study)
            return None if run.state.phase in (Phase.IDLE, Phase.FINISHED) else run
        return None

    def _pod_keys(self) -> Mapping[str, bytes]:
        return {pod.id: pod.key for pod in self.coordinator.run.rules.roster.pods}

    def _evidence(self, study: bytes) -> Iterator[File]:
        return evidence(self.store, self.charters, study)

    def _servicers(self) -> list[Servicer]:
        coordinator, store = self.coordinator, self.store
        runs = Runs(coordinator, self._run, store)
        admin = Administration(self.config.id, coordinator, store.studies, self._evidence, self.plans)
        return [
            (add_RoundCoordinationServiceServicer_to_server, RoundCoordination(coordinator, store, runs)),
            (add_ModelDistributionServiceServicer_to_server, ModelDistribution(coordinator, store)),
            (add_UpdateSubmissionServiceServicer_to_server, UpdateSubmission(coordinator, store, self._signer)),
            (add_KeyShareServiceServicer_to_server, KeyShare(coordinator, store, self._pod_keys)),
            (add_AdministrationServiceServicer_to_server, admin),
            (add_PlanServiceServicer_to_server, PlanServicer(coordinator, self.plans)),
        ]

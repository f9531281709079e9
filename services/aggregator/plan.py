"""The plan in force: which study runs, and through which round (architecture.md §1).

A bad plan is refused with its sentence and the old one keeps being served. `through_round` is a target: a restart
for any other reason opens nothing.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from services.aggregator import metrics
from services.aggregator.config import Config
from services.aggregator.store import Store
from services.aggregator.strategy import check_model_file
from services.common.documents.charter import LoadedCharter
from services.common.documents.shape import check_study, total_rounds
from services.common.documents.study import LoadedStudy, load_study
from services.common.errors import Reason, ServiceError
from services.common.observe.http import Health

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """A study that passed every check, and the round to run through."""

    study: LoadedStudy
    through_round: int

    @property
    def target(self) -> int:
        """The last round to open: a target at or beyond the study's training rounds includes the final evaluation."""
        rounds = self.study.document.rounds
        return total_rounds(self.study) if self.through_round >= rounds else self.through_round


def adopt(config: Config, store: Store, charter: LoadedCharter, health: Health) -> Plan | None:
    """The plan of the configuration, recorded; if it is refused, the newest adopted one, or None.

    Never raises for a bad plan: the refusal is in /readyz, a metric, the log and an event.
    """
    try:
        plan = _checked(config, store, charter)
    except ServiceError as error:
        _log.error("plan refused", extra={"reason": error.reason.value, "detail": error.detail})
        metrics.PLAN_REFUSED.set(1)
        health.note("plan", f"refused, the older one is served: {error.detail}")
        store.record_plan("Refused", {"detail": error.detail[:1000]})
        return _newest(store)
    metrics.PLAN_REFUSED.set(0)
    health.note("plan", None)
    before = _newest(store)
    if before is None or (before.study.digest, before.through_round) != (plan.study.digest, plan.through_round):
        store.record_plan("Adopted", {"study": plan.study.digest.hex(), "through_round": plan.through_round})
    return plan


def stored_study(store: Store, digest: bytes) -> LoadedStudy:
    """A study that was adopted here once. Raises NOT_FOUND."""
    with store.blobs.open(digest) as file:
        return load_study(file.read())


def adopted(store: Store) -> list[bytes]:
    """Digests of all studies ever adopted, oldest first."""
    return [bytes.fromhex(event.payload["study"]) for event in store.plans() if event.kind == "Adopted"]


def _newest(store: Store) -> Plan | None:
    for event in reversed(store.plans()):
        if event.kind == "Adopted":
            study = stored_study(store, bytes.fromhex(event.payload["study"]))
            return Plan(study, int(event.payload["through_round"]))
    return None


def _checked(config: Config, store: Store, charter: LoadedCharter) -> Plan:
    study = load_study(_read(config.study, "study"), config.study.name)
    check_study(charter, study)
    initial = bytes.fromhex(study.document.model.initial)
    if not store.blobs.has(initial):
        try:
            with config.initial_model.open("rb") as file:
                store.blobs.write(iter(lambda: file.read(1 << 20), b""), initial)
        except OSError as error:
            raise _refused(f"cannot read the initial model {config.initial_model} ({error.strerror})") from error
        except ServiceError as error:
            raise _refused(f"{config.initial_model} is not the study's initial model: {error.detail}") from error
    check_model_file(store.blobs.path(initial), study.document.model.parameters)
    if not store.blobs.has(study.digest):
        store.blobs.write([study.blob], study.digest)
    return Plan(study, config.through_round)


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _refused(f"cannot read the {what} {path} ({error.strerror})") from error


def _refused(detail: str) -> ServiceError:
    return ServiceError(Reason.INVALID_DOCUMENT, detail)

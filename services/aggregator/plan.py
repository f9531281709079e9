"""The plan in force: which study runs, and through which round (architecture.md §1).

A bad plan is refused with its sentence and the old one keeps being served; so is a study whose initial model has not
arrived yet. `through_round` is a target: a restart for any other reason opens nothing.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from services.aggregator import metrics
from services.aggregator.config import Config
from services.aggregator.modelfile import check_model_file
from services.aggregator.store import Store
from services.common.documents.charter import LoadedCharter
from services.common.documents.shape import check_study, total_rounds
from services.common.documents.strategies import HEADER_ROOM
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

    @property
    def initial(self) -> bytes:
        """SHA-256 of the model that round 1 starts from."""
        return bytes.fromhex(self.study.document.model.initial)


class Plans:
    """The plan of the configuration against the ones that were adopted before. Thread-safe.

    `note` is what a person must know about it ("" where all is well); the same sentence stands in /readyz.
    """

    def __init__(self, config: Config, store: Store, charter: Callable[[], LoadedCharter], health: Health) -> None:
        """`charter` gives the pinned current one."""
        self.note = ""
        self._config = config
        self._store = store
        self._charter = charter
        self._health = health
        self._lock = threading.Lock()
        self._pending: LoadedStudy | None = None

    def adopt(self) -> Plan:
        """The plan to serve from now on, recorded: the configuration's, else the newest adopted one.

        Raises the refusal of a bad plan only where there is no older one to serve.
        """
        with self._lock:
            before = self._newest()
            try:
                plan = self._checked()
            except ServiceError as error:
                return self._refused(error, before)
            metrics.PLAN_REFUSED.set(0)
            self._pending, note = None, ""
            waits = not self._store.blobs.has(plan.initial)
            metrics.PLAN_WAITS.set(waits)
            if waits:
                note = f"study {plan.study.document.name} is {waiting_for(plan.initial)}"
                if before is not None and before.study.digest != plan.study.digest:
                    self._pending = plan.study
                    self._say(f"{note}; until then {before.study.document.name} is served")
                    return before
            self._say(note)
            if before != plan:
                payload: dict[str, str | int] = {"study": plan.study.digest.hex(), "through_round": plan.through_round}
                self._store.record_plan("Adopted", payload)
            return plan

    def receive(self, digest: bytes, size: int, chunks: Iterable[bytes]) -> str:
        """Take an initial model that a known plan names, in constant memory; what happened, in a sentence.

        Raises NOT_PERMITTED for any other digest, TOO_LARGE, MALFORMED, BAD_DIGEST, INVALID_DATA or STORAGE; then
        nothing is kept.
        """
        study = self._naming(digest)
        parameters, blobs = study.document.model.parameters, self._store.blobs
        if blobs.has(digest):
            return f"the initial model of study {study.document.name} was here already"
        if size > 4 * parameters + HEADER_ROOM:
            raise ServiceError(
                Reason.TOO_LARGE,
                f"a file of {size} bytes is no model of {parameters} parameters, as study {study.document.name} has: "
                "push the v0.safetensors that `wardround study draft` wrote beside it",
            )
        blobs.write(_exactly(chunks, size), digest)
        try:
            check_model_file(blobs.path(digest), parameters)
        except ServiceError:
            blobs.delete(digest)
            raise
        return f"the initial model of study {study.document.name} is here"

    def _naming(self, digest: bytes) -> LoadedStudy:
        studies = [self._pending] if self._pending is not None else []
        studies += [stored_study(self._store, known) for known in adopted(self._store)]
        for study in studies:
            if bytes.fromhex(study.document.model.initial) == digest:
                return study
        wanted = ", ".join(sorted({study.document.model.initial for study in studies})) or "none"
        raise ServiceError(
            Reason.NOT_PERMITTED,
            f"no plan here names a model {digest.hex()} (known: {wanted}): roll out its study first, or push that file",
        )

    def _refused(self, error: ServiceError, before: Plan | None) -> Plan:
        _log.error("plan refused", extra={"reason": error.reason.value, "detail": error.detail})
        metrics.PLAN_REFUSED.set(1)
        event: tuple[str, dict[str, str | int]] = ("Refused", {"detail": error.detail[:1000]})
        last = self._store.plans()[-1:]
        if [(one.kind, one.payload) for one in last] != [event]:  # not once more at every restart
            self._store.record_plan(*event)
        if before is None:
            raise ServiceError(error.reason, f"there is no plan to serve: {error.detail}")
        self._pending = None
        metrics.PLAN_WAITS.set(not self._store.blobs.has(before.initial))
        self._say(f"the plan is refused, {before.study.document.name} is served on: {error.detail}")
        return before

    def _say(self, note: str) -> None:
        self.note = note
        self._health.note("plan", note or None)

    def _newest(self) -> Plan | None:
        for event in reversed(self._store.plans()):
            if event.kind == "Adopted":
                study = stored_study(self._store, bytes.fromhex(event.payload["study"]))
                return Plan(study, int(event.payload["through_round"]))
        return None

    def _checked(self) -> Plan:
        config, blobs = self._config, self._store.blobs
        study = load_study(_read(config.study), config.study.name)
        check_study(self._charter(), study)
        plan = Plan(study, config.target())
        if config.initial_model is not None and not blobs.has(plan.initial):
            _import(config.initial_model, plan.initial, self._store)
        if blobs.has(plan.initial):
            check_model_file(blobs.path(plan.initial), study.document.model.parameters)
        if not blobs.has(study.digest):
            blobs.write([study.blob], study.digest)
        return plan


def waiting_for(model: bytes) -> str:
    """What an operator must do before the first round of a study can open."""
    return f"waiting for the model {model.hex()}: run wardround model push"


def stored_study(store: Store, digest: bytes) -> LoadedStudy:
    """A study that was adopted here once. Raises NOT_FOUND."""
    with store.blobs.open(digest) as file:
        return load_study(file.read())


def adopted(store: Store) -> list[bytes]:
    """Digests of all studies ever adopted, oldest first."""
    return [bytes.fromhex(event.payload["study"]) for event in store.plans() if event.kind == "Adopted"]


def _exactly(chunks: Iterable[bytes], size: int) -> Iterator[bytes]:
    """The chunks, which must have `size` bytes in all: a claim is checked before anything more is written."""
    came = 0
    for chunk in chunks:
        came += len(chunk)
        if came > size:
            break
        yield chunk
    if came != size:
        raise ServiceError(
            Reason.MALFORMED, f"{came} bytes came and {size} were announced: nothing is kept, push it again"
        )


def _import(path: Path, initial: bytes, store: Store) -> None:
    try:
        with path.open("rb") as file:
            store.blobs.write(iter(lambda: file.read(1 << 20), b""), initial)
    except OSError as error:
        raise _bad(f"cannot read the initial model {path} ({error.strerror}): correct `initial_model`") from error
    except ServiceError as error:
        raise _bad(f"{path} is not the study's initial model: {error.detail}") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _bad(f"cannot read the study {path} ({error.strerror}): correct `study`") from error


def _bad(detail: str) -> ServiceError:
    return ServiceError(Reason.INVALID_DOCUMENT, detail)

"""The rounds of a study over virtual hospitals: train, release, sum, judge, step, as the services do it.

Hospital by hospital: what is kept of one is its part of the running sum. Every draw of samples, masks and noise is the
operating system's, as at a site; only a partition has a seed. Not here: transport, signatures, ledgers, policies.
"""

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from services.aggregator import gate
from services.aggregator.conclude import released_figures
from services.aggregator.next_model import next_control
from services.aggregator.strategy import Scalars, server_step
from services.aggregator.tally import SumCheck, class_sums
from services.common.documents.charter import LoadedCharter
from services.common.documents.shape import RoundShape, round_shape, total_rounds
from services.common.documents.strategies import has_control
from services.common.documents.study import LoadedStudy
from services.common.errors import Reason, ServiceError
from services.common.secagg.ring import CHUNK_BYTES, I64
from services.hospital_node.control import control_change, sent_change
from services.hospital_node.dataset import Dataset, Split
from services.hospital_node.evaluation import Counts, evaluate
from services.hospital_node.inputs import Inputs
from services.hospital_node.release import Keys, encode_round
from services.hospital_node.training import Compute, Task, clipped_gradient_sum, train_round
from services.simulation.consortium import COMMITTEE
from services.simulation.pool import Cohort
from services.simulation.sums import MaskedSum, PlainSum, Sum

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


def fresh_key() -> bytes:
    """32 fresh bytes of the operating system (P-8)."""
    return secrets.token_bytes(32)


@dataclass(frozen=True)
class Model:
    """A model between two rounds (d), and what the server keeps beside it (slots, d)."""

    vector: F32 = field(repr=False)
    version: int = 0
    scalars: Scalars = field(default_factory=Scalars)
    kept: F64 = field(default_factory=lambda: np.zeros(0), repr=False)


@dataclass(frozen=True)
class Round:
    """One round. `figures` are those released of the model that it started from, noise included.

    `absent`: hospitals whose training failed, so that they sent nothing.
    """

    number: int
    kind: str
    verdict: str
    reason: str
    cohort: int
    absent: tuple[str, ...]
    figures: dict[str, float]
    started_from: int
    version: int
    seconds: float


class Controls:
    """SCAFFOLD's control variates: the server's c, and of every hospital c_i and what it sent, on the disk.

    A hospital whose training failed has sent nothing, and its c_i stays.
    """

    def __init__(self, scratch: Path, hospitals: int, parameters: int) -> None:
        self.server: F32 = np.zeros(parameters, np.float32)
        shape = (hospitals, parameters)
        self._own = np.memmap(scratch / "controls", np.float32, "w+", shape=shape)
        self.sent = np.memmap(scratch / "changes", np.float64, "w+", shape=shape)

    def correction(self, hospital: int) -> F64:
        """c - c_i (d)."""
        return self.server.astype(np.float64) - np.asarray(self._own[hospital], np.float64)

    def move(self, sums: I64, fraction_bits: int) -> None:
        """The round counts: c and every c_i take what was sent. Raises NOT_FINITE."""
        hospitals = len(self._own)
        self.server = next_control(self.server, sums, fraction_bits, hospitals)
        for hospital in range(hospitals):
            self._own[hospital] += self.sent[hospital].astype(np.float32)

    def begin(self) -> None:
        """A new round: nobody has sent anything."""
        self.sent[:] = 0


class Rounds:
    """A study under way. `tell(round, hospitals done)` is called after every hospital."""

    def __init__(
        self,
        charter: LoadedCharter,
        study: LoadedStudy,
        cohort: Cohort,
        start: F32,
        scratch: Path,
        *,
        masks: bool,
        compute: Compute,
        keys: Keys = fresh_key,
        tell: Callable[[int, int], None] = lambda number, done: None,
    ) -> None:
        self._charter, self._study, self._cohort = charter, study, cohort
        self._sum_file = scratch / "sum"
        self._masks, self._compute, self._keys, self._tell = masks, compute, keys, tell
        self.model = Model(start)
        self._gated: tuple[float, Model] | None = None
        self._newest = 0
        self._controls = Controls(scratch, len(cohort.names), start.size) if has_control(study.document) else None

    def run(self) -> list[Round]:
        """All rounds. Raises BELOW_COHORT where too few trainings succeed, INVALID_DATA."""
        return [self._round(number) for number in range(1, total_rounds(self._study) + 1)]

    def _round(self, number: int) -> Round:
        began, before = time.monotonic(), self.model.version
        shape = round_shape(self._charter, self._study, number)
        absent = self._sum(shape)
        members = len(self._cohort.names) - len(absent)
        verdict, reason, figures = self._conclude(shape, members)
        return Round(
            number, shape.kind, verdict, reason, members, tuple(absent), figures, before, self.model.version,
            time.monotonic() - began,
        )  # fmt: skip

    def _sum(self, shape: RoundShape) -> list[str]:
        """Write the sum of all hospitals to its file; the hospitals that are not in it."""
        total: Sum = MaskedSum(shape.table, COMMITTEE) if self._masks else PlainSum(shape.table)
        absent = []
        if self._controls is not None:
            self._controls.begin()
        for index, name in enumerate(self._cohort.names):
            try:
                total.add(name, self._vector(shape, index))
            except ServiceError as error:
                if error.reason is not Reason.NOT_FINITE:
                    raise
                absent.append(name)
            self._tell(shape.number, index + 1)
        members = len(self._cohort.names) - len(absent)
        if members < shape.minimum_cohort:
            raise ServiceError(
                Reason.BELOW_COHORT,
                f"round {shape.number}: the training of {len(absent)} of {len(self._cohort.names)} hospitals failed, "
                f"the study needs {shape.minimum_cohort} in a sum: lower training.learning_rate",
            )
        self._sum_file.write_bytes(total.close())
        return absent

    def _conclude(self, shape: RoundShape, members: int) -> tuple[str, str, dict[str, float]]:
        """(verdict, its reason, figures); the model becomes what the next round starts from."""
        document, table = self._study.document, shape.table
        check = SumCheck(table, members)
        with self._sum_file.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                check.add(chunk)
        if shape.kind == "train" and document.privacy.mechanism != "shared":
            check.check_norm("parameter", document.encoding.update_clip)
        if check.fault:
            return "rejected", check.fault, {}
        figures, _ = released_figures(table, self._study, self._sum_file)
        figure = figures.get(document.gate.metric) if shape.has_gate else None
        passed = self._gated[0] if self._gated is not None else None
        verdict = gate.judge(figure, passed, document.gate.largest_drop, document.gate.metric)
        if not verdict.keep and self._gated is not None:
            self.model = self._gated[1]
            return "rolled back", verdict.reason, figures
        if figure is not None:
            self._gated = figure, self.model
        if shape.kind == "train":
            try:
                self.model = self._step(shape, members)
            except ServiceError as error:
                if error.reason is not Reason.NOT_FINITE:
                    raise
                return "rejected", error.detail, figures
        return "accepted", "", figures

    def _step(self, shape: RoundShape, members: int) -> Model:
        before, lane = self.model, shape.table.lane_class("parameter")
        step = server_step(self._study.document, shape.number, members, lane.fraction_bits, before.scalars)
        kept = before.kept.copy() if before.kept.size else np.zeros((step.slots, lane.values))
        vector = step.run(before.vector, kept, class_sums(shape.table, "parameter", self._sum_file))
        if self._controls is not None:
            sums = class_sums(shape.table, "control", self._sum_file)
            self._controls.move(sums, shape.table.lane_class("control").fraction_bits)
        self._newest += 1
        return Model(vector, self._newest, step.scalars, kept)

    def _vector(self, shape: RoundShape, hospital: int) -> bytes:
        """What one hospital releases in this round, packed: trained or summed, evaluated, clipped, rounded, noised.

        Raises NOT_FINITE for a training that failed.
        """
        study, (dataset, inputs) = self._study.document, self._cohort.open(hospital)
        update = self._update(shape, hospital, dataset, inputs) if shape.kind == "train" else None
        counts: Counts | None = None
        if shape.has_gate or shape.kind == "final":
            split: Split = "test" if shape.kind == "final" else "validation"
            counts = evaluate(self.model.vector, dataset, split, study, self._compute, inputs)
        x = b"".join(chunk for chunk, _ in encode_round(study, shape, update, counts, self._keys))
        if self._controls is not None and shape.kind == "train":
            first, end = (lane * shape.table.ring.lane_bytes for lane in shape.table.lane_range("control"))
            self._controls.sent[hospital] = sent_change(shape.table, x[first:end])
        return x

    def _update(self, shape: RoundShape, hospital: int, dataset: Dataset, inputs: Inputs) -> F64:
        study, vector = self._study.document, self.model.vector
        if study.privacy.mechanism == "shared":
            return clipped_gradient_sum(vector, dataset, study, keys=self._keys, compute=self._compute, inputs=inputs)
        task = Task(self._study.digest, shape.number, bytes(32))  # names a checkpoint, and none is kept here
        result = train_round(
            vector, dataset, study, task,
            progress=None, keys=self._keys, should_stop=lambda: False, compute=self._compute, inputs=inputs,
            correction=self._controls.correction(hospital) if self._controls is not None else None,
        )  # fmt: skip
        assert result is not None  # noqa: S101  # nobody stops it
        if self._controls is None:
            return result.delta
        return np.stack([result.delta, control_change(self._controls.server, result.delta, study)])

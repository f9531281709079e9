"""A scratch consortium for the audit: real documents, sampler, clip, noise and ring over invented patients.

Nothing here touches a site's data, identity or ledger. A hospital's patients are rows of features; the attacker of
every meter knows all of them, the model and the study, and misses only noise, sampling and the canary's coin.
"""

import datetime
import math
import secrets
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from services.cli.federation import committee_of, make_sites, write_charter
from services.common.documents.charter import LoadedCharter
from services.common.documents.costs import Noise, study_epsilon, training_noise
from services.common.documents.emit import emit
from services.common.documents.shape import RoundShape, check_study, round_shape
from services.common.documents.study import (
    BackboneSection,
    CohortSection,
    EvaluationSection,
    LoadedStudy,
    ModelSection,
    PrivacySection,
    ServerSection,
    Study,
    TimingSection,
    TrainingSection,
    load_study,
)
from services.common.dp.accounting import Event, calibrate, epsilon
from services.common.dp.noise import effective_multiplier, integer_sum
from services.common.errors import Reason, ServiceError
from services.common.secagg.encoding import decode_class, encode_vector
from services.common.secagg.masking import mask_vector, sum_streams
from services.common.secagg.ring import RingSum, chunk_lengths
from services.hospital_node.architectures import build
from services.hospital_node.dataset import Dataset, Fold
from services.hospital_node.evaluation import Counts, count
from services.hospital_node.gradients import clipped_sums, gradients
from services.hospital_node.inputs import FeatureInputs
from services.hospital_node.models import layout, size
from services.hospital_node.release import encode_round

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
Features = npt.NDArray[np.float32]

DELTA = 1e-5
FEATURES = 1280  # of efficientnet-lite0, whose head this is
_NOBODY = np.empty((0, FEATURES), np.float32)


def os_keys() -> bytes:
    """32 fresh bytes of the operating system, as at a hospital."""
    return secrets.token_bytes(32)


@dataclass(frozen=True)
class Consortium:
    """A charter and a study that pass every check, and what one release of it claims."""

    charter: LoadedCharter
    study: LoadedStudy
    hospitals: tuple[str, ...]

    @property
    def document(self) -> Study:
        """The study."""
        return self.study.document

    @cached_property
    def train(self) -> RoundShape:
        """A training round, with a gate."""
        return round_shape(self.charter, self.study, 1)

    @cached_property
    def final(self) -> RoundShape:
        """The final evaluation."""
        return round_shape(self.charter, self.study, 2)

    @cached_property
    def noise(self) -> Noise:
        """Of one training release, one hospital's part."""
        return training_noise(self.document)

    def claim(self, shares: int) -> float:
        """ε of ONE training release, by the accountant, with `shares` hospitals' noise between it and the observer."""
        multiplier = effective_multiplier((self.noise.scale,) * shares, self.noise.sensitivity)
        return epsilon([Event(self.document.privacy.sampling_rate, multiplier)], DELTA)


@dataclass
class Patients:
    """Invented patients of one hospital: features (images, FEATURES), labels (images), and whose images they are."""

    features: Features
    labels: I64
    images: tuple[I64, ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.images:
            self.images = tuple(np.array([row]) for row in range(len(self.labels)))

    def with_one(self, features: Features, labels: I64) -> "Patients":
        """The same and one patient more, who has these images."""
        rows = np.arange(len(self.labels), len(self.labels) + len(labels))
        joined = np.concatenate([self.features, features]).astype(np.float32, copy=False)
        return Patients(joined, np.concatenate([self.labels, labels]), (*self.images, rows))


class Hospital:
    """One hospital's part of a round, as its node computes it."""

    def __init__(self, consortium: Consortium, patients: Patients, keys: Callable[[], bytes] = os_keys) -> None:
        self.consortium = consortium
        study = consortium.document
        empty = Fold((), (), np.empty(0, np.int64))
        truth = np.array([patients.labels[rows[0]] for rows in patients.images], np.int64)
        fold = Fold(patients.images, patients.images, truth)
        self.dataset = Dataset(
            Path(), Path(), study.model.classes, study.model.image_size, "patient", (), patients.labels,
            {"train": fold, "validation": fold, "test": empty},
        )  # fmt: skip
        self.inputs = FeatureInputs(patients.features, torch.device("cpu"))
        module = build_zero(study)
        self._sums = clipped_sums(module, self.inputs, self.dataset, study, keys)
        self._steps = (
            gradients(module, self.inputs, self.dataset, study, keys)[0] if study.privacy.mechanism == "local" else None
        )

    def clipped_sum(self) -> F64:
        """Sample, clip, add up: the site's own sum, (d) float64, no noise yet."""
        return self._sums()[0]

    def integers(self, total: F64) -> I64:
        """`total` as it stands before the noise, (d)."""
        bits, noise = self.consortium.document.privacy.scale_bits, self.consortium.noise
        if self.consortium.document.privacy.mechanism == "local":
            return integer_sum(total, bits)
        return integer_sum(total, bits, noise.room(self.consortium.train.table.lane_class("parameter").bound))

    def bare_vector(self, total: F64) -> bytes:
        """A planted fault: x as `vector` makes it, with no noise in the parameter lanes."""
        shape = self.consortium.train
        zeros = {lane.name: np.zeros(lane.values, np.int64) for lane in shape.table.lanes if lane.name != "sentinel"}
        return b"".join(encode_vector(shape.table, {**zeros, "parameter": self.integers(total)}, bytes, noised=True))

    def local_step(self) -> I64:
        """`local`: the integers of one noised step, (d), before they become floats again."""
        if self._steps is None:
            raise ServiceError(Reason.INTERNAL, "only under local does a hospital noise its own steps")
        privacy = self.consortium.document.privacy
        # 2**bits and an expected batch of 1 are powers of two, so nothing is lost on the way.
        return np.rint(np.ldexp(self._steps()[0], privacy.scale_bits) * privacy.expected_batch).astype(np.int64)

    def vector(self, total: F64, keys: Callable[[], bytes] = os_keys, study: Study | None = None) -> bytes:
        """x of a training round: `total` and the gate's counts, noised. `study`: another one, to plant a fault."""
        shape = self.consortium.train
        return _whole(encode_round(study or self.consortium.document, shape, total, self.counts, keys))

    def final_vector(self, keys: Callable[[], bytes] = os_keys, study: Study | None = None) -> bytes:
        """x of the final evaluation."""
        return _whole(encode_round(study or self.consortium.document, self.consortium.final, None, self.counts, keys))

    @cached_property
    def counts(self) -> Counts:
        """Exact counts of the untrained model, under which every class is as likely."""
        study, labels = self.consortium.document, self.dataset.fold("validation").labels
        even = np.full((len(labels), len(study.model.classes)), 1 / len(study.model.classes))
        return count(even, labels, study.evaluation.histogram_bins)


def build_zero(study: Study) -> torch.nn.Module:
    """The study's head with all weights zero: v0."""
    module = build(study.model)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    return module


def open_sum(shape: RoundShape, vectors: Sequence[bytes], *, masked: bool = False) -> dict[str, I64]:
    """The sum of the hospitals' vectors by class of lanes, through the ring; `masked`: with masks put on and off."""
    table = shape.table
    total = RingSum(table.ring, table.total_bytes)
    for vector in vectors:
        if not masked:
            total.add(vector)
            continue
        streams = [os_keys() for _ in range(3)]
        total.add(b"".join(mask_vector(_reader(vector), table.total_bytes, table.ring, streams, bytes)))
        chunks = len(chunk_lengths(table.total_bytes))
        total.subtract(b"".join(sum_streams(streams, table.ring, table.total_bytes, 0, chunks, bytes)))
    packed, opened, lane_bytes = total.result(), {}, table.ring.lane_bytes
    for lane in table.lanes:
        first, end = table.lane_range(lane.name)
        opened[lane.name] = decode_class(table, lane.name, packed[first * lane_bytes : end * lane_bytes])
    return opened


def _whole(chunks: Iterable[tuple[bytes, bytes]]) -> bytes:
    return b"".join(chunk for chunk, _ in chunks)


def _reader(packed: bytes) -> Callable[[int, memoryview], None]:
    view = memoryview(packed)

    def fill(start: int, out: memoryview) -> None:
        out[:] = view[start : start + len(out)]

    return fill


def make_consortium(
    *,
    mechanism: str = "shared",
    hospitals: int = 4,
    minimum: int = 3,
    colluding: int = 1,
    classes: int = 7,
    epsilon_of_one: float = 3.0,
    noise_multiplier: float | None = None,
    sampling_rate: float = 1.0,
) -> Consortium:
    """A demo charter and a study of ONE release at `epsilon_of_one` (δ = 1e-5), or at this `noise_multiplier`."""
    names = [f"ward-{number + 1}" for number in range(hospitals)]
    with tempfile.TemporaryDirectory() as folder:
        sites = make_sites(Path(folder), names, 4)
        charter = write_charter(Path(folder), sites, committee_of(4, 2), minimum, colluding)
    study = load_study(
        emit(
            _study(
                mechanism=mechanism,
                patients=dict.fromkeys(names, 1000),
                cohort=CohortSection(minimum=minimum, colluding_hospitals=colluding),
                model=_model(classes),
                noise_multiplier=noise_multiplier or calibrate(epsilon_of_one, DELTA, sampling_rate, 1),
                sampling_rate=sampling_rate,
            )
        )
    )
    check_study(charter, study)
    return Consortium(charter, study, tuple(names))


def with_privacy(consortium: Consortium, **changes: float) -> Study:
    """The study with other privacy settings, as a hospital would have it whose node does not do what is claimed."""
    document = consortium.document
    return document.model_copy(update={"privacy": document.privacy.model_copy(update=changes)})


def without_claim(consortium: Consortium, **changes: float) -> Consortium:
    """The same consortium over `with_privacy`; its noise and claims are no longer the charter's."""
    return replace(consortium, study=replace(consortium.study, document=with_privacy(consortium, **changes)))


def random_patients(generator: np.random.Generator, count_: int, classes: int) -> Patients:
    """Invented patients with one image each: features of length 1 in random directions."""
    features = generator.normal(size=(count_, FEATURES)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return Patients(features, generator.integers(0, classes, count_))


def _model(classes: int) -> ModelSection:
    model = ModelSection(
        architecture="linear-head",
        image_size=128,
        classes=tuple(f"class-{number + 1}" for number in range(classes)),
        parameters=1,
        initial="0" * 64,
        backbone=BackboneSection(name="efficientnet-lite0", sha256="0" * 64),
    )
    return model.model_copy(update={"parameters": size(layout(build(model)))})


def _study(
    *,
    mechanism: str,
    patients: dict[str, int],
    cohort: CohortSection,
    model: ModelSection,
    noise_multiplier: float,
    sampling_rate: float,
) -> Study:
    shared = mechanism == "shared"
    bits = math.ceil(math.log2(256 * math.sqrt(model.parameters)))
    study = Study(
        wardround="study/v1",
        name="audit",
        purpose="To measure on invented patients what the noise of this program really is.",
        expires=datetime.datetime.now(datetime.UTC).date() + datetime.timedelta(days=1),
        rounds=1,
        synthetic=True,
        model=model,
        privacy=PrivacySection(
            mechanism="shared" if shared else "local",
            epsilon=100.0,
            delta=DELTA,
            patients=patients,
            noise_multiplier=noise_multiplier,
            sampling_rate=sampling_rate,
            scale_bits=bits,
        ),
        training=TrainingSection(learning_rate=None if shared else 1.0),
        evaluation=EvaluationSection(gate_rounds=(1,), gate_noise_multiplier=4.0, final_noise_multiplier=4.0),
        server=ServerSection(strategy="sgd" if shared else "fedavg"),
        cohort=cohort,
        timing=TimingSection(train_seconds=1, submit_seconds=60, attempt_seconds=120),
    )
    claimed = max(study_epsilon(study).values())
    return study.model_copy(update={"privacy": study.privacy.model_copy(update={"epsilon": claimed})})

"""The study: one training programme, what an ethics board approves (architecture.md §1).

A YAML file whose EXACT bytes are hashed. Everything that changes privacy or the model is here; how far
to run is the plan's.
"""

import datetime
import hashlib
import itertools
from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field

from services.common.documents.strict import Document, Section, hex_bytes, load, refuse
from services.common.errors import ServiceError
from services.common.ids import check_id


class BackboneSection(Section):
    """A frozen public feature extractor; only a head on top of it is trained and travels."""

    name: str = Field(description="entry of the backbone registry")
    sha256: str = Field(description="SHA-256 of its weights file at the site")


class ModelSection(Section):
    """An architecture from the registry installed at the site; no code travels."""

    architecture: str = Field(description="small-cnn, resnet18-gn or linear-head")
    image_size: int = Field(ge=8, le=1024, description="side in pixels after resizing")
    classes: tuple[str, ...] = Field(min_length=2, max_length=256)
    parameters: int = Field(ge=1, le=2**31, description="d: trainable float32 numbers in the model file")
    initial: str = Field(description="SHA-256 of the initial safetensors file (v0)")
    backbone: BackboneSection | None = None


class PrivacySection(Section):
    """privacy.md §1-§4. σ is calibrated for the rounds and evaluations below; `wardround study check` prints ε."""

    mechanism: Literal["local", "shared", "none"]
    unit: Literal["patient"] = "patient"
    none_accepted: str | None = Field(
        default=None, description="for `none`: the sentence that says so in words, at least 20 letters"
    )
    epsilon: float | None = Field(default=None, gt=0, description="claimed ε of the whole study, evaluations included")
    delta: float | None = Field(default=None, gt=0, lt=1e-2)
    clip: float = Field(default=1.0, gt=0, description="C: L2 norm of one patient's gradient")
    noise_multiplier: float = Field(default=0.0, ge=0, description="σ of one training step")
    sampling_rate: float = Field(default=1.0, gt=0, le=1, description="q: chance of a patient to be in a step")
    expected_batch: float = Field(
        default=1.0, gt=0, description="D: the divisor of a step's summed gradients, a constant"
    )
    steps_per_round: int = Field(default=1, ge=1, description="local noisy steps in a round")
    scale_bits: int = Field(default=18, ge=8, le=30, description="gradients become integers at 2**scale_bits")


class TrainingSection(Section):
    """Local optimisation; none of it costs privacy."""

    learning_rate: float = Field(gt=0)
    momentum: float = Field(default=0.0, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    augmentations: int = Field(default=1, ge=1, le=64, description="K, averaged before the clip")
    micro_batch: int = Field(default=32, ge=1, description="patients per forward pass")
    class_frequencies: tuple[float, ...] = Field(
        default=(), description="PUBLIC share of each class, for logit adjustment; empty = no adjustment"
    )
    local_steps: int = Field(default=1, ge=1, description="steps a round without DP")
    batch_size: int = Field(default=32, ge=1, description="patients a step without DP")


class EncodingSection(Section):
    """How an update becomes ring lanes (protocol.md §6)."""

    ring_bits: Literal[16, 24, 32] = 32
    update_clip: float = Field(default=10.0, gt=0, description="L2 clip of a whole update (none, local)")
    update_bound: float = Field(default=1.0, gt=0, description="L∞ clip of one coordinate (none, local)")
    weighting: Literal["uniform"] = "uniform"


class EvaluationSection(Section):
    """Federated evaluation in masked lanes (privacy.md §6)."""

    gate_rounds: tuple[int, ...] = Field(
        default=(), description="rounds that carry (hits, totals) of the model they start from"
    )
    gate_noise_multiplier: float = Field(default=0.0, ge=0)
    final: bool = Field(
        default=True, description="one more round after the last: confusion matrix and score histograms"
    )
    final_noise_multiplier: float = Field(default=0.0, ge=0)
    histogram_bins: int = Field(default=20, ge=4, le=200)


class GateSection(Section):
    """A model whose released figure falls by more than `largest_drop` is rolled back."""

    metric: Literal["balanced_accuracy", "accuracy"] = "balanced_accuracy"
    largest_drop: float = Field(default=1.0, gt=0, le=1)


class ServerSection(Section):
    """The server step."""

    strategy: Literal["fedavg"] = "fedavg"
    learning_rate: float = Field(default=1.0, gt=0)


class CohortSection(Section):
    """At least the charter's."""

    minimum: int = Field(ge=2)
    colluding_hospitals: int = Field(default=1, ge=0)


class TimingSection(Section):
    """Seconds."""

    train_seconds: float = Field(ge=0, description="from the opening of a round to its first attempt")
    submit_seconds: float = Field(gt=0, description="from the manifest to the deadline")
    attempt_seconds: float = Field(gt=0, description="from the proposal to its expiry")


class Study(Document):
    """One training programme."""

    wardround: Literal["study/v1"]
    name: str
    purpose: str = Field(min_length=10, max_length=2000)
    expires: datetime.date
    rounds: int = Field(ge=1, description="most training rounds")
    synthetic: bool = Field(default=False, description="the data are said to be drawn, not photographed")
    model: ModelSection
    privacy: PrivacySection
    training: TrainingSection
    encoding: EncodingSection = EncodingSection()
    evaluation: EvaluationSection = EvaluationSection()
    gate: GateSection = GateSection()
    server: ServerSection = ServerSection()
    cohort: CohortSection
    timing: TimingSection


@dataclass(frozen=True)
class LoadedStudy:
    """A study that stands by itself; `shape.check_study` holds it against a charter.

    `digest` is the plain SHA-256 of `blob`, the exact bytes.
    """

    document: Study
    digest: bytes
    blob: bytes = field(repr=False)


def load_study(blob: bytes, name: str = "study.yaml") -> LoadedStudy:
    """Parse the exact bytes of a study. Raises INVALID_DOCUMENT."""
    study = load(Study, blob, name)
    try:
        check_id(study.name, "name")
    except ServiceError as error:
        raise refuse(name, error.detail) from None
    hex_bytes(study.model.initial, 32, name, "model.initial")
    if study.model.backbone is not None:
        hex_bytes(study.model.backbone.sha256, 32, name, "model.backbone.sha256")
    classes = study.model.classes
    if len(set(classes)) != len(classes) or not all(classes):
        raise refuse(name, "model.classes holds an empty name or one twice: name each class once")
    shares = study.training.class_frequencies
    if shares and (len(shares) != len(classes) or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-3):
        raise refuse(name, "training.class_frequencies needs one share above 0 for each class, 1 in all: correct them")
    gates = study.evaluation.gate_rounds
    if any(a >= b for a, b in itertools.pairwise(gates)):
        raise refuse(name, "evaluation.gate_rounds must ascend, each round once: sort them")
    return LoadedStudy(study, hashlib.sha256(blob).digest(), blob)

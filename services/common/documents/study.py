"""The study: one training programme, what an ethics board approves (architecture.md §1).

A YAML file whose EXACT bytes are hashed. Everything that changes privacy or the model is here; how far
to run is the plan's.
"""

import datetime
import hashlib
import itertools
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from services.common.documents.strict import Document, Section, hex_bytes, load, refuse
from services.common.errors import ServiceError
from services.common.ids import check_id


class BackboneSection(Section):
    """A frozen public feature extractor; only a head on top of it is trained and travels."""

    name: str = Field(description="entry of the backbone registry")
    sha256: str = Field(description="SHA-256 of its weights file at the site")
    views: Literal[1, 2, 4] = Field(
        default=1, description="features are the mean over so many mirrored views: 2 left-right, 4 also upside down"
    )


class ModelSection(Section):
    """An architecture from the registry installed at the site; no code travels."""

    architecture: str = Field(description="an entry of the registry: `wardround model list`")
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
    against: Literal["hospitals", "public"] = Field(
        default="hospitals",
        description="shared: whom the claim holds against; fellow hospitals need colluding_hospitals of at least 1",
    )
    delta: float | None = Field(default=None, gt=0, lt=1e-2)
    patients: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict,
        description="PUBLISHED training patients by hospital, rounded; needed under shared",
    )
    clip: float = Field(default=1.0, gt=0, description="C: L2 norm of one patient's gradient")
    clipping: Literal["flat", "automatic"] = Field(
        default="flat", description="flat: min(1, C/norm); automatic: C/(norm + stability)"
    )
    stability: float = Field(default=0.01, gt=0, description="γ of automatic clipping")
    noise_multiplier: float = Field(
        default=0.0, ge=0, description="σ of one training step; under shared of n_min - k shares together"
    )
    sampling_rate: float = Field(default=1.0, gt=0, le=1, description="q: chance of a patient to be in a step")
    expected_batch: float = Field(
        default=1.0,
        gt=0,
        description="D: the divisor of a step's summed gradients, a constant; under shared of all hospitals together",
    )
    steps_per_round: int = Field(default=1, ge=1, description="local noisy steps in a round")
    scale_bits: int = Field(default=18, ge=8, le=30, description="gradients become integers at 2**scale_bits")


class TrainingSection(Section):
    """A hospital's gradients and, but under `shared`, its own steps; none of it costs privacy."""

    learning_rate: float | None = Field(
        default=None, gt=0, description="of a hospital's own steps; none under shared, where the server takes the step"
    )
    momentum: float = Field(default=0.0, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    proximal: float = Field(
        default=0.0, ge=0, description="μ of FedProx: μ/2 · |w - w_t|² is added to a hospital's objective; 0 = none"
    )
    augmentations: int = Field(default=1, ge=1, le=64, description="K, averaged before the clip")
    micro_batch: int = Field(default=32, ge=1, description="patients per forward pass")
    class_frequencies: tuple[float, ...] = Field(
        default=(), description="PUBLIC share of each class, for logit adjustment; empty = no adjustment"
    )
    class_weights: tuple[float, ...] = Field(
        default=(), description="PUBLIC weight of each class in the loss, before the clip; empty = all 1"
    )
    local_steps: int = Field(default=1, ge=1, description="steps a round without DP")
    batch_size: int = Field(default=32, ge=1, description="patients a step without DP")


class EncodingSection(Section):
    """How an update becomes ring lanes (protocol.md §6)."""

    ring_bits: Literal[16, 24, 32] = 32
    update_clip: float = Field(default=10.0, gt=0, description="L2 clip of a whole update (none, local)")
    update_bound: float = Field(default=1.0, gt=0, description="L∞ clip of one coordinate (none, local)")
    weighting: Literal["uniform"] = "uniform"
    control_clip: float = Field(default=10.0, gt=0, description="scaffold: L2 clip of a control variate's change")
    control_bound: float = Field(default=1.0, gt=0, description="scaffold: L∞ clip of one coordinate of it")


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
    """The server step, post-processing of the sum: of updates, or under `shared` of gradients (docs/strategies.md)."""

    strategy: Literal["fedavg", "fedavgm", "fedadam", "fedyogi", "scaffold", "sgd", "adam"] = "fedavg"
    learning_rate: float = Field(default=1.0, gt=0)
    momentum: float = Field(
        default=0.0, ge=0, lt=1, description="of sgd and fedavgm; β1, the first moment's decay, of the others"
    )
    second_moment: float = Field(default=0.99, ge=0, lt=1, description="β2, the second moment's decay")
    smallest_divisor: float = Field(
        default=1e-4, gt=0, description="adam divides by no less: the noise's variance is subtracted first"
    )
    adaptivity: float = Field(
        default=1e-3,
        gt=0,
        description="τ of fedadam and fedyogi: added to the root of a second moment that begins at τ²",
    )
    averaging: Literal["none", "ema", "tail"] = Field(
        default="none", description="what the last training round publishes: the newest model, or an average"
    )
    averaging_decay: float = Field(default=0.9, gt=0, lt=1, description="of ema")
    averaging_rounds: int = Field(default=1, ge=1, description="of tail: the last so many training rounds")


class DataSection(Section):
    """What a study asks of each site's images before they are used."""

    require_check: bool = Field(
        default=False,
        description="only data that passed `wardround data check` and have not changed since; verdict and keyed "
        "digest stand in the signed ledger",
    )


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
    data: DataSection = DataSection()
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
        for hospital in study.privacy.patients:
            check_id(hospital, "privacy.patients")
    except ServiceError as error:
        raise refuse(name, error.detail) from None
    hex_bytes(study.model.initial, 32, name, "model.initial")
    if study.model.backbone is not None:
        hex_bytes(study.model.backbone.sha256, 32, name, "model.backbone.sha256")
    classes = study.model.classes
    if len(set(classes)) != len(classes) or not all(classes):
        raise refuse(name, "model.classes holds an empty name or one twice: name each class once")
    if (study.training.learning_rate is None) != (study.privacy.mechanism == "shared"):
        raise refuse(
            name,
            "training.learning_rate is missing: add it"
            if study.training.learning_rate is None
            else "training.learning_rate is of no use under shared, where server.learning_rate counts: remove it",
        )
    weights = study.training.class_weights
    if weights and (len(weights) != len(classes) or min(weights) <= 0):
        raise refuse(name, "training.class_weights needs one number above 0 for each class: correct them")
    shares = study.training.class_frequencies
    if shares and (len(shares) != len(classes) or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-3):
        raise refuse(name, "training.class_frequencies needs one share above 0 for each class, 1 in all: correct them")
    gates = study.evaluation.gate_rounds
    if any(a >= b for a, b in itertools.pairwise(gates)):
        raise refuse(name, "evaluation.gate_rounds must ascend, each round once: sort them")
    return LoadedStudy(study, hashlib.sha256(blob).digest(), blob)

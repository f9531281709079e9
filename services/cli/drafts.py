"""Drafts that pass their own checks: a study calibrated for its ε, a policy that allows exactly one study."""

import datetime
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from services.cli.files import refuse_existing, write_new
from services.common.documents.charter import LoadedCharter
from services.common.documents.costs import NOISE_ROOM, spare_rounds
from services.common.documents.emit import emit
from services.common.documents.policy import AllowedStudy, Policy
from services.common.documents.shape import check_study
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
from services.common.dp.accounting import calibrate
from services.common.errors import Reason, ServiceError

_FINEST_BITS = 24  # beyond it rounding costs nothing that could be measured
_GATES = 3
HEAD_CLIP = 0.6  # of a centred head: nearly every gradient is clipped, so that rare and common lesions pull alike
_SHARED_RATES = {"centred-head": 2.0, "linear-head": 3.0}
_UNKNOWN = "0" * 64
_STRATEGY_FIELDS = {  # to begin with; what they were tuned to on four sites is in docs/results.md
    "fedavg": {},
    "fedavgm": {"learning_rate": 0.3, "momentum": 0.9},
    "fedadam": {"learning_rate": 0.1, "momentum": 0.9},
    "fedyogi": {"learning_rate": 0.1, "momentum": 0.9},
    "scaffold": {},
    "adam": {"learning_rate": 0.03, "momentum": 0.9},
}


def a_year_from_now() -> datetime.date:
    """When a draft expires where nobody says."""
    return datetime.datetime.now(datetime.UTC).date() + datetime.timedelta(365)


@dataclass(frozen=True, kw_only=True)
class DraftChoices:
    """What a person decides; the rest follows. `weights` is the backbone's SHA-256 in hex, `start` a model file.

    `patients`: published, of a typical hospital. `sampling_rate`, `steps` and `strategy` None: what suits model and
    mechanism.
    """

    classes: tuple[str, ...]
    name: str = "first-study"
    purpose: str = "State here what this study is for."
    architecture: str = "small-cnn"
    backbone: str | None = None
    weights: str | None = None
    image_size: int = 64
    rounds: int = 20
    mechanism: str = "local"
    epsilon: float = 8.0
    delta: float = 1e-5
    patients: int = 1000
    sampling_rate: float | None = None
    steps: int | None = None
    strategy: str | None = None
    seed: int = 1
    start: Path | None = None
    expires: datetime.date = field(default_factory=a_year_from_now)


def write_draft(charter: LoadedCharter, choices: DraftChoices, folder: Path) -> LoadedStudy:
    """study.yaml and v0.safetensors in `folder`, checked against the charter. Raises CONFLICT where one exists."""
    target, model = folder / "study.yaml", folder / "v0.safetensors"
    refuse_existing([target, model])
    blob = emit(draft_study(charter, choices, model), comments=True)
    loaded = load_study(blob, str(target))
    check_study(charter, loaded)
    write_new(target, blob)
    return loaded


def draft_study(charter: LoadedCharter, choices: DraftChoices, initial: Path) -> Study:
    """A study whose initial model is written to `initial`. Needs torch at this site.

    Every split may use the whole ε: a patient is in one of them only. σ covers the spare rounds.
    """
    model = write_initial(_model(choices), initial, choices.seed, choices.start)
    gates = gate_rounds(choices.rounds)
    ours, shared, head = charter.document.cohort, choices.mechanism == "shared", model.backbone is not None
    steps = choices.steps or (1 if shared else 4)
    cohort = CohortSection(minimum=ours.minimum, colluding_hospitals=ours.colluding_hospitals)
    return Study(
        wardround="study/v1",
        name=choices.name,
        purpose=choices.purpose,
        expires=choices.expires,
        rounds=choices.rounds,
        model=model,
        privacy=privacy_section(
            mechanism=choices.mechanism,
            epsilon=choices.epsilon,
            delta=choices.delta,
            sampling_rate=choices.sampling_rate or (1.0 if head else 0.25),
            patients=dict.fromkeys((member.id for member in charter.document.hospitals), choices.patients),
            steps=steps,
            rounds=choices.rounds,
            parameters=model.parameters,
            cohort=cohort,
            largest_cohort=ours.maximum,
            clip=HEAD_CLIP if choices.architecture == "centred-head" else 1.0,
        ),
        training=training_section(
            choices.mechanism,
            0.5 if head else 0.1,
            momentum=0.0 if choices.strategy == "scaffold" else 0.9,
            local_steps=steps,
        ),
        evaluation=evaluation_section(choices.mechanism, choices.epsilon, choices.delta, gates),
        server=server_section(
            choices.mechanism, _SHARED_RATES.get(choices.architecture, 0.5), 0.9, choices.rounds, choices.strategy
        ),
        cohort=cohort,
        timing=TimingSection(train_seconds=600, submit_seconds=600, attempt_seconds=1800),
    )


def draft_policy(
    charter: LoadedCharter, study: LoadedStudy, hospital: str, dataset: str, *, repeat: bool = False
) -> Policy:
    """A policy of `hospital` that allows exactly this study at exactly its claims.

    `repeat`: under `none`, a second vector for one model may be sent.
    """
    document, ours = study.document, charter.document.cohort
    private = document.privacy.mechanism != "none"
    entry = AllowedStudy(
        sha256=study.digest.hex(),
        mechanisms=(document.privacy.mechanism,),
        epsilon=document.privacy.epsilon or 0.0,
        delta=document.privacy.delta or 0.0,
        rounds=document.rounds,
        until=document.expires,
        minimum_cohort=max(document.cohort.minimum, ours.minimum),
        colluding_hospitals=max(document.cohort.colluding_hospitals, ours.colluding_hospitals),
        no_privacy=None if private else "accepted",
        repeat="allowed" if repeat and not private else None,
    )
    return Policy(
        wardround="policy/v1",
        hospital=hospital,
        dataset=dataset,
        dataset_epsilon=entry.epsilon,
        dataset_delta=2 * entry.delta,  # half of it is for the sum of the studies, half for the filter (L-2)
        studies=(entry,),
    )


def write_initial(wanted: ModelSection, path: Path, seed: int, start: Path | None = None) -> ModelSection:
    """Write v0 of `wanted` to `path`; the section with its parameters and digest. Needs torch at this site.

    The numbers of the model file `start`, else drawn with `seed`. Raises INVALID_DATA for a file of another model.
    """
    architectures, models = torch_side()
    shapes = models.layout(architectures.build(wanted))
    vector = models.initial_vector(wanted, seed) if start is None else models.read_model_file(start, shapes)
    digest = models.write_model_file(path, shapes, vector)
    return wanted.model_copy(update={"parameters": models.size(shapes), "initial": digest.hex()})


def torch_side() -> tuple[Any, Any]:
    """The hospital's `architectures` and `models`. Raises NOT_FOUND where torch is not installed."""
    try:
        from services.hospital_node import architectures, models
    except ImportError as error:
        raise ServiceError(
            Reason.NOT_FOUND,
            f"a model needs {error.name}, which is not installed here: pip install 'wardround[hospital,cli]'",
        ) from None
    return architectures, models


def unwritten_model(
    architecture: str, image_size: int, classes: tuple[str, ...], backbone: BackboneSection | None
) -> ModelSection:
    """A model whose size and digest `write_initial` will know."""
    return ModelSection(
        architecture=architecture,
        image_size=image_size,
        classes=classes,
        parameters=1,
        initial=_UNKNOWN,
        backbone=backbone,
    )


def privacy_section(
    *,
    mechanism: str,
    epsilon: float,
    delta: float,
    sampling_rate: float,
    patients: Mapping[str, int],
    steps: int,
    rounds: int,
    parameters: int,
    cohort: CohortSection,
    largest_cohort: int,
    clip: float = 1.0,
) -> PrivacySection:
    """The smallest noise with which all rounds and the spare ones keep (ε, δ). `patients`: published, by hospital.

    `expected_batch` is q times the published patients: of the middle hospital under `local`, of all under `shared`.
    """
    if mechanism == "none":
        return PrivacySection(
            mechanism="none",
            none_accepted="We accept that no single patient is protected by noise in this study.",
            steps_per_round=steps,
        )
    counts, shared = sorted(patients.values()), mechanism == "shared"
    noise = calibrate(epsilon, delta, sampling_rate, (rounds + spare_rounds(rounds)) * steps)
    bits = max(18, math.ceil(math.log2(256 * math.sqrt(parameters) / clip)))
    if shared:
        honest = cohort.minimum - cohort.colluding_hospitals
        bits = _shared_bits(parameters, clip, noise / math.sqrt(honest), counts[-1], largest_cohort)
    return PrivacySection(
        mechanism="shared" if shared else "local",
        epsilon=epsilon,
        delta=delta,
        against="public" if shared and cohort.colluding_hospitals == 0 else "hospitals",
        patients=dict(patients),
        clip=clip,
        noise_multiplier=noise,
        sampling_rate=sampling_rate,
        expected_batch=max(1.0, sampling_rate * (sum(counts) if shared else counts[len(counts) // 2])),
        steps_per_round=steps,
        scale_bits=bits,
    )


def _shared_bits(parameters: int, clip: float, share: float, patients: int, largest_cohort: int) -> int:
    """The finest scale at which `patients` surely stay within the data bound, if it is fine enough (privacy.md §3).

    `share` is S_h in units of sC. Where no scale does both, the coarsest that the rounding bears.
    """
    coarsest = math.ceil(math.log2(256 * math.sqrt(parameters) / clip))
    bound = (2**31 - 1) // largest_cohort
    finest = math.floor(math.log2(bound / (clip * (patients + 1.01 * NOISE_ROOM * share))))
    return max(coarsest, min(_FINEST_BITS, finest))


def training_section(mechanism: str, learning_rate: float, *, momentum: float, **more: Any) -> TrainingSection:
    """How gradients are taken; rate and momentum are left out under `shared`, where a hospital takes no own steps."""
    if mechanism == "shared":
        return TrainingSection(**more)
    return TrainingSection(learning_rate=learning_rate, momentum=momentum, **more)


def server_section(
    mechanism: str, learning_rate: float, momentum: float, rounds: int, strategy: str | None = None
) -> ServerSection:
    """The server step. By default FedAvg; `shared`: SGD with momentum on the global gradient.

    `learning_rate` and `momentum` are of `sgd`, which publishes the mean of the last quarter of the rounds.
    """
    chosen = strategy or ("sgd" if mechanism == "shared" else "fedavg")
    if chosen != "sgd":
        return ServerSection.model_validate({"strategy": chosen, **_STRATEGY_FIELDS[chosen]}, strict=True)
    tail = max(1, rounds // 4)
    return ServerSection(
        strategy="sgd", learning_rate=learning_rate, momentum=momentum, averaging="tail", averaging_rounds=tail
    )


def evaluation_section(mechanism: str, epsilon: float, delta: float, gates: tuple[int, ...]) -> EvaluationSection:
    """These gates and a final evaluation; under noise each split may use the whole ε."""
    if mechanism == "none":
        return EvaluationSection(gate_rounds=gates)
    return EvaluationSection(
        gate_rounds=gates,
        gate_noise_multiplier=calibrate(epsilon, delta, 1.0, len(gates)) if gates else 0.0,
        final_noise_multiplier=calibrate(epsilon, delta, 1.0, 1),
    )


def _model(choices: DraftChoices) -> ModelSection:
    backbone = None
    if choices.architecture in torch_side()[0].HEADS:
        if choices.backbone is None or choices.weights is None:
            raise ServiceError(
                Reason.INVALID_DOCUMENT,
                f"{choices.architecture} needs --backbone NAME and --weights FILE of the frozen backbone",
            )
        backbone = BackboneSection(name=choices.backbone, sha256=choices.weights, views=views_of(choices.architecture))
    return unwritten_model(choices.architecture, choices.image_size, choices.classes, backbone)


def views_of(architecture: str) -> Literal[1, 4]:
    """More views cost time once, when features are cached; what they were measured to give is in docs/results.md."""
    return 4 if architecture == "centred-head" else 1


def suited_backbone(architecture: str, sha256: str) -> BackboneSection:
    """What of EfficientNet-Lite0 a head was tuned on (docs/results.md). `sha256`: of its weights file, in hex."""
    name = "efficientnet-lite0-texture" if architecture == "centred-head" else "efficientnet-lite0"
    return BackboneSection(name=name, sha256=sha256, views=views_of(architecture))


def gate_rounds(rounds: int) -> tuple[int, ...]:
    """Up to three, spread over the study; never the first round, whose model nobody has trained yet."""
    return tuple(
        sorted({max(2, round(rounds * part / _GATES)) for part in range(1, _GATES + 1)} & set(range(2, rounds + 1)))
    )

"""The study that `wardround demo` drafts: settings for a model, noise calibrated to the ε that was asked for."""

import datetime
from collections.abc import Mapping
from dataclasses import dataclass

from services.cli.drafts import (
    HEAD_CLIP,
    evaluation_section,
    gate_rounds,
    privacy_section,
    server_section,
    training_section,
)
from services.common.documents.study import (
    CohortSection,
    DataSection,
    EncodingSection,
    GateSection,
    ModelSection,
    Study,
    TimingSection,
)
from services.common.errors import Reason, ServiceError


@dataclass(frozen=True)
class Settings:
    """What was tuned for one model on one kind of data (docs/results.md); seconds are for two cores.

    Under `shared`: `shared_rounds` global steps at `server_rate`, each of which takes `shared_seconds` at most. At full
    batch many small steps cost no more noise than few large ones.
    """

    image_size: int
    sampling_rate: float
    steps: int
    learning_rate: float
    train_seconds: float
    submit_seconds: float
    plain_steps: int
    plain_rate: float
    server_rate: float
    shared_seconds: float
    shared_rounds: int
    clip: float = 1.0


SYNTHETIC = Settings(28, 1.0, 5, 0.7, 3, 60, 20, 0.05, 1.0, 1, 20)
REAL = {
    "small-cnn": Settings(64, 0.2, 10, 1.0, 20, 1800, 60, 0.05, 1.0, 10, 40),
    "resnet18-gn": Settings(64, 0.03, 2, 0.5, 60, 7200, 30, 0.05, 0.5, 60, 20),
    # Of the centred head only `shared` was tuned: other rates are the linear head's, scaled by the length of features.
    "centred-head": Settings(224, 1.0, 5, 10.0, 20, 1800, 40, 0.3, 2.0, 0, 100, HEAD_CLIP),
    "linear-head": Settings(224, 1.0, 5, 15.0, 20, 1800, 40, 3.0, 3.0, 0, 100),
}

# Images of each class as HAM10000's authors published them (Tschandl 2018): public, so they cost nothing. A site's own
# counts would be private (privacy.md §5).
_HAM10000 = {"akiec": 327, "bcc": 514, "bkl": 1099, "df": 115, "mel": 1113, "nv": 6705, "vasc": 142}
HAM10000_CLASSES = tuple(sorted(_HAM10000))


def settings_of(model: str, *, synthetic: bool) -> Settings:
    """What was tuned for `model`. Raises INVALID_DOCUMENT for an unknown one."""
    if model not in REAL:
        raise ServiceError(Reason.INVALID_DOCUMENT, f"model {model!r} is unknown: choose {', '.join(REAL)}")
    return SYNTHETIC if synthetic and model == "small-cnn" else REAL[model]


def draft(
    *,
    synthetic: bool,
    model: ModelSection,
    settings: Settings,
    mechanism: str,
    rounds: int,
    epsilon: float,
    delta: float,
    patients: Mapping[str, int],
    cohort: CohortSection,
    strategy: str | None = None,
) -> Study:
    """The demo's study. `patients`: the published number of training patients of each site, a rounded figure.

    `strategy` None: what suits the mechanism.

    Raises OUT_OF_BOUND where no noise gives `epsilon`.
    """
    private, shared, scaffold = mechanism != "none", mechanism == "shared", strategy == "scaffold"
    train_seconds = settings.shared_seconds if shared else settings.train_seconds
    return Study(
        wardround="study/v1",
        name="demo-lesions",
        purpose="Tell skin lesions apart, to show a federation at work. No medical use.",
        expires=datetime.datetime.now(datetime.UTC).date() + datetime.timedelta(days=365),
        rounds=rounds,
        synthetic=synthetic,
        model=model,
        privacy=privacy_section(
            mechanism=mechanism,
            epsilon=epsilon,
            delta=delta,
            sampling_rate=settings.sampling_rate,
            patients=patients,
            steps=1 if shared else settings.steps,
            rounds=rounds,
            parameters=model.parameters,
            cohort=cohort,
            largest_cohort=len(patients),
            clip=settings.clip,
        ),
        training=training_section(
            mechanism,
            settings.learning_rate if private else settings.plain_rate,
            momentum=0.0 if private or scaffold else 0.9,
            micro_batch=64 if model.parameters < 1_000_000 else 8,  # DP holds a gradient of all parameters for each
            class_frequencies=_public_shares(model.classes),
            local_steps=settings.plain_steps,
        ),
        encoding=EncodingSection(update_clip=50.0, update_bound=4.0),
        evaluation=evaluation_section(mechanism, epsilon, delta, gate_rounds(rounds) if shared else _each(rounds)),
        gate=GateSection(largest_drop=1.0 if scaffold else 0.3),
        server=server_section(mechanism, settings.server_rate, 0.9, rounds, strategy),
        data=DataSection(require_check=synthetic),
        cohort=cohort,
        timing=TimingSection(
            train_seconds=train_seconds,
            submit_seconds=settings.submit_seconds,
            attempt_seconds=3 * settings.submit_seconds,
        ),
    )


def _each(rounds: int) -> tuple[int, ...]:
    """A gate in every round but the first, whose model nobody has trained yet."""
    return tuple(range(2, rounds + 1))


def _public_shares(classes: tuple[str, ...]) -> tuple[float, ...]:
    """The published share of each class where all are HAM10000's, else none: no logit adjustment."""
    if set(classes) != set(_HAM10000):
        return ()
    return tuple(round(_HAM10000[name] / sum(_HAM10000.values()), 5) for name in classes)

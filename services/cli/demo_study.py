"""The study that `wardround demo` drafts: settings for a model, noise calibrated to the ε that was asked for."""

from dataclasses import dataclass
from typing import Any

from services.cli.federation import expiry
from services.common.dp.accounting import calibrate

_MARGIN = 0.999  # calibrate to a hair below the claim: the claim itself is then never missed by rounding


@dataclass(frozen=True)
class Settings:
    """What was tuned for one model on one kind of data (docs/results.md); seconds are for two cores."""

    image_size: int
    sampling_rate: float
    steps: int
    learning_rate: float
    momentum: float
    clip: float
    augmentations: int
    train_seconds: float
    submit_seconds: float
    plain_steps: int
    plain_rate: float


SYNTHETIC = Settings(28, 1.0, 5, 0.7, 0.0, 1.0, 1, 3, 60, 20, 0.05)
REAL = {
    "small-cnn": Settings(64, 0.2, 10, 1.0, 0.0, 1.0, 1, 20, 1800, 60, 0.05),
    "resnet18-gn": Settings(64, 0.03, 2, 0.5, 0.0, 1.0, 1, 60, 7200, 30, 0.05),
    "linear-head": Settings(224, 1.0, 5, 15.0, 0.0, 1.0, 1, 20, 1800, 40, 3.0),
}

# Images of each class as HAM10000's authors published them (Tschandl 2018): public, so they cost nothing. A site's own
# counts would be private (privacy.md §5).
_HAM10000 = {"akiec": 327, "bcc": 514, "bkl": 1099, "df": 115, "mel": 1113, "nv": 6705, "vasc": 142}


def draft(
    *,
    name: str,
    synthetic: bool,
    model: dict[str, Any],
    settings: Settings,
    mechanism: str,
    rounds: int,
    epsilon: float,
    delta: float,
    patients: int,
    cohort: dict[str, int],
) -> dict[str, Any]:
    """A study as plain values. `patients`: the published number of training patients of a site, a rounded figure.

    Raises OUT_OF_BOUND where no noise gives `epsilon`.
    """
    private = mechanism == "local"
    gates = list(range(2, rounds + 1))
    study: dict[str, Any] = {
        "wardround": "study/v1",
        "name": name,
        "purpose": "Tell skin lesions apart, to show a federation at work. No medical use.",
        "expires": expiry(),
        "rounds": rounds,
        "synthetic": synthetic,
        "model": model,
        "privacy": {"mechanism": mechanism},
        "training": {
            "learning_rate": settings.learning_rate if private else settings.plain_rate,
            "momentum": settings.momentum if private else 0.9,
            "augmentations": settings.augmentations if private else 1,
            "micro_batch": 64 if model["parameters"] < 1_000_000 else 8,  # a gradient of all parameters for each
            "class_frequencies": _public_shares(model["classes"]),
            "local_steps": settings.plain_steps,
            "batch_size": 32,
        },
        "encoding": {"ring_bits": 32, "update_clip": 50.0, "update_bound": 4.0},
        "evaluation": {"gate_rounds": gates, "final": True, "histogram_bins": 20},
        "gate": {"metric": "balanced_accuracy", "largest_drop": 0.3},
        "cohort": cohort,
        "timing": {
            "train_seconds": settings.train_seconds,
            "submit_seconds": settings.submit_seconds,
            "attempt_seconds": 3 * settings.submit_seconds,
        },
    }
    if not private:
        study["privacy"]["none_accepted"] = "This demonstration protects no single patient; only sums are hidden."
        return study
    steps = settings.steps * (rounds + -(-rounds // 10))  # a tenth more, as check_study counts
    target = _MARGIN * epsilon
    study["privacy"] |= {
        "epsilon": epsilon,
        "delta": delta,
        "clip": settings.clip,
        "noise_multiplier": calibrate(target, delta, settings.sampling_rate, steps),
        "sampling_rate": settings.sampling_rate,
        "expected_batch": max(1.0, settings.sampling_rate * patients),
        "steps_per_round": settings.steps,
        "scale_bits": 20 if model["parameters"] <= 10_000_000 else 22,
    }
    study["evaluation"]["final_noise_multiplier"] = calibrate(target, delta, 1.0, 1)
    if gates:
        study["evaluation"]["gate_noise_multiplier"] = calibrate(target, delta, 1.0, len(gates))
    return study


def _public_shares(classes: list[str]) -> list[float]:
    """The published share of each class where all are HAM10000's, else none: no logit adjustment."""
    if set(classes) != set(_HAM10000):
        return []
    return [round(_HAM10000[name] / sum(_HAM10000.values()), 5) for name in classes]

"""Sensitivity meter (privacy.md §8, 2): how far one patient, however hostile, moves the integers before the noise.

‖rint sum with − without‖₂ ≤ Δ₂, exactly: in whole numbers, no tolerance. The patients are those that a clip might trip
over: numbers that are none, numbers beyond float32's squares, one huge feature, copies, many images, an empty image.
"""

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from services.cli.audit_finding import Finding, Reading, Say
from services.cli.audit_scratch import (
    FEATURES,
    Consortium,
    Hospital,
    Patients,
    make_consortium,
    random_patients,
    without_claim,
)
from services.common.documents.costs import final_noise, gate_noise
from services.common.documents.study import ModelSection
from services.common.dp.clip import Clip
from services.common.dp.noise import integer_sum, sensitivity_rint
from services.hospital_node.architectures import build
from services.hospital_node.clipping import clipped_sum
from services.hospital_node.evaluation import count
from services.hospital_node.models import layout, size

I64 = npt.NDArray[np.int64]

_ADVERSARIES = ("ordinary", "NaN", "infinity", "1e30", "1e-30", "one-hot", "duplicate", "many images", "empty")
_PIXELS = 12  # the smallest image of small-cnn: the law is the same at every size
_CLASSES = 7


def measure_sensitivity(seed: int, say: Say) -> Finding:
    """The whole meter: a head in closed form, a network through hooks, and the counts of evaluations."""
    generator = np.random.default_rng(seed)
    consortium = make_consortium()
    finding = Finding(
        title="2. Sensitivity meter",
        shows="No patient that was tried moves the rounded sum by more than the Δ₂ that the noise is measured by, "
        "to the last integer, nor a table of counts by more than its votes.",
        shows_not="Patients that nobody thought of: the clip's proof covers them, this covers its arithmetic.",
    )
    say("hostile patients, linear head")
    finding.readings += head_readings(consortium, generator)
    say("hostile patients, small network")
    finding.readings += network_readings(generator)
    finding.readings += count_readings(consortium)
    say("planted fault")
    doubled = without_claim(consortium, clip=2 * consortium.document.privacy.clip)
    finding.judge("sensitivity doubled", head_readings(doubled, generator, claimed=consortium))
    return finding


def head_readings(
    consortium: Consortium, generator: np.random.Generator, claimed: Consortium | None = None
) -> list[Reading]:
    """Of the study's head; `claimed` is the consortium whose Δ₂ is claimed, where a fault is planted."""
    limit = (claimed or consortium).noise.sensitivity
    ward = random_patients(generator, 20, _CLASSES)
    before = _head_integers(consortium, ward)
    alone = _head_integers(consortium, Patients(np.empty((0, FEATURES), np.float32), np.empty(0, np.int64)))
    readings = []
    for name in _ADVERSARIES:
        features = hostile(name, (FEATURES,), generator)
        if name == "duplicate":
            features = ward.features[:1]
        labels = np.full(len(features), ward.labels[0])
        joined = ward.with_one(features, labels) if len(features) else ward
        moved = [exact_ratio(_head_integers(consortium, joined) - before, limit)]
        if len(features):  # the only patient of a hospital that had none
            only = Patients(features, labels, (np.arange(len(features)),))
            moved.append(exact_ratio(_head_integers(consortium, only) - alone, limit))
        readings.append(Reading(f"head: {name}", max(moved), 1.0, "of Δ₂"))
    return readings


def network_readings(generator: np.random.Generator) -> list[Reading]:
    """Of small-cnn, whose per-patient gradients are float32 and come from hooks."""
    model = ModelSection(
        architecture="small-cnn",
        image_size=_PIXELS,
        classes=tuple(f"class-{number}" for number in range(_CLASSES)),
        parameters=1,
        initial="0" * 64,
    )
    module, bits = build(model), 18
    _spread_weights(module, generator)
    limit = sensitivity_rint(bits, 1.0, size(layout(module)))
    shape = (3, _PIXELS, _PIXELS)
    images = torch.from_numpy(generator.normal(size=(6, 2, *shape)).astype(np.float32))
    labels = torch.from_numpy(generator.integers(0, _CLASSES, 6))

    def integers(pictures: Tensor, truth: Tensor) -> I64:
        return integer_sum(clipped_sum(module, pictures, truth, Clip(1.0), micro_batch=4), bits)

    before = integers(images, labels)
    readings = []
    for name in _ADVERSARIES:
        found = hostile(name, shape, generator)
        if not len(found):
            continue
        picture = torch.from_numpy(found[:2] if len(found) > 1 else np.repeat(found, 2, axis=0))[None]
        if name == "duplicate":
            picture = images[:1]
        after = integers(torch.cat([images, picture]), torch.cat([labels, labels[:1]]))
        readings.append(Reading(f"network: {name}", exact_ratio(after - before, limit), 1.0, "of Δ₂"))
    return readings


def count_readings(consortium: Consortium) -> list[Reading]:
    """Of the lanes of counts: a patient whose scores are no numbers votes once all the same."""
    study = consortium.document
    bins, base = study.evaluation.histogram_bins, np.full((5, _CLASSES), 1 / _CLASSES)
    labels, readings = np.arange(5), []
    for name, scores in (("NaN", np.nan), ("infinity", np.inf), ("ordinary", 0.3)):
        with_one = count(np.concatenate([base, np.full((1, _CLASSES), scores)]), np.append(labels, 3), bins)
        without = count(base, labels, bins)
        gate, final = gate_noise(study), final_noise(study)
        moved_gate = np.concatenate([with_one.hits - without.hits, with_one.totals - without.totals])
        moved_final = np.concatenate(
            [np.ravel(with_one.confusion - without.confusion), np.ravel(with_one.histogram - without.histogram)]
        )
        for what, moved, noise in (("gate", moved_gate, gate), ("final", moved_final, final)):
            ratio = exact_ratio(moved << noise.fraction_bits, noise.sensitivity)
            readings.append(Reading(f"counts, {what}: {name}", ratio, 1.0, "of Δ₂"))
    return readings


def hostile(name: str, shape: tuple[int, ...], generator: np.random.Generator) -> npt.NDArray[np.float32]:
    """The images (n, …) of one patient that may never be; "duplicate" is the caller's to copy."""
    plain = generator.normal(size=(1, *shape)).astype(np.float32)
    make: dict[str, Callable[[], npt.NDArray[np.float32]]] = {
        "ordinary": lambda: plain,
        "NaN": lambda: _with_first(plain, np.nan),
        "infinity": lambda: _with_first(plain, np.inf),
        "1e30": lambda: np.full_like(plain, 1e30),
        "1e-30": lambda: np.full_like(plain, 1e-30),
        "one-hot": lambda: _with_first(np.zeros_like(plain), 1e6),
        "duplicate": lambda: plain,
        "many images": lambda: generator.normal(size=(9, *shape)).astype(np.float32) * 1e3,
        "empty": lambda: np.zeros_like(plain),
    }
    return make[name]()


def exact_ratio(moved: I64, limit: float) -> float:
    """‖moved‖₂/limit, rounded up: above 1 exactly when the squares in whole numbers add up to more than limit²."""
    squares = sum(value * value for value in moved.tolist() if value)
    ratio = float(np.sqrt(float(Fraction(squares) / Fraction(limit) ** 2)))
    if (squares > Fraction(limit) ** 2) is (ratio > 1.0):
        return ratio
    return 1.0 if ratio > 1.0 else float(np.nextafter(1.0, 2.0))


def _head_integers(consortium: Consortium, patients: Patients) -> I64:
    ward = Hospital(consortium, patients)
    return ward.integers(ward.clipped_sum())


def _with_first(values: npt.NDArray[np.float32], value: float) -> npt.NDArray[np.float32]:
    changed = values.copy()
    changed.reshape(len(values), -1)[:, 0] = value
    return changed


def _spread_weights(module: nn.Module, generator: np.random.Generator) -> None:
    """Weights that are not the start's zeros, so that every layer's gradient is there."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.from_numpy(generator.normal(0, 0.3, tuple(parameter.shape)).astype(np.float32)))

"""Gradient inversion: what of a patient's picture can be read back from what a hospital sends (Zhu 2019; Geiping 2020).

Two models, both by attackers who know model, study and class. A linear model on the pixels, whose plain gradient IS the
picture times a number, so nothing has to be searched; and small-cnn, where the picture is sought whose gradient points
the same way. Each faces a plain update, one with this hospital's noise, a masked one, and the opened sum.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from services.cli.audit_finding import Finding, Reading, Say
from services.cli.audit_scratch import DELTA, os_keys
from services.cli.synthetic import CAMERAS, draw_patient
from services.common.documents.study import ModelSection
from services.common.dp.accounting import calibrate
from services.common.dp.clip import Clip
from services.common.dp.noise import discrete_gaussian, integer_sum, sensitivity_rint, share_scale
from services.common.secagg.masking import mask_vector
from services.common.secagg.ring import Ring
from services.hospital_node.architectures import build
from services.hospital_node.clipping import clipped_sum
from services.hospital_node.head import clipped_head_sum, gather
from services.hospital_node.models import load_vector

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

VIEWS = ("original", "plain update", "update with noise, ε = 8", "masked update", "opened sum of 4, with noise")
_PIXELS, _CLASSES, _HOSPITALS = 28, 4, 4
_NUMBERS = 3 * _PIXELS * _PIXELS
_BITS, _RING_BITS = 16, 32
_EPSILON = 8.0
# Mean correlation above which pictures count as read: a search finds smooth blots in noise as well.
_READ = 0.7


@dataclass(frozen=True)
class Recovered:
    """Pictures (views, 3, size, size) in 0..1 of one patient, and their correlation with the original."""

    pictures: F64
    likeness: tuple[float, ...]


def measure_inversion(seed: int, patients: int, steps: int, say: Say) -> tuple[Finding, dict[str, list[Recovered]]]:
    """Both models; the pictures are drawn, nobody's."""
    generator = np.random.default_rng(seed)
    finding = Finding(
        title="6. Gradient inversion",
        shows="A plain update of one patient gives the picture away, a linear model's to the last pixel. The same "
        "update with its noise, masked, or in an opened sum gives nothing that these attacks can read.",
        shows_not="That no attack could do better on a noised update (ε bounds all of them), nor anything about larger "
        "batches, which are harder to read even when they are plain.",
    )
    labels = generator.integers(0, _CLASSES, patients)
    originals = [draw_patient(int(label), CAMERAS[0], _PIXELS, 1, generator)[0] / 255.0 for label in labels]
    pictures = [np.moveaxis(original, 2, 0) for original in originals]
    found: dict[str, list[Recovered]] = {"linear model": [], "small-cnn": []}
    say("gradients of a linear model")
    for picture, label in zip(pictures, labels.tolist(), strict=True):
        found["linear model"].append(_linear(picture, label, pictures, labels))
    module = _network(generator)
    for number, (picture, label) in enumerate(zip(pictures, labels.tolist(), strict=True), 1):
        say(f"gradients of small-cnn, patient {number} of {patients}")
        found["small-cnn"].append(_searched(module, picture, label, pictures, labels, steps))
    for model, recovered in found.items():
        likeness = np.array([one.likeness for one in recovered])
        finding.notes[model] = {name: likeness[:, place].tolist() for place, name in enumerate(VIEWS)}
        for place, name in enumerate(VIEWS[2:], 2):
            value = max(0.0, float(likeness[:, place].mean()))
            finding.readings.append(Reading(f"{model}, {name}: likeness", value, _READ, "correlation"))
    exact = min(one.likeness[1] for one in found["linear model"])
    # A meter that reads nothing anywhere would prove nothing: the plain update is its planted fault.
    finding.caught = {"no noise and no mask": exact > 0.99}
    return finding, found


def views_of(total: F64, others: F64) -> list[F64]:
    """What leaves a hospital with the clipped sum `total` (d): plain, noised, masked; and the sum with `others`."""
    sensitivity = sensitivity_rint(_BITS, 1.0, total.size)
    scale = share_scale(calibrate(_EPSILON, DELTA, 1.0, 1), sensitivity, 1, 0)
    noise, exact = discrete_gaussian(scale), integer_sum(total, _BITS)
    noised = exact + noise.draw(os_keys(), total.size)
    ring = Ring(_RING_BITS)
    packed = memoryview(ring.pack(noised.astype(np.uint32)))

    def fill(start: int, out: memoryview) -> None:
        out[:] = packed[start : start + len(out)]

    masked = b"".join(mask_vector(fill, len(packed), ring, [os_keys() for _ in range(3)], bytes))
    # Under `shared` each of the four hospitals adds half of the noise that the claim needs at n_min − k = 4.
    share = discrete_gaussian(share_scale(calibrate(_EPSILON, DELTA, 1.0, 1), sensitivity, _HOSPITALS, 0))
    summed = exact + integer_sum(others, _BITS)
    summed = summed + sum(share.draw(os_keys(), total.size) for _ in range(_HOSPITALS))
    return [np.asarray(values / 2.0**_BITS) for values in (exact, noised, ring.lift(ring.unpack(masked)), summed)]


def _linear(picture: F64, label: int, pictures: list[F64], labels: I64) -> Recovered:
    """Weight gradient of the true class over its bias gradient is the picture (for one patient)."""

    def gradient(chosen: list[F64], truth: list[int]) -> F64:
        features = np.array([2 * one.ravel() - 1 for one in chosen], np.float32)
        rows = gather(features, np.array(truth), [np.array([row]) for row in range(len(truth))])
        zero = np.zeros(_CLASSES * (_NUMBERS + 1))
        return clipped_head_sum(zero, rows, Clip(1.0), np.zeros(_CLASSES), np.ones(_CLASSES))

    others = [place for place in range(len(pictures)) if pictures[place] is not picture]
    rest = gradient([pictures[place] for place in others], labels[others].tolist())
    recovered = []
    for view in views_of(gradient([picture], [label]), rest):
        bias, weight = view[label], view[_CLASSES:].reshape(_CLASSES, _NUMBERS)[label]
        recovered.append(_as_picture(weight / bias if bias else weight))
    return _compared(picture, recovered)


def _network(generator: np.random.Generator) -> nn.Module:
    names = tuple(f"class-{number}" for number in range(_CLASSES))
    model = ModelSection(
        architecture="small-cnn", image_size=_PIXELS, classes=names, parameters=1, initial="0" * 64
    )  # fmt: skip
    module = build(model)
    count = sum(parameter.numel() for parameter in module.parameters())
    load_vector(module, generator.normal(0, 0.1, count).astype(np.float32))
    return module


def _searched(module: nn.Module, picture: F64, label: int, pictures: list[F64], labels: I64, steps: int) -> Recovered:
    """The picture whose gradient has the largest cosine with the view, by Adam, smoothed by its total variation."""

    def gradient(chosen: list[F64], truth: list[int]) -> F64:
        values = torch.from_numpy(np.array([2 * one - 1 for one in chosen], np.float32))[:, None]
        return clipped_sum(module, values, torch.tensor(truth), Clip(1.0), micro_batch=4)

    others = [place for place in range(len(pictures)) if pictures[place] is not picture]
    rest = gradient([pictures[place] for place in others], labels[others].tolist())
    names = sorted(name for name, _ in module.named_parameters())
    parameters = [dict(module.named_parameters())[name] for name in names]
    recovered = []
    for view in views_of(gradient([picture], [label]), rest):
        target = torch.from_numpy(view.astype(np.float32))
        guess = torch.zeros((1, 3, _PIXELS, _PIXELS), requires_grad=True)
        adam = torch.optim.Adam([guess], lr=0.1)
        for _ in range(steps):
            adam.zero_grad()
            loss = functional.cross_entropy(module(guess), torch.tensor([label]))
            found = torch.cat([g.ravel() for g in torch.autograd.grad(loss, parameters, create_graph=True)])
            across = (guess[..., 1:] - guess[..., :-1]).abs().mean()
            down = (guess[..., 1:, :] - guess[..., :-1, :]).abs().mean()
            distance = 1 - functional.cosine_similarity(found, target, dim=0) + 0.02 * (across + down)
            distance.backward()  # type: ignore[no-untyped-call]  # torch has no types here
            adam.step()
            with torch.no_grad():
                guess.clamp_(-1, 1)
        recovered.append((guess.detach().numpy()[0].astype(np.float64) + 1) / 2)
    return _compared(picture, recovered)


def _as_picture(values: F64) -> F64:
    """Numbers about −1 … 1 as a picture in 0..1; what is wilder is squeezed, so that noise is seen as noise."""
    spread = max(1.0, float(np.quantile(np.abs(values), 0.99)))
    return np.asarray(np.clip((values / spread + 1) / 2, 0, 1).reshape(3, _PIXELS, _PIXELS))


def _compared(picture: F64, recovered: list[F64]) -> Recovered:
    found = [picture, *recovered]
    return Recovered(np.array(found), tuple(_likeness(picture, one) for one in found))


def _likeness(one: F64, two: F64) -> float:
    """Correlation of two pictures; 0 where one has no contrast at all."""
    a, b = one.ravel() - one.mean(), two.ravel() - two.mean()
    size = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / size if size > 0 else 0.0

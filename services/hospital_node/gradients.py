"""The gradient of one step: clipped and summed by patient (`shared`), and noised (`local`), or plain (`none`).

Which patients, which image of each, how it is turned, and the noise: all from fresh keys of the operating system
(privacy.md §4). torch's and numpy's generators decide nothing here.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from services.common.documents.costs import training_noise
from services.common.documents.study import Study
from services.common.dp.clip import Clip
from services.common.dp.keystream import words
from services.common.dp.noise import discrete_gaussian, integer_sum
from services.common.dp.sampling import choose_one, poisson_sample
from services.common.errors import Reason, ServiceError
from services.hospital_node import metrics
from services.hospital_node.architectures import CENTRE_STEP, FEATURE_LENGTH, CentredHead
from services.hospital_node.clipping import clipped_sum
from services.hospital_node.dataset import Dataset, Fold
from services.hospital_node.head import clipped_centred_sum, clipped_head_sum, gather
from services.hospital_node.inputs import TURNS, FeatureInputs, Inputs
from services.hospital_node.models import layout, size, trainable, trainable_vector

Keys = Callable[[], bytes]
Gradient = Callable[[], tuple[NDArray[np.float64], int]]
"""Gives d numbers, and how many rows they took, which is for this site's eyes only."""

_BLOCK = 8  # micro-batches that are on the device at once


@dataclass(frozen=True)
class _Rows:
    """Patients with equally many rows each: `images` (patients, rows), and how each is turned (None: as it is)."""

    images: NDArray[np.int64]
    turns: NDArray[np.int64] | None


class _Adjusted(nn.Module):
    """The model with log π added to its scores (logit adjustment, Menon 2021, arXiv:2007.07314): for training only."""

    def __init__(self, inner: nn.Module, shares: tuple[float, ...]) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("shift", torch.tensor(shares, dtype=torch.float64).log().float(), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Scores (n, classes), shifted."""
        scores: Tensor = self.inner(inputs) + self.get_buffer("shift")
        return scores


def gradients(module: nn.Module, inputs: Inputs, dataset: Dataset, study: Study, keys: Keys) -> tuple[Gradient, int]:
    """How this study takes the gradient of a hospital's own step, and how many steps a round has.

    Each call gives the gradient of the mean loss (d) float64 on the training patients. Raises INVALID_DOCUMENT for a
    mechanism without own steps, or augmentations that cannot be had.
    """
    if study.privacy.mechanism == "local":
        return _private(module, inputs, dataset, study, keys), study.privacy.steps_per_round
    if study.privacy.mechanism == "none":
        return _plain(adjusted_scores(module, study), inputs, dataset, study, keys), study.training.local_steps
    raise ServiceError(
        Reason.INVALID_DOCUMENT,
        f"under privacy.mechanism {study.privacy.mechanism} a hospital takes no steps of its own: ask for clipped sums",
    )


def clipped_sums(module: nn.Module, inputs: Inputs, dataset: Dataset, study: Study, keys: Keys) -> Gradient:
    """This hospital's part of one step: each call samples anew and gives the sum of clipped gradients (d) float64.

    WITHOUT noise: whoever calls this adds it before a byte of the sum is stored or sent. A patient whose gradient is
    not finite counts as zero. With q = 1 a patient's gradient is the mean over all its images, else that of one,
    uniform and secret. Raises INVALID_DOCUMENT for augmentations that cannot be had.
    """
    if isinstance(module, nn.Linear | CentredHead) and isinstance(inputs, FeatureInputs):
        return lambda: head_sum(trainable_vector(module), inputs, dataset, study, keys)
    return _of_module(adjusted_scores(module, study), inputs, dataset, study, keys)


def adjusted_scores(module: nn.Module, study: Study) -> nn.Module:
    """The module as it is trained: with log π added where the study states PUBLIC class frequencies π."""
    shares = study.training.class_frequencies
    return _Adjusted(module, shares).to(next(module.parameters()).device) if shares else module


def shuffled(key: bytes, count: int) -> NDArray[np.int64]:
    """A uniform order of 0..count-1 from AES-256-CTR words of `key`."""
    return np.argsort(words(key, 0, count), kind="stable")


def _private(module: nn.Module, inputs: Inputs, dataset: Dataset, study: Study, keys: Keys) -> Gradient:
    """DP-SGD: also a step that sampled nobody has noise, and the divisor is the study's, never the batch's size."""
    privacy, sums = study.privacy, clipped_sums(module, inputs, dataset, study, keys)
    noise = discrete_gaussian(training_noise(study).scale)

    def gradient() -> tuple[NDArray[np.float64], int]:
        total, seen = sums()
        # One rounding of the whole sum: Δ₂ counts √d once. The noise comes after it, in integers.
        noised = integer_sum(total, privacy.scale_bits) + noise.draw(keys(), total.size)
        return noised / 2.0**privacy.scale_bits / privacy.expected_batch, seen

    return gradient


def _of_module(module: nn.Module, inputs: Inputs, dataset: Dataset, study: Study, keys: Keys) -> Gradient:
    fold, training = dataset.fold("train"), study.training
    parameters, device = size(layout(module)), next(module.parameters()).device
    weights = torch.tensor(training.class_weights, device=device) if training.class_weights else None

    def total() -> tuple[NDArray[np.float64], int]:
        total, seen = np.zeros(parameters, np.float64), 0
        for rows in _draw(fold, study, inputs, keys, poisson_sample(keys(), len(fold), study.privacy.sampling_rate)):
            at_once = max(1, training.micro_batch * training.augmentations // rows.images.shape[1])
            for images, labels in _tensors(rows, dataset, inputs, at_once * _BLOCK, device):
                began = time.perf_counter()
                total += clipped_sum(module, images, labels, _clip(study), at_once, weights=weights)
                # Every pass has `at_once` places, filled or not: how many were drawn is not to be told.
                places = -(-images.shape[0] // at_once) * at_once * images.shape[1]
                metrics.computed(places, time.perf_counter() - began)
                seen += labels.numel()
        return total, seen

    return total


def head_sum(
    weights: NDArray[np.float32], inputs: FeatureInputs, dataset: Dataset, study: Study, keys: Keys
) -> tuple[NDArray[np.float64], int]:
    """As a call of `clipped_sums` for a head with these weights (d): in closed form, float64, without any module.

    No per-sample gradient is built; what q = 1 needs is gathered once and kept.
    """
    fold, training, classes = dataset.fold("train"), study.training, len(study.model.classes)
    if training.augmentations > 1:
        raise ServiceError(
            Reason.INVALID_DOCUMENT, "features are computed once an image: set training.augmentations to 1"
        )
    shift = np.log(training.class_frequencies) if training.class_frequencies else np.zeros(classes)
    losses = np.array(training.class_weights or (1.0,) * classes)
    chosen = poisson_sample(keys(), len(fold), study.privacy.sampling_rate)
    if study.privacy.sampling_rate == 1:
        groups = inputs.whole("train", fold.images, dataset.labels)
    else:
        picked = [fold.images[patient] for patient in chosen]
        picks = choose_one(keys(), [images.size for images in picked])
        one = [images[i : i + 1] for images, i in zip(picked, picks, strict=True)]
        groups = gather(inputs.features, dataset.labels, one)
    vector, began = weights.astype(np.float64), time.perf_counter()
    if study.model.architecture == "centred-head":
        found = clipped_centred_sum(vector, groups, _clip(study), shift, losses, CENTRE_STEP, FEATURE_LENGTH)
    else:
        found = clipped_head_sum(vector, groups, _clip(study), shift, losses)
    seen = sum(rows.labels.size for rows in groups)
    if study.privacy.sampling_rate == 1:  # else the time would tell how many were drawn
        metrics.computed(seen, time.perf_counter() - began)
    return found, seen


def _clip(study: Study) -> Clip:
    privacy = study.privacy
    return Clip(privacy.clip, privacy.stability if privacy.clipping == "automatic" else None)


def _plain(module: nn.Module, inputs: Inputs, dataset: Dataset, study: Study, keys: Keys) -> Gradient:
    """Minibatch SGD: patients in a random order, a new one when all were seen; one random image of each."""
    fold, training = dataset.fold("train"), study.training
    device = next(module.parameters()).device
    weights = torch.tensor(training.class_weights, device=device) if training.class_weights else None
    waiting = np.empty(0, np.int64)

    def gradient() -> tuple[NDArray[np.float64], int]:
        nonlocal waiting
        if not waiting.size:
            waiting = shuffled(keys(), len(fold))
        chosen, waiting = waiting[: training.batch_size], waiting[training.batch_size :]
        module.zero_grad(set_to_none=True)
        seen = 0
        began = time.perf_counter()
        for rows in _draw(fold, study, inputs, keys, chosen):
            for images, labels in _tensors(rows, dataset, inputs, training.micro_batch, device):
                scores = module(images.flatten(0, 1))
                loss = functional.cross_entropy(scores, labels.flatten(), weight=weights, reduction="sum")
                (loss / rows.images.size).backward()  # type: ignore[no-untyped-call]  # torch has no types here
                seen += labels.numel()
        metrics.computed(seen, time.perf_counter() - began)
        flat = [p.grad.cpu().numpy().ravel() for _, p in trainable(module) if p.grad is not None]
        return np.concatenate(flat).astype(np.float64), seen

    return gradient


def _draw(fold: Fold, study: Study, inputs: Inputs, keys: Keys, chosen: NDArray[np.int64]) -> Iterator[_Rows]:
    """The rows of the chosen patients, each image `augmentations` times with a random turn."""
    if not chosen.size:
        return
    counts = np.array([fold.images[patient].size for patient in chosen], np.int64)
    if study.privacy.mechanism != "none" and study.privacy.sampling_rate == 1:
        groups = [
            np.stack([fold.images[patient] for patient in chosen[counts == count]]) for count in np.unique(counts)
        ]
    else:
        picks = choose_one(keys(), counts)
        groups = [np.array([[fold.images[p][i]] for p, i in zip(chosen, picks, strict=True)], np.int64)]
    for images in groups:
        if not inputs.augmentable:
            yield _Rows(images, None)
            continue
        repeated = np.repeat(images, study.training.augmentations, axis=1)
        turns = choose_one(keys(), np.full(repeated.size, TURNS)).reshape(repeated.shape)
        yield _Rows(repeated, turns)


def _tensors(
    rows: _Rows, dataset: Dataset, inputs: Inputs, patients: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs (p, rows, …) and labels (p, rows) of at most `patients` patients at a time."""
    for start in range(0, rows.images.shape[0], patients):
        images = rows.images[start : start + patients]
        turns = None if rows.turns is None else rows.turns[start : start + patients].ravel()
        batch = inputs.batch(images.ravel(), turns)
        labels = torch.from_numpy(dataset.labels[images]).to(device)
        yield batch.reshape(*images.shape, *batch.shape[1:]), labels

"""The gradient of one step: clipped, summed and noised by patient (`local`), or plain (`none`).

Which patients, which image of each, how it is turned, and the noise: all from fresh keys of the operating system
(privacy.md §4). torch's and numpy's generators decide nothing here.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from services.common.documents.study import Study
from services.common.dp.keystream import words
from services.common.dp.noise import DiscreteGaussian, sensitivity_rint, share_scale
from services.common.dp.sampling import choose_one, poisson_sample
from services.common.errors import Reason, ServiceError
from services.hospital_node.clipping import clipped_sum
from services.hospital_node.dataset import Dataset, Fold
from services.hospital_node.inputs import TURNS, Inputs
from services.hospital_node.models import layout, size, trainable

Keys = Callable[[], bytes]
Gradient = Callable[[], tuple[NDArray[np.float64], int]]


@dataclass(frozen=True)
class _Rows:
    """What goes through the model in one step: image, turn (None: as it is) and patient of each row.

    `owner` counts the step's patients 0, 1, … ascending: the rows of one patient lie together.
    """

    images: NDArray[np.int64]
    turns: NDArray[np.int64] | None
    owner: NDArray[np.int64]

    def blocks(self, most: int) -> Iterator["_Rows"]:
        """The same rows, whole patients, at most `most` rows at a time (or one patient); `owner` begins at 0 in each."""
        ends = np.append(np.flatnonzero(np.diff(self.owner)) + 1, self.owner.size)
        start = 0
        while start < self.owner.size:
            stop = max(int(ends[ends > start][0]), int(ends[ends <= start + most].max(initial=0)))
            turns = None if self.turns is None else self.turns[start:stop]
            yield _Rows(self.images[start:stop], turns, self.owner[start:stop] - self.owner[start])
            start = stop


def gradients(module: nn.Module, inputs: Inputs, dataset: Dataset, study: Study, keys: Keys) -> tuple[Gradient, int]:
    """How this study takes a gradient of `module` on the training patients, and how many steps a round has.

    Each call gives the gradient of the mean loss (d) float64, and the rows it took (for this site's eyes only).
    Raises INVALID_DOCUMENT for a mechanism or augmentation that cannot be trained here.
    """
    if not inputs.augmentable and study.training.augmentations > 1:
        raise ServiceError(
            Reason.INVALID_DOCUMENT, "features are computed once an image: set training.augmentations to 1"
        )
    if study.privacy.mechanism == "local":
        return _private(module, inputs, dataset, study, keys), study.privacy.steps_per_round
    if study.privacy.mechanism == "none":
        return _plain(module, inputs, dataset, study, keys), study.training.local_steps
    raise ServiceError(
        Reason.INVALID_DOCUMENT,
        f"privacy.mechanism {study.privacy.mechanism} is not trained by this version: choose local, or none",
    )


def loss_function(study: Study, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Cross-entropy of each row (n). Where the study states PUBLIC class shares π, log π is added to the scores.

    That is logit adjustment (Menon 2021, arXiv:2007.07314): the bare scores, which evaluation uses, then aim at the
    balanced accuracy, and no weight makes one patient's gradient larger than another's.
    """
    shares = study.training.class_frequencies
    shift = torch.tensor(shares, dtype=torch.float64).log().float().to(device) if shares else None

    def loss(scores: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(scores if shift is None else scores + shift, labels, reduction="none")

    return loss


def shuffled(key: bytes, count: int) -> NDArray[np.int64]:
    """A uniform order of 0..count-1 from AES-256-CTR words of `key`."""
    return np.argsort(words(key, 0, count), kind="stable")


def _private(module: nn.Module, inputs: Inputs, dataset: Dataset, study: Study, keys: Keys) -> Gradient:
    """DP-SGD: also a step that sampled nobody has noise, and the divisor is the study's, never the batch's size.

    With q = 1 a patient's gradient is the mean over all its images, else that of one, uniform and secret.
    """
    fold, privacy = dataset.fold("train"), study.privacy
    most = study.training.micro_batch * study.training.augmentations
    everybody = privacy.sampling_rate == 1
    parameters = size(layout(module))
    sensitivity = sensitivity_rint(privacy.scale_bits, privacy.clip, parameters)
    noise = DiscreteGaussian(share_scale(privacy.noise_multiplier, sensitivity, 1, 0))
    device = next(module.parameters()).device
    loss = loss_function(study, device)

    def gradient() -> tuple[NDArray[np.float64], int]:
        chosen = poisson_sample(keys(), len(fold), privacy.sampling_rate)
        rows = _draw(fold, chosen, everybody, study, inputs, keys)
        blocks = _tensors(rows, dataset, inputs, most, device)
        total = clipped_sum(module, loss, blocks, privacy.clip, privacy.scale_bits)
        total += noise.draw(keys(), parameters)  # after the one rounding of the whole sum, in integers
        return total / 2.0**privacy.scale_bits / privacy.expected_batch, rows.images.size

    return gradient


def _plain(module: nn.Module, inputs: Inputs, dataset: Dataset, study: Study, keys: Keys) -> Gradient:
    """Minibatch SGD: patients in a random order, a new one when all were seen; one random image of each."""
    fold, training = dataset.fold("train"), study.training
    device = next(module.parameters()).device
    loss = loss_function(study, device)
    waiting = np.empty(0, np.int64)

    def gradient() -> tuple[NDArray[np.float64], int]:
        nonlocal waiting
        if not waiting.size:
            waiting = shuffled(keys(), len(fold))
        chosen, waiting = waiting[: training.batch_size], waiting[training.batch_size :]
        rows = _draw(fold, chosen, False, study, inputs, keys)
        module.zero_grad(set_to_none=True)
        for images, labels, _ in _tensors(rows, dataset, inputs, training.micro_batch, device):
            (loss(module(images), labels).sum() / rows.images.size).backward()  # type: ignore[no-untyped-call]  # torch
        flat = [p.grad.cpu().numpy().ravel() for _, p in trainable(module) if p.grad is not None]
        return np.concatenate(flat).astype(np.float64), rows.images.size

    return gradient


def _draw(fold: Fold, chosen: NDArray[np.int64], every_image: bool, study: Study, inputs: Inputs, keys: Keys) -> _Rows:
    """All images of the chosen patients, or a secret one of each; each `augmentations` times with a random turn."""
    counts = np.array([fold.images[patient].size for patient in chosen], np.int64)
    if every_image:
        images = np.concatenate([fold.images[patient] for patient in chosen])
        owner = np.repeat(np.arange(chosen.size), counts)
    else:
        picks = choose_one(keys(), counts)
        images = np.array([fold.images[p][i] for p, i in zip(chosen, picks, strict=True)], np.int64)
        owner = np.arange(chosen.size)
    if not inputs.augmentable:
        return _Rows(images, None, owner)
    images, owner = (np.repeat(array, study.training.augmentations) for array in (images, owner))
    return _Rows(images, choose_one(keys(), np.full(images.size, TURNS)), owner)


def _tensors(
    rows: _Rows, dataset: Dataset, inputs: Inputs, most: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Inputs, labels and patients of blocks of about `most` rows."""
    for block in rows.blocks(most):
        labels, owner = torch.from_numpy(dataset.labels[block.images]), torch.from_numpy(block.owner)
        yield inputs.batch(block.images, block.turns), labels.to(device), owner.to(device)

"""What a model sees of an image: normalised pixels, or features of a frozen backbone cached at the site.

Every number depends on one image only (no mean over the data set), so nothing here costs privacy.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from copy import copy
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from services.common.documents.study import BackboneSection, ModelSection
from services.common.errors import Reason, ServiceError
from services.common.store.durable import storing
from services.hospital_node.backbones import BACKBONES, load_backbone
from services.hospital_node.dataset import Dataset, Split
from services.hospital_node.head import Rows, gather

# Mean and spread of skin photographs as the dermoscopy literature prints them: public constants. Taking them from
# the site's own images would cost privacy (privacy.md §5).
PIXEL_MEAN = (0.763, 0.546, 0.570)
PIXEL_SPREAD = (0.15, 0.15, 0.16)

TURNS = 8  # rotations by quarter turns, each also mirrored

_EXTRACT_BATCH = 8  # more images at once no longer fit a core's cache between two layers
_log = logging.getLogger(__name__)


class Inputs(Protocol):
    """Images by index as the model's input."""

    augmentable: bool

    def batch(self, images: NDArray[np.int64], turns: NDArray[np.int64] | None = None) -> Tensor:
        """(n, …) float32 on the device; row i turned by `turns[i]` of 0..TURNS-1."""


class PixelInputs:
    """(n, 3, size, size): pixels about 0 with a spread about 1."""

    augmentable = True

    def __init__(self, dataset: Dataset, device: torch.device) -> None:
        self._dataset = dataset
        self._device = device
        public = (PIXEL_MEAN, PIXEL_SPREAD)
        self._mean, self._spread = (255 * torch.tensor(values, device=device).view(1, 3, 1, 1) for values in public)

    def batch(self, images: NDArray[np.int64], turns: NDArray[np.int64] | None = None) -> Tensor:
        """(n, 3, size, size) float32 on the device."""
        pixels = torch.from_numpy(self._dataset.pixels(images)).to(self._device)
        values = (pixels.permute(0, 3, 1, 2).float() - self._mean) / self._spread
        if turns is None:
            return values.contiguous()
        out = torch.empty_like(values)
        for turn in range(TURNS):
            rows = torch.from_numpy(np.flatnonzero(turns == turn)).to(self._device)
            turned = torch.rot90(values[rows], turn % 4, (2, 3))
            out[rows] = turned.flip(3) if turn >= 4 else turned
        return out


class FeatureInputs:
    """(n, features), each of length 1: a gradient's norm is then at most √2, whatever the image."""

    augmentable = False

    def __init__(self, features: NDArray[np.float32], device: torch.device) -> None:
        self.features = features
        self._features = torch.from_numpy(features).to(device)
        self._whole: dict[str, tuple[Rows, ...]] = {}

    def of_others(self) -> "FeatureInputs":
        """The same numbers for other patients of them: nothing is copied, nothing gathered yet."""
        other = copy(self)
        other._whole = {}
        return other

    def whole(self, split: Split, patients: Sequence[NDArray[np.int64]], labels: NDArray[np.int64]) -> tuple[Rows, ...]:
        """All rows of a split's patients, gathered once: they never change while this object lives."""
        if split not in self._whole:
            self._whole[split] = gather(self.features, labels, patients)
        return self._whole[split]

    def batch(self, images: NDArray[np.int64], turns: NDArray[np.int64] | None = None) -> Tensor:
        """(n, features) float32 on the device. Raises INVALID_DOCUMENT when asked to turn an image."""
        if turns is not None:
            raise ServiceError(Reason.INVALID_DOCUMENT, "features are computed once: set training.augmentations to 1")
        return self._features[torch.from_numpy(images).to(self._features.device)]


def open_inputs(
    dataset: Dataset,
    model: ModelSection,
    device: torch.device,
    backbones: Path | None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Inputs:
    """The inputs of the study's model. Raises INVALID_DATA for a bad image of a backbone's, NOT_FOUND."""
    if dataset.image_size != model.image_size or dataset.classes != model.classes:
        raise ServiceError(Reason.INTERNAL, "the data set was loaded for another study's image size or classes")
    if model.backbone is None:
        return PixelInputs(dataset, device)
    return FeatureInputs(cached_features(dataset, model.backbone, device, backbones, should_stop), device)


def cached_features(
    dataset: Dataset,
    section: BackboneSection,
    device: torch.device,
    backbones: Path | None,
    should_stop: Callable[[], bool] = lambda: False,
) -> NDArray[np.float32]:
    """(images, features) of unit length; each computed once, kept under the state folder by backbone and image digest.

    A stop leaves the rest zero: the caller stops too. Raises INVALID_DATA, NOT_FOUND, STORAGE.
    """
    width = BACKBONES[section.name].features if section.name in BACKBONES else 0
    places = feature_cache(dataset, section)
    out = np.zeros((len(dataset), width), np.float32)
    missing: list[int] = []
    for image, place in enumerate(places):
        stored = _read_feature(place, width)
        if stored is None:
            missing.append(image)
        else:
            out[image] = stored
    if not missing:
        return out
    _log.info("computing the features of %d of %d images with %s", len(missing), len(dataset), section.name)
    network, kind = load_backbone(section, backbones).to(device), BACKBONES[section.name]
    for start in range(0, len(missing), _EXTRACT_BATCH):
        if should_stop():
            break
        rows = missing[start : start + _EXTRACT_BATCH]
        pixels = torch.from_numpy(dataset.pixels(np.array(rows, np.int64))).to(device)
        with torch.inference_mode():
            values = (pixels.permute(0, 3, 1, 2).float() - kind.pixel_mean) / kind.pixel_scale
            found = unit_features(network, values, section.views).cpu().numpy().astype("<f4")
        for row, feature in zip(rows, found, strict=True):
            write_feature(places[row], feature.tobytes())
        out[rows] = found
    return out


def unit_features(network: nn.Module, images: Tensor, views: int) -> Tensor:
    """(n, features) of length 1: the mean over `views` mirrored copies of each image (n, 3, h, w)."""
    mirrored: tuple[list[int], ...] = ([], [3], [2], [2, 3])
    found = torch.stack([network(torch.flip(images, axes)) for axes in mirrored[:views]]).mean(0)
    return nn.functional.normalize(found, dim=1)


def feature_cache(dataset: Dataset, section: BackboneSection) -> list[Path]:
    """Where each image's features lie under the state folder: by backbone, views, size and the image's digest."""
    cache = dataset.state / "features" / f"{section.name}-{section.sha256}-{dataset.image_size}-{section.views}"
    return [cache / f"{dataset.image_digest(image).hex()}.f32" for image in range(len(dataset))]


def _read_feature(path: Path, width: int) -> NDArray[np.float32] | None:
    """The numbers of one image, None where they are missing or damaged."""
    try:
        blob = path.read_bytes()
    except FileNotFoundError:
        return None
    data, digest = blob[: 4 * width], blob[4 * width :]
    return np.frombuffer(data, "<f4") if hashlib.sha256(data).digest() == digest else None


def write_feature(path: Path, data: bytes) -> None:
    """Numbers and their SHA-256. No fsync, they can be computed again; the digest finds what a crash tore."""
    partial = path.with_suffix(".new")
    with storing(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data + hashlib.sha256(data).digest())
        partial.rename(path)

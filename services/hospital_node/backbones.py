"""Frozen public feature extractors. Their weights lie at the site, found by SHA-256, and never travel.

BatchNorm uses its stored statistics for ever, so one image never changes another's features. It is then a factor and a
shift for each channel, and folded into the convolution before it: the same features to 1e-6 in a third of the time.
"""

import hashlib
import pickle  # for the name of the error with which torch refuses what is no tensor; nothing is unpickled here
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from services.common.documents.study import BackboneSection
from services.common.errors import Reason, ServiceError

# EfficientNet-Lite0: (repeats, kernel, stride, expansion, channels in, channels out) of each stage.
# Tan and Le 2019 (arXiv:1905.11946) without squeeze-excitation and with ReLU6, as google's "lite" variant has it.
_LITE0 = (
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
)

_TEXTURED = (2, 3, 4, 5, 6)  # stages whose texture is a feature: the first two made the model worse
_LEAST_USUAL = 1e-6  # a channel whose γ is zero is constant, not infinitely lively


class _SameConv(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding (the odd pixel right and below), as the weights were trained."""

    def forward(self, images: Tensor) -> Tensor:
        """(n, c, h, w) → (n, c', ⌈h/stride⌉, ⌈w/stride⌉)."""
        pads: list[int] = []
        for axis in (3, 2):
            side, kernel, stride = images.shape[axis], self.kernel_size[axis - 2], self.stride[axis - 2]
            missing = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            pads += [missing // 2, missing - missing // 2]
        left, right, top, bottom = pads
        even = (left, top) == (right, bottom)  # the convolution itself can pad evenly, which saves a copy of the map
        return functional.conv2d(
            images if even else functional.pad(images, pads),
            self.weight,
            self.bias,
            self.stride,
            (top, left) if even else 0,
            self.dilation,
            self.groups,
        )


def _conv(before: int, after: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return _SameConv(before, after, kernel, stride, groups=groups, bias=False)


def _norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=1e-3)


class _InvertedResidual(nn.Module):
    """Expand, depthwise convolution, project; names as in the published weights file."""

    def __init__(self, kernel: int, stride: int, expansion: int, before: int, after: int) -> None:
        super().__init__()
        inner = before * expansion
        if expansion != 1:
            self._expand_conv, self._bn0 = _conv(before, inner, 1), _norm(inner)
        self._depthwise_conv, self._bn1 = _conv(inner, inner, kernel, stride, groups=inner), _norm(inner)
        self._project_conv, self._bn2 = _conv(inner, after, 1), _norm(after)
        self._expands, self._skips = expansion != 1, stride == 1 and before == after

    def forward(self, images: Tensor) -> Tensor:
        """(n, before, h, w) → (n, after, h', w')."""
        out = functional.relu6(self._bn0(self._expand_conv(images))) if self._expands else images
        out = functional.relu6(self._bn1(self._depthwise_conv(out)))
        projected: Tensor = self._bn2(self._project_conv(out))
        return projected + images if self._skips else projected


class EfficientNetLite0(nn.Module):
    """(n, 3, h, w) → (n, 1280), the mean of the last feature map over the image."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _conv(3, 32, 3, 2), _norm(32)
        blocks: list[nn.Module] = []
        for repeats, kernel, stride, expansion, before, after in _LITE0:
            for again in range(repeats):
                blocks.append(
                    _InvertedResidual(kernel, 1 if again else stride, expansion, after if again else before, after)
                )
        self._blocks = nn.Sequential(*blocks)
        self._conv_head, self._bn1 = _conv(320, 1280, 1), _norm(1280)

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, h, w), values (x − 127) / 128 → (n, 1280)."""
        out = functional.relu6(self._bn0(self._conv_stem(images)))
        out = functional.relu6(self._bn1(self._conv_head(self._blocks(out))))
        return out.mean((2, 3))

    def freeze(self) -> None:
        """Once the weights are loaded: nothing changes any more, so each norm goes into the convolution before it."""
        self.eval().requires_grad_(requires_grad=False)
        for part in list(self.modules()):
            before = ""
            for name, layer in list(part.named_children()):
                if isinstance(layer, nn.BatchNorm2d):
                    setattr(part, before, fuse_conv_bn_eval(getattr(part, before), layer))
                    setattr(part, name, nn.Identity())
                before = name
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's own stubs leave it out


class EfficientNetLite0Texture(EfficientNetLite0):
    """(n, 3, h, w) → (n, 744): how a stage's channels vary over the image, the last five stages, each of length 1.

    A channel's standard deviation over the image is divided by the one that the BatchNorms expect of photographs (√Σγ²
    over the blocks that a stage adds up), then the mean over the stage's channels is taken off. So what all photographs
    have in common, and how rich in contrast one is, are gone by public numbers alone: a function of one image.
    """

    def __init__(self) -> None:
        super().__init__()
        for stage in _TEXTURED:
            self.register_buffer(f"_usual{stage}", torch.ones(_LITE0[stage][-1]), persistent=False)

    @torch.no_grad()
    def freeze(self) -> None:
        """As above; the norms' γ are kept first."""
        first, blocks = 0, list(self._blocks.children())
        for stage, (repeats, *_) in enumerate(_LITE0):
            if stage in _TEXTURED:
                squares = [block.get_parameter("_bn2.weight").square() for block in blocks[first : first + repeats]]
                usual = torch.stack(squares).sum(0).sqrt()
                self.get_buffer(f"_usual{stage}").copy_(usual.clamp_min(_LEAST_USUAL))
            first += repeats
        super().freeze()

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, h, w), values (x − 127) / 128 → (n, 744)."""
        maps, first, found = functional.relu6(self._bn0(self._conv_stem(images))), 0, []
        for stage, (repeats, *_) in enumerate(_LITE0):
            maps = self._blocks[first : first + repeats](maps)
            first += repeats
            if stage not in _TEXTURED:
                continue
            spread = (maps - maps.mean((2, 3), keepdim=True)).square().mean((2, 3)).sqrt()
            relative = spread / self.get_buffer(f"_usual{stage}")
            found.append(functional.normalize(relative - relative.mean(1, keepdim=True), dim=1))
        return torch.cat(found, dim=1)


@dataclass(frozen=True)
class BackboneKind:
    """An entry of the registry: the network without its classifier, and how it wants its pixels."""

    make: Callable[[], EfficientNetLite0]
    features: int
    pixel_mean: float
    pixel_scale: float
    classifier_prefix: str


BACKBONES = {
    "efficientnet-lite0": BackboneKind(EfficientNetLite0, 1280, 127.0, 128.0, "_fc."),
    "efficientnet-lite0-texture": BackboneKind(EfficientNetLite0Texture, 744, 127.0, 128.0, "_fc."),
}
"""Both read the same weights file."""


def load_backbone(section: BackboneSection, folder: Path | None) -> nn.Module:
    """The frozen network with the weights file of that SHA-256 in `folder`. Raises NOT_FOUND, INVALID_DATA."""
    if section.name not in BACKBONES:
        known = ", ".join(sorted(BACKBONES))
        raise ServiceError(
            Reason.INVALID_DOCUMENT, f"backbone {section.name!r} is not installed here: choose one of {known}"
        )
    path = find_weights(section.sha256, folder)
    kind = BACKBONES[section.name]
    with torch.random.fork_rng(devices=[]):
        network = kind.make()
    stored = {name: t for name, t in read_tensors(path).items() if not name.startswith(kind.classifier_prefix)}
    try:
        network.load_state_dict(stored, strict=True)
    except RuntimeError as error:
        detail = str(error).splitlines()[-1].strip()
        raise ServiceError(
            Reason.INVALID_DATA, f"{path} does not hold the weights of {section.name} ({detail}): correct the study"
        ) from None
    network.freeze()
    return network


def find_weights(sha256: str, folder: Path | None) -> Path:
    """The file in `folder` with this SHA-256, whatever its name. Raises NOT_FOUND."""
    files = sorted(p for p in folder.iterdir() if p.is_file()) if folder is not None and folder.is_dir() else []
    for path in files:
        with path.open("rb") as source:
            if hashlib.file_digest(source, "sha256").hexdigest() == sha256:
                return path
    raise ServiceError(
        Reason.NOT_FOUND,
        f"no file in the backbones folder {folder} has SHA-256 {sha256}: put the study's weights file there "
        "(`backbones` in this site's configuration names the folder)",
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors only: a pickle that holds anything else is refused by torch's own loader."""
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ServiceError(Reason.INVALID_DATA, f"{path} holds no plain tensors ({error}): fetch it again") from None
    if not isinstance(stored, dict) or not all(isinstance(t, Tensor) for t in stored.values()):
        raise ServiceError(Reason.INVALID_DATA, f"{path} holds no plain tensors: fetch the weights file itself")
    return stored

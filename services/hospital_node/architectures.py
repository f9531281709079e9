"""The registry of architectures. No code travels: a study names an entry that is installed at every site.

Rules for every entry: no statistic over a batch (a patient would reach the others' gradients), nothing in place
(it overwrites what gradient hooks need, pytorch#61519), no dropout (its masks would come from torch's generator,
P-8), and only layers of which Opacus has per-sample gradients. Torchvision's networks are taken as they are but for
that; tensor names stay theirs, so that its weights can be converted (`STORED_NAMES`).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from services.common.documents.study import ModelSection
from services.common.errors import Reason, ServiceError
from services.hospital_node.backbones import BACKBONES

_WIDTHS = (16, 32, 32)  # channels of small-cnn
_MIDDLE, _RIM = 0.25, 0.42  # radii, in sides of the image
_SMALLEST = 12  # below it the last map has no pixel that is neither middle nor rim
CENTRE_STEP = (
    1 / 16
)  # of the centre in a unit of its own numbers: with it the server's usual rate follows in ten rounds
FEATURE_LENGTH = 3.0  # so that little of a clipped gradient is the bias's
_schemas: list[Any] = []  # keeps torch.library objects alive; without them the schemas vanish


class SmallCnn(nn.Module):
    """A few thousand parameters for images of 28 to 64 px: little to train means little noise under DP.

    Three convolutions with GroupNorm, then for each channel the mean over the middle of the image minus the mean
    over its rim: how the lesion differs from the skin around it. The difference takes the light and the camera out,
    and the part that all images share, on which a clipped gradient would be wasted.
    """

    def __init__(self, classes: int, image_size: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for depth, width in enumerate(_WIDTHS):
            stride = 2 if depth == 0 and image_size > 40 else 1
            layers += [nn.Conv2d(before, width, 3, stride=stride, padding=1), nn.GroupNorm(4, width), nn.ReLU()]
            layers += [nn.AvgPool2d(2)] if depth < len(_WIDTHS) - 1 else []
            before = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(before, classes)

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, size, size) → scores (n, classes)."""
        maps = self.features(images)
        scores: Tensor = self.classifier((maps * _middle_minus_rim(maps)).sum((2, 3)))
        return scores


class CentredHead(nn.Module):
    """A linear classifier on what is particular to an image: its features less their centre, at one length.

    Most of a feature vector is common to all photographs of skin, and a clipped gradient is wasted on it as on a bias.
    The centre is found under the same noise as the weights (`clipped_centred_sum`); CENTRE_STEP · `centre` is the
    point itself, so that server steps suit both.
    """

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.centre = nn.Parameter(torch.zeros(features))
        self.weight = nn.Parameter(torch.zeros(classes, features))
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, features: Tensor) -> Tensor:
        """(n, features) → scores (n, classes)."""
        own = nn.functional.normalize(features - CENTRE_STEP * self.centre, dim=1) * FEATURE_LENGTH
        return nn.functional.linear(own, self.weight, self.bias)


class _Residual(nn.Module):
    """A torchvision block with its skip added out of place. `layer_scale`: a factor for each channel, or nothing."""

    def __init__(self, block: nn.Module, skips: bool, layer_scale: Tensor | None = None) -> None:
        super().__init__()
        self.block, self._skips = block, skips
        if layer_scale is not None:  # as a depthwise convolution Opacus knows its gradient
            width = len(layer_scale)
            self.layer_scale = nn.Conv2d(width, width, 1, groups=width, bias=False)
            with torch.no_grad():
                self.layer_scale.weight.copy_(layer_scale.reshape(width, 1, 1, 1))
        self._scaled = layer_scale is not None

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) → (n, c', h', w')."""
        out: Tensor = self.block(x)
        if self._scaled:
            out = self.layer_scale(out)
        return out + x if self._skips else out


class _ChannelNorm(nn.Module):
    """LayerNorm over the channels of each pixel, with the layer itself as a child that Opacus knows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, maps: Tensor) -> Tensor:
        """(n, c, h, w) → the same."""
        normed: Tensor = self.norm(maps.permute(0, 2, 3, 1))
        back: Tensor = normed.permute(0, 3, 1, 2)
        return back


@dataclass(frozen=True)
class Entry:
    """One architecture: how it is made, and what a person should know before choosing it."""

    make: Callable[[ModelSection], nn.Module]
    note: str
    torchvision: bool = False


def build(model: ModelSection) -> nn.Module:
    """The trainable module of the study's architecture. Raises INVALID_DOCUMENT.

    Its weights mean nothing until `load_vector`. HEADS take features, the others (n, 3, size, size).
    """
    if model.architecture not in REGISTRY:
        raise _bad_study(
            f"model.architecture {model.architecture!r} is not installed here: choose one of "
            f"{', '.join(REGISTRY)}, or upgrade this site"
        )
    if model.backbone is not None and model.architecture not in HEADS:
        raise _bad_study(f"{model.architecture} takes no model.backbone: remove it or choose {' or '.join(HEADS)}")
    with torch.random.fork_rng(devices=[]):  # a module's default weights are drawn: leave torch's generator alone
        return REGISTRY[model.architecture].make(model)


def stored_name(name: str) -> str:
    """The name that torchvision's own state_dict has for a tensor of ours."""
    return re.sub(r"\.norm\.(weight|bias)$", r".\1", name.removesuffix(".weight") if "layer_scale" in name else name)


def import_torchvision() -> Any:
    """torchvision, on a torch built without CUDA too.

    There torchvision's own registrations name operators that its missing library would have defined
    (`operator torchvision::nms does not exist`), so the two schemas are defined first.
    """
    if not _schemas:
        library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]  # torch has no types here
        for name in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, name):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]  # as above
        _schemas.append(library)
    import torchvision

    return torchvision


def _middle_minus_rim(maps: Tensor) -> Tensor:
    """Weights (h, w) for maps (n, c, h, w): +1 shared by the middle, −1 by the rim, 0 between."""
    rows, columns = (
        (torch.arange(side, device=maps.device, dtype=maps.dtype) + 0.5) / side - 0.5 for side in maps.shape[2:]
    )
    square = rows[:, None] ** 2 + columns[None, :] ** 2  # of the radius: ONNX has no hypot
    middle, rim = (square < _MIDDLE**2).to(maps.dtype), (square > _RIM**2).to(maps.dtype)
    return middle / middle.sum() - rim / rim.sum()


def _small_cnn(model: ModelSection) -> nn.Module:
    if model.image_size < _SMALLEST:
        raise _bad_study(f"small-cnn needs model.image_size of at least {_SMALLEST}, not {model.image_size}: raise it")
    return SmallCnn(len(model.classes), model.image_size)


def _resnet(depths: tuple[int, ...], bottleneck: bool) -> Callable[[ModelSection], nn.Module]:
    """torchvision's ResNet with GroupNorm of 16 groups and residual adds that hooks survive."""

    def make(model: ModelSection) -> nn.Module:
        resnet = import_torchvision().models.resnet

        class Block(resnet.BasicBlock):  # type: ignore[name-defined,misc]  # the base is only known after the import
            def forward(self, x: Tensor) -> Tensor:
                out = torch.relu(self.bn1(self.conv1(x)))
                out = self.bn2(self.conv2(out))
                return torch.relu(out + (x if self.downsample is None else self.downsample(x)))

        class Bottleneck(resnet.Bottleneck):  # type: ignore[name-defined,misc]  # as above
            def forward(self, x: Tensor) -> Tensor:
                out = torch.relu(self.bn1(self.conv1(x)))
                out = torch.relu(self.bn2(self.conv2(out)))
                out = self.bn3(self.conv3(out))
                return torch.relu(out + (x if self.downsample is None else self.downsample(x)))

        module: nn.Module = resnet.ResNet(
            Bottleneck if bottleneck else Block,
            list(depths),
            num_classes=len(model.classes),
            norm_layer=lambda width: nn.GroupNorm(16, width),
        )
        return _tamed(module)

    return make


def _torchvision(name: str, smallest: int, **options: Any) -> Callable[[ModelSection], nn.Module]:
    """Any other network of torchvision's, by the name of its maker."""

    def make(model: ModelSection) -> nn.Module:
        if model.image_size < smallest:
            raise _bad_study(
                f"{model.architecture} needs model.image_size of at least {smallest}, not {model.image_size}: raise it"
            )
        maker = getattr(import_torchvision().models, name)
        return _tamed(maker(weights=None, num_classes=len(model.classes), **options))

    return make


def _tamed(module: nn.Module) -> nn.Module:
    """Nothing in place, nothing dropped at random, residual adds out of place; names as they were."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if hasattr(child, "use_res_connect"):
                setattr(parent, name, _Residual(child.block, bool(child.use_res_connect)))  # type: ignore[arg-type]  # an nn.Module
            elif type(child).__name__ == "CNBlock":
                setattr(parent, name, _Residual(child.block, True, child.layer_scale.detach()))  # type: ignore[arg-type,operator]  # as above
    for part in module.modules():
        if hasattr(part, "inplace"):
            setattr(part, "inplace", False)  # noqa: B010  # activations of many types
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return module


def _group_norm(width: int) -> nn.GroupNorm:
    """As many groups as divide `width`, at most 16, with at least 8 channels each: one pixel has a spread too."""
    groups = max(g for g in range(1, 17) if width % g == 0 and (g == 1 or width // g >= 8))
    return nn.GroupNorm(groups, width)


def _head(make: Callable[[int, int], nn.Module]) -> Callable[[ModelSection], nn.Module]:
    """A classifier (features, classes) on a frozen backbone, which stays at the site."""

    def made(model: ModelSection) -> nn.Module:
        if model.backbone is None or model.backbone.name not in BACKBONES:
            raise _bad_study(f"{model.architecture} needs model.backbone.name, one of: {', '.join(sorted(BACKBONES))}")
        return make(BACKBONES[model.backbone.name].features, len(model.classes))

    return made


def _bad_study(sentence: str) -> ServiceError:
    return ServiceError(Reason.INVALID_DOCUMENT, sentence)


_LARGE = "no DP, or very many patients"
REGISTRY: dict[str, Entry] = {
    "centred-head": Entry(_head(CentredHead), "best under DP: `shared`, q = 1, features cached once"),
    "linear-head": Entry(_head(nn.Linear), "under DP, `shared` or `local`: q = 1, features cached once"),
    "small-cnn": Entry(_small_cnn, "under DP without any pretrained weights, 28 to 64 px"),
    "mobilenet-v3-small-gn": Entry(_torchvision("mobilenet_v3_small", 32, norm_layer=_group_norm), _LARGE, True),
    "mobilenet-v3-large-gn": Entry(_torchvision("mobilenet_v3_large", 32, norm_layer=_group_norm), _LARGE, True),
    "efficientnet-b0-gn": Entry(_torchvision("efficientnet_b0", 32, norm_layer=_group_norm), _LARGE, True),
    "resnet18-gn": Entry(_resnet((2, 2, 2, 2), bottleneck=False), _LARGE, True),
    "resnet34-gn": Entry(_resnet((3, 4, 6, 3), bottleneck=False), _LARGE, True),
    "resnet50-gn": Entry(_resnet((3, 4, 6, 3), bottleneck=True), _LARGE, True),
    "convnext-tiny": Entry(_torchvision("convnext_tiny", 32, norm_layer=_ChannelNorm), _LARGE, True),
}
"""Every architecture that a study may name."""
HEADS = ("centred-head", "linear-head")
"""Those that need `model.backbone`."""

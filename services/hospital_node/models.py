"""The registry of architectures, and the model file. No code travels: a study names an entry.

Never BatchNorm in training mode nor any statistic over a batch (a patient would reach the others' gradients).
The flat vector of a module is its trainable tensors in ascending name order; the model file is that vector as
safetensors, F32, contiguous in the same order and nothing else.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from services.common.documents.study import ModelSection
from services.common.errors import Reason, ServiceError
from services.common.store.durable import replace_file
from services.hospital_node.backbones import BACKBONES

Layout = tuple[tuple[str, tuple[int, ...]], ...]

_WIDTHS = (16, 32, 32)  # channels of small-cnn
_MIDDLE, _RIM = 0.25, 0.42  # radii, in sides of the image
_SMALLEST = 12  # below it the last map has no pixel that is neither middle nor rim
_MAX_HEADER = 2**20
_schemas: list[Any] = []  # keeps torch.library objects alive: the schemas vanish with them


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


def _middle_minus_rim(maps: Tensor) -> Tensor:
    """Weights (h, w) for maps (n, c, h, w): +1 shared by the middle, −1 by the rim, 0 between."""
    rows, columns = (
        (torch.arange(side, device=maps.device, dtype=maps.dtype) + 0.5) / side - 0.5 for side in maps.shape[2:]
    )
    radius = torch.hypot(rows[:, None], columns[None, :])
    middle, rim = (radius < _MIDDLE).to(maps.dtype), (radius > _RIM).to(maps.dtype)
    return middle / middle.sum() - rim / rim.sum()


def _small_cnn(model: ModelSection) -> nn.Module:
    if model.image_size < _SMALLEST:
        raise _bad_study(f"small-cnn needs model.image_size of at least {_SMALLEST}, not {model.image_size}: raise it")
    return SmallCnn(len(model.classes), model.image_size)


def _resnet18_gn(model: ModelSection) -> nn.Module:
    """torchvision's ResNet-18 with GroupNorm and a residual add that hooks survive."""
    resnet = import_torchvision().models.resnet

    class Block(resnet.BasicBlock):  # type: ignore[name-defined,misc]  # the base is only known after the import
        """BasicBlock without in-place operations: they overwrite what backward hooks need (pytorch#61519)."""

        def forward(self, x: Tensor) -> Tensor:
            """(n, c, h, w) → (n, c', h', w')."""
            out = torch.relu(self.bn1(self.conv1(x)))
            out = self.bn2(self.conv2(out))
            return torch.relu(out + (x if self.downsample is None else self.downsample(x)))

    module: nn.Module = resnet.ResNet(
        Block, [2, 2, 2, 2], num_classes=len(model.classes), norm_layer=lambda width: nn.GroupNorm(16, width)
    )
    for part in module.modules():
        if isinstance(part, nn.ReLU):
            part.inplace = False
    return module


def _linear_head(model: ModelSection) -> nn.Module:
    """A linear classifier on the features of a frozen backbone, which stays at the site."""
    if model.backbone is None or model.backbone.name not in BACKBONES:
        raise _bad_study(f"linear-head needs model.backbone.name, one of: {', '.join(sorted(BACKBONES))}")
    return nn.Linear(BACKBONES[model.backbone.name].features, len(model.classes))


REGISTRY: dict[str, Callable[[ModelSection], nn.Module]] = {
    "small-cnn": _small_cnn,
    "resnet18-gn": _resnet18_gn,
    "linear-head": _linear_head,
}


def build(model: ModelSection) -> nn.Module:
    """The trainable module of the study's architecture. Raises INVALID_DOCUMENT.

    Its weights mean nothing until `load_vector`. `linear-head` takes features, the others (n, 3, size, size).
    """
    if model.architecture not in REGISTRY:
        raise _bad_study(
            f"model.architecture {model.architecture!r} is not installed here: choose one of "
            f"{', '.join(REGISTRY)}, or upgrade this site"
        )
    if model.backbone is not None and model.architecture != "linear-head":
        raise _bad_study(f"{model.architecture} takes no model.backbone: remove it or choose linear-head")
    with torch.random.fork_rng(devices=[]):  # a module's default weights are drawn: leave torch's generator alone
        return REGISTRY[model.architecture](model)


def initial_vector(model: ModelSection, seed: int) -> NDArray[np.float32]:
    """Public, reproducible v0 weights (d) for `study draft`; a torch generator is used here and nowhere else.

    Convolutions: He. Classifier: zero, so the first prediction is uniform. Norms: weight 1, bias 0.
    """
    module = build(model)
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_in", nonlinearity="relu", generator=generator)
        elif isinstance(part, nn.Linear):
            nn.init.zeros_(part.weight)
        if isinstance(part, nn.Conv2d | nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)
    return trainable_vector(module)


def trainable(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The trainable tensors, names ascending: the order of every flat vector."""
    return sorted((name, p) for name, p in module.named_parameters() if p.requires_grad)


def layout(module: nn.Module) -> Layout:
    """(name, shape) of the trainable tensors, names ascending."""
    return tuple((name, tuple(p.shape)) for name, p in trainable(module))


def size(shapes: Layout) -> int:
    """d: how many numbers the tensors hold."""
    return sum(int(np.prod(shape, dtype=np.int64)) for _, shape in shapes)


def trainable_vector(module: nn.Module) -> NDArray[np.float32]:
    """All trainable numbers (d), tensors in ascending name order."""
    parts = [p.detach().cpu().numpy().astype("<f4").ravel() for _, p in trainable(module)]
    return np.concatenate(parts)


def load_vector(module: nn.Module, vector: NDArray[Any]) -> None:
    """Put the flat vector (d) into the module as float32. Raises INVALID_DATA when the length differs."""
    wanted = size(layout(module))
    if vector.shape != (wanted,):
        raise _bad_model(f"the model has {vector.size} numbers, this architecture {wanted}: check model.parameters")
    start = 0
    with torch.no_grad():
        for _, parameter in trainable(module):
            stop = start + parameter.numel()
            values = torch.from_numpy(np.ascontiguousarray(vector[start:stop], np.float32))
            parameter.copy_(values.reshape(parameter.shape))
            start = stop


def write_model_file(path: Path, shapes: Layout, vector: NDArray[np.float32]) -> bytes:
    """Write the model file whole or not at all; its SHA-256. Raises INVALID_DATA, STORAGE."""
    if vector.shape != (size(shapes),):
        raise _bad_model(f"{vector.size} numbers do not fill tensors of {size(shapes)}")
    head, data = _header(shapes), np.ascontiguousarray(vector, "<f4")
    replace_file(path, [head, data.data])
    digest = hashlib.sha256(head)
    digest.update(data.data)
    return digest.digest()


def read_model_file(path: Path, shapes: Layout) -> NDArray[np.float32]:
    """The flat vector (d) of a model file that has exactly these tensors. Raises INVALID_DATA.

    The header's text may be any JSON with the same meaning (who wrote it chose the spaces); the data may not.
    """
    with path.open("rb") as source:
        length = int.from_bytes(source.read(8), "little")
        if not 2 <= length <= _MAX_HEADER:
            raise _bad_model(f"{path} is not a safetensors file: fetch it again")
        try:
            stated = json.loads(source.read(length))
        except ValueError:
            raise _bad_model(f"{path} is not a safetensors file: fetch it again") from None
        data = source.read()
    expected = json.loads(_header(shapes)[8:])
    if not isinstance(stated, dict) or {k: v for k, v in stated.items() if k != "__metadata__"} != expected:
        raise _bad_model(f"{path} holds other tensors than this architecture's {len(shapes)}: check the study's model")
    if len(data) != 4 * size(shapes):
        raise _bad_model(f"{path} has {len(data)} bytes of data, {4 * size(shapes)} are needed: fetch it again")
    return np.frombuffer(data, "<f4").astype(np.float32)


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


def _header(shapes: Sequence[tuple[str, tuple[int, ...]]]) -> bytes:
    """Length and JSON of a safetensors file whose tensors lie one after the other, padded to 8 bytes."""
    entries: dict[str, Any] = {}
    start = 0
    for name, shape in sorted(shapes):
        stop = start + 4 * int(np.prod(shape, dtype=np.int64))
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bad_study(sentence: str) -> ServiceError:
    return ServiceError(Reason.INVALID_DOCUMENT, sentence)


def _bad_model(sentence: str) -> ServiceError:
    return ServiceError(Reason.INVALID_DATA, sentence)

"""A model as numbers: its flat vector, the model file, first weights, weights converted from torchvision's.

The flat vector of a module is its trainable tensors in ascending name order; the model file is that vector as
safetensors, F32, contiguous in the same order and nothing else.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from services.common.documents.strategies import CONTROL
from services.common.documents.study import ModelSection
from services.common.errors import Reason, ServiceError
from services.common.store.durable import replace_file
from services.hospital_node.architectures import CentredHead, build, stored_name
from services.hospital_node.backbones import read_tensors

Layout = tuple[tuple[str, tuple[int, ...]], ...]

_MAX_HEADER = 2**20


def initial_vector(model: ModelSection, seed: int) -> NDArray[np.float32]:
    """Public, reproducible v0 weights (d) for `study draft`; a torch generator is used here and nowhere else.

    Convolutions and inner linear layers: He. The classifier: zero, so the first prediction is uniform. Norms: weight
    1, bias 0. Layer scales stay as the architecture has them. A centred head is all zeros.
    """
    module = build(model)
    if isinstance(module, CentredHead):
        return trainable_vector(module)
    generator = torch.Generator().manual_seed(seed)
    *_, last = (part for part in module.modules() if isinstance(part, nn.Linear))
    for name, part in module.named_modules():
        if name.endswith("layer_scale"):
            continue
        if part is last:
            nn.init.zeros_(part.weight)
        elif isinstance(part, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(part.weight, mode="fan_in", nonlinearity="relu", generator=generator)
        if isinstance(part, nn.Conv2d | nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)
    return trainable_vector(module)


def converted_vector(model: ModelSection, weights: Path, seed: int) -> tuple[NDArray[np.float32], list[str]]:
    """v0 (d) from a torchvision state_dict file, and the tensors that it did not fill (those keep first weights).

    `weights` is read with weights_only. A classifier of another number of classes is not taken. Where torchvision
    has BatchNorm, its factors become GroupNorm's; its running statistics have no place. Raises INVALID_DATA where the
    file is another architecture's.
    """
    module = build(model)
    if isinstance(module, CentredHead):
        raise _bad_model("centred-head has no counterpart in torchvision: draft the study without such a file")
    load_vector(module, initial_vector(model, seed))
    stored = read_tensors(weights)
    left: list[str] = []
    *_, last = (name for name, part in module.named_modules() if isinstance(part, nn.Linear))
    with torch.no_grad():
        for name, parameter in trainable(module):
            given = stored.get(stored_name(name))
            if given is not None and given.numel() == parameter.numel():
                parameter.copy_(given.reshape(parameter.shape))
            elif name.startswith(last):
                left.append(name)
            else:
                raise _bad_model(
                    f"{weights} has no tensor {stored_name(name)} for {model.architecture}: give its own file"
                )
    return trainable_vector(module), left


def trainable(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The trainable tensors, names ascending: the order of every flat vector."""
    return sorted((name, p) for name, p in module.named_parameters() if p.requires_grad)


def layout(module: nn.Module) -> Layout:
    """(name, shape) of the trainable tensors, names ascending."""
    return tuple((name, tuple(p.shape)) for name, p in trainable(module))


@lru_cache(maxsize=8)
def layout_of(model: ModelSection) -> Layout:
    """That of the study's architecture, built once: building one draws all its weights."""
    return layout(build(model))


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

    The header's text may be any JSON with the same meaning (who wrote it chose the spaces); the data may not. A
    control variate behind them (SCAFFOLD) is no part of the model and left out.
    """
    return _read_numbers(path, shapes)[: size(shapes)]


def read_control(path: Path, shapes: Layout) -> NDArray[np.float32]:
    """The server's control variate c (d) in a model file, zeros where there is none. Raises as `read_model_file`."""
    found = _read_numbers(path, shapes)[size(shapes) :]
    return found if found.size else np.zeros(size(shapes), np.float32)


def _read_numbers(path: Path, shapes: Layout) -> NDArray[np.float32]:
    """All numbers of the file: the model's, and those of a control variate if there is one."""
    with path.open("rb") as source:
        length = int.from_bytes(source.read(8), "little")
        if not 2 <= length <= _MAX_HEADER:
            raise _bad_model(f"{path} is not a safetensors file: fetch it again")
        try:
            stated = json.loads(source.read(length))
        except ValueError:
            raise _bad_model(f"{path} is not a safetensors file: fetch it again") from None
        data = source.read()
    control = isinstance(stated, dict) and CONTROL in stated
    whole = (*shapes, (CONTROL, (size(shapes),))) if control else shapes
    expected = json.loads(_header(whole)[8:])
    if not isinstance(stated, dict) or {k: v for k, v in stated.items() if k != "__metadata__"} != expected:
        raise _bad_model(f"{path} holds other tensors than this architecture's {len(shapes)}: check the study's model")
    if len(data) != 4 * size(whole):
        raise _bad_model(f"{path} has {len(data)} bytes of data, {4 * size(whole)} are needed: fetch it again")
    return np.frombuffer(data, "<f4").astype(np.float32)


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


def _bad_model(sentence: str) -> ServiceError:
    return ServiceError(Reason.INVALID_DATA, sentence)

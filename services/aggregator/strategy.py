"""Server steps as functions over one block, and the model file that they rewrite (docs: "Model file").

A model file is a safetensors file of F32 tensors, names ascending, data contiguous and nothing else: the header's
bytes are copied, the data rewritten block by block. Memory O(block).
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from services.common.errors import Reason, ServiceError
from services.common.secagg.encoding import dequantise
from services.common.secagg.ring import I64

F32 = npt.NDArray[np.float32]
Step = Callable[[F32, I64], F32]
_MOST_HEADER = 1 << 22


def fedavg(learning_rate: float, size: int, fraction_bits: int) -> Step:
    """model + learning_rate * Σ / |U| with Σ in integers at 2**fraction_bits (McMahan 2017, equal weights).

    The step raises NOT_FINITE where float32 cannot hold the new model.
    """

    def step(model: F32, sums: I64) -> F32:
        exact = model.astype(np.float64) + dequantise(sums, fraction_bits) * (learning_rate / size)
        with np.errstate(over="ignore"):
            new = exact.astype(np.float32)
        if not np.isfinite(new).all():
            raise ServiceError(Reason.NOT_FINITE, "the new model holds a number beyond float32: the round is rejected")
        return new

    return step


STRATEGIES: dict[str, Callable[[float, int, int], Step]] = {"fedavg": fedavg}
"""A study's `server.strategy` to the maker of its step: (learning rate, |U|, fraction bits)."""


def check_model_file(path: Path, parameters: int) -> int:
    """The offset of the data. Raises INVALID_DATA for any file that is not in the one layout, or of another length."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_MOST_HEADER, size - 8):
            raise _bad(path, "its header length is not possible")
        try:
            header = json.loads(file.read(length))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            end = 0
            for name in sorted(tensors):
                begin, stop = tensors[name]["data_offsets"]
                count = int(np.prod(tensors[name]["shape"], dtype=np.int64))
                if tensors[name]["dtype"] != "F32" or begin != end or stop - begin != 4 * count:
                    raise _bad(path, f"tensor {name!r} is not F32, or not contiguous in the order of names")
                end = stop
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _bad(path, "its header is not that of a safetensors file") from error
    if end != size - 8 - length or end != 4 * parameters:
        raise _bad(path, f"it holds {end // 4} numbers, the study has {parameters}")
    return 8 + length


def rewrite(path: Path, parameters: int, sums: Iterator[I64], step: Step) -> Iterator[bytes]:
    """The bytes of the next model file: the header of `path`, then `step` over its data and the blocks of `sums`."""
    offset = check_model_file(path, parameters)
    with path.open("rb") as file:
        yield file.read(offset)
        for block in sums:
            model = np.frombuffer(file.read(4 * len(block)), "<f4")
            yield step(model, block).astype("<f4").tobytes()


def _bad(path: Path, why: str) -> ServiceError:
    return ServiceError(Reason.INVALID_DATA, f"model file {path.name}: {why}; make it with the study's architecture")

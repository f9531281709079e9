"""The model file, and what the server keeps beside it, rewritten block by block (docs: "Model file"). Memory O(block).

A model file is a safetensors file of F32 tensors, names ascending, data contiguous and nothing else: the header's
bytes are copied. Under scaffold one more tensor, `CONTROL`, may follow (next_model.py). A kept file is u32 length, JSON
of the scalars, then for each block of `BLOCK` parameters its slots one after the other, float64 little-endian. It is a
function of the study and of the sums of accepted rounds, so nobody signs it: `verify` makes it again.
"""

import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from services.aggregator.strategy import F64, Scalars, Step
from services.common.errors import Reason, ServiceError
from services.common.secagg.ring import CHUNK_BYTES, I64

BLOCK = CHUNK_BYTES // 4
_MOST_HEADER = 1 << 22


def check_model_file(path: Path, parameters: int) -> int:
    """The offset of the data. Raises INVALID_DATA for any file that is not in the one layout, or of another length."""
    return read_header(path, parameters)[1]


def read_header(path: Path, numbers: int) -> tuple[dict[str, Any], int]:
    """(the header, the offset of the data) of a file of `numbers` numbers. Raises as `check_model_file`."""
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
    if end != size - 8 - length or end != 4 * numbers:
        raise _bad(path, f"it holds {end // 4} numbers, the study has {numbers}")
    return header, 8 + length


def read_scalars(kept: Path | None) -> Scalars:
    """What a kept file begins with; None = before the first round."""
    if kept is None:
        return Scalars()
    with kept.open("rb") as file:
        return Scalars(**json.loads(file.read(int.from_bytes(file.read(4), "little"))))


def rewrite(
    model: Path, kept: Path | None, parameters: int, sums: Iterator[I64], step: Step
) -> Iterator[tuple[bytes, bytes]]:
    """(bytes of the next model file, bytes of the next kept file), pair by pair, over blocks of `BLOCK` sums.

    `kept` None: all zeros. A step that keeps nothing has an empty kept file. Raises INVALID_DATA, NOT_FINITE.
    """
    offset = check_model_file(model, parameters)
    text = json.dumps(asdict(step.scalars), sort_keys=True).encode() if step.slots else b""
    head = len(text).to_bytes(4, "little") + text if step.slots else b""
    with model.open("rb") as weights, nullcontext() if kept is None else kept.open("rb") as before:
        if before is not None:
            before.seek(4 + int.from_bytes(before.read(4), "little"))
        yield weights.read(offset), head
        for block in sums:
            numbers = np.frombuffer(weights.read(4 * len(block)), "<f4")
            slots: F64 = np.zeros((step.slots, len(block)))
            if before is not None:
                slots[:] = np.frombuffer(before.read(slots.nbytes), "<f8").reshape(slots.shape)
            yield step.run(numbers, slots, block).astype("<f4").tobytes(), slots.astype("<f8").tobytes()


def _bad(path: Path, why: str) -> ServiceError:
    return ServiceError(Reason.INVALID_DATA, f"model file {path.name}: {why}; make it with the study's architecture")

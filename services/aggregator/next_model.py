"""The next model file from the sum of a round, as `conclude` writes it and `verify` makes it again.

Under scaffold (Karimireddy 2020, arXiv:1910.06378, Algorithm 1) the file holds x and behind it the server's control
variate c, so that one digest binds both: x ← x + η_g·ΣΔx/|U| and c ← c + |U|/N·(ΣΔc/|U|) = c + ΣΔc/N, with N the
hospitals of the charter. The study's first model has no c, which is zero there; the last training round publishes its
model without one, since no round follows. Only operations that IEEE 754 rounds correctly.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from services.aggregator.modelfile import BLOCK, read_header, read_scalars, rewrite
from services.aggregator.strategy import F32, Step, server_step
from services.aggregator.tally import class_blocks
from services.common.documents.strategies import CONTROL, has_control
from services.common.documents.study import Study
from services.common.errors import Reason, ServiceError
from services.common.secagg.encoding import LaneTable, dequantise
from services.common.secagg.ring import I64

Pairs = Iterator[tuple[bytes, bytes]]
"""(bytes of the next model file, bytes of the next kept file), pair by pair."""


def next_model(
    study: Study,
    number: int,
    members: int,
    hospitals: int,
    table: LaneTable,
    model: Path,
    kept: Path | None,
    sums: Path,
) -> tuple[bool, Pairs]:
    """(is something kept beside the model?, the two files) of training round `number`.

    `members`: |U|; `hospitals`: N. Raises INVALID_DATA, NOT_FINITE.
    """
    lane = table.lane_class("parameter")
    step = server_step(study, number, members, lane.fraction_bits, read_scalars(kept))
    if has_control(study):
        return False, _with_control(model, table, sums, step, hospitals, last=number == study.rounds)
    return step.slots > 0, rewrite(model, kept, lane.values, class_blocks(table, "parameter", sums, BLOCK), step)


def _with_control(model: Path, table: LaneTable, sums: Path, step: Step, hospitals: int, *, last: bool) -> Pairs:
    lane = table.lane_class("control")
    parameters = lane.values
    with model.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    had = model.stat().st_size - 8 - length > 4 * parameters
    header, offset = read_header(model, parameters * (2 if had else 1))
    if had and CONTROL not in header:
        raise ServiceError(
            Reason.INVALID_DATA, f"model file {model.name} holds more than the study's model and {CONTROL}"
        )
    with model.open("rb") as weights, model.open("rb") as controls:
        weights.seek(offset)
        controls.seek(offset + 4 * parameters)
        yield _header(header, parameters, with_control=not last), b""
        for block in class_blocks(table, "parameter", sums, BLOCK):
            numbers = np.frombuffer(weights.read(4 * len(block)), "<f4")
            yield step.run(numbers, np.zeros((0, len(block))), block).astype("<f4").tobytes(), b""
        for block in () if last else class_blocks(table, "control", sums, BLOCK):
            before = np.frombuffer(controls.read(4 * len(block)), "<f4") if had else np.zeros(len(block), "<f4")
            yield next_control(before, block, lane.fraction_bits, hospitals).astype("<f4").tobytes(), b""


def next_control(before: F32, sums: I64, fraction_bits: int, hospitals: int) -> F32:
    """c + ΣΔc/N of one block. Raises NOT_FINITE where float32 cannot hold it."""
    with np.errstate(over="ignore"):
        after = (before + dequantise(sums, fraction_bits) / hospitals).astype(np.float32)
    if not np.isfinite(after).all():
        raise ServiceError(
            Reason.NOT_FINITE, "the control variate holds a number beyond float32: the round is rejected"
        )
    return after


def _header(header: dict[str, object], parameters: int, *, with_control: bool) -> bytes:
    """The header of the same tensors, with or without c behind them, padded to 8 bytes."""
    tensors = {name: entry for name, entry in header.items() if name != CONTROL}
    if with_control:
        place = [4 * parameters, 8 * parameters]
        tensors[CONTROL] = {"dtype": "F32", "shape": [parameters], "data_offsets": place}
    text = json.dumps(tensors, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text

"""From masked vectors to the sum: ring sums chunk by chunk, minus the released piece sums (protocol.md §4 step 9, §7).

Memory O(chunk) whatever d and n are; chunks are worked on by all cores and leave in order. Integers cannot be
non-finite; what the server step makes of them is checked in `strategy`.
"""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from services.aggregator.vectors import reading
from services.common.errors import Reason, ServiceError
from services.common.secagg.digests import VectorDigest
from services.common.secagg.encoding import LaneTable, check_sentinels, decode_class
from services.common.secagg.ring import CHUNK_BYTES, I64, RingSum, chunk_lengths


def unmask(
    table: LaneTable, vectors: Sequence[Path], pieces: Sequence[Path], workers: int | None = None
) -> Iterator[bytes]:
    """The chunks of Σ = sum of `vectors` - sum of `pieces`, packed, in order; files hold at least `table.total_bytes`.

    Raises STORAGE where a file is shorter than it must be.
    """
    lengths = chunk_lengths(table.total_bytes)
    count = workers or max(1, os.cpu_count() or 1)
    if len(lengths) == 1:
        yield _one_chunk(table, vectors, pieces, 0, lengths[0])
        return
    with ThreadPoolExecutor(count, thread_name_prefix="tally") as pool:
        window: deque[Future[bytes]] = deque()
        for index, length in enumerate(lengths):
            window.append(pool.submit(_one_chunk, table, vectors, pieces, index, length))
            if len(window) > 2 * count:
                yield window.popleft().result()
        while window:
            yield window.popleft().result()


def _one_chunk(table: LaneTable, vectors: Sequence[Path], pieces: Sequence[Path], index: int, length: int) -> bytes:
    total, buffer = (
        RingSum(table.ring, length),
        memoryview(bytearray(length)),
    )  # reused: fresh pages cost more than sums
    for path in vectors:
        total.add(_read_into(buffer, path, index * CHUNK_BYTES))
    for path in pieces:
        total.subtract(_read_into(buffer, path, index * CHUNK_BYTES))
    return total.result()


def _read_into(buffer: memoryview, path: Path, offset: int) -> memoryview:
    with reading(path) as handle:
        count = os.preadv(handle, [buffer], offset)
    if count != len(buffer):
        raise ServiceError(Reason.STORAGE, f"{path.name} ends before byte {offset + len(buffer)}: the volume lost data")
    return buffer


def _read(path: Path, offset: int, length: int) -> memoryview:
    return _read_into(memoryview(bytearray(length)), path, offset)


@dataclass
class SumCheck:
    """Looks at the chunks of Σ as they pass: digest, sentinels, range of every lane, norm of the update.

    `fault` is the first reason to reject the sum, "" while there is none; the digest is taken all the same.
    """

    table: LaneTable
    size: int  # |U|
    fault: str = ""
    square: float = 0.0  # sum of squares of the decoded parameters
    digest: VectorDigest = field(init=False)
    _lane: int = 0

    def __post_init__(self) -> None:
        self.digest = VectorDigest(self.table.total_bytes)

    def add(self, chunk: bytes) -> bytes:
        """Look at the next chunk, and hand it on."""
        self.digest.add(chunk)
        ring = self.table.ring
        if self._lane == 0:
            try:
                check_sentinels(self.table, chunk[: 4 * ring.lane_bytes], self.size)
            except ServiceError as error:
                self.fault = error.detail
        lifted = ring.lift(ring.unpack(chunk))
        first = 0
        for lane in self.table.lanes:
            begin, end = self.table.lane_range(lane.name)
            part = lifted[max(begin - self._lane, 0) : max(end - self._lane, 0)]
            if len(part):
                first += len(part)
                self._check(lane.name, part, lane.bound, lane.fraction_bits)
        self._lane += len(lifted)
        return chunk

    def _check(self, name: str, part: I64, bound: int, fraction_bits: int) -> None:
        highest = max(int(part.max()), -int(part.min()))
        if highest > self.size * bound and not self.fault:
            self.fault = f"a lane of {name} sums to {highest}, at most {self.size}*{bound} is possible"
        if name == "parameter":
            scaled = part.astype(np.float64)
            self.square += float(scaled @ scaled) * 4.0**-fraction_bits

    def check_norm(self, largest: float, parameters: int, fraction_bits: int) -> None:
        """||Σ|| against |U|·C, with one unit of rounding in every coordinate of every hospital (protocol.md §7)."""
        room = self.size * (largest * (1 + 2.0**-20) + 2.0**-fraction_bits * float(np.sqrt(parameters)))
        if self.square > room * room and not self.fault:
            self.fault = f"the sum's norm is {self.square**0.5:.6g}, at most {room:.6g} is possible"


def class_sums(table: LaneTable, name: str, sum_file: Path) -> I64:
    """The decoded int64 sums of a small class, whole."""
    return np.concatenate(list(class_blocks(table, name, sum_file)))


def class_blocks(table: LaneTable, name: str, sum_file: Path, values: int = CHUNK_BYTES // 4) -> Iterator[I64]:
    """The decoded int64 sums of a class, `values` at a time, read from the packed Σ."""
    begin, end = table.lane_range(name)
    step = values * table.lane_class(name).limbs
    width = table.ring.lane_bytes
    for start in range(begin, end, step):
        yield decode_class(table, name, _read(sum_file, start * width, (min(start + step, end) - start) * width))

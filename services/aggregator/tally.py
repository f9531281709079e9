"""From masked vectors to the sum: ring sums chunk by chunk, minus the released piece sums (protocol.md §4 step 9, §7).

Memory O(chunk) whatever d and n are; chunks are worked on by all cores and leave in order. Integers cannot be
non-finite; what the server step makes of them is checked in `strategy`.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from services.aggregator.vectors import reading
from services.common.errors import Reason, ServiceError
from services.common.secagg.digests import VectorDigest
from services.common.secagg.encoding import LaneTable, check_sentinels, decode_class
from services.common.secagg.parallel import WORKERS, in_order
from services.common.secagg.ring import BLOCK_BYTES, CHUNK_BYTES, I64, U8, Ring, RingSum, chunk_lengths


def unmask(
    table: LaneTable, vectors: Sequence[Path], pieces: Sequence[Path], workers: int = WORKERS
) -> Iterator[bytes]:
    """The chunks of Σ = sum of `vectors` - sum of `pieces`, packed, in order; files hold at least `table.total_bytes`.

    Raises STORAGE where a file is shorter than it must be.
    """
    lengths = chunk_lengths(table.total_bytes)
    spare: list[_Summer] = []  # append and pop are atomic between threads

    def one(index: int) -> bytes:
        summer = spare.pop() if spare else _Summer(table.ring)
        chunk = summer.sum(vectors, pieces, index * CHUNK_BYTES, lengths[index])
        spare.append(summer)
        return chunk

    return in_order(one, range(len(lengths)), workers)


class _Summer:
    """What one worker uses again for every chunk: fresh pages would cost more than sums."""

    def __init__(self, ring: Ring) -> None:
        # Sums of 24-bit lanes take eight times their bytes to carry: as a whole chunk they would fill the cache.
        size = BLOCK_BYTES if ring.bits == 24 else CHUNK_BYTES
        self._sum, self._read, self._chunk = (
            RingSum(ring, size),
            np.empty(size, np.uint8),
            np.empty(CHUNK_BYTES, np.uint8),
        )

    def sum(self, vectors: Sequence[Path], pieces: Sequence[Path], start: int, length: int) -> bytes:
        for done in range(0, length, self._sum.size):
            out = self._chunk[done : min(done + self._sum.size, length)]
            total = self._sum if len(out) == self._sum.size else RingSum(self._sum.ring, len(out))
            buffer = self._read[: len(out)]
            for path in vectors:
                total.add(_read_into(buffer, path, start + done))
            for path in pieces:
                total.subtract(_read_into(buffer, path, start + done))
            total.take(out)
        return self._chunk[:length].tobytes()


def _read_into(buffer: U8, path: Path, offset: int) -> U8:
    with reading(path) as handle:
        count = os.preadv(handle, [buffer.data], offset)
    if count != len(buffer):
        raise ServiceError(Reason.STORAGE, f"{path.name} ends before byte {offset + len(buffer)}: the volume lost data")
    return buffer


def _read(path: Path, offset: int, length: int) -> U8:
    return _read_into(np.empty(length, np.uint8), path, offset)


@dataclass
class SumCheck:
    """Looks at the chunks of Σ as they pass: digest, sentinels, range of every lane, norms of update and control.

    `fault` is the first reason to reject the sum, "" while there is none; the digest is taken all the same.
    """

    table: LaneTable
    size: int  # |U|
    fault: str = ""
    squares: dict[str, float] = field(default_factory=dict)  # by class: sum of squares of the decoded values
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
        if name in ("parameter", "control"):
            scaled = part.astype(np.float64)
            self.squares[name] = self.squares.get(name, 0.0) + float(scaled @ scaled) * 4.0**-fraction_bits

    def check_norm(self, name: str, largest: float) -> None:
        """||Σ|| against |U|·C, with one unit of rounding in every coordinate of every hospital (protocol.md §7)."""
        lane, square = self.table.lane_class(name), self.squares.get(name, 0.0)
        room = self.size * (largest * (1 + 2.0**-20) + 2.0**-lane.fraction_bits * float(np.sqrt(lane.values)))
        if square > room * room and not self.fault:
            self.fault = f"the norm of the {name} lanes' sum is {square**0.5:.6g}, at most {room:.6g} is possible"


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

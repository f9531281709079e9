"""Numbers to ring lanes and back (protocol.md §6; privacy.md §3).

Order of lanes: as the table lists its classes, the four sentinels first. A value spread over several
limbs has them side by side, low limb first; the low ones are 0..2^w-1 with w = ⌊log2 bound⌋, the highest
carries the sign.
Dangers: nothing is checked or clipped after noise was added.
Not here: clipping and rounding (rounding), drawing noise (dp.noise), choosing the table (documents.shape).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from services.common.errors import Reason, ServiceError
from services.common.secagg.messages import MAX_LANES, LaneClass
from services.common.secagg.parallel import WORKERS, in_order
from services.common.secagg.ring import CHUNK_BYTES, I64, Ring, chunk_lengths
from services.common.secagg.rounding import F64, ROUNDED, Reals, Rounder

SENTINEL = LaneClass(name="sentinel", values=4, fraction_bits=0, bound=1, limbs=1)
T = TypeVar("T")
_Codes = Callable[[int, int], npt.NDArray[Any]]
"""(first lane of the class, lanes) → as many 8-byte items whose low bits are the lanes."""


@dataclass(frozen=True)
class LaneTable:
    """The classes of lanes of one round, in order, in a ring of `ring_bits`."""

    lanes: tuple[LaneClass, ...]
    ring_bits: int

    @property
    def ring(self) -> Ring:
        """The ring of all lanes. Raises MALFORMED for unknown bits."""
        return Ring(self.ring_bits)

    @property
    def total_lanes(self) -> int:
        """Lanes of one vector."""
        return sum(lane.values * lane.limbs for lane in self.lanes)

    @property
    def total_bytes(self) -> int:
        """Bytes of one packed vector."""
        return self.total_lanes * self.ring.lane_bytes

    def lane_class(self, name: str) -> LaneClass:
        """The class called `name`. Raises NOT_FOUND."""
        for lane in self.lanes:
            if lane.name == name:
                return lane
        raise ServiceError(Reason.NOT_FOUND, f"this round has no lanes called {name!r}")

    def lane_range(self, name: str) -> tuple[int, int]:
        """(first, behind the last) lane of the class called `name`. Raises NOT_FOUND."""
        wanted = self.lane_class(name)
        start = sum(lane.values * lane.limbs for lane in self.lanes[: self.lanes.index(wanted)])
        return start, start + wanted.values * wanted.limbs

    def check(self, maximum_cohort: int) -> None:
        """Raise MALFORMED unless the sum over `maximum_cohort` hospitals can never wrap in any class."""
        half = 2 ** (self.ring.bits - 1) - 1
        if not self.lanes or self.lanes[0] != SENTINEL:
            raise _refused("the first class must be the four sentinels")
        if len({lane.name for lane in self.lanes}) != len(self.lanes):
            raise _refused("two classes have one name")
        for lane in self.lanes:
            if not lane.name or lane.values < 1 or lane.limbs < 1 or lane.bound < 1:
                raise _refused(f"class {lane.name!r} needs a name, values, limbs and a bound of at least 1")
            if maximum_cohort * lane.bound > half:
                raise _refused(
                    f"class {lane.name!r}: {maximum_cohort} hospitals with bound {lane.bound} overflow a ring of "
                    f"{self.ring_bits} bits (at most {half}): fewer hospitals, a smaller bound or a wider ring"
                )
            if lane.limbs > 1 and (lane.bound < 2 or limb_bits(lane) * (lane.limbs - 1) + self.ring_bits > 63):
                raise _refused(f"class {lane.name!r}: {lane.limbs} limbs of bound {lane.bound} do not fit 63 bits")
        if self.total_lanes > MAX_LANES:
            raise _refused(f"{self.total_lanes} lanes, at most {MAX_LANES}")


def limb_bits(lane: LaneClass) -> int:
    """w: bits of each low limb, ⌊log2 bound⌋."""
    return lane.bound.bit_length() - 1


def encode_vector(
    table: LaneTable,
    values: Mapping[str, I64 | Reals],
    take: Callable[[memoryview], T],
    noised: bool = False,
    *,
    workers: int = WORKERS,
) -> Iterator[T]:
    """`take` of each chunk, in order, of x: the packed vector of one hospital, sentinels added.

    `values` has integers (int64) or reals for every other class; reals are rounded as their chunk is made, and take
    one limb. `take` is called by the worker, with memory that is used again when it returns. Raises MALFORMED for a
    missing, unknown or wrongly sized class, OUT_OF_BOUND for a value beyond its bound, NOT_FINITE. With `noised`
    integers are not checked: what noise pushes over the bound wraps in the ring.
    """
    names = {lane.name for lane in table.lanes} - {SENTINEL.name}
    if set(values) != names:
        raise _refused(f"values for {sorted(values)}, the table has {sorted(names)}")
    numbers: dict[str, I64 | Reals] = {**values, SENTINEL.name: np.ones(4, np.int64)}
    for lane in table.lanes:
        _check_class(lane, numbers[lane.name])
    lengths = chunk_lengths(table.total_bytes)
    spare: list[_Encoder] = []  # append and pop are atomic between threads

    def one(chunk: int) -> T:
        encoder = spare.pop() if spare else _Encoder(table, numbers, noised)
        taken = take(encoder.encode(chunk * CHUNK_BYTES, lengths[chunk]))
        spare.append(encoder)
        return taken

    return in_order(one, range(len(lengths)), workers)


def decode_class(table: LaneTable, name: str, packed: Any) -> I64:
    """The int64 sums of the class `name` from its packed lanes: all of them, or any run of whole values.

    Raises MALFORMED for a broken value.
    """
    lane = table.lane_class(name)
    lifted = table.ring.lift(table.ring.unpack(packed))
    if len(lifted) % lane.limbs:
        raise _refused(f"class {name!r}: {len(lifted)} lanes are not whole values of {lane.limbs} limbs")
    limbs = lifted.reshape(-1, lane.limbs)
    total = limbs[:, 0].copy()
    for limb in range(1, lane.limbs):
        total += limbs[:, limb] << np.int64(limb_bits(lane) * limb)
    return total


def dequantise(sums: I64, fraction_bits: int) -> F64:
    """Integer sums back to float64: sums / 2**fraction_bits."""
    return sums.astype(np.float64) * 2.0**-fraction_bits


def check_sentinels(table: LaneTable, packed: Any, cohort_size: int) -> None:
    """Raise CONFLICT unless each sentinel in the packed sum's head (four lanes) is `cohort_size`.

    A wrong one means a wrong sum: a pod's, or a hospital's that lied (P-23).
    """
    found = decode_class(table, SENTINEL.name, packed)
    if len(found) != SENTINEL.values or np.any(found != cohort_size):
        raise ServiceError(
            Reason.CONFLICT, f"the sentinels decode to {found.tolist()}, not to {cohort_size}: the sum is wrong"
        )


def check_range(table: LaneTable, name: str, packed: Any, cohort_size: int) -> None:
    """Raise OUT_OF_BOUND where a lane's sum in `packed` (lanes of `name`) exceeds cohort_size * bound."""
    lane = table.lane_class(name)
    lifted = table.ring.lift(table.ring.unpack(packed))
    largest = int(np.max(np.abs(lifted), initial=0))
    if largest > cohort_size * lane.bound:
        raise ServiceError(
            Reason.OUT_OF_BOUND,
            f"a lane of {name!r} sums to {largest}, {cohort_size} hospitals reach {lane.bound} each",
        )


class _Encoder:
    """Encodes chunk after chunk in memory of its own. One thread."""

    def __init__(self, table: LaneTable, numbers: Mapping[str, I64 | Reals], noised: bool) -> None:
        self._ring, self._chunk = table.ring, np.empty(CHUNK_BYTES, np.uint8)
        self._parts: list[tuple[int, int, _Codes]] = []  # (first lane, behind the last, codes of lanes among them)
        for lane in table.lanes:
            given = numbers[lane.name]
            if isinstance(given, Reals):
                codes: _Codes = Rounder(given, lane.fraction_bits, lane.bound).codes
            else:
                codes = _limbs(lane, given, noised)
            self._parts.append((*table.lane_range(lane.name), codes))

    def encode(self, start: int, length: int) -> memoryview:
        """Bytes start … start + length of the vector, whole lanes; valid until the next call."""
        width = self._ring.lane_bytes
        origin, end = start // width, (start + length) // width
        for first, behind, codes in self._parts:
            for lane in range(max(first, origin), min(behind, end), ROUNDED):
                count = min(ROUNDED, behind - lane, end - lane)
                out = self._chunk[(lane - origin) * width : (lane - origin + count) * width]
                self._ring.pack_into(codes(lane - first, count), out)
        return self._chunk[:length].data


def _limbs(lane: LaneClass, numbers: I64, noised: bool) -> _Codes:
    """The codes of integers: the limbs of each value side by side."""
    limbs, width = lane.limbs, limb_bits(lane)

    def codes(first: int, count: int) -> I64:
        skipped = first % limbs  # a chunk may end between two limbs of one value
        block = np.ascontiguousarray(numbers[first // limbs : -(-(first + count) // limbs)])
        top = block >> np.int64(width * (limbs - 1)) if limbs > 1 else block
        if not noised and (int(top.min()) < -lane.bound or int(top.max()) > lane.bound):
            raise ServiceError(
                Reason.OUT_OF_BOUND, f"a value of {lane.name!r} is beyond its bound {lane.bound}: nothing is sent"
            )
        if limbs == 1:
            return block
        split = np.empty((len(block), limbs), np.int64)
        for limb in range(limbs - 1):
            split[:, limb] = (block >> np.int64(width * limb)) & np.int64(2**width - 1)
        split[:, -1] = top
        return split.reshape(-1)[skipped : skipped + count]

    return codes


def _check_class(lane: LaneClass, numbers: I64 | Reals) -> None:
    if isinstance(numbers, Reals):
        shape, fits = numbers.numbers.shape, lane.limbs == 1
    else:
        shape, fits = numbers.shape, numbers.dtype == np.int64
    if shape != (lane.values,) or not fits:
        raise _refused(f"class {lane.name!r}: {shape} numbers of the wrong kind, not {lane.values} of int64 or reals")


def _refused(detail: str) -> ServiceError:
    return ServiceError(Reason.MALFORMED, f"lanes: {detail}")

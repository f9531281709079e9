"""Numbers to ring lanes and back (protocol.md §6; privacy.md §3).

Order of lanes: as the table lists its classes, the four sentinels first. A value spread over several
limbs has them side by side, low limb first; the low ones are 0..2^w-1 with w = ⌊log2 bound⌋, the highest
carries the sign.
Dangers: clipping passes NaN through, so finiteness is checked FIRST; nothing is checked or clipped after
noise was added; stochastic rounding needs float64.
Not here: drawing noise (dp.noise), choosing the table (documents.shape).
"""

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR

from services.common.errors import Reason, ServiceError
from services.common.secagg.masking import WORKERS
from services.common.secagg.messages import MAX_LANES, LaneClass
from services.common.secagg.ring import I64, U8, Ring

SENTINEL = LaneClass(name="sentinel", values=4, fraction_bits=0, bound=1, limbs=1)
_BLOCK = 1 << 16  # values worked on at once: a few arrays of them stay in the cache

F64 = npt.NDArray[np.float64]


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


def clip_update(delta: npt.NDArray[Any], l2: float, linf: float) -> F64:
    """`delta` (any float array) as float64 with norm ≤ `l2`, then each coordinate in ±`linf`.

    Raises NOT_FINITE first, where any number is NaN or infinite: a failed training sends nothing.
    """
    exact = np.array(delta, np.float64)
    if not np.isfinite(exact).all():
        raise ServiceError(Reason.NOT_FINITE, "the update holds NaN or infinity: the training failed, nothing is sent")
    with np.errstate(over="ignore"):
        norm = float(np.sqrt(np.dot(exact, exact)))
    if not np.isfinite(norm):  # finite numbers whose squares overflow
        exact /= np.max(np.abs(exact))
        norm = float(np.sqrt(np.dot(exact, exact)))
        exact *= l2 / norm
    elif norm > l2:
        exact *= l2 / norm
    np.clip(exact, -linf, linf, out=exact)
    return exact


def quantise(values: npt.NDArray[Any], fraction_bits: int, key: bytes | None = None) -> I64:
    """round(values * 2**fraction_bits) as int64.

    With a 32-byte `key` from the operating system the rounding is stochastic and unbiased (codes of at
    most 16 bits without DP noise), else to the nearest even. Raises NOT_FINITE; OUT_OF_BOUND beyond 2^62.
    """
    out = np.empty(len(values), np.int64)

    def one(start: int) -> None:
        scaled = np.asarray(values[start : start + _BLOCK], np.float64) * 2.0**fraction_bits
        if not np.isfinite(scaled).all():
            raise ServiceError(Reason.NOT_FINITE, "a value to encode is NaN or infinite: nothing is sent")
        if float(np.max(np.abs(scaled))) >= 2.0**62:
            raise ServiceError(Reason.OUT_OF_BOUND, "a value to encode is beyond 62 bits: nothing is sent")
        if key is None:
            out[start : start + _BLOCK] = np.rint(scaled)
            return
        counter = (start * 8 // 16).to_bytes(16, "big")  # eight bytes a value of ONE keystream
        words = Cipher(AES256(key), CTR(counter)).encryptor().update(bytes(8 * len(scaled)))
        below = np.floor(scaled)
        scaled -= below
        # Compared with the exact fraction: floor(scaled + uniform) would round the sum a second time.
        up = (np.frombuffer(words, "<u8") >> np.uint64(11)) * 2.0**-53 < scaled
        out[start : start + _BLOCK] = below
        out[start : start + _BLOCK] += up

    _each_block(len(values), one)
    return out


def encode_vector(table: LaneTable, values: Mapping[str, npt.NDArray[np.int64]], noised: bool = False) -> bytearray:
    """x: the packed vector of one hospital, sentinels added; `values` has an int64 array for every other class.

    Raises MALFORMED for a missing, unknown or wrongly sized class, OUT_OF_BOUND for a value beyond its
    bound. With `noised` nothing is checked: what noise pushes over the bound wraps in the ring.
    """
    names = {lane.name for lane in table.lanes} - {SENTINEL.name}
    if set(values) != names:
        raise _refused(f"values for {sorted(values)}, the table has {sorted(names)}")
    ring, position = table.ring, 0
    packed = bytearray(table.total_bytes)
    out = np.frombuffer(packed, np.uint8)
    for lane in table.lanes:
        numbers = np.ones(4, np.int64) if lane.name == SENTINEL.name else values[lane.name]
        if numbers.shape != (lane.values,) or numbers.dtype != np.int64:
            raise _refused(f"class {lane.name!r}: {numbers.dtype}{numbers.shape}, not int64({lane.values},)")
        size = lane.limbs * ring.lane_bytes
        part = out[position : position + lane.values * size]

        def one(start: int, lane: LaneClass = lane, numbers: I64 = numbers, part: U8 = part, size: int = size) -> None:
            block = numbers[start : start + _BLOCK]
            _encode_block(ring, lane, block, noised, part[start * size : (start + len(block)) * size])

        _each_block(lane.values, one)
        position += lane.values * size
    return packed


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


def _each_block(values: int, work: Callable[[int], None]) -> None:
    """`work` with the start of every block of `values`, on all cores (numpy releases the interpreter lock)."""
    if values <= _BLOCK:
        if values:
            work(0)
        return
    with ThreadPoolExecutor(WORKERS) as pool:
        deque(pool.map(work, range(0, values, _BLOCK)), maxlen=0)


def _encode_block(ring: Ring, lane: LaneClass, block: I64, noised: bool, out: U8) -> None:
    width = limb_bits(lane)
    top = block >> np.int64(width * (lane.limbs - 1)) if lane.limbs > 1 else block
    if not noised and (int(top.min()) < -lane.bound or int(top.max()) > lane.bound):
        raise ServiceError(
            Reason.OUT_OF_BOUND, f"a value of {lane.name!r} is beyond its bound {lane.bound}: nothing is sent"
        )
    if lane.limbs == 1:
        ring.pack_into(block.astype(np.uint32), out)
        return
    limbs = np.empty((len(block), lane.limbs), np.uint32)
    for limb in range(lane.limbs - 1):
        limbs[:, limb] = (block >> np.int64(width * limb)) & np.int64(2**width - 1)
    limbs[:, -1] = top.astype(np.uint32)
    ring.pack_into(limbs.reshape(-1), out)


def _refused(detail: str) -> ServiceError:
    return ServiceError(Reason.MALFORMED, f"lanes: {detail}")

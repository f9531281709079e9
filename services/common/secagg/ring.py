"""Arithmetic in Z_2^b, b in {16, 24, 32}, over packed little-endian lanes (protocol.md §6, §10).

Lane i of b bits is bytes [i*b/8, (i+1)*b/8). A chunk is whole AES blocks and whole lanes of every ring.

How it is fast: numpy's wrap-around IS the modulus at 16 and 32 bits, so packed bytes are added as they
lie. At 24 bits there is no such type: every BYTE is summed by itself in 16 bits, one pass without strides,
and carries move up inside the lanes only when the sum is packed again, or after 127 addends.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from services.common.errors import Reason, ServiceError

CHUNK_BYTES = 1_048_560  # 48 * 21845; 1 MiB is not a multiple of 3
BLOCK_BYTES = CHUNK_BYTES // 5  # whole AES blocks and lanes again; a few such buffers stay in a core's own cache
RING_BITS = (16, 24, 32)

if sys.byteorder != "little":  # pragma: no cover - wrong sums would be worse than no start
    raise ImportError("the ring views packed little-endian lanes in place: this machine is big-endian")

_ADDENDS = 127  # 127 * 255 < 2^15 in either direction
U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]
I64 = npt.NDArray[np.int64]


def chunk_lengths(total_bytes: int) -> tuple[int, ...]:
    """Lengths of the chunks of a vector of `total_bytes`: all CHUNK_BYTES but a shorter, never empty last.

    Raises MALFORMED for an empty vector.
    """
    if total_bytes < 1:
        raise ServiceError(Reason.MALFORMED, f"a vector of {total_bytes} bytes has no chunk")
    whole, rest = divmod(total_bytes, CHUNK_BYTES)
    return (CHUNK_BYTES,) * whole + ((rest,) if rest else ())


@dataclass(frozen=True)
class Ring:
    """Z_2^bits. Raises MALFORMED for bits other than 16, 24, 32."""

    bits: int

    def __post_init__(self) -> None:
        if self.bits not in RING_BITS:
            raise ServiceError(Reason.MALFORMED, f"a ring of {self.bits} bits: choose 16, 24 or 32")

    @property
    def lane_bytes(self) -> int:
        """Bytes of one lane on the wire: 2, 3 or 4."""
        return self.bits // 8

    def pack_into(self, values: npt.NDArray[Any], out: U8) -> None:
        """Write the low bits of `values` (contiguous, 4 or 8 bytes each, as they lie in memory) packed into `out`.

        Integers are so taken mod 2^bits. `out` is uint8, len(values) * lane_bytes.
        """
        if self.bits == 24:
            spread = values.view(np.uint8)
            for byte in range(3):
                out[byte::3] = spread[byte :: values.itemsize]
        else:
            kind = f"<u{self.lane_bytes}"
            out.view(kind)[:] = values.view(kind)[:: values.itemsize // self.lane_bytes]

    def pack(self, values: U32) -> bytes:
        """`values` (uint32, taken mod 2^bits) as packed lanes."""
        out = np.empty(len(values) * self.lane_bytes, np.uint8)
        self.pack_into(np.ascontiguousarray(values, np.uint32), out)
        return out.tobytes()

    def unpack(self, packed: Any) -> U32:
        """Packed lanes (a contiguous buffer) as uint32 in 0..2^bits-1. Raises MALFORMED for a broken lane."""
        raw = _bytes_of(packed)
        self._check(len(raw))
        if self.bits == 24:
            values = np.empty(len(raw) // 3, np.uint32)
            if len(values):
                # Overlapping 32-bit words, three bytes apart; the last lane's would end past the buffer.
                np.copyto(values[:-1], np.ndarray((len(values) - 1,), np.uint32, raw, 0, (3,)))
                values[-1] = int.from_bytes(raw[-3:].tobytes(), "little")
                values &= np.uint32(0xFFFFFF)
            return values
        return raw.view(f"<u{self.lane_bytes}").astype(np.uint32)

    def lift(self, values: U32) -> I64:
        """The centred representative of each lane: int64 in -2^(bits-1)..2^(bits-1)-1."""
        shift = np.uint32(32 - self.bits)
        return (values << shift).view(np.int32).astype(np.int64) >> np.int64(shift)

    def _check(self, size: int) -> None:
        if size % self.lane_bytes:
            raise ServiceError(Reason.MALFORMED, f"{size} bytes are not whole lanes of {self.lane_bytes} bytes")


class RingSum:
    """A sum over ONE run of `size` packed bytes (whole lanes), starting at zero. Its memory is used again and again."""

    def __init__(self, ring: Ring, size: int) -> None:
        self.ring = ring
        self.size = size
        ring._check(size)
        kind = {16: np.uint16, 24: np.int16, 32: np.uint32}[ring.bits]
        self._sums: npt.NDArray[Any] = np.empty(size if ring.bits == 24 else size // ring.lane_bytes, kind)
        self._carries = _Carries(self._sums) if ring.bits == 24 else None
        self._addends = 0  # none: what `_sums` holds means nothing

    def add(self, packed: Any) -> None:
        """Add packed lanes (a contiguous buffer of exactly `size` bytes). Raises MALFORMED for another length."""
        self.adding(packed)()

    def subtract(self, packed: Any) -> None:
        """Subtract packed lanes (a contiguous buffer of exactly `size` bytes). Raises MALFORMED for another length."""
        raw = self._lanes(packed)
        self._start()
        self._apply(np.subtract, raw)

    def adding(self, packed: Any) -> Callable[[], None]:
        """`add` for a buffer that is written anew for every addend: checked once, called as often as it is filled."""
        raw, sums = self._lanes(packed), self._sums

        def add() -> None:
            if self._addends:
                self._apply(np.add, raw)
            else:
                np.copyto(sums, raw)
                self._addends = 1

        return add

    def result(self) -> bytes:
        """The sum so far as packed lanes, `size` bytes; more may be added."""
        out = np.empty(self.size, np.uint8)
        self.take(out)
        self.add(out)
        return out.tobytes()

    def take(self, out: U8) -> None:
        """Write the sum, packed, into `out` (`size` bytes), and start again at zero."""
        self._start()
        if self._carries is None:
            np.copyto(out, self._sums.view(np.uint8))
        else:
            self._carries.move()
            np.copyto(out, self._sums, casting="unsafe")
        self._addends = 0

    def _start(self) -> None:
        if not self._addends:
            self._sums.fill(0)
            self._addends = 1

    def _apply(self, operation: np.ufunc, raw: npt.NDArray[Any]) -> None:
        if self._carries is not None and self._addends == _ADDENDS:
            self._carries.move()
            self._sums &= np.int16(0xFF)
            self._addends = 1
        operation(self._sums, raw, self._sums)
        self._addends += 1

    def _lanes(self, packed: Any) -> npt.NDArray[Any]:
        raw = _bytes_of(packed)
        if len(raw) != self.size:
            raise ServiceError(Reason.MALFORMED, f"{len(raw)} bytes given to a sum over {self.size} bytes")
        return raw if self._carries is not None else raw.view(self._sums.dtype)


class _Carries:
    """Moves what exceeds a byte of `sums` (int16, one for each byte of packed 24-bit lanes) to the byte above it."""

    def __init__(self, sums: npt.NDArray[np.int16]) -> None:
        self._sums = sums
        self._carry = np.empty_like(sums)
        # All ones where a carry stays in its lane: out of every lowest byte, and two along, out of every middle one.
        mask = np.zeros(len(sums) + 2, np.int16)
        mask[::3] = -1
        self._stays = mask[:-2], mask[2:]

    def move(self) -> None:
        """The low byte of every sum is the lane's byte now; what leaves a lane at its top is gone (mod 2^24)."""
        if not len(self._sums):
            return
        for mask in self._stays:
            np.right_shift(self._sums, np.int16(8), self._carry)
            np.bitwise_and(self._carry, mask, self._carry)
            np.add(self._sums[1:], self._carry[:-1], self._sums[1:])


def _bytes_of(packed: Any) -> U8:
    return np.frombuffer(packed, np.uint8) if memoryview(packed).nbytes else np.empty(0, np.uint8)

"""Arithmetic in Z_2^b, b in {16, 24, 32}, over packed little-endian lanes (protocol.md §6, §10).

Lane i of b bits is bytes [i*b/8, (i+1)*b/8). A chunk is whole AES blocks and whole lanes of every ring.

How it is fast: numpy's wrap-around IS the modulus at 16 and 32 bits, so packed bytes are added as they
lie. At 24 bits the packed bytes are read as overlapping unaligned 32-bit words, three bytes apart; the
byte too many sits above bit 24 and falls away when the sum is packed again, so nothing is unpacked.
"""

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from services.common.errors import Reason, ServiceError

CHUNK_BYTES = 1_048_560  # 48 * 21845; 1 MiB is not a multiple of 3
RING_BITS = (16, 24, 32)

if sys.byteorder != "little":  # pragma: no cover - wrong sums would be worse than no start
    raise ImportError("the ring views packed little-endian lanes in place: this machine is big-endian")

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

    def pack_into(self, values: U32, out: U8) -> None:
        """Write `values` (uint32, taken mod 2^bits) packed into `out` (uint8, len(values) * lane_bytes)."""
        if self.bits == 24:
            spread = values.view(np.uint8)
            for byte in range(3):
                out[byte::3] = spread[byte::4]
        elif self.bits == 16:
            out.view("<u2")[:] = values.astype(np.uint16)
        else:
            out.view("<u4")[:] = values

    def pack(self, values: U32) -> bytes:
        """`values` (uint32, taken mod 2^bits) as packed lanes."""
        out = np.empty(len(values) * self.lane_bytes, np.uint8)
        self.pack_into(np.ascontiguousarray(values, np.uint32), out)
        return out.tobytes()

    def unpack(self, packed: Any) -> U32:
        """Packed lanes (a contiguous buffer) as uint32 in 0..2^bits-1. Raises MALFORMED for a broken lane."""
        raw = _bytes_of(packed)
        self._check(raw)
        if self.bits == 24:
            values = np.zeros(len(raw) // 3, np.uint32)
            _apply_24(np.add, values, raw)
            values &= np.uint32(0xFFFFFF)
            return values
        return raw.view(f"<u{self.lane_bytes}").astype(np.uint32)

    def lift(self, values: U32) -> I64:
        """The centred representative of each lane: int64 in -2^(bits-1)..2^(bits-1)-1."""
        shift = np.uint32(32 - self.bits)
        return (values << shift).view(np.int32).astype(np.int64) >> np.int64(shift)

    def _check(self, raw: U8) -> None:
        if len(raw) % self.lane_bytes:
            raise ServiceError(Reason.MALFORMED, f"{len(raw)} bytes are not whole lanes of {self.lane_bytes} bytes")


class RingSum:
    """A sum over ONE chunk of `size` bytes (whole lanes), starting at zero."""

    def __init__(self, ring: Ring, size: int) -> None:
        self.ring = ring
        self.size = size
        ring._check(np.empty(size, np.uint8))
        # At 24 bits lanes are kept as 32-bit words whose top byte is never looked at.
        kind = {16: np.uint16, 24: np.uint32, 32: np.uint32}[ring.bits]
        self._lanes: npt.NDArray[Any] = np.zeros(size // ring.lane_bytes, kind)
        self._packed = np.empty(size if ring.bits == 24 else 0, np.uint8)

    def clear(self) -> None:
        """Start again at zero in the same memory: fresh megabytes for every chunk would cost page faults."""
        self._lanes.fill(0)

    def add(self, packed: Any) -> None:
        """Add packed lanes (a contiguous buffer of exactly `size` bytes). Raises MALFORMED for another length."""
        raw = self._sized(packed)
        if self.ring.bits == 24:
            _apply_24(np.add, self._lanes, raw)
        else:
            np.add(self._lanes, raw.view(self._lanes.dtype), out=self._lanes)

    def subtract(self, packed: Any) -> None:
        """Subtract packed lanes (a contiguous buffer of exactly `size` bytes). Raises MALFORMED for another length."""
        raw = self._sized(packed)
        if self.ring.bits == 24:
            _apply_24(np.subtract, self._lanes, raw)
        else:
            np.subtract(self._lanes, raw.view(self._lanes.dtype), out=self._lanes)

    def result(self) -> bytes:
        """The sum so far as packed lanes, `size` bytes."""
        if self.ring.bits == 24:
            self.ring.pack_into(self._lanes, self._packed)
            return self._packed.tobytes()
        return self._lanes.tobytes()

    def _sized(self, packed: Any) -> U8:
        raw = _bytes_of(packed)
        if len(raw) != self.size:
            raise ServiceError(Reason.MALFORMED, f"{len(raw)} bytes given to a sum over {self.size} bytes")
        return raw


def _bytes_of(packed: Any) -> U8:
    return np.frombuffer(packed, np.uint8) if memoryview(packed).nbytes else np.empty(0, np.uint8)


def _apply_24(operation: np.ufunc, lanes: U32, raw: U8) -> None:
    """lanes = operation(lanes, packed 24-bit lanes). The last goes alone: its 32-bit word would end past the buffer."""
    last = len(lanes) - 1
    if last < 0:
        return
    words = np.ndarray((last,), np.uint32, raw, 0, (3,)) if last else np.empty(0, np.uint32)
    operation(lanes[:last], words, out=lanes[:last])
    tail = np.frombuffer(raw[-3:].tobytes() + b"\0", np.uint32)
    operation(lanes[last:], tail, out=lanes[last:])

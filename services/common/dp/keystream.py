"""AES-256-CTR words: the one source of randomness of noise and sampling (P-8).

The key comes from the operating system and serves ONE draw of ONE purpose; the functions here only stretch it.
"""

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

KEY_BYTES = 32
BLOCK_BYTES = 16


def keystream(key: bytes, first_block: int, length: int) -> bytes:
    """`length` bytes of the keystream, from counter block `first_block` (below 2**128) on.

    Raises ValueError for a key that is not 32 bytes.
    """
    if len(key) != KEY_BYTES:
        raise ValueError(f"a key has {KEY_BYTES} bytes, this one {len(key)}")
    counter = modes.CTR(first_block.to_bytes(BLOCK_BYTES, "big"))
    return Cipher(algorithms.AES256(key), counter).encryptor().update(bytes(length))


def words(key: bytes, first: int, count: int) -> npt.NDArray[np.uint64]:
    """Words `first`, `first` + 1, … of the keystream as uint64 (count,): 8 bytes each, two to an AES block."""
    skip = first % 2
    stream = keystream(key, first // 2, 8 * (count + skip))
    return np.frombuffer(stream, dtype="<u8")[skip:].astype(np.uint64, copy=False)

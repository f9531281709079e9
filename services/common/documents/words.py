"""The 12 words of P-26: a SHA-256 that two people can read to each other on the telephone.

The list in words.txt is the English list of BIP-39 (2048 words, told apart by their first four letters),
published under the MIT licence: https://github.com/bitcoin/bips/tree/master/bip-0039
"""

from functools import lru_cache
from importlib import resources

WORDS = 12
_BITS = 11


def words_of(digest: bytes) -> tuple[str, ...]:
    """The first 132 bits of a 32-byte digest as 12 words of 11 bits each, most significant first."""
    if len(digest) != 32:
        raise ValueError("a SHA-256 digest has 32 bytes")
    number = int.from_bytes(digest, "big") >> (256 - WORDS * _BITS)
    return tuple(_list()[number >> (_BITS * i) & 2**_BITS - 1] for i in reversed(range(WORDS)))


def same_words(digest: bytes, spoken: str) -> bool:
    """Whether `spoken` (any case, any white space or commas) are the words of `digest`."""
    return tuple(spoken.lower().replace(",", " ").split()) == words_of(digest)


@lru_cache(maxsize=1)
def _list() -> tuple[str, ...]:
    text = resources.files(__package__).joinpath("words.txt").read_text(encoding="ascii")
    return tuple(text.split())

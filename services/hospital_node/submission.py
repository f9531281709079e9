"""From the packed vector x to what leaves: masks, boxes, commitments (protocol.md §4 step 5, §10).

y is never stored: x and the seeds of an attempt make it again, bit by bit (ADR 0010).
Dangers: seeds are drawn here, once for each attempt; masking two vectors with one seed would open both, so no chunk
leaves that is not the one first made. Nothing here depends on data but y (P-6).
"""

import hashlib
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from services.common.secagg import masking, sealing
from services.common.secagg.blob import encode
from services.common.secagg.certificate import CheckedManifest
from services.common.secagg.digests import chunk_digest, vector_digest, with_digest
from services.common.secagg.messages import BoxDigest, Header, LedgerMark, Signed
from services.common.secagg.signing import Signer
from services.hospital_node.vectorfile import damaged


@dataclass(frozen=True)
class Masked:
    """One vector masked for one attempt. y itself is x plus the streams of `seeds`, which live as long as x does."""

    seeds: tuple[bytes, ...] = field(repr=False)
    vector: bytes
    chunk_digests: tuple[bytes, ...] = field(repr=False)
    commitments: tuple[bytes, ...] = field(repr=False)
    boxes: tuple[bytes, ...] = field(repr=False)
    pods: tuple[int, ...]


def mask(fill: masking.Fill, checked: CheckedManifest, hospital: str) -> Masked:
    """Mask x, which `fill` reads, with fresh seeds, and seal these to the manifest's pods."""
    committee, table = checked.roster.committee, checked.table
    seeds = tuple(secrets.token_bytes(sealing.SEED_BYTES) for _ in committee.pieces)
    keys = _keys(seeds, checked.M, hospital)
    digests = tuple(masking.mask_vector(fill, table.total_bytes, table.ring, keys, chunk_digest))
    boxes = tuple(
        sealing.seal(
            commitment.suite,
            commitment.sealing_key,
            sealing.pack_seeds(seeds[j] for j in committee.pieces_of(pod)),
            sealing.box_info(checked.M, hospital, pod),
        )
        for pod, commitment in checked.commitments.items()
    )
    return Masked(
        seeds=seeds,
        vector=vector_digest(table.total_bytes, digests),
        chunk_digests=digests,
        commitments=tuple(masking.commitment(checked.M, hospital, j, seed) for j, seed in enumerate(seeds)),
        boxes=boxes,
        pods=tuple(checked.commitments),
    )


def masked_chunks(
    fill: masking.Fill,
    checked: CheckedManifest,
    hospital: str,
    seeds: Sequence[bytes],
    digests: Sequence[bytes],
    first: int,
) -> Iterator[bytes]:
    """The chunks of y from number `first` on, made again from x and the stored seeds.

    Each is held against its digest of the first time BEFORE it is handed on: another x under the same seeds would
    open both. Raises STORAGE.
    """
    table, keys = checked.table, _keys(seeds, checked.M, hospital)
    chunks = masking.mask_vector(fill, table.total_bytes, table.ring, keys, with_digest, first_chunk=first)
    for (chunk, digest), expected in zip(chunks, digests[first:], strict=True):
        if digest != expected:
            raise damaged()
        yield chunk


def _keys(seeds: Sequence[bytes], manifest: bytes, hospital: str) -> list[bytes]:
    return [masking.stream_key(seed, manifest, hospital, j) for j, seed in enumerate(seeds)]


def sign_header(masked: Masked, checked: CheckedManifest, hospital: str, mark: LedgerMark, signer: Signer) -> Signed:
    """The header over the masked vector and the ledger AFTER its debit (privacy.md L-4)."""
    return signer.sign(
        "header",
        encode(
            Header(
                manifest=checked.M,
                hospital=hospital,
                lanes=checked.table.total_lanes,
                commitments=masked.commitments,
                boxes=tuple(
                    BoxDigest(pod, hashlib.sha256(box).digest())
                    for pod, box in zip(masked.pods, masked.boxes, strict=True)
                ),
                vector=masked.vector,
                ledger=mark,
            )
        ),
    )

"""This hospital's control variate c_i of SCAFFOLD (Karimireddy 2020, arXiv:1910.06378, Algorithm 1, option II).

    y ← y - η_l·(g(y) - c_i + c), K times;   c_i⁺ = c_i - c + (x - y)/(K·η_l);   Δc_i = c_i⁺ - c_i is sent, masked

Rules:
- c_i moves only with the verified result of a round that counted this hospital, in the transaction that takes the
  result: what the server added to c is what is added here. Left out, rejected or stalled: c_i stays.
- What is added is read back from x, the very lanes that were sent, clipped and rounded: c stays the mean of all c_i.
- A new c_i is a blob on the disk before that transaction names it; the old one goes after it. Killed: done again.
Not here: steps (training.py), the server's c (aggregator/next_model.py).
"""

import hashlib
import logging

import numpy as np
import numpy.typing as npt

from services.common.documents.strategies import has_control
from services.common.documents.study import LoadedStudy, Study
from services.common.errors import Reason, ServiceError
from services.common.secagg.certificate import CheckedManifest
from services.common.secagg.encoding import LaneTable, decode_class, dequantise
from services.common.secagg.ring import CHUNK_BYTES
from services.hospital_node.store import Store
from services.hospital_node.vectorfile import reading_vector

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
_log = logging.getLogger(__name__)


def own_control(store: Store, study: LoadedStudy) -> F32 | None:
    """c_i (d), zeros before the first counted round; None for a study without control variates. Raises STORAGE."""
    if not has_control(study.document):
        return None
    digest = store.control(study.digest)
    if digest is None:
        return np.zeros(study.document.model.parameters, np.float32)
    blob = store.blobs.path(digest).read_bytes() if store.blobs.has(digest) else b""
    if hashlib.sha256(blob).digest() != digest:
        raise ServiceError(
            Reason.STORAGE,
            f"this hospital's control variate {digest.hex()[:12]}… is damaged or gone: restore the volume, or leave "
            "the study",
        )
    return np.frombuffer(blob, "<f4").astype(np.float32)


def control_change(server: F32, delta: F64, study: Study) -> F64:
    """Δc_i (d) after the K steps that moved the weights by `delta` = y - x; `server` is c."""
    rate = study.training.learning_rate
    assert rate is not None  # noqa: S101  # no study without `shared` loads without one
    return -(server.astype(np.float64) + delta / (study.training.local_steps * rate))


def moved_control(store: Store, study: LoadedStudy, checked: CheckedManifest) -> bytes | None:
    """The digest of c_i + Δc_i as x of this counted round holds it, on the disk; None where nothing moves.

    Without x, which only a lost or scrubbed file explains, c_i stays and the log says so. Raises STORAGE.
    """
    own = own_control(store, study) if "control" in {lane.name for lane in checked.table.lanes} else None
    if own is None:
        return None
    vector = store.vector(study.digest, checked.core.round)
    if vector is None:
        _log.error("the vector of round %d is gone: the control variate stays as it was", checked.core.round)
        return None
    change = _read_change(store, vector.x, checked)
    return store.blobs.write([(own + change).astype("<f4").tobytes()])


def _read_change(store: Store, x: bytes, checked: CheckedManifest) -> F64:
    table = checked.table
    (begin, end), width = table.lane_range("control"), table.ring.lane_bytes
    packed = bytearray((end - begin) * width)
    with reading_vector(store.blobs, x) as fill, memoryview(packed) as out:
        for start in range(0, len(packed), CHUNK_BYTES):
            fill(begin * width + start, out[start : start + CHUNK_BYTES])
    return sent_change(table, bytes(packed))


def sent_change(table: LaneTable, packed: bytes) -> F64:
    """Δc_i (d) as its packed lanes hold it, clipped and rounded."""
    return dequantise(decode_class(table, "control", packed), table.lane_class("control").fraction_bits)

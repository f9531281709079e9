"""The real aggregator as a process that kills itself (SIGKILL) inside the server step of one round.

KILL_ROUND: which step. KILL_PLACE: `before` its first write, `between` the two blobs, `after` both.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from services.aggregator import __main__, conclude
from services.common.store.blobs import BlobStore

PLACE, NUMBER = os.environ["KILL_PLACE"], int(os.environ["KILL_ROUND"])
_step, _keep = conclude._step, BlobStore._keep


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def keep_and_die(store: BlobStore, written: Path, digest: bytes, expected: bytes | None) -> bytes:
    _keep(store, written, digest, expected)
    die()
    return digest


def step(state: Any, *rest: Any) -> tuple[bytes, bytes]:
    if state.round == NUMBER and PLACE == "before":
        die()
    if state.round == NUMBER and PLACE == "between":
        BlobStore._keep = keep_and_die  # type: ignore[method-assign]  # that is the point
    found = _step(state, *rest)
    if state.round == NUMBER and PLACE == "after":
        die()
    return found


if __name__ == "__main__":
    conclude._step = step
    sys.exit(__main__.main())

"""The one sentence of a process that must not start: on standard error, and where the kubelet looks for it."""

import contextlib
import os
import sys
from pathlib import Path

from services.common.errors import ServiceError

TERMINATION = Path("/dev/termination-log")  # the kubelet's default terminationMessagePath
_MOST_BYTES = 4096  # more of it the kubelet does not read
REFUSED = 2


def refused(who: str, error: ServiceError, termination: Path = TERMINATION) -> int:
    """Say in one line why `who` does not start and return the exit code, 2.

    In a Kubernetes pod the same line becomes the container's termination message (`kubectl describe pod`).
    """
    sentence = f"{who}: {' '.join(error.detail.split())}"
    print(sentence, file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):  # no kubelet, or not ours to write: standard error has said it
        handle = os.open(termination, os.O_WRONLY | os.O_TRUNC)
        with os.fdopen(handle, "wb") as out:
            out.write(sentence.encode()[:_MOST_BYTES])
    return REFUSED

"""A real file system that fills up."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted(point: Path, size: str) -> Iterator[Path]:
    """A tmpfs of `size` (as mount writes it: 256k, 1m) at `point`; skips where this user may not mount one."""
    point.mkdir()
    found = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(point)], capture_output=True, check=False
    )
    if found.returncode != 0:
        pytest.skip("may not mount a small file system here")
    yield point
    subprocess.run(["umount", "-l", str(point)], check=True)

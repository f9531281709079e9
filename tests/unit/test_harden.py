"""P-22: core dumps off, not dumpable, memory locked where allowed; swap without a lock stops the start."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROBE = """
import os, resource, sys
from pathlib import Path
from services.common.observe.harden import harden
from services.common.errors import ServiceError
if sys.argv[2] == "weak":
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
    os.setuid(65534)
try:
    locked = harden(sys.argv[3] == "demo", Path(sys.argv[1]))
except ServiceError as error:
    print(error.reason.value)
    sys.exit()
status = Path("/proc/self/status").read_text()
print(locked, resource.getrlimit(resource.RLIMIT_CORE), status.split("VmLck:")[1].split()[0])
"""
HEAD = "Filename\tType\tSize\tUsed\tPriority\n"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may lock memory here, and give that up again")


def probe(tmp_path: Path, who: str, charter: str, swap: bool) -> str:
    swaps = tmp_path / "swaps"
    swaps.write_text(HEAD + ("/dev/sda2 partition 1 0 -2\n" if swap else ""))
    tmp_path.chmod(0o755)
    for parent in list(tmp_path.parents)[:2]:
        parent.chmod(0o755)
    command = [sys.executable, "-c", PROBE, str(swaps), who, charter]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@needs_root
def test_locked_where_allowed(tmp_path: Path) -> None:
    """P-22: with the right to lock, the memory in use is locked, and swap does no harm."""
    locked, *core, kilobytes = probe(tmp_path, "strong", "real", swap=True).split()
    assert (locked, core) == ("True", ["(0,", "0)"])
    assert int(kilobytes) > 1000


@needs_root
@pytest.mark.parametrize(
    ("charter", "swap", "outcome"),
    [("real", True, "UNSAFE_STORE"), ("real", False, "False"), ("demo", True, "False")],
)
def test_not_locked(tmp_path: Path, charter: str, swap: bool, outcome: str) -> None:
    """P-22: without that right, swap stops the start unless the charter is a demo."""
    assert probe(tmp_path, "weak", charter, swap).split()[0] == outcome

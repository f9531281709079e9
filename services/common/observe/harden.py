"""What a process that holds secrets asks of the operating system, before it reads any (protocol.md P-22).

No core dump, no other process of this user looking in (ptrace, /proc/PID/mem), memory never written to swap.
"""

import ctypes
import logging
import resource
from pathlib import Path

from prometheus_client import Gauge

from services.common.errors import Reason, ServiceError

_log = logging.getLogger(__name__)
_PR_SET_DUMPABLE = 4
# Every page is locked when it is first touched: locking reserved address space as well would cost gigabytes.
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4
_CAP_IPC_LOCK = 14

_LOCKED = Gauge("wardround_memory_locked", "1 when the memory of this process cannot be written to swap, else 0")


def harden(demo: bool, swaps: Path = Path("/proc/swaps")) -> bool:
    """Forbid core dumps, lock memory where the limit allows, and return whether it is locked.

    Raises UNSAFE_STORE where locking fails, the machine has swap and `demo` is not set.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    locked = _may_lock() and libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT) == 0
    _LOCKED.set(locked)
    if not locked and not demo and len(swaps.read_text().splitlines()) > 1:
        raise ServiceError(
            Reason.UNSAFE_STORE,
            "memory cannot be locked and this machine has swap, so round keys could reach a disk: raise "
            "RLIMIT_MEMLOCK to unlimited, turn swap off, or run in a pod with Guaranteed QoS",
        )
    if not locked:
        _log.warning("memory is not locked; this machine has no swap, or the charter is a demo")
    if demo:
        _log.warning("DEMO charter: the store, swap and organisation rules are lifted")
    return locked


def _may_lock() -> bool:
    """Under a finite limit mlockall may succeed now and let a later allocation fail: that is not "allowed"."""
    _, most = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    status = Path("/proc/self/status").read_text()
    capabilities = int(next(line for line in status.splitlines() if line.startswith("CapEff:")).split()[1], 16)
    if most == resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (most, most))
    return most == resource.RLIM_INFINITY or bool(capabilities >> _CAP_IPC_LOCK & 1)

"""Die −9 before the n-th thing that this process writes: every write of SQLite, every write, sync, rename and removal.

SQLite's own writes are seen where its operating system layer makes them (xSetSystemCall of sqlite3_vfs), so also
those inside one commit: journal, database pages, truncation. Python's are seen through audit events and wrapped calls.
"""

import ctypes
import io
import os
import signal
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_POINTERS = (
    "xOpen", "xDelete", "xAccess", "xFullPathname", "xDlOpen", "xDlError", "xDlSym", "xDlClose", "xRandomness",
    "xSleep", "xCurrentTime", "xGetLastError", "xCurrentTimeInt64", "xSetSystemCall", "xGetSystemCall",
    "xNextSystemCall",
)  # fmt: skip
_CALLS = {  # SQLite's name → C type of the call
    "write": ctypes.CFUNCTYPE(ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t),
    "pwrite": ctypes.CFUNCTYPE(ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long),
    "pwrite64": ctypes.CFUNCTYPE(ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64),
    "ftruncate": ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int64),
    "unlink": ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p),
}


class _Vfs(ctypes.Structure):
    _fields_ = [
        ("iVersion", ctypes.c_int),
        ("szOsFile", ctypes.c_int),
        ("mxPathname", ctypes.c_int),
        ("pNext", ctypes.c_void_p),
        ("zName", ctypes.c_char_p),
        ("pAppData", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    ]


class KillPoints:
    """Counts writes below `folder` once `armed`; the process dies before number `armed` (0: only counts)."""

    def __init__(self, folder: Path, told: Callable[[str], None]) -> None:
        self._folder = str(folder.resolve())
        self._told = told
        self._keep: list[Any] = []  # C callbacks must outlive SQLite's use of them
        self.armed: int | None = None
        self.count = 0
        self._watch_sqlite()
        self._watch_python()

    def pass_by(self, what: str) -> None:
        if self.armed is None:
            return
        self.count += 1
        if self.count == self.armed:
            self._told(what)
            os.kill(os.getpid(), signal.SIGKILL)

    def _watch_sqlite(self) -> None:
        import _sqlite3

        library = ctypes.CDLL(_sqlite3.__file__)
        library.sqlite3_vfs_find.restype = ctypes.POINTER(_Vfs)
        vfs = library.sqlite3_vfs_find(None)
        pointer = ctypes.cast(vfs, ctypes.c_void_p)
        get = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(vfs.contents.xGetSystemCall)
        put = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
            vfs.contents.xSetSystemCall
        )
        for name, kind in _CALLS.items():
            address = get(pointer, name.encode())
            if not address:
                continue
            original = kind(address)

            def hooked(*arguments: Any, name: str = name, original: Any = original) -> Any:
                self.pass_by(f"sqlite {name}")
                return original(*arguments)

            callback = kind(hooked)
            self._keep += [original, callback]
            assert put(pointer, name.encode(), ctypes.cast(callback, ctypes.c_void_p)) == sqlite3.SQLITE_OK

    def _watch_python(self) -> None:
        points = self

        class Counted(io.BufferedWriter):
            def write(self, data: Any) -> int:
                points.pass_by("write")
                return super().write(data)

        fdopen = os.fdopen

        def counted_fdopen(handle: int, mode: str = "r", *more: Any, **named: Any) -> Any:
            return Counted(io.FileIO(handle, "wb")) if mode == "wb" else fdopen(handle, mode, *more, **named)

        os.fdopen = counted_fdopen
        for name in ("fsync", "pwrite", "ftruncate", "fdatasync"):
            original = getattr(os, name)

            def counted(*arguments: Any, name: str = name, original: Any = original) -> Any:
                self.pass_by(name)
                return original(*arguments)

            setattr(os, name, counted)
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("os.rename", "os.remove", "os.mkdir", "os.truncate", "os.link"):
            if self._folder in str(arguments[0]):
                self.pass_by(event)
        elif event == "open":
            path, _, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if writes and isinstance(path, (str, bytes, os.PathLike)) and self._folder in os.fsdecode(path):
                self.pass_by("open to write")


def sqlite_has_a_seam() -> bool:
    """Whether this Python's SQLite is a library of its own, whose system calls can be watched."""
    try:
        import _sqlite3

        return hasattr(ctypes.CDLL(_sqlite3.__file__), "sqlite3_vfs_find")
    except (AttributeError, OSError):
        return False

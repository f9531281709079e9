"""kill -9 at any moment: what was answered is there, what was not is there wholly or not at all."""

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from services.common.store.blobs import BlobStore
from services.common.store.database import open_database
from services.common.store.events import SCHEMA, EventLog

ROOT = Path(__file__).parents[2]
WRITER = """
import os, sys
from pathlib import Path
from services.common.store.blobs import BlobStore
from services.common.store.database import open_database
from services.common.store.events import SCHEMA, EventLog
folder = Path(sys.argv[1])
log = EventLog(open_database(folder / "s.db", [SCHEMA]))
store = BlobStore(folder / "b")
number = log.version("s") // 2
while True:
    digest = store.write([str(number).encode()] * 20_000)
    log.append("s", 2 * number, [("Stored", {"digest": digest.hex()}), ("Told", {"number": number})], "test")
    number += 1
    os.write(1, f"{number}\\n".encode())
"""


@pytest.mark.parametrize("seed", range(6))
def test_a_killed_writer_loses_nothing_that_it_answered(tmp_path: Path, seed: int) -> None:
    for life in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None
            lines = [writer.stdout.readline() for _ in range(1 + (7 * seed + 5 * life) % 11)]
            os.kill(writer.pid, signal.SIGKILL)
            answered = int(([line for line in [*lines, *writer.stdout] if line.endswith("\n")])[-1])
        database = open_database(tmp_path / "s.db", [SCHEMA])
        store = BlobStore(tmp_path / "b")
        found = EventLog(database).read("s")
        assert len(found) % 2 == 0
        assert answered <= len(found) // 2 <= answered + 1
        for number, event in enumerate(found[::2]):
            data = store.path(bytes.fromhex(event.payload["digest"])).read_bytes()
            assert data == str(number).encode() * 20_000
            assert hashlib.sha256(data).hexdigest() == event.payload["digest"]
        assert list((tmp_path / "b" / "tmp").iterdir()) == []
        database.close()

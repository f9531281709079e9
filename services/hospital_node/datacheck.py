"""The record of `wardround data check` beside the images, and what of it a study may require (ADR 0016).

The record says whether the folder passed, and the digest of what was looked at. It stays at the site; what a ledger
tells others is that digest under the site's secret key, which says that the data are the same or not and nothing else.
"""

import csv
import hashlib
import hmac
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from services.common.documents.study import LoadedStudy
from services.common.errors import Reason, ServiceError
from services.hospital_node.dataset import METADATA, written_path
from services.hospital_node.events import Checked
from services.hospital_node.ports import Consents, Trainer

RECORD = "data-check.json"
_VERSION = "data-check/v1"
_DATASET, _TOLD = b"wardround/v1/dataset\x00", b"wardround/v1/data-check\x00"
_LOOK_SECONDS = 10.0  # thousands of files are not asked for their times in every round


def require_check(study: LoadedStudy, consents: Consents, trainer: Trainer, before: Checked | None) -> Checked | None:
    """What the ledger is to say of the data; None where the study asks for no check. Raises POLICY_REFUSES.

    `before` is what this process found at its last round: other data are opened anew.
    """
    if not study.document.data.require_check:
        return None
    found = Checked(study.digest.hex(), consents.checked_data())
    if before is not None and before.data != found.data:
        trainer.reopen()
    return found


def dataset_digest(table: bytes, images: Mapping[str, bytes]) -> bytes:
    """H(label ‖ H(metadata.csv) ‖ for each path in it, ascending: u32(length) ‖ path ‖ H(file)).

    `table` and the values of `images` are SHA-256 of whole files; files that no row names do not count.
    """
    whole = hashlib.sha256(_DATASET + table)
    for path in sorted(images):
        name = path.encode()
        whole.update(len(name).to_bytes(4, "big") + name + images[path])
    return whole.digest()


@dataclass(frozen=True)
class Record:
    """What a check found, as the node reads it: no name, no path, no count."""

    passed: bool
    dataset: bytes

    def encode(self) -> bytes:
        """The file's bytes."""
        verdict = "passed" if self.passed else "failed"
        return (json.dumps({"wardround": _VERSION, "verdict": verdict, "dataset": self.dataset.hex()}) + "\n").encode()

    @classmethod
    def decode(cls, blob: bytes) -> "Record":
        """The record again. Raises ValueError for anything else."""
        found = json.loads(blob)
        if not isinstance(found, dict) or found.keys() != {"wardround", "verdict", "dataset"}:
            raise ValueError("other keys")
        record = cls(found["verdict"] == "passed", bytes.fromhex(found["dataset"]))
        if record.encode() != blob:
            raise ValueError("another version")
        return record


class DataCheck:
    """Whether the images in `folder` are those that passed their check; looked at again as files change.

    `key` gives the site's 32 secret bytes.
    """

    def __init__(self, folder: Path, key: Callable[[], bytes], clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._key = key
        self._clock = clock
        self._looked = float("-inf")
        self._seen: list[tuple[str, int, int, int]] = []
        self._digest = b""

    def told(self) -> str:
        """The keyed digest, hex, of data that passed. Raises POLICY_REFUSES: no record, a failed or another one."""
        path = self._folder / RECORD
        try:
            record = Record.decode(path.read_bytes())
        except FileNotFoundError:
            raise _refuse(f"{path} is missing") from None
        except (OSError, ValueError) as error:
            raise _refuse(f"{path} is no record of this version ({error})") from None
        if not record.passed:
            raise _refuse(f"{path} says that the check failed: mend what it names")
        if record.dataset != self._present():
            raise _refuse(f"{self._folder} has changed since it was checked")
        return hmac.digest(self._key(), _TOLD + record.dataset, "sha256").hex()

    def _present(self) -> bytes:
        """The digest of what lies there now; files are read again only when one has another time, size or place."""
        now = self._clock()
        if now - self._looked < _LOOK_SECONDS:
            return self._digest
        try:
            paths = _listed(self._folder)
            seen = [_place(self._folder, name) for name in (METADATA, *paths)]
            if seen != self._seen:
                images = {name: _sha256(self._folder / name) for name in paths}
                self._digest, self._seen = dataset_digest(_sha256(self._folder / METADATA), images), seen
        except (OSError, ValueError, csv.Error) as error:
            raise _refuse(f"{self._folder} cannot be held against its check ({error})") from None
        self._looked = now
        return self._digest


def _listed(folder: Path) -> list[str]:
    with (folder / METADATA).open(newline="", encoding="utf-8-sig") as source:
        paths = [cells.get("path") or "" for cells in csv.DictReader(source)]
    if any(written_path(path) is None for path in paths):
        raise ValueError(f"a path of {METADATA} leads out of the folder")
    return paths


def _place(folder: Path, name: str) -> tuple[str, int, int, int]:
    found = (folder / name).stat()
    return name, found.st_mtime_ns, found.st_size, found.st_ino


def _sha256(path: Path) -> bytes:
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").digest()


def _refuse(what: str) -> ServiceError:
    return ServiceError(
        Reason.POLICY_REFUSES,
        f"the study requires a passed data check (`data.require_check`), and {what}: run `wardround data check` on the "
        "folder; nothing is downloaded",
    )

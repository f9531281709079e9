"""What a finished run left behind: `RUN/evidence`, read as the passport, the report and `verify` need it.

RUN/evidence/aggregator/…, RUN/evidence/pods/ID/audit.jsonl, RUN/evidence/hospitals/ID/…, and SHA256SUMS over all.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.common.documents.charter import LoadedCharter, load_charter
from services.common.documents.study import LoadedStudy, load_study
from services.common.errors import Reason, ServiceError
from services.common.secagg.blob import decode
from services.common.secagg.messages import Result, Signed

SUMS = "SHA256SUMS"


@dataclass(frozen=True)
class Round:
    """One round that has a signed result; `released` is its JSON."""

    number: int
    folder: Path
    signed: Signed
    result: Result
    released: dict[str, Any]

    @property
    def figures(self) -> dict[str, float]:
        """Released figures of the model that the round started from."""
        return dict(self.released["figures"])


@dataclass(frozen=True)
class Run:
    """Documents and rounds; parsed, not verified. `charter` is the newest one, `charters` all of them by digest."""

    evidence: Path
    charter: LoadedCharter
    charters: dict[bytes, LoadedCharter]
    study: LoadedStudy
    rounds: tuple[Round, ...]

    @property
    def aggregator(self) -> Path:
        """The aggregator's evidence."""
        return self.evidence / "aggregator"

    def model(self, version: int) -> Path:
        """The file of model `version`."""
        return self.aggregator / "models" / f"v{version:04d}.safetensors"


def load_run(folder: Path) -> Run:
    """Read RUN/evidence. Raises NOT_FOUND or what the documents raise."""
    evidence = folder / "evidence"
    centre = evidence / "aggregator"
    if not (centre / "charter.yaml").exists():
        raise ServiceError(
            Reason.NOT_FOUND,
            f"{folder} holds no evidence of a run: give the folder that `wardround demo --output` made",
        )
    charter = load_charter((centre / "charter.yaml").read_bytes())
    older = [load_charter(path.read_bytes(), path.name) for path in sorted((centre / "charters").glob("*.yaml"))]
    study = load_study((centre / "study.yaml").read_bytes())
    charters = {one.digest: one for one in (*older, charter)}
    return Run(evidence, charter, charters, study, tuple(_rounds(centre / "rounds")))


def _rounds(folder: Path) -> Iterator[Round]:
    for path in sorted(folder.glob("*")):
        if (path / "result.signed").exists():
            # Parsed here for readers; `verify` opens it again under the aggregator's key.
            signed = decode(Signed, (path / "result.signed").read_bytes())
            result = decode(Result, signed.blob)
            try:
                released = json.loads(result.released)
            except ValueError:
                raise ServiceError(Reason.MALFORMED, f"the result of round {path.name} releases no JSON") from None
            yield Round(int(path.name), path, signed, result, released)


def files_of(evidence: Path) -> list[Path]:
    """All evidence files but the list of sums, in a fixed order."""
    return sorted(path for path in evidence.rglob("*") if path.is_file() and path.name != SUMS)


def write_sums(evidence: Path) -> None:
    """SHA256SUMS as sha256sum prints it."""
    lines = [f"{_sha256(path)}  {path.relative_to(evidence)}\n" for path in files_of(evidence)]
    (evidence / SUMS).write_text("".join(lines))


def check_sums(evidence: Path) -> int:
    """How many files SHA256SUMS covers. Raises BAD_DIGEST for a changed, missing or extra file."""
    if not evidence.is_dir():
        raise ServiceError(Reason.NOT_FOUND, f"{evidence} is not there: give a folder that holds `evidence`")
    lines = (evidence / SUMS).read_text().splitlines() if (evidence / SUMS).exists() else []
    wanted = {line[66:]: line[:64] for line in lines}
    found = {str(path.relative_to(evidence)): path for path in files_of(evidence)}
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            raise _bad(f"{name} is missing")
        if name not in wanted:
            raise _bad(f"{name} is not in {SUMS}")
        if _sha256(found[name]) != wanted[name]:
            raise _bad(f"{name} is not the file that was collected: its SHA-256 differs from {SUMS}")
    if len(wanted) != len(lines) or any(line[64:66] != "  " for line in lines):
        raise _bad(f"{SUMS} is not as sha256sum writes it")
    return len(found)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _bad(detail: str) -> ServiceError:
    return ServiceError(Reason.BAD_DIGEST, detail)

"""`wardround verify RUN`: every signature, certificate, receipt, digest and the models' lineage, offline.

What it proves: that the collected evidence is consistent with the charter's keys, byte for byte. What it cannot: that
nobody holds back other evidence, or what a sum of masks hides.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from services.aggregator.conclude import released_figures
from services.aggregator.next_model import next_model
from services.cli.run import Round, Run, check_sums, load_run
from services.common.documents.charter import LoadedCharter, load_signatures
from services.common.documents.shape import check_study, core_for, round_shape
from services.common.errors import Reason, ServiceError
from services.common.secagg.blob import decode, encode
from services.common.secagg.certificate import (
    CheckedManifest,
    check_abandon_certificate,
    check_certificate,
    check_close,
    check_endorsed,
    check_header,
    check_manifest,
    check_receipt,
    open_round_signed,
)
from services.common.secagg.cohort import Cohort
from services.common.secagg.digests import VectorDigest
from services.common.secagg.encoding import LaneTable
from services.common.secagg.messages import (
    OUTCOME_ACCEPTED,
    ZERO_DIGEST,
    AcceptList,
    Core,
    Header,
    Manifest,
    PieceSum,
    Proposal,
    Result,
    Signed,
)
from services.common.secagg.ring import CHUNK_BYTES
from services.common.secagg.signing import digest, open_signed
from services.common.store.chain import verify_lines
from services.hospital_node.events import Checked
from services.hospital_node.ledger import Entry, parse_export, verify_export

Say = Callable[[str], None]


def verify(
    run: Annotated[Path, typer.Argument(help="folder that `wardround demo --output` made, or collected evidence")],
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Check a run offline: every signature, certificate, receipt, digest, released figure and the models' lineage.

    Example: wardround verify build/demo
    """
    if as_json:
        _verify_for_a_program(run)
        return
    console = Console()
    verify_run(run, lambda line: console.print(line, highlight=False, soft_wrap=True))
    console.print(f"{run}: everything verifies")


def _verify_for_a_program(run: Path) -> None:
    said: list[str] = []
    fault, signatures = "", 0
    try:
        signatures = verify_run(run, said.append)
    except ServiceError as error:
        fault = error.detail
        raise
    finally:
        found = {"verifies": not fault, "signatures": signatures, "checked": said, "fault": fault}
        print(json.dumps(found, indent=2, ensure_ascii=False))


@dataclass
class _Chain:
    """Where the lineage stands: the newest result, the model that the next round starts from, all known models.

    `kept` holds, in `scratch`, what the server kept beside each model for its next step, made again from the sums.
    """

    result: bytes
    model: bytes
    models: dict[bytes, Path]
    reached: set[bytes]
    scratch: Path
    kept: dict[bytes, Path] = field(default_factory=dict)
    signatures: int = 0


def verify_run(folder: Path, say: Say = lambda _: None) -> int:
    """Check everything; how many signatures verified. Raises the first fault as ServiceError."""
    with tempfile.TemporaryDirectory() as scratch:
        return _verify(folder, Path(scratch), say)


def _verify(folder: Path, scratch: Path, say: Say) -> int:
    say(f"{check_sums(folder / 'evidence')} files as collected")
    run = load_run(folder)
    for charter in run.charters.values():
        signatures = _signatures(run, charter)
        if signatures.exists():
            signed = load_signatures(signatures.read_bytes(), charter)
            say(f"charter {charter.digest.hex()[:12]}… signed by {', '.join(signed)}")
        check_study(charter, run.study)
    models = {_sha256(path): path for path in sorted((run.aggregator / "models").glob("*.safetensors"))}
    initial = bytes.fromhex(run.study.document.model.initial)
    chain = _Chain(ZERO_DIGEST, initial, models, {initial}, scratch)
    _need(initial in models, "the initial model of the study is not among the models")
    for one in run.rounds:
        name = f"round {one.number}"
        try:
            _check_round(run, one, chain)
        except ServiceError as error:
            raise ServiceError(error.reason, f"{name}: {error.detail}") from error
        say(f"{name}: {_summary(one)}")
    _need(bool(run.rounds), "there is no round with a result")
    _check_stalled(run, chain)
    strangers = [path.name for found, path in models.items() if found not in chain.reached]
    _need(not strangers, f"no round led to the model {', '.join(strangers)}")
    checked = _check_sites(run)
    if run.study.document.data.require_check:
        say(f"data checked, and the same since, by the ledgers of {', '.join(checked) or 'nobody: no ledger is here'}")
    say(f"{len(models)} models in one line of descent, {chain.signatures} signatures verified")
    return chain.signatures


def _signatures(run: Run, charter: LoadedCharter) -> Path:
    """Where the pods' signatures on a charter lie: the newest beside it, those before in `signatures`."""
    if charter is run.charter:
        return run.aggregator / "charter.signatures.yaml"
    return run.aggregator / "signatures" / f"{charter.digest.hex()}.yaml"


def _charter(run: Run, digest: bytes) -> LoadedCharter:
    _need(digest in run.charters, f"the charter {digest.hex()[:12]}… that it names is not among the charters")
    return run.charters[digest]


def _check_round(run: Run, one: Round, chain: _Chain) -> None:
    result = one.result
    charter = _charter(run, result.charter)
    _need(open_signed(Result, "result", one.signed, charter.roster.aggregator.key) == result, "the result differs")
    chain.signatures += 1
    _need(result.previous_result == chain.result, "its result does not follow the one before")
    attempts = sorted(int(path.stem.split("-")[1]) for path in one.folder.glob("manifest-*.blob"))
    for attempt in attempts:
        if attempt != result.attempt:
            _check_given_up(run, one.folder, one.number, attempt, chain)
    _need(result.attempt in attempts, f"the manifest of attempt {result.attempt} is missing")
    checked = check_manifest((one.folder / f"manifest-{result.attempt}.blob").read_bytes(), charter.roster)
    named = (result.manifest, result.round, result.charter, result.study)
    _need(named == (checked.M, one.number, charter.digest, run.study.digest), "the result names another manifest")
    start = checked.core.model
    _need(start in chain.models, "the model that it starts from is not among the models")
    _need(result.round == checked.core.round and start == chain.model, "it does not start from the newest model")
    own = core_for(charter, run.study, one.number, chain.result, start)
    _need(own == checked.core, "its core is not what charter and study give (P-21)")
    table = round_shape(charter, run.study, one.number).table
    cohort = _check_messages(one, checked, chain)
    _need(result.cohort == cohort.digest, "the result names another cohort")
    certificate = (one.folder / f"certificate-{result.attempt}.blob").read_bytes()
    _need(result.certificate == hashlib.sha256(certificate).digest(), "the result names another certificate")
    close = check_close(_signed(one.folder / "close.signed"), charter.roster)
    _need((close.study, close.round) == (run.study.digest, one.number), "another close")
    chain.signatures += 1
    _check_sum(run, one, table, cohort, chain, len(charter.roster.hospitals))
    chain.result, chain.model = digest("result", one.signed.blob), result.model
    chain.reached.add(result.model)


def _check_stalled(run: Run, chain: _Chain) -> None:
    """Rounds without a result: what was proposed and sent in them is genuine all the same."""
    ended = {one.folder for one in run.rounds}
    for folder in sorted(set((run.aggregator / "rounds").glob("*")) - ended):
        for path in sorted(folder.glob("manifest-*.blob")):
            _check_given_up(run, folder, int(folder.name), int(path.stem.split("-")[1]), chain)


def _check_given_up(run: Run, folder: Path, number: int, attempt: int, chain: _Chain) -> None:
    blob = (folder / f"manifest-{attempt}.blob").read_bytes()
    # Which charter's keys must fit is written inside; what it says holds only under those keys.
    named = decode(Core, decode(Proposal, decode(Manifest, blob).proposal.blob).core).charter
    charter = _charter(run, named)
    checked = check_manifest(blob, charter.roster)
    chain.signatures += 1 + len(checked.commitments)
    path = folder / f"abandon-{attempt}.blob"
    if path.exists():
        check_abandon_certificate(
            path.read_bytes(), charter.roster, run.study.digest, number, attempt, manifest=checked.M
        )
        chain.signatures += checked.roster.committee.quorum
    _check_submissions(folder, checked, attempt, chain)


def _check_submissions(folder: Path, checked: CheckedManifest, attempt: int, chain: _Chain) -> dict[str, bytes]:
    """Header digests by hospital; each header and receipt verified."""
    found: dict[str, bytes] = {}
    for path in sorted(folder.glob(f"header-{attempt}-*.signed")):
        signed = _signed(path)
        header: Header = check_header(signed, checked)
        _need(path.name == f"header-{attempt}-{header.hospital}.signed", f"{path.name} is of {header.hospital}")
        receipt = _signed(folder / f"receipt-{attempt}-{header.hospital}.signed")
        check_receipt(receipt, checked, signed, header.hospital, header.vector)
        found[header.hospital] = digest("header", signed.blob)
        chain.signatures += 2
    return found


def _check_messages(one: Round, checked: CheckedManifest, chain: _Chain) -> Cohort:
    attempt, quorum = one.result.attempt, checked.roster.committee.quorum
    endorsements = [_signed(path) for path in sorted(one.folder.glob(f"endorse-{attempt}-*.signed"))]
    check_endorsed(checked, endorsements)
    headers = _check_submissions(one.folder, checked, attempt, chain)
    cohort = check_certificate(checked, (one.folder / f"certificate-{attempt}.blob").read_bytes())
    for member in cohort.members:
        _need(headers.get(member.hospital) == member.header, f"the cohort has another header of {member.hospital}")
    accepts = sorted(one.folder.glob(f"accept-{attempt}-*.signed"))
    for path in accepts:
        open_round_signed(AcceptList, "accept", _signed(path), checked)
    _need(len(accepts) >= quorum, f"only {len(accepts)} accept lists, {quorum} are needed")
    chain.signatures += 1 + len(checked.commitments) + len(endorsements) + len(accepts) + quorum
    _check_pieces(one, checked, cohort, chain)
    return cohort


def _check_pieces(one: Round, checked: CheckedManifest, cohort: Cohort, chain: _Chain) -> None:
    """Every piece has a release by a holder; a second holder's digest agrees unless the result says otherwise."""
    sums: dict[int, set[bytes]] = {}
    committee = checked.roster.committee
    for name in ("release", "digest"):
        for path in sorted(one.folder.glob(f"{name}-{one.result.attempt}-*.signed")):
            pod, signed = open_round_signed(PieceSum, "release", _signed(path), checked)
            _need(signed.cohort == cohort.digest, f"{path.name} is over another cohort")
            _need(signed.piece in committee.pieces_of(pod), f"{path.name}: that pod does not hold the piece")
            sums.setdefault(signed.piece, set()).add(signed.vector)
            chain.signatures += 1
    _need(sorted(sums) == list(range(len(committee.pieces))), "a piece was never released")
    differ = [piece for piece, found in sums.items() if len(found) > 1]
    told = bool(one.released["named"] or one.released["disputed"])
    _need(not differ or told, f"the pods' sums of pieces {differ} differ, and the result does not say so (P-23)")


def _check_sum(run: Run, one: Round, table: LaneTable, cohort: Cohort, chain: _Chain, hospitals: int) -> None:
    result, path = one.result, one.folder / "sum.bin"
    if result.sum == ZERO_DIGEST:
        _need(result.outcome != OUTCOME_ACCEPTED, "accepted without a sum")
        return
    with path.open("rb") as file:
        vector = VectorDigest(table.total_bytes)
        while chunk := file.read(CHUNK_BYTES):
            vector.add(chunk)
    _need(vector.result() == result.sum, "sum.bin is not the sum that the result names")
    if one.released["verdict"] == "rejected":
        _need(result.model == chain.model, "a rejected round changed the model")
        return
    figures, sums = released_figures(table, run.study, path)
    _need(figures == one.released["figures"], "the released figures are not those of the sum")
    _need(sums == one.released.get("sums", sums), "the released counts are not those of the sum")
    if one.released["verdict"] == "rolled back":
        _need(result.model in chain.models, "it rolls back to an unknown model")
        return
    if "parameter" in {lane.name for lane in table.lanes}:
        _check_step(run, one, table, cohort, chain, hospitals)
    else:
        _need(result.model == chain.model, "a round without parameters changed the model")


def _check_step(run: Run, one: Round, table: LaneTable, cohort: Cohort, chain: _Chain, hospitals: int) -> None:
    """The next model is what the study's server step makes of the last one, what was kept beside it, and the sum."""
    result, model, before = one.result, chain.models[chain.model], chain.kept.get(chain.model)
    members, study, sums = len(cohort.members), run.study.document, one.folder / "sum.bin"
    keeps, pairs = next_model(study, one.number, members, hospitals, table, model, before, sums)
    made, after = hashlib.sha256(), chain.scratch / f"{one.number}"
    with after.open("wb") as kept:
        for numbers, slots in pairs:
            made.update(numbers)
            kept.write(slots)
    _need(made.digest() == result.model, "the next model is not the server's step from the last one by the sum")
    _need(result.model in chain.models, "the next model is not among the models")
    if keeps:
        chain.kept[result.model] = after


def _check_sites(run: Run) -> list[str]:
    """Ledgers and audit logs are whole chains; headers and receipts are known to those who should know them.

    Returns the hospitals whose ledger says before everything they sent that their data had passed the check.
    """
    checked = []
    for folder in sorted((run.evidence / "pods").glob("*")):
        _named(folder, partial(verify_lines, (folder / "audit.jsonl").read_bytes()))
    for folder in sorted((run.evidence / "hospitals").glob("*")):
        lines = (folder / "ledger.jsonl").read_text().splitlines()
        _named(folder, partial(verify_export, lines))
        heads = {(entry.sequence, entry.head) for entry in parse_export(lines)}
        since = first_check(parse_export(lines), run.study.digest.hex())
        if since is not None:
            checked.append(folder.name)
        for one in run.rounds:
            for path in one.folder.glob(f"header-*-{folder.name}.signed"):
                attempt = int(path.name.split("-")[1])
                mark = decode(Header, _signed(path).blob).ledger
                _need((mark.sequence, mark.head) in heads, f"{folder.name}: a header names a debit the ledger lacks")
                _need(
                    not run.study.document.data.require_check or (since is not None and since < mark.sequence),
                    f"{folder.name}: it sent a header, and its ledger says of no data check before it",
                )
                held = folder / "receipts" / f"{one.number:04d}-{attempt}.signed"
                given = one.folder / f"receipt-{attempt}-{folder.name}.signed"
                _need(not held.exists() or held.read_bytes() == given.read_bytes(), f"{folder.name}: another receipt")
    return checked


def first_check(entries: Iterable[Entry], study: str) -> int | None:
    """The number of the first event that says that the data of this study (hex) passed their check."""
    for entry in entries:
        event = entry.parsed()
        if isinstance(event, Checked) and (event.study, event.verdict) == (study, "passed"):
            return entry.sequence
    return None


def _named(folder: Path, check: Callable[[], object]) -> None:
    try:
        check()
    except ServiceError as error:
        raise ServiceError(error.reason, f"{folder.name}: {error.detail}") from error


def _summary(one: Round) -> str:
    figures = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in sorted(one.figures.items()))
    text = f"{one.released['verdict']}, cohort of {one.released['cohort']}, model v{one.result.version}"
    return f"{text}; released {figures}" if figures else text


def _signed(path: Path) -> Signed:
    if not path.exists():
        raise ServiceError(Reason.NOT_FOUND, f"{path.name} is missing")
    signed = decode(Signed, path.read_bytes())
    _need(encode(signed) == path.read_bytes(), f"{path.name} is not in its one encoding")
    return signed


def _sha256(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _need(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ServiceError(Reason.BAD_DIGEST, otherwise)

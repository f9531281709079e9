"""`wardround charter`: draft from join files, sign as a pod's owner, verify out of band and pin (P-26)."""

import json
from collections.abc import Collection
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from services.cli.files import write_new
from services.cli.site import fingerprint
from services.common.documents.charter import (
    Charter,
    CharterSignatures,
    CohortSection,
    CommitteeSection,
    JoinFile,
    LimitsSection,
    LoadedCharter,
    check_signatures,
    load_charter,
    load_join,
)
from services.common.documents.emit import emit
from services.common.documents.pin import Pin, load_pin
from services.common.documents.site import load_signer, read
from services.common.documents.strict import load
from services.common.documents.words import same_words, words_of
from services.common.errors import Reason, ServiceError
from services.common.ids import Role
from services.common.store.durable import replace_file

app = typer.Typer(no_args_is_help=True, help="The consortium's constitution: who is in it, and under which limits.")

_SIGNATURES = "charter.signatures.yaml"


class Suite(StrEnum):
    """HPKE suites that a charter may fix."""

    hybrid = "mlkem768-x25519"
    x25519 = "x25519"


class PinAs(StrEnum):
    """Which charter of the pin is meant."""

    current = "current"
    next = "next"


@app.command()
def draft(
    joins: Annotated[list[Path], typer.Argument(metavar="JOIN...", help="the join.yaml of every member")],
    consortium: Annotated[str, typer.Option(help="the consortium's name, as in the join files")],
    out: Annotated[Path, typer.Option(help="the charter to write; not overwritten")],
    committee: Annotated[str, typer.Option(help="pods,threshold,quorum[,slack]")] = "4,2,3",
    minimum_cohort: Annotated[int, typer.Option(min=2, help="organisations that every opened sum must hold")] = 3,
    maximum_cohort: Annotated[int, typer.Option(min=2, max=4096, help="hospitals that a round may hold at most")] = 64,
    colluding: Annotated[int, typer.Option(min=0, help="k: hospitals that may act together")] = 1,
    two_hospitals: Annotated[bool, typer.Option("--two-hospitals-accepted", help="needed in words for k = 0")] = False,
    version: Annotated[int, typer.Option(min=1, help="one more for every amendment")] = 1,
    suite: Annotated[Suite, typer.Option(help="how seeds are sealed to the pods")] = Suite.hybrid,
    demo: Annotated[bool, typer.Option("--demo", help="lifts safety rules; never for patients' data")] = False,
) -> None:
    """Put the join files together to a charter that every role will accept.

    Example: wardround charter draft join/*.yaml --consortium lesions --committee 5,3,4 --minimum-cohort 3 --out
    charter.yaml
    """
    members = [load_join(read(path), str(path)) for path in joins]
    foreign = [join for join in members if join.consortium != consortium]
    if foreign:
        raise ServiceError(
            Reason.INVALID_DOCUMENT,
            f"{foreign[0].id} joins {foreign[0].consortium}, this charter is for {consortium}: let it make a new "
            "join.yaml",
        )
    centre = [join for join in members if join.role == "aggregator"]
    if len(centre) != 1:
        raise ServiceError(
            Reason.INVALID_DOCUMENT, f"{len(centre)} of the join files are an aggregator's, exactly one is needed"
        )
    pods = tuple(join.member for join in members if join.role == "pod")
    charter = Charter(
        wardround="charter/v1",
        consortium=consortium,
        version=version,
        demo=demo,
        suite=suite.value,
        committee=_committee(committee, len(pods)),
        cohort=CohortSection(
            minimum=minimum_cohort,
            maximum=maximum_cohort,
            colluding_hospitals=colluding,
            two_hospitals="accepted" if two_hospitals else None,
        ),
        limits=LimitsSection(),
        aggregator=centre[0].member,
        pods=pods,
        hospitals=tuple(join.member for join in members if join.role == "hospital"),
    )
    blob = emit(charter)
    loaded = load_charter(blob, str(out))
    write_new(out, blob)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{out}: {len(pods)} pods, {len(charter.hospitals)} hospitals, SHA-256 {loaded.digest.hex()}")
    console.print(f"  {' '.join(words_of(loaded.digest))}")
    console.print(
        f"next: send it to all members; pod owners: wardround charter sign {out} --identity keys/identity.pem"
    )


@app.command()
def sign(
    charter: Annotated[Path, typer.Argument(help="the charter, exact bytes")],
    identity: Annotated[Path, typer.Option(help="identity.pem of a pod")],
    signatures: Annotated[Path | None, typer.Option(help="the signatures file; default: beside the charter")] = None,
) -> None:
    """Add this pod owner's signature over the charter's exact bytes.

    Example: wardround charter sign charter.yaml --identity keys/identity.pem
    """
    loaded, signer = load_charter(read(charter), str(charter)), load_signer(identity)
    pod = next((pod.id for pod in loaded.roster.pods if pod.key == signer.public), None)
    if pod is None:
        raise ServiceError(
            Reason.UNKNOWN_MEMBER, f"{identity} is the key of no pod of {charter}: only pods' owners sign a charter"
        )
    path = signatures or charter.with_name(_SIGNATURES)
    held: dict[str, str] = {}
    if path.exists():
        check_signatures(read(path), loaded, str(path))
        held = dict(load(CharterSignatures, read(path), str(path)).signatures)
    held[pod] = signer.sign("charter", loaded.blob).signature.hex()
    document = CharterSignatures(wardround="signatures/v1", charter=loaded.digest.hex(), signatures=held)
    replace_file(path, [emit(document)])
    needed = loaded.roster.committee.quorum
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{path}: signed by {', '.join(sorted(held))} ({len(held)} of at least {needed})")
    if len(held) < needed:
        console.print(f"next: {needed - len(held)} more pod owners sign, with this file beside the charter")


@app.command()
def verify(
    charter: Annotated[Path, typer.Argument(help="the charter, exact bytes")],
    me: Annotated[str, typer.Option(help="this site's id")],
    join: Annotated[Path, typer.Option(help="this site's own join.yaml")] = Path("join.yaml"),
    confirm: Annotated[str | None, typer.Option(help="the twelve words, as another member read them out")] = None,
    pin: Annotated[Path, typer.Option(help="the pin to write")] = Path("pin.yaml"),
    pin_as: Annotated[PinAs | None, typer.Option("--as", help="`next` announces an amendment")] = None,
    signatures: Annotated[Path | None, typer.Option(help="the signatures file; default: beside the charter")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Show what this charter binds you to; pin it only after its twelve words were compared by voice (P-26).

    Example: wardround charter verify charter.yaml --me alice --confirm "twelve words that the others read out"
    """
    loaded = load_charter(read(charter), str(charter))
    role = _check_own(loaded, me, load_join(read(join), str(join)), str(join))
    console = Console(highlight=False, soft_wrap=True, quiet=as_json)
    path = signatures or charter.with_name(_SIGNATURES)
    signed = check_signatures(read(path), loaded, str(path)) if path.exists() else ()
    if as_json:
        print(json.dumps(_plain(loaded, me, role, signed), indent=2, ensure_ascii=False))
    _show(console, loaded, me, role)
    console.print(f"signed by {len(signed)} pod owners, {loaded.roster.committee.quorum} are needed to start a round")
    if confirm is None:
        console.print('next: compare the words with two other members by voice, then add --confirm "the twelve words"')
        return
    if not same_words(loaded.digest, confirm):
        raise ServiceError(
            Reason.BAD_DIGEST,
            f"the words are not those of {charter}: nothing is pinned; the other member holds another file, compare "
            "them",
        )
    _pin(pin, loaded.digest.hex(), pin_as)
    console.print(f"pinned in {pin}")


def _committee(text: str, pods: int) -> CommitteeSection:
    numbers = text.split(",")
    if len(numbers) not in (3, 4) or not all(number.strip().isdecimal() for number in numbers):
        raise ServiceError(
            Reason.INVALID_DOCUMENT, f"--committee {text!r}: write pods,threshold,quorum[,slack], for example 4,2,3"
        )
    wanted, threshold, quorum, slack = (*map(int, numbers), *([0] if len(numbers) == 3 else []))
    if wanted != pods:
        raise ServiceError(
            Reason.INVALID_DOCUMENT,
            f"--committee {text} needs {wanted} pods, the join files hold {pods}: add or remove",
        )
    if threshold < 2 or quorum < 2:
        raise ServiceError(
            Reason.INVALID_DOCUMENT,
            f"--committee {text}: a threshold or quorum below 2 lets one pod open every update (P-1): take 4,2,3 or "
            "5,3,4",
        )
    return CommitteeSection(threshold=threshold, quorum=quorum, slack=slack)


def _check_own(charter: LoadedCharter, me: str, join: JoinFile, name: str) -> Role:
    found = charter.find(me)
    if found is None:
        raise ServiceError(Reason.UNKNOWN_MEMBER, f"the charter does not list {me}: send your join.yaml to its drafter")
    role, entry = found
    if join.id != me or entry != join.member or role != join.role or join.consortium != charter.document.consortium:
        raise ServiceError(
            Reason.CONFLICT,
            f"the entry of {me} in the charter is not what {name} says: somebody changed it; do not pin, ask the "
            "drafter",
        )
    return role


def _show(console: Console, charter: LoadedCharter, me: str, role: Role) -> None:
    document, digest = charter.document, charter.digest
    console.print(
        f"{document.consortium}, version {document.version}; you are {role.value} {me}, your entry is unchanged"
    )
    console.print(f"SHA-256 {digest.hex()}")
    console.print(f"in words: [bold]{' '.join(words_of(digest))}[/]")
    table = Table("role", "id", "organisation", "fingerprint of the identity key", box=None, pad_edge=False)
    for member_role, member in charter.members():
        if member_role is not Role.HOSPITAL:
            table.add_row(member_role.value, member.id, member.organisation, fingerprint(member.identity_key))
    console.print(table)
    hospitals = ", ".join(f"{member.id} ({member.organisation})" for member in document.hospitals)
    console.print(f"hospitals: {hospitals}")
    committee, cohort = charter.roster.committee, document.cohort
    console.print(
        f"{committee.threshold} of {committee.pods} pods together can open an update, {committee.quorum} must answer; "
        f"at least {cohort.minimum} organisations in every sum, {cohort.colluding_hospitals} may act together"
    )
    if document.demo:
        console.print(
            "[bold red]DEMO charter: organisation, store and swap rules are lifted; not for patients' data[/]"
        )
    if cohort.colluding_hospitals == 0:
        console.print(
            "[bold red]colluding_hospitals is 0: each of two hospitals can read the other's vector together with the "
            "aggregator (P-12)[/]"
        )


def _plain(charter: LoadedCharter, me: str, role: Role, signed: Collection[str]) -> dict[str, Any]:
    """What `verify` shows, for a program."""
    document, committee = charter.document, charter.roster.committee
    return {
        "consortium": document.consortium,
        "version": document.version,
        "sha256": charter.digest.hex(),
        "words": " ".join(words_of(charter.digest)),
        "demo": document.demo,
        "me": {"role": role.value, "id": me},
        "members": [
            {
                "role": member_role.value,
                "id": member.id,
                "organisation": member.organisation,
                "fingerprint": member.identity_key,
            }
            for member_role, member in charter.members()
        ],
        "committee": {"pods": committee.pods, "threshold": committee.threshold, "quorum": committee.quorum},
        "minimum_cohort": document.cohort.minimum,
        "colluding_hospitals": document.cohort.colluding_hospitals,
        "signed_by": sorted(signed),
    }


def _pin(path: Path, digest: str, pin_as: PinAs | None) -> None:
    if not path.exists():
        if pin_as is PinAs.next:
            raise ServiceError(
                Reason.NOT_FOUND, f"{path} does not exist: pin the charter in force first, without --as next"
            )
        write_new(path, emit(Pin(wardround="pin/v1", current=digest)))
        return
    held = load_pin(read(path), str(path))
    if pin_as is None and held.current != digest:
        raise ServiceError(
            Reason.CONFLICT,
            f"{path} pins another charter ({held.current[:12]}…): say --as next for an amendment that takes force at a "
            "new round, or --as current to replace it at once",
        )
    if pin_as is PinAs.next and held.current != digest:
        pin = Pin(wardround="pin/v1", current=held.current, next=digest)
    else:
        pin = Pin(wardround="pin/v1", current=digest, next=held.next if held.next != digest else None)
    replace_file(path, [emit(pin)])

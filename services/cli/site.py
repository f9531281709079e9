"""`wardround site`: what one site makes for itself. Its keys are made here and never leave."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.console import Console
from rich.table import Table

from services.cli.check import Finding, check_site
from services.cli.files import PUBLIC, SECRET, refuse_existing, write_new
from services.cli.kubernetes import MANIFEST, VALUES, renewed_secret, secret_manifest, site_values
from services.cli.operator import CERTIFICATE, KEY
from services.common.clock import SystemClock
from services.common.documents.charter import JoinFile, Member, join_blob, load_join
from services.common.documents.emit import emit
from services.common.documents.site import read
from services.common.errors import Reason, ServiceError
from services.common.ids import Role, check_id
from services.common.rpc.certificates import Issued, issue_leaf, make_root, server_name
from services.common.secagg.signing import Signer
from services.common.store.durable import replace_file

app = typer.Typer(no_args_is_help=True, help="A site's own keys and certificates, and whether it is ready.")

_LEAF_DAYS = 90.0


class SiteRole(StrEnum):
    """The roles that a site can have in a charter."""

    hospital = "hospital"
    pod = "pod"
    aggregator = "aggregator"


@app.command()
def init(
    role: Annotated[SiteRole, typer.Option(help="what this site runs")],
    id: Annotated[str, typer.Option(help="its name in the charter: a-z, 0-9 and '-'")],
    organisation: Annotated[str, typer.Option(help="the legal owner, as the others know it")],
    consortium: Annotated[str, typer.Option(help="the consortium's name: a-z, 0-9 and '-'")],
    out: Annotated[Path, typer.Option(help="folder for the keys; nothing in it is overwritten")],
    days: Annotated[float, typer.Option(min=1, max=398, help="life of the first TLS certificate")] = _LEAF_DAYS,
    aggregator: Annotated[str, typer.Option(help="host:port that this site will dial, where it is known")] = "",
) -> None:
    """Make this site's keys, its join.yaml for the charter, and secret.yaml and site.yaml for its cluster.

    Example: wardround site init --role hospital --id alice --organisation "Alice Hospital" --consortium lesions --out
    keys/
    """
    join, files = make_site(Role(role.value), id, organisation, consortium, out, days, aggregator)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{role.value} {id} of {organisation}: {files} files in {out}")
    console.print(f"  fingerprint of the identity key: {fingerprint(join.identity_key)}")
    console.print(
        f"  keep identity.pem and {MANIFEST} secret; keep tls-root-key.pem off the cluster: it issues this site's "
        "certificates"
    )
    console.print(
        f"next: send {out / 'join.yaml'} to whoever drafts the charter, and read the fingerprint out by phone"
    )


def make_site(
    role: Role,
    id: str,
    organisation: str,
    consortium: str,
    out: Path,
    days: float = _LEAF_DAYS,
    aggregator: str = "",
) -> tuple[JoinFile, int]:
    """Write a new site's keys, certificates, join.yaml, secret.yaml and site.yaml to `out`; how many files, too.

    Raises MALFORMED for a name that is no DNS label, CONFLICT rather than overwriting anything.
    """
    check_id(consortium, "consortium")
    check_id(id)
    now, private = SystemClock().now_ms(), Ed25519PrivateKey.generate()
    root = make_root(consortium, id, now)
    join = _join(role, id, organisation, consortium, Signer(private), root)
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    files = {
        "identity.pem": (pem, SECRET),
        "tls-root.pem": (root.certificate, PUBLIC),
        "tls-root-key.pem": (root.key, SECRET),
        **_leaves(role, id, consortium, root.certificate, root.key, days, now),
        "join.yaml": (emit(join), PUBLIC),
    }
    contents = {name: content for name, (content, _) in files.items()}
    files[MANIFEST] = (secret_manifest(id, contents), SECRET)
    files[VALUES] = (site_values(role, id, aggregator), PUBLIC)
    refuse_existing([out / name for name in files])
    out.mkdir(parents=True, exist_ok=True)
    for name, (content, mode) in files.items():
        write_new(out / name, content, mode)
    return join, len(files)


@app.command()
def renew(
    folder: Annotated[Path, typer.Argument(help="the folder that `site init` made", metavar="DIR")],
    days: Annotated[float, typer.Option(min=1, max=398, help="life of the new certificate")] = _LEAF_DAYS,
) -> None:
    """Issue new TLS certificates under this site's own root; running services read them by themselves.

    Example: wardround site renew keys/ --days 90
    """
    join = load_join(read(folder / "join.yaml"), str(folder / "join.yaml"))
    root, key = read(folder / "tls-root.pem"), read(folder / "tls-root-key.pem")
    leaves = _leaves(Role(join.role), join.id, join.consortium, root, key, days, SystemClock().now_ms())
    for name, (content, mode) in leaves.items():
        replace_file(folder / name, [content])
        (folder / name).chmod(mode)
    fresh = {name: content for name, (content, _) in leaves.items()}
    replace_file(folder / MANIFEST, [renewed_secret(folder, join.id, fresh)])
    Console(highlight=False, soft_wrap=True).print(
        f"{join.role} {join.id}: certificates renewed for {days:g} days, in {MANIFEST} too"
    )


@app.command()
def operator(
    folder: Annotated[Path, typer.Argument(help="the folder that `site init` made", metavar="DIR")],
    name: Annotated[str, typer.Option(help="who will hold it: a-z, 0-9 and '-'; it stands in the service's log")],
    out: Annotated[Path, typer.Option(help="folder for the certificate and its key; nothing is overwritten")],
    days: Annotated[float, typer.Option(min=1, max=398, help="life of the certificate")] = _LEAF_DAYS,
) -> None:
    """Issue a certificate with which a person asks this site's aggregator, and brings it models.

    Example: wardround site operator keys/ --name olga --out olga/ --days 30
    """
    join = load_join(read(folder / "join.yaml"), str(folder / "join.yaml"))
    if join.role != Role.AGGREGATOR.value:
        raise ServiceError(
            Reason.INVALID_DOCUMENT,
            f"{join.id} is a {join.role}: it is administered on its own machine, through its Unix socket, without any "
            "certificate",
        )
    root, key = read(folder / "tls-root.pem"), read(folder / "tls-root-key.pem")
    files = _operator_leaf(name, join.consortium, root, key, days, SystemClock().now_ms())
    refuse_existing([out / file for file in files])
    for file, (content, mode) in files.items():
        write_new(out / file, content, mode)
    Console(highlight=False, soft_wrap=True).print(
        f"{out}: certificate of operator {name} for {days:g} days; there is no revocation, so keep the days few"
    )


@app.command()
def check(
    config: Annotated[Path, typer.Option(help="the configuration that the service is started with")],
    study: Annotated[Path | None, typer.Option(help="a study: a hospital's data are held against it")] = None,
    connect: Annotated[bool, typer.Option(help="also look up and dial the aggregator's address")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Check files, keys, certificate, charter, data and state before the service starts. Exit code 1 if one fails.

    Example: wardround site check --config hospital.yaml --study study.yaml --connect
    """
    findings = check_site(config, study, connect, SystemClock().now_ms())
    failed = [finding for finding in findings if finding.state is Finding.State.FAILED]
    if as_json:
        checks = [{"what": one.what, "state": one.state.value, "detail": one.detail} for one in findings]
        print(json.dumps({"ready": not failed, "checks": checks}, indent=2, ensure_ascii=False))
    else:
        table = Table(box=None, pad_edge=False, show_header=False)
        for finding in findings:
            table.add_row(_MARKS[finding.state], finding.what, finding.detail)
        Console(highlight=False).print(table)
    if failed:
        raise ServiceError(
            Reason.INVALID_DOCUMENT,
            f"{len(failed)} of {len(findings)} checks of {config} failed, first: {failed[0].what}: {failed[0].detail}",
        )
    if not as_json:
        Console(highlight=False).print("ready to start")


_MARKS = {
    Finding.State.PASSED: "[green]ok[/]",
    Finding.State.WARNED: "[yellow]warning[/]",
    Finding.State.FAILED: "[red]FAILED[/]",
}


def fingerprint(identity_key: str) -> str:
    """The 64 hex digits of an identity key in groups of eight, to be read out."""
    return " ".join(identity_key[i : i + 8] for i in range(0, len(identity_key), 8))


def _join(role: Role, id: str, organisation: str, consortium: str, signer: Signer, root: Issued) -> JoinFile:
    member = Member(
        id=id,
        organisation=organisation,
        identity_key=signer.public.hex(),
        tls_root=root.certificate.decode(),
        signature="",
    )
    signature = signer.sign("join", join_blob(role, member)).signature.hex()
    fields = member.model_dump() | {"signature": signature}
    join = JoinFile.model_validate({"wardround": "join/v1", "consortium": consortium, "role": role.value, **fields})
    return load_join(emit(join))


def _leaves(
    role: Role, id: str, consortium: str, root: bytes, root_key: bytes, days: float, now_ms: int
) -> dict[str, tuple[bytes, int]]:
    """The service's leaf; at the aggregator also an operator's, for `wardround watch` and the plan."""
    names = [server_name(id, consortium)] if role is Role.AGGREGATOR else []
    leaf = issue_leaf(root, root_key, role, id, consortium, days=days, now_ms=now_ms, server_names=names)
    files = {"tls.pem": (leaf.certificate, PUBLIC), "tls-key.pem": (leaf.key, SECRET)}
    if role is Role.AGGREGATOR:
        files |= _operator_leaf(id, consortium, root, root_key, days, now_ms)
    return files


def _operator_leaf(
    name: str, consortium: str, root: bytes, root_key: bytes, days: float, now_ms: int
) -> dict[str, tuple[bytes, int]]:
    leaf = issue_leaf(root, root_key, Role.OPERATOR, name, consortium, days=days, now_ms=now_ms)
    return {CERTIFICATE: (leaf.certificate, PUBLIC), KEY: (leaf.key, SECRET)}

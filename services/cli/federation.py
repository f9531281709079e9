"""A whole federation laid out in one folder, as many sites would have made it: keys, charter, study, policies, configs.

For the demo, the end-to-end tests and the benchmarks. Everything is what a real site has; only the charter says
`demo: true`, because here one person owns all sites.
"""

import datetime
import hashlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from ruamel.yaml import YAML

from services.cli.processes import Service
from services.common.clock import SystemClock
from services.common.documents.charter import load_charter
from services.common.ids import Role
from services.common.rpc.certificates import issue_leaf, make_root, server_name
from services.common.secagg.blob import encode
from services.common.secagg.committee import Committee
from services.common.secagg.messages import Join
from services.common.secagg.signing import Signer

CONSORTIUM = "demo"
AGGREGATOR = "centre"
QUORUMS = {(3, 3): 3, (4, 2): 3, (5, 3): 4, (5, 2): 4, (7, 3): 5}
_POD_NAMES = ("ash", "birch", "cedar", "elm", "fir", "hazel", "larch", "maple", "oak", "pine", "rowan", "willow")


@dataclass(frozen=True)
class Site:
    """One site's folder and identity."""

    role: Role
    id: str
    folder: Path
    member: dict[str, str]

    @property
    def state(self) -> Path:
        """Where its process keeps what must survive."""
        return self.folder / "state"

    @property
    def socket(self) -> Path:
        """Its administration socket; relative, since a socket's path may have 107 bytes at most."""
        return self.folder / "admin.sock"


@dataclass(frozen=True)
class Federation:
    """All sites in `root`; `charter` and `study` are exact bytes."""

    root: Path
    sites: tuple[Site, ...]
    charter: bytes
    study: bytes

    def of(self, role: Role) -> list[Site]:
        """The sites of one role, in the charter's order."""
        return [site for site in self.sites if site.role == role]

    @property
    def aggregator(self) -> Site:
        """The coordinating centre."""
        return self.of(Role.AGGREGATOR)[0]


def to_yaml(document: dict[str, Any]) -> bytes:
    """Plain YAML of plain values."""
    out = BytesIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.allow_unicode = True
    yaml.dump(document, out)
    return out.getvalue()


def committee_of(pods: int, threshold: int) -> Committee:
    """The recommended quorum for (m, t): docs/protocol.md. Raises INVALID_DOCUMENT for an unsafe pair."""
    quorum = QUORUMS.get((pods, threshold), (pods + threshold) // 2 + 1)
    committee = Committee(pods, threshold, min(pods, quorum))
    committee.check()
    return committee


def make_site(folder: Path, role: Role, member_id: str, organisation: str) -> Site:
    """Identity key, TLS root and leaf (and an operator's leaf at the centre) in `folder`; the self-signed entry."""
    folder.mkdir(parents=True, exist_ok=True)
    now = SystemClock().now_ms()
    private = Ed25519PrivateKey.generate()
    root = make_root(CONSORTIUM, member_id, now)
    names = [server_name(member_id, CONSORTIUM)] if role == Role.AGGREGATOR else []
    leaf = issue_leaf(root.certificate, root.key, role, member_id, CONSORTIUM, days=30, now_ms=now, server_names=names)
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    files = {
        "identity.pem": pem,
        "tls-root.pem": root.certificate,
        "tls.pem": leaf.certificate,
        "tls-key.pem": leaf.key,
    }
    if role == Role.AGGREGATOR:
        operator = issue_leaf(root.certificate, root.key, Role.OPERATOR, member_id, CONSORTIUM, days=30, now_ms=now)
        files |= {"operator.pem": operator.certificate, "operator-key.pem": operator.key}
    for name, content in files.items():
        path = folder / name
        path.touch(mode=0o600)
        path.write_bytes(content)
    signer = Signer(private)
    join = Join(role.value, member_id, organisation, signer.public, root.certificate)
    member = {
        "id": member_id,
        "organisation": organisation,
        "identity_key": signer.public.hex(),
        "tls_root": root.certificate.decode(),
        "signature": signer.sign("join", encode(join)).signature.hex(),
    }
    return Site(role, member_id, folder, member)


def make_sites(root: Path, hospitals: list[str], pods: int) -> tuple[Site, ...]:
    """The centre, `pods` key-share pods and the hospitals, each in a folder of its own under `root`/sites."""
    names = [_POD_NAMES[i] if i < len(_POD_NAMES) else f"pod-{i + 1}" for i in range(pods)]
    wanted = [(Role.AGGREGATOR, AGGREGATOR), *((Role.POD, n) for n in names), *((Role.HOSPITAL, n) for n in hospitals)]
    return tuple(
        make_site(root / "sites" / name, role, name, f"{name} ({role.value}'s organisation)") for role, name in wanted
    )


def write_charter(
    root: Path, sites: tuple[Site, ...], committee: Committee, cohort: dict[str, Any], suite: str = "mlkem768-x25519"
) -> bytes:
    """charter.yaml, the pods' signatures beside it, and everybody's pin. Returns the exact bytes."""
    by_role = {role: [site.member for site in sites if site.role == role] for role in Role}
    blob = to_yaml(
        {
            "wardround": "charter/v1",
            "consortium": CONSORTIUM,
            "version": 1,
            "demo": True,
            "suite": suite,
            "committee": {"threshold": committee.threshold, "quorum": committee.quorum, "slack": committee.slack},
            "cohort": cohort,
            "limits": {"epsilon": 100.0, "delta": 1e-3},
            "aggregator": by_role[Role.AGGREGATOR][0],
            "pods": by_role[Role.POD],
            "hospitals": by_role[Role.HOSPITAL],
        }
    )
    charter = load_charter(blob)
    (root / "charter.yaml").write_bytes(blob)
    signatures = {}
    for site in sites:
        (site.folder / "pin.yaml").write_bytes(to_yaml({"wardround": "pin/v1", "current": charter.digest.hex()}))
        if site.role == Role.POD:
            key = serialization.load_pem_private_key((site.folder / "identity.pem").read_bytes(), None)
            assert isinstance(key, Ed25519PrivateKey)  # noqa: S101  # written above
            signatures[site.id] = Signer(key).sign("charter", blob).signature.hex()
    (root / "charter.signatures.yaml").write_bytes(
        to_yaml({"wardround": "signatures/v1", "charter": charter.digest.hex(), "signatures": signatures})
    )
    return blob


def write_configs(federation: Federation, data: dict[str, Path], through_round: int, threads: int) -> None:
    """Every site's config.yaml and every hospital's policy.yaml; `data` by hospital id."""
    root = federation.root
    for site in federation.sites:
        common: dict[str, Any] = {
            "id": site.id,
            "charters": [str(root / "charter.yaml")],
            "pins": str(site.folder / "pin.yaml"),
            "identity_key": str(site.folder / "identity.pem"),
            "tls": {"certificate": str(site.folder / "tls.pem"), "key": str(site.folder / "tls-key.pem")},
            "state": str(site.state),
            "http": "127.0.0.1:0",
        }
        if site.role == Role.AGGREGATOR:
            common |= {
                "listen": "127.0.0.1:0",
                "study": str(root / "study.yaml"),
                "through_round": through_round,
                "initial_model": str(root / "v0.safetensors"),
                "charter_signatures": str(root / "charter.signatures.yaml"),
            }
        else:
            common |= {"admin_socket": str(site.socket)}
        if site.role == Role.HOSPITAL:
            common |= {
                "policy": str(site.folder / "policy.yaml"),
                "data": str(data[site.id]),
                "backbones": str(root / "backbones"),
                "device": "auto",
                "threads": threads,
            }
        (site.folder / "config.yaml").write_bytes(to_yaml(common))


def set_aggregator_address(federation: Federation, address: str) -> None:
    """Write where the aggregator listens into every other site's config."""
    for site in federation.sites:
        if site.role != Role.AGGREGATOR:
            path = site.folder / "config.yaml"
            path.write_bytes(path.read_bytes() + f"aggregator: {address}\n".encode())


def write_policies(federation: Federation, study: dict[str, Any], epsilon: float) -> None:
    """A policy of every hospital that allows exactly this study; under `none` in words, with `repeat: allowed`."""
    privacy = study["privacy"]
    none = privacy["mechanism"] == "none"
    allowed: dict[str, Any] = {
        "sha256": hashlib.sha256(federation.study).hexdigest(),
        "mechanisms": [privacy["mechanism"]],
        "epsilon": epsilon,
        "delta": privacy.get("delta") or 0.0,
        "rounds": study["rounds"] + 1,
        "until": study["expires"],
        "minimum_cohort": study["cohort"]["minimum"],
        "colluding_hospitals": study["cohort"]["colluding_hospitals"],
    }
    if none:
        allowed |= {"no_privacy": "accepted", "repeat": "allowed"}
    for site in federation.of(Role.HOSPITAL):
        policy = {
            "wardround": "policy/v1",
            "hospital": site.id,
            "dataset": "lesions",
            "dataset_epsilon": epsilon,
            "dataset_delta": privacy.get("delta") or 0.0,
            "studies": [allowed],
        }
        (site.folder / "policy.yaml").write_bytes(to_yaml(policy))


def expiry() -> datetime.date:
    """A study drafted here is good for a year."""
    return datetime.datetime.now(datetime.UTC).date() + datetime.timedelta(days=365)


def service(federation: Federation, site: Site) -> Service:
    """The process of one site."""
    module = {
        Role.AGGREGATOR: "services.aggregator",
        Role.POD: "services.keyshare",
        Role.HOSPITAL: "services.hospital_node",
    }[site.role]
    log = federation.root / "logs" / f"{site.id}.log"
    return Service(site.id, module, site.folder / "config.yaml", log)

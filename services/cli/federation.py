"""A whole federation laid out in one folder, as many sites would have made it: keys, charter, study, policies, configs.

For the demo, the end-to-end tests and the benchmarks. Everything is what a real site has; only the charter says
`demo: true`, because here one person owns all sites.
"""

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from services.cli import site as sites_of
from services.cli.drafts import draft_policy
from services.cli.processes import Service
from services.common.documents.charter import (
    Charter,
    CharterSignatures,
    CohortSection,
    CommitteeSection,
    LimitsSection,
    LoadedCharter,
    Member,
    load_charter,
)
from services.common.documents.emit import emit
from services.common.documents.pin import Pin
from services.common.documents.site import load_signer
from services.common.documents.study import LoadedStudy, Study, load_study
from services.common.ids import Role
from services.common.secagg.committee import Committee

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
    member: Member

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
    """All sites in `root`, under one charter, for one study."""

    root: Path
    sites: tuple[Site, ...]
    charter: LoadedCharter
    study: LoadedStudy

    def of(self, role: Role) -> list[Site]:
        """The sites of one role, in the charter's order."""
        return [site for site in self.sites if site.role == role]

    @property
    def aggregator(self) -> Site:
        """The coordinating centre."""
        return self.of(Role.AGGREGATOR)[0]


def _yaml(document: dict[str, Any]) -> bytes:
    """Plain YAML of plain values: a configuration, which nobody hashes."""
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


def make_sites(root: Path, hospitals: list[str], pods: int) -> tuple[Site, ...]:
    """The centre, `pods` key-share pods and the hospitals, each in a folder of its own under `root`/sites."""
    names = [_POD_NAMES[i] if i < len(_POD_NAMES) else f"pod-{i + 1}" for i in range(pods)]
    wanted = [(Role.AGGREGATOR, AGGREGATOR), *((Role.POD, n) for n in names), *((Role.HOSPITAL, n) for n in hospitals)]
    made = []
    for role, name in wanted:
        folder = root / "sites" / name
        join, _ = sites_of.make_site(role, name, f"{name} ({role.value}'s organisation)", CONSORTIUM, folder)
        made.append(Site(role, name, folder, join.member))
    return tuple(made)


def write_charter(
    root: Path, sites: tuple[Site, ...], committee: Committee, minimum: int, colluding: int
) -> LoadedCharter:
    """charter.yaml, the pods' signatures beside it, and everybody's pin. Any ε up to 100 may be shown."""
    by_role = {role: tuple(site.member for site in sites if site.role == role) for role in Role}
    charter = Charter(
        wardround="charter/v1",
        consortium=CONSORTIUM,
        version=1,
        demo=True,
        committee=CommitteeSection(threshold=committee.threshold, quorum=committee.quorum, slack=committee.slack),
        cohort=CohortSection(
            minimum=minimum,
            maximum=len(by_role[Role.HOSPITAL]),
            colluding_hospitals=colluding,
            two_hospitals="accepted" if colluding == 0 else None,
        ),
        limits=LimitsSection(epsilon=100, delta=1e-3),
        aggregator=by_role[Role.AGGREGATOR][0],
        pods=by_role[Role.POD],
        hospitals=by_role[Role.HOSPITAL],
    )
    loaded = load_charter(emit(charter))
    (root / "charter.yaml").write_bytes(loaded.blob)
    signatures = {}
    for site in sites:
        (site.folder / "pin.yaml").write_bytes(emit(Pin(wardround="pin/v1", current=loaded.digest.hex())))
        if site.role == Role.POD:
            signer = load_signer(site.folder / "identity.pem")
            signatures[site.id] = signer.sign("charter", loaded.blob).signature.hex()
    signed = CharterSignatures(wardround="signatures/v1", charter=loaded.digest.hex(), signatures=signatures)
    (root / "charter.signatures.yaml").write_bytes(emit(signed))
    return loaded


def write_study(root: Path, sites: tuple[Site, ...], charter: LoadedCharter, study: Study) -> Federation:
    """study.yaml, and a policy of every hospital that allows exactly it; under `none` also a vector sent again."""
    loaded = load_study(emit(study))
    (root / "study.yaml").write_bytes(loaded.blob)
    for site in sites:
        if site.role == Role.HOSPITAL:
            policy = draft_policy(charter, loaded, site.id, "lesions", repeat=True)
            (site.folder / "policy.yaml").write_bytes(emit(policy))
    return Federation(root, sites, charter, loaded)


def write_configs(federation: Federation, data: dict[str, Path], through_round: int, threads: int) -> None:
    """Every site's config.yaml; `data` folders by hospital id."""
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
        (site.folder / "config.yaml").write_bytes(_yaml(common))


def set_aggregator_address(federation: Federation, address: str) -> None:
    """Write where the aggregator listens into every other site's config."""
    for site in federation.sites:
        if site.role != Role.AGGREGATOR:
            path = site.folder / "config.yaml"
            path.write_bytes(path.read_bytes() + f"aggregator: {address}\n".encode())


def service(federation: Federation, site: Site) -> Service:
    """The process of one site."""
    module = {
        Role.AGGREGATOR: "services.aggregator",
        Role.POD: "services.keyshare",
        Role.HOSPITAL: "services.hospital_node",
    }[site.role]
    log = federation.root / "logs" / f"{site.id}.log"
    return Service(site.id, module, site.folder / "config.yaml", log)

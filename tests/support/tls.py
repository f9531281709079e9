"""A consortium's certificates in a folder: real roots, real leaves, and the wrong ones that tests need."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from services.common.clock import SystemClock
from services.common.ids import Role
from services.common.rpc.certificates import Issued, issue_leaf, make_root, server_name
from services.common.rpc.leaf import LeafFiles
from services.common.rpc.members import Members


@dataclass
class FakeConsortium:
    """`leaf(role, id)` are files ready for a service's `tls`; `root(role, id)` is what the charter would hold."""

    folder: Path
    name: str
    aggregator: str
    roots: dict[tuple[Role, str], Issued] = field(default_factory=dict)

    @property
    def server_name(self) -> str:
        return server_name(self.aggregator, self.name)

    def root(self, role: Role, id: str) -> bytes:
        return self.roots[role, id].certificate

    @property
    def aggregator_root(self) -> bytes:
        return self.root(Role.AGGREGATOR, self.aggregator)

    def leaf(self, role: Role, id: str) -> LeafFiles:
        return LeafFiles(self.folder / f"{role.value}-{id}.crt", self.folder / f"{role.value}-{id}.key")

    def issue(
        self,
        role: Role,
        id: str,
        *,
        signer: tuple[Role, str] | None = None,
        days: float = 1,
        now_ms: int | None = None,
        name: str | None = None,
    ) -> LeafFiles:
        """Write a leaf for (role, id) under the root of `signer` (default: its own); `name` = another file name."""
        root = self.roots[signer or (role, id)]
        issued = issue_leaf(
            root.certificate,
            root.key,
            role,
            id,
            self.name,
            days=days,
            now_ms=SystemClock().now_ms() if now_ms is None else now_ms,
            server_names=[self.server_name] if role is Role.AGGREGATOR else (),
        )
        files = (
            self.leaf(role, id) if name is None else LeafFiles(self.folder / f"{name}.crt", self.folder / f"{name}.key")
        )
        files.certificate.write_bytes(issued.certificate)
        files.key.write_bytes(issued.key)
        return files

    def members(self) -> Members:
        return Members(self.name, {who: (root.certificate,) for who, root in self.roots.items()})


def make_consortium(
    folder: Path,
    pods: Sequence[str] = ("pod-a", "pod-b", "pod-c", "pod-d"),
    hospitals: Sequence[str] = ("north", "south", "west"),
    *,
    aggregator: str = "centre",
    name: str = "demo",
    operators: Sequence[str] = ("olga",),
) -> FakeConsortium:
    """Roots and leaves of all members under `folder`; operators' leaves come from the aggregator's root."""
    folder.mkdir(parents=True, exist_ok=True)
    made = FakeConsortium(folder, name, aggregator)
    now = SystemClock().now_ms()
    members = [
        (Role.AGGREGATOR, aggregator),
        *((Role.POD, id) for id in pods),
        *((Role.HOSPITAL, id) for id in hospitals),
    ]
    for role, id in members:
        made.roots[role, id] = make_root(name, id, now)
        made.issue(role, id)
    for id in operators:
        made.issue(Role.OPERATOR, id, signer=(Role.AGGREGATOR, aggregator))
    return made

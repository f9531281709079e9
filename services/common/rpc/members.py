"""The members with their TLS roots, as the charters in force list them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from services.common.documents.charter import Charter
from services.common.errors import Reason, ServiceError
from services.common.ids import Role


@dataclass(frozen=True)
class Members:
    """`roots`: by (role, id) the PEM roots of that member, more than one only while two charters are in force."""

    consortium: str
    roots: Mapping[tuple[Role, str], tuple[bytes, ...]]

    @classmethod
    def of(cls, charters: Iterable[Charter]) -> "Members":
        """The members of all charters in force (current, next). Raises INVALID_DOCUMENT if the consortia differ."""
        roots: dict[tuple[Role, str], tuple[bytes, ...]] = {}
        names: set[str] = set()
        for charter in charters:
            names.add(charter.consortium)
            entries = [
                (Role.AGGREGATOR, charter.aggregator),
                *((Role.POD, pod) for pod in charter.pods),
                *((Role.HOSPITAL, hospital) for hospital in charter.hospitals),
            ]
            for role, member in entries:
                root = member.tls_root.encode()
                known = roots.get((role, member.id), ())
                roots[role, member.id] = known if root in known else (*known, root)
        if len(names) != 1:
            raise ServiceError(
                Reason.INVALID_DOCUMENT,
                f"charters of one consortium are needed, not of {sorted(names)}: check the pins",
            )
        return cls(names.pop(), roots)

    def bundle(self) -> bytes:
        """All roots in one PEM: TLS takes any of them, the interceptor then only the member's own."""
        return b"".join(sorted({root.strip() + b"\n" for roots in self.roots.values() for root in roots}))

"""The exact bytes of a cohort and its size, counted by organisation (protocol.md §10, P-12, P-19)."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from services.common.errors import Reason, ServiceError
from services.common.ids import check_id
from services.common.secagg.messages import MAX_HOSPITALS, Accepted
from services.common.secagg.roster import Roster
from services.common.secagg.signing import digest


@dataclass(frozen=True)
class Cohort:
    """U under M = `manifest`: hospitals with the digests of their headers, strictly ascending by id bytes."""

    manifest: bytes
    members: tuple[Accepted, ...]

    def __post_init__(self) -> None:
        ids = [member.hospital.encode() for member in self.members]
        if any(first >= second for first, second in pairwise(ids)):
            raise ServiceError(Reason.MALFORMED, "cohort: hospitals must be strictly ascending, each once")

    @cached_property
    def blob(self) -> bytes:
        """M ‖ u32(|U|) ‖ for each: lp(hospital) ‖ header digest (32)."""
        out = bytearray(self.manifest + len(self.members).to_bytes(4, "big"))
        for member in self.members:
            name = member.hospital.encode()
            out += len(name).to_bytes(4, "big") + name + member.header
        return bytes(out)

    @cached_property
    def digest(self) -> bytes:
        """D(cohort, blob)."""
        return digest("cohort", self.blob)

    @classmethod
    def parse(cls, blob: bytes) -> "Cohort":
        """The cohort of its exact bytes. Raises MALFORMED for any other."""
        count = int.from_bytes(blob[32:36], "big")
        if len(blob) < 36 or count > MAX_HOSPITALS:
            raise ServiceError(Reason.MALFORMED, "cohort: truncated or too large")
        members, position = [], 36
        for _ in range(count):
            size = int.from_bytes(blob[position : position + 4], "big")
            end = position + 4 + size + 32
            if not 1 <= size <= 63 or end > len(blob):
                raise ServiceError(Reason.MALFORMED, "cohort: truncated, or an id that is not 1 to 63 bytes")
            name = blob[position + 4 : position + 4 + size].decode("ascii", "replace")
            members.append(Accepted(check_id(name, "hospital"), blob[end - 32 : end]))
            position = end
        if position != len(blob):
            raise ServiceError(Reason.MALFORMED, "cohort: bytes behind its end")
        return cls(bytes(blob[:32]), tuple(members))

    def check_cohort_size(self, roster: Roster, minimum: int) -> None:
        """P-12: at least `minimum` ORGANISATIONS (the core's n_min), at most n_max hospitals, all in the charter.

        Raises BELOW_COHORT, TOO_LARGE, UNKNOWN_MEMBER.
        """
        organisations = {roster.hospital(member.hospital).organisation for member in self.members}
        least = max(minimum, roster.minimum_cohort)
        if len(organisations) < least:
            raise ServiceError(
                Reason.BELOW_COHORT,
                f"a cohort of {len(self.members)} hospitals from {len(organisations)} organisations, at least {least}",
            )
        if len(self.members) > roster.maximum_cohort:
            raise ServiceError(
                Reason.TOO_LARGE, f"a cohort of {len(self.members)} hospitals, at most {roster.maximum_cohort}"
            )


def check_certificate_bytes(blob: bytes, maximum_cohort: int) -> None:
    """Raise TOO_LARGE for a certificate beyond 128 B * n_max + 4 KiB, before anything of it is read."""
    if len(blob) > 128 * maximum_cohort + 4096:
        raise ServiceError(Reason.TOO_LARGE, f"certificate of {len(blob)} bytes for at most {maximum_cohort} hospitals")

"""The policy: a hospital's own consent. Deny by default (architecture.md §1)."""

import datetime
import hashlib
from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field

from services.common.documents.strict import Document, Section, hex_bytes, load, refuse
from services.common.errors import ServiceError
from services.common.ids import check_id


class AllowedStudy(Section):
    """One study that this hospital consents to, by the digest of its exact bytes."""

    sha256: str
    mechanisms: tuple[Literal["local", "shared", "none"], ...] = ("local", "shared")
    epsilon: float = Field(ge=0, description="cap of this study at this hospital")
    delta: float = Field(ge=0, lt=1e-2)
    rounds: int = Field(ge=1)
    until: datetime.date
    minimum_cohort: int = Field(default=3, ge=2)
    colluding_hospitals: int = Field(default=1, ge=0)
    no_privacy: Literal["accepted"] | None = Field(default=None, description="needed in words for mechanism none")
    repeat: Literal["allowed"] | None = Field(
        default=None, description="`allowed`: mechanism none may submit a second vector for one model"
    )


class Policy(Document):
    """Nothing outside `studies` is allowed."""

    wardround: Literal["policy/v1"]
    hospital: str
    dataset: str = Field(description="name of the ledger's data set")
    dataset_epsilon: float = Field(ge=0, description="total cap of the data set, over all studies")
    dataset_delta: float = Field(ge=0, lt=1e-2, description="δ in all; half is for the studies' own δ together")
    studies: tuple[AllowedStudy, ...] = ()


class Plan(Document):
    """What an operator rolls out: how far the study that travels beside it shall run."""

    wardround: Literal["plan/v1"]
    study: str = Field(description="SHA-256 of the study's exact bytes")
    through_round: int = Field(ge=0, description="a target that only rises")


@dataclass(frozen=True)
class LoadedPolicy:
    """A policy that stands by itself; `digest` is the plain SHA-256 of `blob`, the exact bytes."""

    document: Policy
    digest: bytes
    blob: bytes = field(repr=False)

    def allowed(self, study: bytes) -> AllowedStudy | None:
        """The entry for the study with this digest, or None: what is not written is refused."""
        return next((entry for entry in self.document.studies if entry.sha256 == study.hex()), None)


def load_policy(blob: bytes, name: str = "policy.yaml") -> LoadedPolicy:
    """Parse the exact bytes of a policy. Raises INVALID_DOCUMENT."""
    policy = load(Policy, blob, name)
    try:
        check_id(policy.hospital, "hospital")
        check_id(policy.dataset, "dataset")
    except ServiceError as error:
        raise refuse(name, error.detail) from None
    seen: set[str] = set()
    for i, entry in enumerate(policy.studies):
        hex_bytes(entry.sha256, 32, name, f"studies[{i}].sha256")
        if entry.sha256 in seen:
            raise refuse(name, f"studies[{i}] repeats the study {entry.sha256[:12]}…: keep one entry for it")
        seen.add(entry.sha256)
        if "none" in entry.mechanisms and entry.no_privacy != "accepted":
            raise refuse(
                name,
                f"studies[{i}].mechanisms holds none, which protects no single patient: remove it, or say "
                "`no_privacy: accepted`",
            )
        if entry.minimum_cohort < entry.colluding_hospitals + 2:
            raise refuse(
                name,
                f"studies[{i}].minimum_cohort is {entry.minimum_cohort}, but must be at least colluding_hospitals + 2 "
                f"= {entry.colluding_hospitals + 2} (P-12): raise it",
            )
    return LoadedPolicy(policy, hashlib.sha256(blob).digest(), blob)


def load_plan(blob: bytes, name: str = "plan.yaml") -> Plan:
    """Parse a plan. Raises INVALID_DOCUMENT."""
    plan = load(Plan, blob, name)
    hex_bytes(plan.study, 32, name, "study")
    return plan

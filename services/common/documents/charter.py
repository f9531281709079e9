"""The charter: the consortium's constitution (architecture.md §1, protocol.md §1-§3).

A YAML file whose EXACT bytes are hashed (plain SHA-256), signed by pod owners and pinned by members.
Loading refuses whatever is unsafe: P-1 (committee), P-12 (cohort), distinct ids, keys and organisations.
"""

from typing import Literal

from pydantic import Field

from services.common.documents.strict import Document, Section


class Member(Section):
    """One site's entry, as its join file has it; `signature` is over the Join blob (label join)."""

    id: str
    organisation: str = Field(min_length=1, max_length=128)
    identity_key: str = Field(description="Ed25519 public key, 64 hex digits")
    tls_root: str = Field(description="PEM of the site's own TLS root certificate")
    signature: str = Field(description="Ed25519 signature over the join blob, 128 hex digits")


class CommitteeSection(Section):
    """(t, q, s); m is the number of pods."""

    threshold: int = Field(ge=2, description="t: pods that must collude to open one hospital's update")
    quorum: int = Field(ge=2, description="q: pods whose signatures fix a cohort")
    slack: int = Field(default=0, ge=0, description="s: rolled-back honest pods to be borne beside t-1 bad ones")


class CohortSection(Section):
    """Limits of every cohort, counted by organisation."""

    minimum: int = Field(ge=2, description="n_min, at least colluding_hospitals + 2")
    maximum: int = Field(ge=2, le=4096, description="n_max")
    colluding_hospitals: int = Field(default=1, ge=0, description="k; 0 needs `two_hospitals: accepted`")
    two_hospitals: Literal["accepted"] | None = Field(
        default=None, description="`accepted` says in words that with k = 0 each of two hospitals can read the other"
    )


class LimitsSection(Section):
    """What no study under this charter may exceed."""

    rounds: int = Field(default=1000, ge=1, le=100_000, description="highest round number of a study")
    parameters: int = Field(default=200_000_000, ge=1, le=2**31, description="d")
    ring_bits: tuple[Literal[16, 24, 32], ...] = (16, 24, 32)
    round_key_hours: float = Field(default=24, gt=0, le=168, description="longest life of a round key")
    epsilon: float = Field(default=10, gt=0, description="largest ε of one study")
    delta: float = Field(default=1e-5, gt=0, lt=1e-2, description="largest δ of one study")


class Charter(Document):
    """`members` by role; a pod's index is its position in `pods`."""

    wardround: Literal["charter/v1"]
    consortium: str = Field(description="DNS label; part of TLS names")
    version: int = Field(ge=1)
    demo: bool = Field(default=False, description="lifts the organisation, store and swap rules; printed everywhere")
    suite: Literal["mlkem768-x25519", "x25519"] = "mlkem768-x25519"
    committee: CommitteeSection
    cohort: CohortSection
    limits: LimitsSection = LimitsSection()
    verify: Literal["one", "full"] = Field(default="one", description="P-23: holders compared for each piece")
    aggregator: Member
    pods: tuple[Member, ...]
    hospitals: tuple[Member, ...]

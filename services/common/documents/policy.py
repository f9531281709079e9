"""The policy: a hospital's own consent. Deny by default (architecture.md §1)."""

import datetime
from typing import Literal

from pydantic import Field

from services.common.documents.strict import Document, Section


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
    dataset_delta: float = Field(ge=0, lt=1e-2)
    studies: tuple[AllowedStudy, ...] = ()


class Plan(Document):
    """What an operator rolls out: how far the study that travels beside it shall run."""

    wardround: Literal["plan/v1"]
    study: str = Field(description="SHA-256 of the study's exact bytes")
    through_round: int = Field(ge=0, description="a target that only rises")

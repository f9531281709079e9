"""Valid documents for everybody's tests: members with real keys and TLS roots, charter, study, policy, pin.

`Site` holds the private keys openly on purpose. Identity keys follow from the id; TLS roots are drawn once a process.
"""

import datetime
import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from services.common.documents.charter import (
    Charter,
    CharterSignatures,
    CohortSection,
    CommitteeSection,
    JoinFile,
    LimitsSection,
    LoadedCharter,
    Member,
    join_blob,
    load_charter,
)
from services.common.documents.emit import emit
from services.common.documents.pin import Pin
from services.common.documents.policy import AllowedStudy, LoadedPolicy, Policy, load_policy
from services.common.documents.study import LoadedStudy, Study, load_study
from services.common.ids import Role
from services.common.rpc.certificates import Issued, make_root
from services.common.secagg.signing import Signer

NOW = 1_795_000_000_000  # Unix ms, November 2026
CONSORTIUM = "test"
HOSPITALS = ("alice", "bob", "carol", "dave")
INITIAL = hashlib.sha256(b"v0").hexdigest()


@dataclass(frozen=True)
class Site:
    """One member with everything that it keeps to itself."""

    role: Role
    entry: Member
    signer: Signer = field(repr=False)
    root: Issued = field(repr=False)

    @property
    def join(self) -> JoinFile:
        return JoinFile(wardround="join/v1", consortium=CONSORTIUM, role=self.role.value, **self.entry.model_dump())


@dataclass(frozen=True)
class Documents:
    """A charter with the sites that signed its entries."""

    charter: LoadedCharter
    sites: dict[str, Site]

    def signatures(self, pods: Sequence[str]) -> bytes:
        """The signatures file with the owners of `pods`."""
        return emit(
            CharterSignatures(
                wardround="signatures/v1",
                charter=self.charter.digest.hex(),
                signatures={
                    pod: self.sites[pod].signer.sign("charter", self.charter.blob).signature.hex() for pod in pods
                },
            )
        )

    def pin(self) -> bytes:
        return emit(Pin(wardround="pin/v1", current=self.charter.digest.hex()))


@functools.lru_cache(maxsize=256)
def make_site(role: Role, id: str, organisation: str | None = None) -> Site:
    """A member whose entry carries its own signature."""
    signer = Signer.from_seed(hashlib.sha256(f"identity/{id}".encode()).digest())
    root = make_root(CONSORTIUM, id, NOW)
    unsigned = Member(
        id=id,
        organisation=organisation or f"{id} trust",
        identity_key=signer.public.hex(),
        tls_root=root.certificate.decode(),
        signature="",
    )
    signature = signer.sign("join", join_blob(role, unsigned)).signature
    return Site(role, unsigned.model_copy(update={"signature": signature.hex()}), signer, root)


def make_charter(
    pods: int = 4,
    threshold: int = 2,
    quorum: int = 3,
    hospitals: Sequence[str] = HOSPITALS,
    *,
    minimum: int = 3,
    maximum: int = 16,
    colluding: int = 1,
    two_hospitals: str | None = None,
    limits: LimitsSection | None = None,
    **changes: Any,
) -> tuple[Charter, dict[str, Site]]:
    """A charter, not yet loaded, and its sites by id; `changes` replace fields of the charter, fitting or not."""
    aggregator = make_site(Role.AGGREGATOR, "centre")
    owners = [make_site(Role.POD, f"pod-{index}") for index in range(pods)]
    wards = [make_site(Role.HOSPITAL, id) for id in hospitals]
    charter = Charter(
        wardround="charter/v1",
        consortium=CONSORTIUM,
        version=1,
        suite="x25519",
        committee=CommitteeSection.model_construct(threshold=threshold, quorum=quorum, slack=0),
        cohort=CohortSection.model_construct(
            minimum=minimum, maximum=maximum, colluding_hospitals=colluding, two_hospitals=two_hospitals
        ),
        limits=limits or LimitsSection(),
        aggregator=aggregator.entry,
        pods=tuple(site.entry for site in owners),
        hospitals=tuple(site.entry for site in wards),
    )
    return charter.model_copy(update=changes), {site.entry.id: site for site in (aggregator, *owners, *wards)}


def make_documents(**options: Any) -> Documents:
    """A charter that loads, with its sites."""
    charter, sites = make_charter(**options)
    return Documents(load_charter(emit(charter)), sites)


def study_fields(mechanism: str = "local") -> dict[str, Any]:
    """A small valid study as plain data, to be changed by a test and turned to bytes with `study_blob`."""
    privacy: dict[str, Any] = {"mechanism": mechanism}
    evaluation: dict[str, Any] = {"gate_rounds": (2,), "final": True}
    if mechanism != "none":
        privacy |= {
            "epsilon": 8.0,
            "delta": 1e-5,
            "noise_multiplier": 4.0,
            "sampling_rate": 0.5,
            "expected_batch": 50.0,
        }
        evaluation |= {"gate_noise_multiplier": 4.0, "final_noise_multiplier": 4.0}
    else:
        privacy["none_accepted"] = "No single patient is protected by noise in this study."
    if mechanism == "shared":
        privacy |= {"patients": dict.fromkeys(HOSPITALS, 100), "expected_batch": 200.0}
    server = {"strategy": "sgd", "learning_rate": 0.5, "momentum": 0.9} if mechanism == "shared" else {}
    return {
        "wardround": "study/v1",
        "name": "lesions",
        "purpose": "A small study that the tests run.",
        "expires": datetime.date(2030, 1, 31),
        "rounds": 4,
        "synthetic": True,
        "model": {
            "architecture": "small-cnn",
            "image_size": 28,
            "classes": ("benign", "malignant"),
            "parameters": 500,
            "initial": INITIAL,
        },
        "privacy": privacy,
        "training": {} if mechanism == "shared" else {"learning_rate": 0.1},
        "evaluation": evaluation,
        "server": server,
        "cohort": {"minimum": 3, "colluding_hospitals": 1},
        "timing": {"train_seconds": 1.0, "submit_seconds": 10.0, "attempt_seconds": 60.0},
    }


def study_blob(fields: dict[str, Any]) -> bytes:
    """The exact bytes of a study with these fields (valid by type)."""
    return emit(Study.model_validate(fields, strict=True))


def make_study(mechanism: str = "local", **changes: dict[str, Any] | Any) -> LoadedStudy:
    """A study that loads; `changes` are merged into the sections or replace whole fields."""
    fields = study_fields(mechanism)
    for key, change in changes.items():
        fields[key] = {**fields[key], **change} if isinstance(change, dict) and key in fields else change
    return load_study(study_blob(fields))


def make_policy(hospital: str, study: LoadedStudy, **changes: Any) -> LoadedPolicy:
    """The policy of `hospital` that allows just this study; `changes` replace fields of its entry."""
    local = study.document.privacy.mechanism != "none"
    entry = {
        "sha256": study.digest.hex(),
        "mechanisms": (study.document.privacy.mechanism,),
        "epsilon": study.document.privacy.epsilon or 0.0,
        "delta": study.document.privacy.delta or 0.0,
        "rounds": study.document.rounds + 1,
        "until": datetime.date(2030, 1, 31),
        "minimum_cohort": 3,
        "colluding_hospitals": 1,
        "no_privacy": None if local else "accepted",
        **changes,
    }
    policy = Policy(
        wardround="policy/v1",
        hospital=hospital,
        dataset="lesions",
        dataset_epsilon=10.0,
        dataset_delta=1e-4,
        studies=(AllowedStudy.model_validate(entry, strict=True),),
    )
    return load_policy(emit(policy))

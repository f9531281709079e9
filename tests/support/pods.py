"""A committee of real pods over real stores, driven by hand as a lying or honest aggregator would."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from services.common.errors import Reason, ServiceError
from services.common.secagg import blob as codec
from services.common.secagg.certificate import CheckedManifest, Ref, check_manifest
from services.common.secagg.cohort import Cohort
from services.common.secagg.encoding import LaneTable
from services.common.secagg.messages import (
    AbandonCertificate,
    Accepted,
    AcceptList,
    Close,
    CohortCertificate,
    Core,
    LedgerMark,
    Manifest,
    Signed,
)
from services.common.secagg.signing import digest
from services.keyshare.pod import Pod
from services.keyshare.store import CustodyStore
from tests.support.consortium import NOW, STUDY, Consortium, Submission, make_consortium, values_for
from tests.support.packed import encoded


class FakeClock:
    def __init__(self, now: int = NOW) -> None:
        self.now = now

    def now_ms(self) -> int:
        return self.now


def vector(table: LaneTable, hospital: int) -> bytes:
    """x of the hospital with this number."""
    return encoded(table, values_for(table, hospital))


def refuses(reason: Reason) -> "pytest.RaisesExc[ServiceError]":
    """The block is refused with `reason`."""
    return pytest.raises(ServiceError, match=f"^{reason.value}: ")


@dataclass
class Round:
    """One attempt that got as far as a manifest."""

    checked: CheckedManifest
    endorsements: list[Signed]
    submissions: dict[str, Submission]

    @property
    def manifest(self) -> bytes:
        return self.checked.blob

    @property
    def ref(self) -> Ref:
        return Ref(self.checked.core.study, self.checked.core.round, self.checked.proposal.attempt)

    def cohort(self, *hospitals: str) -> Cohort:
        """U over these hospitals (all that submitted when none is named)."""
        names = hospitals or tuple(self.submissions)
        return Cohort(
            self.checked.M,
            tuple(
                Accepted(name, digest("header", self.submissions[name].header.blob))
                for name in sorted(names, key=str.encode)
            ),
        )


class PodWorld:
    """m real pods. `pods[i]` is None while it is down."""

    def __init__(self, folder: Path, consortium: Consortium | None = None) -> None:
        self.folder = folder
        self.consortium = consortium or make_consortium()
        self.clock = FakeClock()
        self.stores: dict[int, CustodyStore] = {}
        self.pods: dict[int, Pod] = {}
        for index in range(len(self.consortium.roster.pods)):
            self.boot(index)
        for index in self.pods:
            self.go_live(index)

    def place(self, index: int) -> Path:
        return self.folder / f"pod-{index}"

    def boot(self, index: int) -> Pod:
        """Start (or kill and start) a pod; it is not live."""
        self.stop(index)
        roster = self.consortium.roster
        self.stores[index] = CustodyStore(self.place(index), demo=True)
        identity = self.consortium.pods[index].identity
        pod = Pod(roster.pods[index].id, identity, self.stores[index], {roster.charter: roster}, self.clock)
        self.pods[index] = pod
        return pod

    def stop(self, index: int) -> None:
        if index in self.stores:
            self.stores.pop(index).close()
            self.pods.pop(index, None)

    def close(self) -> None:
        for index in list(self.stores):
            self.stop(index)

    def marks(self, index: int, nonce: bytes | None = None, others: Sequence[int] | None = None) -> list[Signed]:
        """The other pods' marks about pod `index`."""
        asking = self.pods[index]
        chosen = [other for other in self.pods if other != index] if others is None else others
        return [self.pods[other].mark(nonce or asking.state.boot, asking.id) for other in chosen]

    def go_live(self, index: int) -> None:
        self.pods[index].deliver(self.marks(index))

    def restart(self, index: int) -> Pod:
        pod = self.boot(index)
        self.go_live(index)
        return pod

    def propose(
        self,
        core: Core | None = None,
        attempt: int = 1,
        abandons: Sequence[bytes] = (),
        pods: Sequence[int] | None = None,
    ) -> bytes:
        """The exact bytes of a manifest to which `pods` (all that run) committed; not endorsed yet."""
        proposal = self.consortium.proposal(core, attempt)
        chosen = pods or sorted(self.pods)
        return codec.encode(Manifest(proposal, tuple(self.pods[index].propose(proposal, abandons) for index in chosen)))

    def attempt(
        self,
        core: Core | None = None,
        attempt: int = 1,
        abandons: Sequence[bytes] = (),
        pods: Sequence[int] = (),
        ledger: Mapping[str, LedgerMark] | None = None,
    ) -> Round:
        """Propose, endorse, and let every hospital mask and sign; nothing is offered yet."""
        manifest = self.propose(core, attempt, abandons, pods)
        checked = check_manifest(manifest, self.consortium.roster)
        endorsements = [self.pods[index].endorse(manifest) for index in checked.commitments]
        submissions = {
            name: self.consortium.submit(checked, name, vector(checked.table, number), (ledger or {}).get(name))
            for number, name in enumerate(self.consortium.hospitals)
        }
        return Round(checked, endorsements, submissions)

    def offer(self, index: int, found: Round, *hospitals: str) -> tuple[AcceptList, dict[str, Reason]]:
        """What the pod accepts of these hospitals (all by default), and why it leaves others out."""
        names = hospitals or tuple(found.submissions)
        items = [(found.submissions[name].header, found.submissions[name].boxes[index]) for name in names]
        signed, refused = self.pods[index].offer(found.manifest, lambda: items)
        return codec.decode(AcceptList, signed.blob), {name: Reason(why.partition(":")[0]) for name, why in refused}

    def offer_all(self, found: Round) -> None:
        for index in found.checked.commitments:
            if index in self.pods:
                assert not self.offer(index, found)[1]

    def certificate(self, found: Round, cohort: Cohort | None = None, pods: Sequence[int] = (0, 1, 2)) -> bytes:
        """A cohort certificate with real locks of `pods`."""
        cohort = cohort or found.cohort()
        locks = tuple(self.pods[index].lock(found.manifest, cohort.blob) for index in pods)
        return codec.encode(CohortCertificate(cohort.blob, locks))

    def abandon(self, index: int, found: Round) -> Signed:
        return self.pods[index].abandon(self.consortium.roster.charter, found.ref, found.checked.M)

    def abandon_certificate(self, found: Round, pods: Sequence[int]) -> bytes:
        return codec.encode(AbandonCertificate(tuple(self.abandon(index, found) for index in pods)))

    def close_round(self, number: int, study: bytes = STUDY, by: bytes | None = None) -> Signed:
        close = Close(self.consortium.roster.charter if by is None else by, study, number)
        return self.consortium.aggregator.sign("close", codec.encode(close))

    def sums(self, index: int, found: Round, certificate: bytes, pieces: Sequence[int]) -> dict[int, bytes]:
        """The released sum of each piece, whole."""
        out = dict.fromkeys(pieces, b"")
        for item in self.pods[index].release(found.manifest, certificate, pieces, 0, 1):
            if not isinstance(item, Signed):
                out[item[0]] += item[2]
        return out

    def unmask(self, found: Round, cohort: Cohort, certificate: bytes) -> np.ndarray:
        """Σ over the cohort as centred integers, from y and the pods' sums."""
        ring = found.checked.table.ring
        total = np.zeros(found.checked.table.total_lanes, np.uint32)
        for member in cohort.members:
            total += ring.unpack(found.submissions[member.hospital].y)
        plan = self.consortium.roster.committee.assign(sorted(self.pods))
        for index, pieces in plan.release.items():
            for data in self.sums(index, found, certificate, pieces).values():
                total -= ring.unpack(data)
        return ring.lift(total)

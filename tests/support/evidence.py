"""A small finished run on disk: the real aggregator's evidence and real ledgers, from fake pods and hospitals.

Dave comes after round 1. Every count that a hospital sends carries noise of the deviation that the study asks for.
"""

from pathlib import Path

import numpy as np

from services.cli.evidence import collect
from services.cli.run import write_sums
from services.common.documents.shape import round_shape
from services.common.ids import Role
from services.common.rpc.certificates import server_name
from services.common.rpc.channel import dial
from services.common.rpc.leaf import LeafWatch
from services.common.secagg.certificate import CheckedManifest
from services.common.secagg.encoding import LaneTable
from services.common.secagg.messages import LedgerMark
from services.hospital_node.ledger import Ledger
from services.hospital_node.release import lane_noises, round_debits, study_plan
from services.hospital_node.store import Store
from tests.support.aggregator_world import CENTRE, World, until
from tests.support.documents import CONSORTIUM, make_policy
from tests.support.fake_federation import Federation, federation, over
from tests.support.fake_hospital import FakeHospital
from wardround.admin.v1.admin_pb2_grpc import AdministrationServiceStub

HITS, TOTALS = (40, 30), (50, 40)
CONFUSION = ((40, 10), (10, 30))


class Bookkeeper:
    """One hospital's ledger and the counts that it sends."""

    def __init__(self, world: World, id: str, folder: Path) -> None:
        self._world = world
        self._plan = study_plan(world.documents.charter, world.study, make_policy(id, world.study))
        self._store = Store(folder)
        self._ledger = Ledger(self._store.database)
        self._draw = np.random.default_rng(sum(map(ord, id)))

    def mark(self, checked: CheckedManifest) -> LedgerMark:
        """Debit the round before its header is signed."""
        world, core = self._world, checked.core
        shape = round_shape(world.documents.charter, world.study, core.round)
        debits = round_debits(world.study, shape, core.model, f"v{core.round}", attempt=1, manifest=checked.M)
        with self._store.database.transaction() as connection:
            return self._ledger.debit(connection, self._plan, debits)

    def values(self, table: LaneTable, number: int) -> dict[str, np.ndarray]:
        """Lane values: the same true counts each time, with fresh noise."""
        shape = round_shape(self._world.documents.charter, self._world.study, number)
        noises, found = lane_noises(self._world.study.document, shape), dict[str, np.ndarray]()
        for lane in table.lanes[1:]:
            exact = self._exact(lane.name, lane.values) * 2**lane.fraction_bits
            scale = noises[lane.name].scale if lane.name in noises and lane.name != "parameter" else 0.0
            found[lane.name] = np.rint(exact + self._draw.normal(0, scale, lane.values)).astype(np.int64)
        return found

    def _exact(self, name: str, values: int) -> np.ndarray:
        if name == "gate":
            return np.array([*HITS, *TOTALS])
        if name == "confusion":
            return np.array(CONFUSION).ravel()
        if name == "histogram":
            bins = values // 4
            falling = np.array([12, 9, 7, 5, 4, 3] + [0] * (bins - 6))
            return np.concatenate([falling, falling[::-1]] * 2)
        return np.full(values, 1.0 if name == "weight" else 0.01)

    def export(self, folder: Path) -> None:
        """The ledger as the evidence holds it."""
        folder.mkdir(parents=True)
        (folder / "ledger.jsonl").write_text("".join(line + "\n" for line in self._ledger.export()))
        self._store.close()


def make_run(folder: Path, mechanism: str = "local") -> Path:
    """RUN with `evidence/`, two training rounds and the final one; a few seconds."""
    study = {
        "rounds": 2,
        "timing": {"train_seconds": 0.2, "submit_seconds": 2.0, "attempt_seconds": 40.0},
        "evaluation": {"gate_rounds": (1, 2), "final": True},
    }
    with federation(folder / "centre", rounds=2, through_round=3, mechanism=mechanism, study=study) as whole:
        books = {name: Bookkeeper(whole.world, name, folder / "ledgers" / name) for name in ("alice", "bob", "carol")}
        _join(whole, books)
        whole.hospitals["alice"].wait_for(over(1))
        books["dave"] = Bookkeeper(whole.world, "dave", folder / "ledgers" / "dave")
        _join(whole, {"dave": books["dave"]})
        until(lambda: whole.state.phase == "finished")
        evidence = folder / "run" / "evidence"
        _collect(whole.world, evidence / "aggregator")
    for name, book in books.items():
        book.export(evidence / "hospitals" / name)
    write_sums(evidence)
    return folder / "run"


def _join(whole: Federation, books: dict[str, Bookkeeper]) -> None:
    for name, book in books.items():
        whole.hospitals[name] = FakeHospital(whole.world, name, values=book.values, mark=book.mark)


def _collect(world: World, folder: Path) -> None:
    leaf = LeafWatch(world.leaf(Role.OPERATOR, "olga", CENTRE)).current()
    root = world.sites[CENTRE].root.certificate
    with dial(world.address, server_name(CENTRE, CONSORTIUM), leaf, root) as channel:
        collect(AdministrationServiceStub(channel), folder)

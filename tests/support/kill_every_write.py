"""A hospital's round, killed before each of its writes in turn, and lived again from what lay on the disk.

`python -m tests.support.kill_every_write FOLDER MECHANISM EVERY` prints one JSON object a kill. A process of its own:
it forks, which a process with gRPC's threads must not. Round 1 is whole; round 2, which trains and carries a gate,
is the one that dies: from the training to the scrubbing after its result.
"""

import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from services.cli.ledger import verify_source
from services.cli.ledger_source import open_source
from services.common.clock import SystemClock
from services.common.secagg.encoding import decode_class
from services.common.secagg.signing import digest
from services.common.store.blobs import BlobStore
from services.hospital_node.__main__ import own_signer
from services.hospital_node.client import AggregatorClient, round_state
from services.hospital_node.config import HospitalConfig, SiteDocuments, load_config
from services.hospital_node.control import own_control
from services.hospital_node.participate import Participation
from services.hospital_node.store import Store
from tests.support.consortium import derive
from tests.support.direct_caller import DirectCaller, read_log, remember
from tests.support.fake_aggregator_for_hospitals import FakeAggregator
from tests.support.hospital_world import SHARED, FixedTrainer, World, make_world
from tests.support.kill_points import KillPoints

PARAMETERS = 300_000  # y has two chunks
STEP = 1 / 8  # between one draw's lanes and the next one's: far more than their mean's noise, far less than a clip
STUDIES: dict[str, dict[str, Any]] = {
    "local": {"encoding": {"update_clip": 1000.0}},
    "shared": SHARED,
    "scaffold": {
        "privacy": {
            "mechanism": "none", "epsilon": None, "delta": None, "noise_multiplier": 0.0,
            "none_accepted": "No single patient is protected by noise in this study.",
        },
        "evaluation": {"gate_noise_multiplier": 0.0, "final_noise_multiplier": 0.0},
        "encoding": {"update_clip": 1000.0, "control_clip": 1000.0},
        "server": {"strategy": "scaffold"},
    },
}  # fmt: skip
NOT_PRIVATE = {"epsilon": 0.0, "delta": 0.0, "no_privacy": "accepted", "repeat": "allowed"}  # of a policy


class DrawTrainer(FixedTrainer):
    """Every training is a draw of its own: its number stands in each lane of the update."""

    def train(
        self, study: Any, round_number: int, model: Path, model_digest: bytes, should_stop: Any, control: Any
    ) -> Any:
        found = super().train(study, round_number, model, model_digest, should_stop, control)
        return np.full_like(found, STEP * sum(line.startswith("train") for line in self.lines()))


class Life:
    """One life of the hospital's process, and the aggregator as it is then."""

    def __init__(
        self,
        aggregator: FakeAggregator,
        config: HospitalConfig,
        documents: SiteDocuments,
        folder: Path,
        pass_by: Callable[[str], None] = lambda what: None,
    ) -> None:
        self.aggregator = aggregator
        charter = next(iter(documents.charters().values()))
        state = folder / "state"
        self.caller = DirectCaller(aggregator, folder / "sent.log", pass_by)
        self.store = Store(state)
        self.participation = Participation(
            config.id,
            own_signer(config.identity_key, charter, config.id),
            documents,
            client=AggregatorClient(self.caller),  # type: ignore[arg-type]  # the three calls that it uses are there
            store=self.store,
            models=BlobStore(state / "models"),
            trainer=DrawTrainer(folder / "trainer.log"),
            clock=SystemClock(),
        )

    def step(self) -> None:
        self.participation.advance(round_state(self.aggregator.state))

    def close(self) -> None:
        self.caller.close()
        self.store.close()


class Script:
    """What happens to the hospital in round 2; a later life begins at the phase in which the earlier one died."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world, self.folder = world, folder
        self.aggregator = FakeAggregator(world)
        self.site = folder / "site"
        mechanism = world.study.document.privacy.mechanism
        policy = NOT_PRIVATE if mechanism == "none" else {}
        self.config = load_config(world.write_site(self.site, "127.0.0.1:1", mechanisms=[mechanism], **policy))
        self.documents = SiteDocuments(self.config)
        first = Life(self.aggregator, self.config, self.documents, self.site)
        self.aggregator.open_round(1)
        checked = self.aggregator.collect()
        first.step()
        self._finish(checked)
        first.step()
        policy = self.documents.policy()  # every fork has at hand what round 2 costs
        first.participation.consent.projection(policy, world.charter, world.study, 2, world.initial)
        first.close()
        self.aggregator.open_round(2)
        self.second = self.aggregator.make_manifest(self.aggregator.core(2), 1, seconds=7200, expires=10_000)

    def _finish(self, checked: Any) -> None:
        header = digest("header", self.aggregator.submissions()[-1].header.blob)
        self.aggregator.finish(checked, {"alice": header, "bob": derive("bob"), "carol": derive("carol")})

    def live(self, folder: Path, points: KillPoints | None = None, number: int = 0) -> None:
        """Round 2 to its end, from the phase in which the last life died; `number`: dies before that write."""
        remember(self.aggregator, folder / "sent.log")
        reached = (folder / "phase").read_text() if (folder / "phase").exists() else "training"
        if points is not None:
            points.armed = number
        passes = [points.pass_by] if points is not None else []
        life = Life(self.aggregator, self.config, self.documents, folder, *passes)
        for phase in ("training", "collecting", "finished")[("training", "collecting", "finished").index(reached) :]:
            self._note(folder, phase)
            if phase == "collecting":
                self.aggregator.offer(*self.second)
            elif phase == "finished":
                self.aggregator.offer(*self.second)
                self._finish(self.second[0])
            life.step()
        life.close()

    @staticmethod
    def _note(folder: Path, phase: str) -> None:
        handle = os.open(folder / "phase", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.write(handle, phase.encode())
        os.close(handle)

    def found(self, folder: Path) -> dict[str, Any]:
        """What lies on the disk and what has left, as plain data. Raises when the ledger does not verify."""
        source = open_source(folder / "state")
        verify_source(source)
        looked_at = folder / "looked-at"  # a look must not be what undoes a cut commit: the next life does that
        shutil.copytree(folder / "state", looked_at)
        opened = [digest("header", parts[0]).hex() for kind, parts in read_log(folder / "sent.log") if kind == "open"]
        store = Store(looked_at)
        try:
            kept = [vector for vector in [store.vector(self.world.study.digest, 2)] if vector is not None]
            return {
                "ledger": [entry.head.hex() for entry in source.entries],
                "opened": opened,
                "submissions": [(s.round, digest("header", s.header.blob).hex()) for s in store.all_submissions()],
                "receipts": [s.round for s in store.all_submissions() if s.receipt is not None],
                "chain": store.chain(self.world.study.digest).round,
                "kept": [vector.name for vector in kept],
                "control": self._control(store),
                "blobs": len(list((looked_at / "vectors" / "blobs").iterdir())),
                "trainings": DrawTrainer(folder / "trainer.log").lines().count("train 2"),
            }
        finally:
            store.close()
            shutil.rmtree(looked_at)

    def _control(self, store: Store) -> float:
        """The control variate in draws: every number of it is the sum of the draws that were counted."""
        own = own_control(store, self.world.study)
        if own is None:
            return 0.0
        assert np.ptp(own) == 0
        return float(own[0]) / STEP

    def left(self, folder: Path) -> list[dict[str, Any]]:
        """Every distinct (header, bytes) that left in round 2, opened with the pods' keys."""
        checked, out = self.second[0], []
        uploads: dict[str, list[list[bytes]]] = {}
        for kind, parts in read_log(folder / "sent.log"):
            if kind == "open":
                name = digest("header", parts[0]).hex()
                uploads.setdefault(name, []).append([])
            elif kind == "chunk":
                uploads[name][-1].append(parts[0])
        aggregator = FakeAggregator(self.world)
        remember(aggregator, folder / "sent.log")
        for name, arrived in aggregator.arrived.items():
            if checked.M not in arrived.header.blob:
                continue
            packed, table = aggregator.open_vector(arrived, checked), checked.table
            lanes = {}
            for wanted in ("parameter", "gate"):
                first, end = (place * table.ring.lane_bytes for place in table.lane_range(wanted))
                lanes[wanted] = packed[first:end]
            mean = decode_class(table, "parameter", lanes["parameter"]).mean()
            draw = float(mean) / 2.0 ** table.lane_class("parameter").fraction_bits / STEP
            out.append({"header": name.hex(), "draw": draw, "gate": lanes["gate"].hex()})
        return out


def in_child(work: Callable[[], None], log: Path) -> int:
    """The exit status of `work` in a forked process: negative is the signal that killed it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            log.write_text(traceback.format_exc())
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> int:
    folder, mechanism, every = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    script = Script(make_world(folder / "world", PARAMETERS, **STUDIES[mechanism]), folder)
    number = 1
    while True:
        place = folder / f"life-{number}"
        shutil.copytree(script.site, place)

        def first_life(place: Path = place, number: int = number) -> None:
            points = KillPoints(place / "state", lambda what: (place / "killed").write_text(what) and None)
            script.live(place, points, number)

        ended = in_child(first_life, place / "fault")
        if ended == 1:
            raise SystemExit((place / "fault").read_text())
        seen = {"number": number, "ended": ended, "after_kill": script.found(place)}
        if ended:
            seen["before"] = (place / "killed").read_text()
            again = in_child(lambda place=place: script.live(place), place / "fault")  # type: ignore[misc]
            if again:
                raise SystemExit(f"kill {number} before {seen['before']}: " + (place / "fault").read_text())
        print(json.dumps({**seen, "in_the_end": script.found(place), "left": script.left(place)}), flush=True)
        shutil.rmtree(place)
        if not ended:
            return 0
        number += every


if __name__ == "__main__":
    sys.exit(main())

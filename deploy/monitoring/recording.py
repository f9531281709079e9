"""A whole federation of real processes under a real Prometheus, with something of everything that dashboards show.

Sixteen training rounds under `shared` noise and the final evaluation of `wardround demo`, in which
- two pods restart while round 2 collects, which a hospital that stands still holds open: more than the committee bears,
  so the attempt is abandoned and repeated;
- a hospital is killed in round 3 and comes back in round 4;
- another hospital's data set has too little ε for all rounds: it refuses the later ones.
"""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from deploy.monitoring.build import HELM
from deploy.monitoring.evaluate import Window
from deploy.monitoring.prometheus import Prometheus, free_address
from services.cli import demo, synthetic
from services.cli.evidence import administration, status
from services.cli.federation import Federation
from services.cli.processes import stop_all
from services.common.documents.emit import emit
from services.common.documents.policy import load_policy
from services.common.errors import Reason, ServiceError
from services.common.ids import Role
from wardround.admin.v1 import admin_pb2

ROUNDS = 16
HOSPITALS = ("alice", "bob", "carol", "dave")
ABSENT, POOR = "carol", "dave"
_EPSILON, _POOR_SHARE = 8.0, 0.75  # so that it lasts for about half of the rounds


@dataclass(frozen=True)
class Recorded:
    """The federation at the end of its study, its processes and Prometheus still up."""

    prometheus: Prometheus
    window: Window
    federation: Federation

    def job(self, dashboard: str) -> str:
        """The value of the variable `job` for a dashboard: rounds, site or committee."""
        if dashboard == "committee":
            return "|".join(f"wardround/{pod.id}" for pod in self.federation.of(Role.POD))
        return f"wardround/{self.federation.aggregator.id if dashboard == 'rounds' else POOR}"


@contextmanager
def recorded(folder: Path, minutes: float = 20, tell: Callable[[str], None] = lambda line: None) -> Iterator[Recorded]:
    """Run the study in `folder` (empty or new) to its end. Raises UNREACHABLE when it does not end in time."""
    data = {name: folder / "data" / name for name in HOSPITALS}
    synthetic.write_sites(folder / "data", HOSPITALS)
    demo.check_drawn(data)
    laid = demo.lay_out(
        folder,
        data,
        4,
        2,
        "small-cnn",
        "shared",
        ROUNDS,
        _EPSILON,
        None,
        None,
        synthetic_data=True,
        quick_deadline=True,
    )
    _impoverish(laid)
    targets, until = _fix_ports(laid), time.monotonic() + 60 * minutes
    with Prometheus(folder / "prometheus", targets, sorted(HELM.glob("*/files/rules.yaml"))) as prometheus:
        running = demo.start(laid)
        try:
            began = _play(running, until, tell)
            time.sleep(5)  # the last state is scraped and the rules have seen it
            yield Recorded(prometheus, Window(began, time.time()), laid)
        finally:
            stop_all(list(running.services.values()))


def _fix_ports(laid: Federation) -> dict[str, str]:
    """Where each process will answer scrapes, known before it starts and the same after a restart."""
    targets = {site.id: free_address() for site in laid.sites}
    for site in laid.sites:
        path = site.folder / "config.yaml"
        text = path.read_text()
        assert "http: 127.0.0.1:0" in text  # noqa: S101  # as federation.write_configs has it
        path.write_text(text.replace("http: 127.0.0.1:0", f"http: {targets[site.id]}"))
    return targets


def _impoverish(laid: Federation) -> None:
    """Give one hospital's data set less ε than the study takes."""
    path = next(site.folder for site in laid.sites if site.id == POOR) / "policy.yaml"
    policy = load_policy(path.read_bytes()).document
    path.write_bytes(emit(policy.model_copy(update={"dataset_epsilon": _POOR_SHARE * _EPSILON})))


def _play(running: demo.Running, until: float, tell: Callable[[str], None]) -> float:
    """Watch the study to its end and do what the head of this file says; when its first round opened."""
    pods = [site.id for site in running.federation.of(Role.POD)][-2:]
    done: set[str] = set()
    dead: set[str] = set()
    began = 0.0

    def once(what: str) -> bool:
        if what in done:
            return False
        done.add(what)
        tell(what)
        return True

    with administration(running.federation, running.federation.aggregator, running.address) as centre:
        while time.monotonic() < until:
            running.check(dead)
            now = status(centre) or admin_pb2.Status()
            if now.round and not began:
                began = time.time() - 5
            if now.finished:
                return began
            # A round may be over between two looks: while one hospital stands still, its collecting lasts.
            if now.round == 2 and once(f"{ABSENT} stands still in round 2"):
                _signal(running, ABSENT, signal.SIGSTOP)
            if (now.round, now.phase) == (2, "collecting") and once(f"{' and '.join(pods)} restart in round 2"):
                for name in pods:
                    running.services[name].kill()
                    running.services[name].start()
                _signal(running, ABSENT, signal.SIGCONT)
            if now.round == 3 and once(f"{ABSENT} is killed in round 3"):
                running.services[ABSENT].kill()
                dead = {ABSENT}
            if now.round == 4 and once(f"{ABSENT} comes back"):
                running.services[ABSENT].start()
                dead = set()
            time.sleep(0.2)  # the rhythm of looking; what happens depends on the state alone
    raise ServiceError(Reason.UNREACHABLE, f"the study did not end in time: see {running.federation.root / 'logs'}")


def _signal(running: demo.Running, site: str, number: signal.Signals) -> None:
    process = running.services[site].process
    assert process is not None  # noqa: S101  # it was started
    process.send_signal(number)

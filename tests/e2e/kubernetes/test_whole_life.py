"""The whole life of a consortium on a real cluster: `make e2e-kubernetes`, on whatever KUBECONFIG points to.

One namespace for each organisation with Pod Security `restricted`: an aggregator, five key-share pods under a charter
that is no demo, four hospitals with synthetic images; half of the sites by Helm 4, the others by Helm 3. Needs the
images as archives (`make images`, $IMAGES) and a way to load them (tests/support/kubernetes.py: load_image). Prints
seconds by step and writes build/e2e-kubernetes.json.
"""

import os
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.kubernetes import beginning, leaving, refused, rolling
from tests.support.kubernetes import Story, helms, run, why_no_cluster
from tests.support.kubernetes_sites import CENTRE
from tests.support.kubernetes_world import ROOT, World

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
CLI = f"localhost/wardround/cli:{VERSION}"
FOLDER = Path(os.environ.get("IMAGES", ROOT / "build/images"))
ARCHIVES = {
    name: FOLDER / f"{name}-{VERSION}{flavour}.tar"
    for name, flavour in (("aggregator", ""), ("keyshare", ""), ("hospital-node", "-cpu"), ("cli", ""))
}


def why_not() -> str:
    missing = [str(path) for path in ARCHIVES.values() if not path.exists()]
    return why_no_cluster() or (f"{missing[0]} is missing: make images" if missing else "")


pytestmark = [pytest.mark.slow, pytest.mark.kubernetes, pytest.mark.timeout(3300)]


@pytest.fixture
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    if reason := why_not():
        pytest.skip(reason)
    name = "short-kubernetes" if "short" in request.node.name else "e2e-kubernetes"
    made = World(tmp_path, Story(ROOT / f"build/{name}.json"))
    made.remove()  # what an earlier run that was cut off has left
    try:
        yield made
    finally:
        with made.story.step("everything is removed"):
            made.remove()


def begin(world: World) -> None:
    """From nothing to ten releases that are connected, by way of everything that must be refused."""
    step, (helm4, helm3) = world.story.step, helms()
    world.story.facts["versions"] = [
        run("kubectl", "version").split("Server Version: ")[-1].strip(),
        *(run(helm, "version", "--template", "{{.Version}}") for helm in (helm4, helm3)),
    ]
    with step("images reach the nodes"):
        beginning.load_images(ARCHIVES)
    with step("ten organisations agree on a charter and a study"):
        beginning.found_the_consortium(world)
    with step("namespaces (Pod Security restricted), Secrets, images of the hospitals"):
        beginning.make_sites_ready(world, CLI)
    with step("bad installs are refused, each in a sentence"):
        refused.refuse_bad_installs(world)
    with step("bad starts are refused, each in the pod's last words"):
        refused.refuse_bad_starts(world, CLI)
    with step("helm install: the aggregator; it waits for its model, which is pushed"):
        beginning.install_the_centre(world)
    with step("helm install: five key-share pods, four hospitals"):
        beginning.install_the_others(world)


def verify(world: World, study: str) -> None:
    with world.story.step(f"evidence of every role about study {study}; wardround verify"):
        signatures = leaving.gather_and_verify(world, study)
        assert signatures > 100
        world.story.facts[f"signatures verified, {study}"] = signatures


def test_a_short_life_of_a_consortium(world: World) -> None:
    """What fits into continuous integration: from nothing to verified rounds, faults and a bad plan on the way."""
    step = world.story.step
    begin(world)
    with step("helm test: a hospital"):
        beginning.helm_tests(world)
    with step("helm upgrade of the target: two rounds"):
        rolling.first_rounds(world)
    with step("network policies, by trying"):
        beginning.try_the_network(world, CLI)
    with step("kubectl set env: more rounds; pods of each kind are deleted in mid-round"):
        rolling.delete_pods_in_mid_round(world)
    with step("a bad plan is stopped, refused, undone"):
        rolling.bad_plan_and_undo(world)
    verify(world, "first")


def test_the_whole_life_of_a_consortium(world: World) -> None:
    step = world.story.step
    begin(world)
    with step("helm test: every role, both Helms"):
        beginning.helm_tests(world, CENTRE, "ash", "fir", "carol")
    with step("helm upgrade of the target: two rounds"):
        rolling.first_rounds(world)
    with step("network policies, by trying"):
        beginning.try_the_network(world, CLI)
    with step("a second release of one pod identity is refused"):
        refused.second_release_of_a_pod(world)
    with step("restarts open nothing and spend no ε"):
        rolling.restart_opens_nothing(world)
    with step("kubectl set env: more rounds; pods of each kind are deleted in mid-round"):
        rolling.delete_pods_in_mid_round(world)
    with step("a charter is amended, one site after the other, while rounds go on"):
        rolling.amend_the_charter(world)
    with step("a second study is rolled out in mid-flight, and runs to its end"):
        rolling.second_study_in_mid_flight(world)
    with step("a bad plan is stopped, refused, undone"):
        rolling.bad_plan_and_undo(world)
    with step("kubectl rollout undo brings a whole plan back"):
        rolling.undo_really_undoes(world)
    with step("the node is drained in mid-round"):
        rolling.drain_the_node(world)
    with step("helm rollback, both Helms"):
        leaving.roll_a_release_back(world)
    with step("helm uninstall keeps the ledger, a new install goes on with it"):
        leaving.leave_and_come_back(world)
    with step("kubectl and Helm change the same target, both Helms"):
        leaving.mix_kubectl_and_helm(world, world.centre, [world.chart(CENTRE), *world.consortium.files(CENTRE)])
        leaving.aggregator_under_helm_3(world, helms()[1])
    with step("a certificate is renewed, and read without a restart"):
        rolling.renew_a_certificate(world)
    for study in ("first", "second"):
        verify(world, study)
    # A study is stopped for good only by what an honest consortium cannot do: tests/integration tries `resume`.
    assert all("services.hospital_node.resume" in line for line in world.guide.left), world.guide.left

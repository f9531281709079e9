"""Last steps: rollback, uninstall and return, evidence from everybody, and what Helm and kubectl do to each other."""

import json
import subprocess

from services.cli.verify import verify_run
from tests.e2e.kubernetes.beginning import DIALLING
from tests.support.kubernetes import Namespace, run
from tests.support.kubernetes_sites import CENTRE, role_of, wardround
from tests.support.kubernetes_world import World


def roll_a_release_back(world: World) -> None:
    """`helm rollback` under both Helms: a hospital's consent of before is in force again."""
    for hospital in ("alice", "carol"):
        space = world[hospital]
        before = space.get("configmap", f"{hospital}-documents")["binaryData"]
        path = world.consortium.folder / hospital / "policy.yaml"
        held = path.read_bytes()
        path.write_bytes(held + b"# of today\n")
        world.upgrade(hospital)
        assert space.get("configmap", f"{hospital}-documents")["binaryData"] != before
        path.write_bytes(held)
        space.release("rollback")
        assert space.get("configmap", f"{hospital}-documents")["binaryData"] == before


def leave_and_come_back(world: World) -> None:
    """`helm uninstall` keeps the ledger's volume; a new install goes on with the very same chain."""
    for hospital in ("dave", "bob"):
        space, before = world[hospital], world.ledger(hospital)
        space.release("uninstall", "--wait")
        claims = {claim["metadata"]["name"] for claim in space.get("pvc")["items"]}
        assert f"state-{hospital}-0" in claims
        world.install(hospital)
        space.rolled_out(600)
        assert world.ledger(hospital)[: len(before)] == before


def gather_and_verify(world: World, study: str) -> int:
    """Every role's evidence by its own operator's hand; the number of signatures that hold."""
    consortium = world.consortium
    where, digest = consortium.folder / f"run-{study}", consortium.study(study).digest
    world.status()  # the way to an aggregator that was replaced is found again
    wardround("evidence", "pull", where, "--study", consortium.path(study), "--address", world.address, "--operator",
              consortium.folder / "olga", "--charter", consortium.charter())  # fmt: skip
    for site in DIALLING:
        command = ["kubectl", "-n", world[site].name, "exec", world[site].pod, "-c", "service", "--", "python", "-m",
                   "services.common.rpc.administer", "evidence"]  # fmt: skip
        if site == "alice":
            command = world.guide.words("kubectl exec --namespace alice", "evidence")
        command += ["--study", digest.hex()]
        tar = consortium.folder / f"{site}.tar"
        with tar.open("wb") as out:
            subprocess.run(command, stdout=out, check=True, timeout=300)
        wardround("evidence", "add", where, "--role", role_of(site).value, "--id", site, "--tar", tar)
    return verify_run(where, print)


def aggregator_under_helm_3(world: World, helm3: str) -> None:
    """`kubectl set env` and `rollout undo`, then `helm upgrade`: with Helm 3 and a release of its own."""
    space = Namespace(world.stranger.name, CENTRE, helm3)
    secret = json.loads(world.centre.kubectl("get", "secret", f"wardround-{CENTRE}", "-o", "json"))
    secret["metadata"] = {"name": f"wardround-{CENTRE}"}
    space.apply(secret)
    words = [world.chart(CENTRE), *world.consortium.files(CENTRE)]
    space.release("install", *words)
    space.rolled_out()
    mix_kubectl_and_helm(world, space, words)
    space.release("uninstall")


def mix_kubectl_and_helm(world: World, space: Namespace, words: list[str]) -> None:
    """The target that was set last is in force, whoever set it; what Helm says about it is kept in the record."""

    def target() -> str:
        containers = space.get("statefulset", CENTRE)["spec"]["template"]["spec"]["containers"]
        return next(one["value"] for one in containers[0]["env"] if one["name"] == "WARDROUND_THROUGH_ROUND")

    space.kubectl("set", "env", f"statefulset/{CENTRE}", "WARDROUND_THROUGH_ROUND=0")
    done = subprocess.run(
        [space.helm, "upgrade", CENTRE, *words, "-n", space.name, "--set", "plan.throughRound=1"],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    version = run(space.helm, "version", "--template", "{{.Version}}")
    said = " ".join(done.stderr.split())[-500:]
    world.story.facts[f"helm upgrade after kubectl set env, {version}"] = said or "no word"
    if done.returncode:
        assert "conflict" in said, said
        space.release("upgrade", *words, "--set", "plan.throughRound=1", "--force-conflicts")
    assert target() == "1"
    space.kubectl("rollout", "undo", f"statefulset/{CENTRE}")
    assert target() == "0"
    done = subprocess.run(
        [space.helm, "upgrade", CENTRE, *words, "-n", space.name, "--set", "plan.throughRound=2"],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    if done.returncode:
        space.release("upgrade", *words, "--set", "plan.throughRound=2", "--force-conflicts")
    assert target() == "2"
    space.rolled_out()

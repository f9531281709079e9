"""Middle steps: rounds, restarts, amendments and rollouts, while every round that was opened ends."""

import hashlib
import json

from tests.e2e.kubernetes.beginning import ROUNDS, push_model
from tests.support.kubernetes import refusal, run, until
from tests.support.kubernetes_sites import CENTRE, HOSPITALS, wardround
from tests.support.kubernetes_world import World, cordoned

OPEN = ("training", "proposed", "endorsing", "collecting")


def first_rounds(world: World) -> None:
    """New rounds are an ordinary upgrade of the target."""
    world.guide.run("helm upgrade centre", "plan.throughRound=40", through=2)
    world.centre.rolled_out()
    world.round_over(2, 600)
    history = world.centre.kubectl("rollout", "history", f"statefulset/{CENTRE}")
    assert "study first" in history
    assert "through round 2" in history


def restart_opens_nothing(world: World) -> None:
    """Everybody is restarted while the target is reached: no round opens and no ε is spent."""
    world.wait(lambda now: "target" in now.detail, 120, "the target should be reached")
    before = {hospital: world.ledger(hospital) for hospital in HOSPITALS}
    for site in (CENTRE, "ash", "alice"):
        world[site].kubectl("delete", "pod", f"{site}-0", "--wait=true")
    for site in (CENTRE, "ash", "alice"):
        world[site].rolled_out()
    now = world.wait(lambda now: now.pods_live == 5 and now.hospitals_enrolled == 4, 240, "all should be back")
    assert now.round == 2
    assert "target" in now.detail
    assert {hospital: world.ledger(hospital) for hospital in HOSPITALS} == before


def set_env(world: World, through: int) -> None:
    """The kubectl way to more rounds."""
    world.guide.run("kubectl set env", through=through)
    world.centre.rolled_out()


def stop_rounds(world: World) -> int:
    """A lower target stops after the open round; the number of the last one."""
    set_env(world, world.status().round)
    now = world.wait(
        lambda now: now.phase == "idle" and "target" in now.detail, 300, "the open round should be the last"
    )
    return int(now.round)


def delete_pods_in_mid_round(world: World) -> None:
    """One of each kind, gently and by force: every round ends, and every debit was made once."""
    set_env(world, ROUNDS)
    for site, force in (("dave", True), ("fir", True), (CENTRE, False), ("carol", False)):
        number = world.wait(lambda now: now.phase in OPEN, 300, "a round should be open").round
        words = ["--grace-period=0", "--force"] if force else ["--wait=false"]
        world[site].kubectl("delete", "pod", world[site].pod, *words)
        world.round_over(number, 400)
        world.story.facts[f"round {number}"] = f"ended although {site} was {'killed' if force else 'deleted'} in it"
    for site in ("dave", "fir", CENTRE, "carol"):
        world[site].rolled_out()
    stop_rounds(world)
    check_ledgers(world)


def check_ledgers(world: World) -> None:
    """No round was debited twice: one vector for each study, round and split."""
    for hospital in HOSPITALS:
        events = [json.loads(row["event"]) for row in world.ledger(hospital)]
        debits = [event for event in events if event["kind"] == "debit"]
        assert debits
        seen: dict[tuple[str, int, str], set[str]] = {}
        for row in debits:
            seen.setdefault((row["study"], row["round"], row["split"]), set()).add(row["vector"])
        assert all(len(vectors) == 1 for vectors in seen.values()), (hospital, seen)


def amend_the_charter(world: World) -> None:
    """One site after the other takes the next charter, without a restart, while rounds go on; then it is in force."""
    consortium = world.consortium
    started = {site: space.get("pod", space.pod)["metadata"]["uid"] for site, space in world.spaces.items()}
    set_env(world, ROUNDS)
    started[CENTRE] = world.centre.get("pod", world.centre.pod)["metadata"]["uid"]
    consortium.agree(2, maximum=8)
    for site in consortium.sites:
        consortium.pin(site, 2, "next")
        consortium.announced.add(site)
        number = world.status().round
        if site == "alice":
            world.guide.run("helm upgrade ward", "charterNext")
        else:
            world.upgrade(site, *(["--set", f"plan.throughRound={ROUNDS}"] if site == CENTRE else []))
        world.story.facts.setdefault("rounds while the charter was amended", []).append(number)
    after = consortium.loaded(2).digest
    until(lambda: charter_in_force(world) == after, 600, "a round should open under the second charter")
    world.round_over(world.status().round, 300)
    assert {site: space.get("pod", space.pod)["metadata"]["uid"] for site, space in world.spaces.items()} == started
    consortium.version, consortium.announced = 2, set()
    for site in consortium.sites:
        consortium.pin(site, 2, "current")
        world.upgrade(site, *(["--set", f"plan.throughRound={ROUNDS}"] if site == CENTRE else []))
    until(lambda: world.centre.page("/metrics").count('charter="next"') == 0, 300, "the old charter should be gone")
    world.round_over(world.status().round + 1, 300)


def charter_in_force(world: World) -> bytes:
    """Of the newest round of the first study: the evidence begins with its charter."""
    blob = b""
    for part in world.evidence(world.consortium.study("first").digest):
        if part.path not in ("", "charter.yaml"):
            break
        blob += part.chunk
    return hashlib.sha256(blob).digest()


def second_study_in_mid_flight(world: World) -> None:
    """Rolled out while a round of the first is open: that one ends, then the second waits for its model, and runs."""
    consortium = world.consortium
    consortium.consent("first", "second")
    for hospital in HOSPITALS:
        world.upgrade(hospital)
    # kubectl set the target last; a value that stays the same would stay kubectl's, too
    world.guide.run("helm upgrade centre", "--force-conflicts", through=ROUNDS - 1)
    world.centre.rolled_out()
    number = world.wait(lambda now: now.phase in OPEN, 300, "a round should be open").round
    world.guide.run("helm upgrade centre", "plan.study=next/study.yaml", through=3)
    world.centre.rolled_out()
    world.round_over(number, 300)
    model = consortium.study("second").document.model.initial
    world.wait(lambda now: model in now.detail, 120, "the second study should wait for its model")
    push_model(world, "second")
    second = consortium.study("second").digest
    world.wait(lambda now: now.study == second, 300, "the second study should begin")
    world.wait(lambda now: now.study == second and now.finished, 900, "the second study should end")


def bad_plan_and_undo(world: World) -> None:
    """Stopped before it harms; where it gets through all the same, refused while the old plan goes on; undone."""
    consortium, centre = world.consortium, world.centre
    bad = consortium.folder / "bad" / "study.yaml"
    bad.parent.mkdir(exist_ok=True)
    bad.write_bytes(consortium.path("first").read_bytes().replace(b"minimum: 3", b"minimum: 2"))
    template = centre.get("statefulset", CENTRE)["spec"]["template"]
    options = ["-f", str(consortium.folder / CENTRE / "site.yaml"), *consortium.files(CENTRE, "bad")]
    said = refusal(centre.helm, "upgrade", CENTRE, world.chart(CENTRE), "-n", centre.name, *options, seconds=600)
    logs = centre.kubectl("logs", f"job/{CENTRE}-plan-check", "--tail=20")
    assert "cohort.minimum" in said + logs, said + logs
    assert centre.get("statefulset", CENTRE)["spec"]["template"] == template, "nothing was changed"

    before = centre.get("statefulset", CENTRE)["status"]["currentRevision"]
    centre.kubectl("set", "env", f"statefulset/{CENTRE}", "WARDROUND_THROUGH_ROUND=all")
    centre.rolled_out()
    ready = centre.page("/readyz")
    assert "WARDROUND_THROUGH_ROUND='all' is not a round number" in ready
    assert ready.endswith("\nready"), "the old plan is served"
    assert "wardround_plan_refused 1.0" in centre.page("/metrics")
    assert "is refused" in world.status().detail
    centre.kubectl("rollout", "undo", f"statefulset/{CENTRE}")
    centre.rolled_out()
    assert centre.get("statefulset", CENTRE)["status"]["currentRevision"] == before, (
        "undo brings the very revision back"
    )
    assert "note plan" not in centre.page("/readyz")
    assert "wardround_plan_refused 0.0" in centre.page("/metrics")


def undo_really_undoes(world: World) -> None:
    """One more study rolled out, then `rollout undo`: study, target and annotation are those of before."""
    centre, consortium = world.centre, world.consortium
    before = centre.get("statefulset", CENTRE)["spec"]["template"]
    world.upgrade(CENTRE, "--set", "plan.throughRound=1", study="first", taking_back=True)
    centre.rolled_out()
    assert centre.get("statefulset", CENTRE)["spec"]["template"] != before
    world.guide.run("kubectl rollout undo")
    centre.rolled_out()
    assert centre.get("statefulset", CENTRE)["spec"]["template"] == before
    digest = hashlib.sha256(centre.inside("cat", "/etc/wardround/plan/study.yaml").encode()).digest()
    assert digest == consortium.study("second").digest
    world.wait(lambda now: now.study == digest, 120, "the second study should be in force again")


def drain_the_node(world: World) -> None:
    """The node of the centre is drained in mid-round and comes back: everything returns, the round ends."""
    node = world.centre.get("pod", world.centre.pod)["spec"]["nodeName"]
    world.upgrade(CENTRE, "--set", f"plan.throughRound={ROUNDS}", study="first", taking_back=True)
    world.centre.rolled_out()
    number = world.wait(lambda now: now.phase in OPEN, 300, "a round should be open").round
    with cordoned(node):
        run("kubectl", "drain", node, "--ignore-daemonsets", "--delete-emptydir-data",
            "--pod-selector=app.kubernetes.io/part-of=wardround", "--timeout=300s", seconds=400)  # fmt: skip
    for space in world.spaces.values():
        space.rolled_out(600)
    world.wait(lambda now: now.pods_live == 5 and now.hospitals_enrolled == 4, 300, "all should be back")
    world.round_over(number, 600)
    world.round_over(number + 1, 600)
    check_ledgers(world)


def renew_a_certificate(world: World) -> None:
    """A new leaf in the Secret is read by the running process; nobody is restarted, the ledger is not touched."""
    space, before = world["alice"], world.ledger("alice")

    def valid_until() -> float:
        lines = space.page("/metrics").splitlines()
        return next(float(one.split()[-1]) for one in lines if one.startswith("wardround_certificate_expiry_timestamp"))

    started, until_then = space.get("pod", space.pod)["metadata"]["uid"], valid_until()
    wardround("site", "renew", world.consortium.folder / "alice", "--days", 30)
    world.guide.run("kubectl apply --namespace alice")
    until(lambda: valid_until() != until_then, 300, "the new certificate should be read")
    world.wait(lambda now: now.hospitals_enrolled == 4, 240, "the hospital should be connected with it")
    assert space.get("pod", space.pod)["metadata"]["uid"] == started
    assert world.ledger("alice")[: len(before)] == before

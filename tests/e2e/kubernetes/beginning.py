"""First steps of the whole life: an agreement, installs that stand, and who can reach whom."""

from pathlib import Path

from tests.support.kubernetes import load_image, run, until
from tests.support.kubernetes_sites import CENTRE, HOSPITALS, PODS, wardround
from tests.support.kubernetes_world import World, plain_pod

ROUNDS = 300  # of the first study: more than the fastest cluster runs in all these steps
DIALLING = (*PODS, *HOSPITALS)


def load_images(archives: dict[str, Path]) -> None:
    for archive in archives.values():
        load_image(archive)


def found_the_consortium(world: World) -> None:
    """Ten organisations make their keys, agree on a charter by its twelve words, and on a study."""
    consortium = world.consortium
    consortium.init()
    consortium.agree(1, maximum=4)
    for site in consortium.sites:
        consortium.pin(site, 1, "current")
    consortium.draft_study("first", rounds=ROUNDS, train_seconds=8)
    consortium.draft_study("second", rounds=2, train_seconds=8, seed=2)
    consortium.consent("first")


def make_sites_ready(world: World, cli: str) -> None:
    """Namespaces, the Secrets that `site init` wrote, and the hospitals' images on claims of their own."""
    world.make_namespaces()
    for site, space in world.spaces.items():
        if site == CENTRE:
            world.guide.run("kubectl apply --namespace centre")
        else:
            space.kubectl("apply", "-f", str(world.consortium.folder / site / "secret.yaml"))
    for hospital in HOSPITALS:
        world.fill(world[hospital], cli, world.consortium.images(hospital))


def install_the_centre(world: World) -> None:
    """It waits for its model, and says so; an operator brings it."""
    said = world.install(CENTRE)
    assert "kubectl rollout status" in said
    assert f"state-{CENTRE}-0" in said, "NOTES say which claim is kept"
    world.centre.rolled_out()
    world.connect()
    folder, model = world.consortium.folder, world.consortium.study("first").document.model.initial
    assert f"waiting for the model {model}: run wardround model push" in world.status().detail
    assert model in world.centre.page("/readyz")
    push_model(world, "first")
    assert model not in world.status().detail
    assert (folder / "olga").is_dir()


def push_model(world: World, study: str) -> None:
    folder = world.consortium.folder
    wardround("model", "push", folder / study / "v0.safetensors", "--address", world.address, "--operator",
              folder / "olga", "--charter", world.consortium.charter())  # fmt: skip


def install_the_others(world: World) -> None:
    for site in DIALLING:
        said = world.install(site)
        assert f"helm test {site}" in said
        assert f"state-{site}-0" in said
    for site in DIALLING:
        world[site].rolled_out(600)
    world.wait(lambda now: now.pods_live == 5 and now.hospitals_enrolled == 4, 240, "everybody should be connected")


def helm_tests(world: World, *sites: str) -> None:
    for site in sites:
        world[site].release("test", "--timeout", "5m")
    assert "Succeeded" in world.guide.run("helm test ward")


def try_the_network(world: World, cli: str) -> None:
    """By trying: a stranger is stopped, a hospital reaches the aggregator and names, and nothing else."""
    world.stranger.apply(plain_pod("stranger", cli, labels={"app": "stranger"}))
    world.stranger.kubectl("wait", "--for=condition=Ready", "pod/stranger", "--timeout=300s")
    addresses = {site: space.get("pod", space.pod)["status"]["podIP"] for site, space in world.spaces.items()}
    stranger = world.stranger.get("pod", "stranger")["status"]["podIP"]

    def of_stranger(*targets: tuple[str, int]) -> list[bool]:
        return _reached(world.stranger.kubectl("exec", "stranger", "--", "python", "-c", _dial(*targets)))

    shut = [(addresses[site], port) for site in ("ash", "alice", "carol") for port in (9464, 8443)]
    found = of_stranger(*shut, (addresses[CENTRE], 9464), (addresses[CENTRE], 8443))
    assert found == [False] * 7 + [True], "a stranger reaches the aggregator's mTLS port, its gate, and nothing else"

    world.stranger.kubectl("exec", "stranger", "--", "sh", "-c", f"python -c '{_SERVE}' >/dev/null 2>&1 &")
    until(lambda: of_stranger((stranger, 8000)) == [True], 60, "the stranger should listen")
    cluster = run("kubectl", "get", "service", "kubernetes", "-n", "default", "-o", "jsonpath={.spec.clusterIP}")
    shut = [(stranger, 8000), (addresses["birch"], 9464), (addresses["bob"], 9464), (cluster, 443)]
    for site in ("alice", "dave", "fir"):
        targets = [(f"{CENTRE}.wr-{CENTRE}.svc", 443), *shut, (addresses[CENTRE], 9464)]
        found = _reached(world[site].python(_dial(*targets)))
        assert found == [True] + [False] * 5, f"{site} reaches the aggregator by its name and nothing else: {found}"
    world.stranger.kubectl("delete", "pod", "stranger", "--grace-period=1")


_SERVE = 'import http.server; http.server.test(http.server.SimpleHTTPRequestHandler, port=8000, bind="0.0.0.0")'


def _dial(*targets: tuple[str, int]) -> str:
    """A program that tries them all, one line each."""
    return (
        "import socket\n"
        f"for target in {list(targets)!r}:\n"
        "    try:\n"
        "        socket.create_connection(target, 3).close()\n"
        "        print('open')\n"
        "    except OSError as error:\n"
        "        print('shut', error)\n"
    )


def _reached(said: str) -> list[bool]:
    return [line == "open" for line in said.split("\n") if line]

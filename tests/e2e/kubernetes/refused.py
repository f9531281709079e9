"""What must not work: refused at the earliest place that can know, in a sentence; nothing that stands is touched."""

import base64
import io
import json
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from services.common.ids import Role
from services.common.rpc.certificates import issue_leaf
from tests.support.kubernetes import Namespace, refusal, run, until
from tests.support.kubernetes_world import World

_DAY = 86_400_000


def refuse_bad_installs(world: World) -> None:
    """Each names the value or the thing, and nothing is installed."""
    consortium = world.consortium

    def refused(site: str, *words: str, space: Namespace | None = None) -> str:
        where = space or world[site]
        given = [*consortium.files(site), *words]
        return refusal(where.helm, "install", site, world.chart(site), "-n", where.name, *given)

    for site in ("alice", "carol"):  # one with each Helm
        assert "aggregatr" in refused(site, "--set", "config.aggregatr=x:1")
        missing = refused(site, space=world.stranger)
        assert f"no Secret wardround-{site}" in missing
        assert "kubectl apply -f secret.yaml" in missing
        assert "erin" in refused(site, "--set", "config.id=erin")
    stripped = world["bob"].get("secret", "wardround-bob")
    del stripped["data"]["identity.pem"]
    stripped["metadata"] = {"name": "half"}
    world["bob"].apply(stripped)
    assert "no key identity.pem" in refused("bob", "--set", "secretName=half")
    for space in (*world.spaces.values(), world.stranger):
        assert not run(space.helm, "list", "-n", space.name, "-q").strip(), f"{space.name} has a release"


def refuse_bad_starts(world: World, cli: str) -> None:
    """A hospital that must not start says why as its pod's last words: alice's release, in a namespace beside."""
    space = Namespace(world.stranger.name, "alice", world["alice"].helm)
    secret = world["alice"].get("secret", "wardround-alice")
    secret["metadata"] = {"name": "wardround-alice"}
    space.apply(secret)
    good = world.consortium.images("alice")

    world.fill(space, cli, _tar_of(good, lambda member: None))
    with _installed(world, space):
        assert "metadata.csv" in _last_words(space, "`data` must name")
    world.fill(space, cli, _tar_of(good, _hidden))
    with _installed(world, space):
        assert "metadata.csv cannot be read" in _last_words(space, "user 65532")
    with _installed(world, space, "--set", "gpu.count=1"):
        until(
            lambda: "Insufficient nvidia.com/gpu" in space.kubectl("describe", "pod", space.pod), 120,
            "the scheduler should say that no node has a GPU",
        )  # fmt: skip
    world.fill(space, cli, good)
    secret["data"] |= _expired(world)
    space.apply(secret)
    with _installed(world, space):
        assert "renew it" in _last_words(space, "valid from")
    space.kubectl("delete", "pvc,secret", "--all", "--wait=true")


@contextmanager
def _installed(world: World, space: Namespace, *words: str) -> Iterator[None]:
    space.release("install", world.chart(space.site), *world.consortium.files(space.site), *words)
    yield
    space.release("uninstall", "--wait")


def _last_words(space: Namespace, *words: str) -> str:
    """The sentence with which the service's process ended, once all `words` are in it; `describe` shows it."""

    def ended() -> str:
        for status in space.get("pod", space.pod)["status"].get("containerStatuses", ()):
            if state := status["state"].get("terminated") or status["lastState"].get("terminated"):
                return str(state.get("message", ""))
        return ""

    said = until(ended, 300, f"{space.pod} should end with a sentence")
    assert all(word in said for word in words), said
    assert said in space.kubectl("describe", "pod", space.pod)
    return str(said)


def _tar_of(blob: bytes, change: Callable[[tarfile.TarInfo], tarfile.TarInfo | None]) -> bytes:
    """The archive with every member changed, or without it."""
    out = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(blob)) as old, tarfile.open(fileobj=out, mode="w") as new:
        for member in old.getmembers():
            if (changed := change(member)) is not None:
                new.addfile(changed, old.extractfile(member))
    return out.getvalue()


def _hidden(member: tarfile.TarInfo) -> tarfile.TarInfo:
    return member.replace(mode=0) if member.name == "metadata.csv" else member


def _expired(world: World) -> dict[str, str]:
    """A Secret's entries: alice's leaf as her own root issued it for one day, three days ago."""
    folder = world.consortium.folder / "alice"
    root, key = ((folder / name).read_bytes() for name in ("tls-root.pem", "tls-root-key.pem"))
    days_ago = int(time.time() * 1000) - 3 * _DAY
    leaf = issue_leaf(root, key, Role.HOSPITAL, "alice", "wards", days=1, now_ms=days_ago)
    return {
        "tls.pem": base64.b64encode(leaf.certificate).decode(),
        "tls-key.pem": base64.b64encode(leaf.key).decode(),
    }


def second_release_of_a_pod(world: World) -> None:
    """The same identity in another namespace, on another volume: refused in one sentence that `describe` shows."""
    space = world.stranger
    secret = json.loads(world["ash"].kubectl("get", "secret", "wardround-ash", "-o", "json"))
    secret["metadata"] = {"name": "wardround-ash"}
    space.apply(secret)
    files = world.consortium.files("ash")
    run(space.helm, "install", "ash", world.chart("ash"), "-n", space.name, *files)
    _last_words(Namespace(space.name, "ash", space.helm), "another process with the identity of ash is connected")
    assert world.status().pods_live == 5, "the first one goes on"
    run(space.helm, "uninstall", "ash", "-n", space.name)

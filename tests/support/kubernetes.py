"""kubectl and Helm on the cluster that KUBECONFIG points to, and a way to the aggregator's Service from here."""

import json
import os
import shlex
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from services.common.errors import ServiceError

POLL_SECONDS = 1.0  # real clusters offer no clock of ours; everything waits by asking


class CommandError(AssertionError):
    """A command that should have worked did not; its own words are in it."""


def run(*words: str, given: bytes | None = None, check: bool = True, seconds: float = 300) -> str:
    """Run a command to its end; its standard output. Raises CommandError with what it said."""
    done = subprocess.run(words, input=given, capture_output=True, timeout=seconds, check=False)
    if check and done.returncode:
        said = (done.stderr + done.stdout).decode(errors="replace")[-4000:]
        raise CommandError(f"`{shlex.join(words)[:300]}` ended with {done.returncode}:\n{said}")
    return done.stdout.decode(errors="replace")


def refusal(*words: str, given: bytes | None = None, seconds: float = 300) -> str:
    """What a command says that must fail."""
    done = subprocess.run(words, input=given, capture_output=True, timeout=seconds, check=False)
    said = (done.stderr + done.stdout).decode(errors="replace")
    if not done.returncode:
        raise CommandError(f"`{shlex.join(words)[:300]}` should have been refused:\n{said[-2000:]}")
    return said


def why_no_cluster() -> str:
    """Why the tests on a cluster cannot run here, or ""."""
    if not os.environ.get("KUBECONFIG"):
        return "KUBECONFIG is not set: start a cluster (kind, k3d) and export it"
    missing = [name for name in ("kubectl", "helm") if shutil.which(name) is None]
    if missing:
        return f"{missing[0]} is not installed"
    try:
        run("kubectl", "get", "--raw", "/readyz", "--request-timeout=10s", seconds=30)
    except (CommandError, subprocess.TimeoutExpired) as error:
        return f"the cluster of KUBECONFIG does not answer: {str(error).strip().splitlines()[-1]}"
    return ""


def helms() -> tuple[str, str]:
    """Helm 4 and Helm 3 ($HELM, $HELM3), the same one twice where only one is there."""
    four, three = os.environ.get("HELM", "helm"), os.environ.get("HELM3", "helm3")
    return four, three if shutil.which(three) else four


def load_image(archive: Path) -> None:
    """Make an image known to the cluster's nodes: $KUBERNETES_LOAD, else kind's or k3d's own command."""
    if command := os.environ.get("KUBERNETES_LOAD"):
        run(*shlex.split(command), str(archive))
        return
    context = run("kubectl", "config", "current-context").strip()
    if context.startswith("kind-"):
        run("kind", "load", "image-archive", str(archive), "--name", context.removeprefix("kind-"))
    elif context.startswith("k3d-"):
        run("k3d", "image", "import", str(archive), "--cluster", context.removeprefix("k3d-"))
    else:
        raise CommandError(
            f"how images reach {context} is not known here: set KUBERNETES_LOAD to a command that takes an archive"
        )


@dataclass
class Namespace:
    """kubectl and Helm in one namespace; its one release has the site's id as name."""

    name: str
    site: str
    helm: str

    def kubectl(self, *words: str, given: bytes | None = None, seconds: float = 300) -> str:
        return run("kubectl", "-n", self.name, *words, given=given, seconds=seconds)

    def get(self, *words: str) -> Any:
        return json.loads(self.kubectl("get", *words, "-o", "json"))

    def apply(self, manifest: dict[str, Any]) -> None:
        self.kubectl("apply", "-f", "-", given=json.dumps(manifest).encode())

    def release(self, verb: str, *words: str, seconds: float = 600) -> str:
        """`helm VERB SITE …` in this namespace."""
        return run(self.helm, verb, self.site, "-n", self.name, *words, seconds=seconds)

    @property
    def applies_server_side(self) -> bool:
        """Whether this namespace's Helm asks the API server who owns a field, as Helm 4 does."""
        return not run(self.helm, "version", "--template", "{{.Version}}").startswith("v3")

    @property
    def pod(self) -> str:
        return f"{self.site}-0"

    def inside(self, *words: str, given: bytes | None = None, seconds: float = 300) -> str:
        """A command in the service's own container."""
        return self.kubectl("exec", "-i", self.pod, "-c", "service", "--", *words, given=given, seconds=seconds)

    def python(self, program: str, seconds: float = 120) -> str:
        return self.inside("python", "-c", program, seconds=seconds).strip()

    def status(self) -> dict[str, Any]:
        """What a hospital or pod says over its own socket."""
        found: dict[str, Any] = json.loads(self.inside("python", "-m", "services.common.rpc.administer", "status"))
        return found

    def page(self, path: str) -> str:
        """A page of the service's HTTP port, whatever its status code."""
        return self.python(
            "import http.client; c = http.client.HTTPConnection('127.0.0.1', 9464, timeout=20); "
            f"c.request('GET', '{path}'); print(c.getresponse().read().decode())"
        )

    def rolled_out(self, seconds: float = 300) -> None:
        self.kubectl("rollout", "status", f"statefulset/{self.site}", f"--timeout={seconds:.0f}s", seconds=seconds + 30)


def until(what: Callable[[], Any], seconds: float, why: str) -> Any:
    """Ask until the answer is true; a command that fails in between (a pod that restarts) is asked again."""
    ends, last = time.monotonic() + seconds, "nothing"
    while time.monotonic() < ends:
        try:
            if found := what():
                return found
        except (CommandError, ServiceError, subprocess.TimeoutExpired, ValueError) as error:
            last = str(error)
        time.sleep(POLL_SECONDS)
    raise AssertionError(f"not within {seconds:.0f} s: {why}; last: {last[-2000:]}")


@contextmanager
def forwarded(namespace: str, service: str, port: int) -> Iterator[str]:
    """host:port here that leads to a Service's port, dialled again whenever its pod is replaced."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        here = probe.getsockname()[1]
    command = ["kubectl", "-n", namespace, "port-forward", f"service/{service}", f"{here}:{port}"]
    ended = threading.Event()
    running: list[subprocess.Popen[bytes]] = []

    def keep() -> None:
        while not ended.is_set():
            running[:] = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)]
            running[0].wait()
            ended.wait(0.5)

    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{here}"
    finally:
        ended.set()
        for process in running:
            process.terminate()
        thread.join(10)


@dataclass
class Story:
    """Steps with their seconds; the record outlives a failing step."""

    record: Path
    steps: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        started, outcome = time.monotonic(), "failed"
        print(f"\n{what} …", flush=True)
        try:
            yield
            outcome = "passed"
        finally:
            seconds = round(time.monotonic() - started, 1)
            print(f"{what}: {outcome} in {seconds} s", flush=True)
            self.steps.append({"step": what, "outcome": outcome, "seconds": seconds})
            self.record.parent.mkdir(parents=True, exist_ok=True)
            whole = {"facts": self.facts, "steps": self.steps, "seconds": sum(one["seconds"] for one in self.steps)}
            self.record.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n")

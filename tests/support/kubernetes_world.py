"""The consortium on a cluster: one namespace for each organisation, and what its people do there."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from services.cli.operator import dial_aggregator
from services.common.rpc.channel import Caller
from tests.support.kubernetes import Namespace, Story, forwarded, helms, run, until
from tests.support.kubernetes_guide import RELEASES, Guide
from tests.support.kubernetes_sites import CENTRE, HOSPITALS, PODS, Consortium, role_of
from wardround.admin.v1 import admin_pb2
from wardround.admin.v1.admin_pb2_grpc import AdministrationServiceStub

ROOT = Path(__file__).resolve().parents[2]
CHARTS = {"aggregator": "aggregator", "pod": "keyshare", "hospital": "hospital-node"}
LABELS = {"app.kubernetes.io/part-of": "wardround-e2e"}
# Half of the sites live with Helm 3, the other half with Helm 4.
WITH_HELM_3 = ("elm", "fir", "carol", "dave")


class World:
    """Namespaces by site, the consortium's files, and the aggregator's status from here."""

    def __init__(self, folder: Path, story: Story) -> None:
        four, three = helms()
        self.story = story
        self.consortium = Consortium(folder, f"{CENTRE}.wr-{CENTRE}.svc:443")
        self.spaces = {
            site: Namespace(f"wr-{site}", site, three if site in WITH_HELM_3 else four)
            for site in self.consortium.sites
        }
        self.guide = Guide(self.consortium, self.spaces)
        self.stranger = Namespace("wr-stranger", "stranger", four)
        self._stack = ExitStack()
        self._caller: Caller | None = None
        self.address = ""

    def __getitem__(self, site: str) -> Namespace:
        return self.spaces[site]

    @property
    def centre(self) -> Namespace:
        return self.spaces[CENTRE]

    def chart(self, site: str) -> str:
        return str(ROOT / "deploy/helm" / CHARTS[role_of(site).value])

    def make_namespaces(self) -> None:
        """As strict as a cluster can ask: Pod Security `restricted`, enforced."""
        for space in (*self.spaces.values(), self.stranger):
            labels = LABELS | {"pod-security.kubernetes.io/enforce": "restricted"}
            manifest = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": space.name, "labels": labels}}
            run("kubectl", "apply", "-f", "-", given=json.dumps(manifest).encode())

    def remove(self) -> None:
        """All namespaces with everything in them; the volumes go too."""
        self._stack.close()
        run("kubectl", "delete", "namespace", "-l", ",".join(f"{k}={v}" for k, v in LABELS.items()), "--wait=true",
            "--ignore-not-found", seconds=600)  # fmt: skip

    def connect(self) -> None:
        """Open a lasting way to the aggregator, as its operator olga."""
        self.address = self._stack.enter_context(forwarded(self.centre.name, CENTRE, 443))
        folder = self.consortium.folder
        self._caller = self._stack.enter_context(
            dial_aggregator(self.address, self.consortium.charter(), folder / "olga")
        )

    def status(self) -> admin_pb2.Status:
        """What the aggregator says now; it may be restarting, so for a while it is asked again."""
        assert self._caller is not None
        return self._caller.unary(
            lambda channel: AdministrationServiceStub(channel).GetStatus, admin_pb2.GetStatusRequest(), seconds=60
        ).status

    def evidence(self, study: bytes) -> Iterator[admin_pb2.ExportEvidenceResponse]:
        """The aggregator's evidence of one study, part by part."""
        assert self._caller is not None
        request = admin_pb2.ExportEvidenceRequest(study=study)
        with self._caller.stream(
            lambda channel: AdministrationServiceStub(channel).ExportEvidence, request, seconds=300
        ) as parts:
            yield from parts

    def wait(self, what: Any, seconds: float, why: str) -> admin_pb2.Status:
        """Until `what(status)` holds; the aggregator's last sentence is in the failure."""
        last: list[admin_pb2.Status] = []

        def look() -> admin_pb2.Status | None:
            last[:] = [self.status()]
            return last[0] if what(last[0]) else None

        try:
            found: admin_pb2.Status = until(look, seconds, why)
        except AssertionError as error:
            shown = last[0] if last else "no status"
            raise AssertionError(f"{error}\nthe aggregator says: {shown}\n{self.pods_now()}") from None
        return found

    def round_over(self, number: int, seconds: float = 240, study: str = "first") -> admin_pb2.Status:
        """Until round `number` of the study has a result."""
        digest = self.consortium.study(study).digest

        def over(now: admin_pb2.Status) -> bool:
            return now.study == digest and (
                now.round > number or (now.round == number and now.phase in ("idle", "finished"))
            )

        return self.wait(over, seconds, f"round {number} of {study} should end")

    def round_open(self, number: int, phases: tuple[str, ...] = (), seconds: float = 240) -> admin_pb2.Status:
        """Until round `number` is open (in one of `phases`)."""
        what = f"round {number} should be open"
        return self.wait(
            lambda now: (
                now.round >= number and now.phase not in ("idle", "finished")
                if not phases
                else now.round == number and now.phase in phases
            ),
            seconds,
            what,
        )

    def pods_now(self) -> str:
        return run("kubectl", "get", "pods", "-A", "-o", "wide", check=False)

    def install(self, site: str) -> str:
        """By the guide's own line, where it has one of that site."""
        if site in RELEASES.values():
            release = next(name for name, ours in RELEASES.items() if ours == site)
            return self.guide.run(f"helm install {release}", through=0)
        return self[site].release("install", self.chart(site), *self.consortium.files(site))

    def upgrade(self, site: str, *words: str, study: str = "first", taking_back: bool = False) -> str:
        """`taking_back`: what kubectl has changed since becomes Helm's again, as the guide says."""
        if taking_back and self[site].applies_server_side:
            words = (*words, "--force-conflicts")
        return self[site].release("upgrade", self.chart(site), *self.consortium.files(site, study), *words)

    def ledger(self, hospital: str) -> list[dict[str, Any]]:
        """The rows of a hospital's ledger, as its own container exports them."""
        program = (
            "import io, sys, tarfile; from services.common.rpc.administer import *; from services.common.rpc.unix "
            "import dial_admin; from wardround.admin.v1 import admin_pb2, admin_pb2_grpc\n"
            "stub = admin_pb2_grpc.AdministrationServiceStub(dial_admin(Path('/run/wardround/admin.sock')))\n"
            "out, now = b'', ''\n"
            "for part in stub.ExportEvidence(admin_pb2.ExportEvidenceRequest()):\n"
            "    now = part.path or now\n"
            "    out += part.chunk if now == 'ledger.jsonl' else b''\n"
            "print(out.decode())"
        )
        return [json.loads(line) for line in self[hospital].python(program).splitlines() if line]

    def restarts(self) -> dict[str, int]:
        """How often the containers of each site were started again, beside the pods that were replaced."""
        found = {}
        for site, space in self.spaces.items():
            pods = space.get("pods", "-l", "app.kubernetes.io/component=service")["items"]
            found[site] = sum(s["restartCount"] for pod in pods for s in pod["status"].get("containerStatuses", ()))
        return found

    def fill(self, space: Namespace, image: str, tar: bytes) -> None:
        """A hospital's images on the claim `images` of its namespace, brought by a pod that goes again."""
        claim = {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": "images"},
            "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "64Mi"}}},
        }
        space.apply(claim)
        # A scheduler that sees the first pod of a fresh cluster before its volume has looked again after five minutes.
        bound = "--for=jsonpath={.status.phase}=Bound"
        run("kubectl", "-n", space.name, "wait", bound, "pvc/images", "--timeout=20s", check=False)
        volume = {"name": "images", "persistentVolumeClaim": {"claimName": "images"}}
        space.apply(plain_pod("fill", image, mounts={"/data": volume}))
        space.kubectl("wait", "--for=condition=Ready", "pod/fill", "--timeout=300s")
        space.kubectl("exec", "-i", "fill", "--", "tar", "x", "-C", "/data", given=tar)
        space.kubectl("delete", "pod", "fill", "--grace-period=1")


def plain_pod(
    name: str, image: str, labels: dict[str, str] | None = None, mounts: dict[str, dict[str, Any]] | None = None
) -> dict[str, Any]:
    """A pod that does nothing and passes Pod Security `restricted`."""
    mounts = mounts or {}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": labels or {}},
        "spec": {
            "automountServiceAccountToken": False,
            "restartPolicy": "Never",
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 65532,
                "fsGroup": 65532,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [
                {
                    "name": "main",
                    "image": image,
                    "imagePullPolicy": "IfNotPresent",
                    "command": ["python", "-c", "import time; time.sleep(3600)"],
                    "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                    "resources": {
                        "limits": {"memory": "64Mi", "cpu": "250m"},
                        "requests": {"memory": "32Mi", "cpu": "5m"},
                    },
                    "volumeMounts": [{"name": volume["name"], "mountPath": path} for path, volume in mounts.items()],
                }
            ],
            "volumes": list(mounts.values()),
        },
    }


@contextmanager
def cordoned(node: str) -> Iterator[None]:
    """Nothing new is scheduled on the node; afterwards it is again, whatever happened."""
    run("kubectl", "cordon", node)
    try:
        yield
    finally:
        run("kubectl", "uncordon", node)


__all__ = ["CENTRE", "HOSPITALS", "PODS", "World", "cordoned", "plain_pod"]

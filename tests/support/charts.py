"""Charts through the real `helm` binaries: which are there, one consortium's files, rendering."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.cli.drafts import draft_policy
from services.cli.federation import committee_of, make_sites, write_charter
from services.common.documents.emit import emit
from services.common.documents.study import load_study

ROOT = Path(__file__).resolve().parents[2]
HELM = ROOT / "deploy/helm"
CHARTS = ("aggregator", "hospital-node", "keyshare")
KINDS = ("PodMonitor", "PrometheusRule")
ALL_KINDS = tuple(f"--api-versions=monitoring.coreos.com/v1/{kind}" for kind in KINDS)
RELEASE, NAMESPACE = "ward", "site"
INSTALLS = [
    pytest.param(chart, path, id=f"{chart}-{path.stem}")
    for chart in CHARTS
    for path in sorted((HELM / chart / "ci").glob("*.yaml"))
]


@cache
def helms() -> tuple[str, ...]:
    """The binaries: $HELM (several with ':') or helm and helm3 on the PATH."""
    named = [name for name in os.environ.get("HELM", "").split(os.pathsep) if name] or ["helm", "helm3"]
    return tuple(found for name in named if (found := shutil.which(name)))


needs_helm = pytest.mark.skipif(not helms(), reason="no helm binary on the PATH and none named by $HELM")


@dataclass(frozen=True)
class Files:
    """What a site gives by --set-file, by chart and value."""

    of: dict[str, dict[str, Path]]

    def options(self, chart: str, **other: Path) -> list[str]:
        """helm's options; `other` takes the place of a file."""
        return [f"--set-file={key}={path}" for key, path in (self.of[chart] | other).items()]


def make_files(root: Path) -> Files:
    """The files of a consortium with centre, ash and alice, all of them genuine."""
    sites = make_sites(root, ["alice", "bob", "carol", "dave"], 4)
    folders = {site.id: site.folder for site in sites}
    charter = write_charter(root, sites, committee_of(4, 2), minimum=2, colluding=0)
    study = load_study((ROOT / "docs/examples/study.yaml").read_bytes())
    (folders["alice"] / "policy.yaml").write_bytes(emit(draft_policy(charter, study, "alice", "images", repeat=False)))
    common = {"charter": root / "charter.yaml"}
    return Files(
        {
            "aggregator": common
            | {
                "pin": folders["centre"] / "pin.yaml",
                "plan.study": ROOT / "docs/examples/study.yaml",
                "charterSignatures": root / "charter.signatures.yaml",
            },
            "hospital-node": common
            | {"pin": folders["alice"] / "pin.yaml", "policy": folders["alice"] / "policy.yaml"},
            "keyshare": common | {"pin": folders["ash"] / "pin.yaml"},
        }
    )


def run(helm: str, *words: str) -> subprocess.CompletedProcess[bytes]:
    """helm, outside any cluster."""
    alone = {name: value for name, value in os.environ.items() if name != "KUBECONFIG"}
    return subprocess.run([helm, *words], capture_output=True, check=False, env=alone | {"KUBECONFIG": os.devnull})


@cache
def template(helm: str, chart: str, *options: str) -> subprocess.CompletedProcess[bytes]:
    """`helm template` of a chart."""
    return run(helm, "template", RELEASE, str(HELM / chart), f"--namespace={NAMESPACE}", *options)


def render(helm: str, chart: str, *options: str) -> list[dict[str, Any]]:
    """The manifests, which must render."""
    done = template(helm, chart, *options)
    assert done.returncode == 0, done.stderr.decode()
    return manifests(done.stdout)


def manifests(rendered: bytes) -> list[dict[str, Any]]:
    """Parsed as Kubernetes parses them (YAML 1.1)."""
    return [found for found in yaml.load_all(rendered, yaml.CSafeLoader) if found]


def one(found: list[dict[str, Any]], kind: str, name: str = RELEASE) -> dict[str, Any]:
    """The manifest of that kind and name."""
    named = [item for item in found if item["kind"] == kind and item["metadata"]["name"] == name]
    assert len(named) == 1, (kind, name, [(item["kind"], item["metadata"]["name"]) for item in found])
    return named[0]


def pod_specs(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The spec of every pod that the manifests make."""
    specs = [item["spec"] for item in found if item["kind"] == "Pod"]
    return specs + [item["spec"]["template"]["spec"] for item in found if "template" in item.get("spec", {})]

"""Every named install renders under every Helm, fits the API of three minor versions, and keeps to the hardening."""

import hashlib
from base64 import b64decode
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from services.aggregator.config import load_config as load_aggregator
from services.cli import kubernetes
from services.common.documents.site import load_dialing
from services.hospital_node.config import load_config as load_hospital
from tests.support.charts import (
    ALL_KINDS,
    CHARTS,
    HELM,
    INSTALLS,
    KINDS,
    RELEASE,
    Files,
    needs_helm,
    one,
    pod_specs,
    render,
)

pytestmark = needs_helm
MINORS = ("1.33", "1.35", "1.37")
LOADERS = {"aggregator": load_aggregator, "hospital-node": load_hospital, "keyshare": load_dialing}


def install(files: Files, helm: str, chart: str, values: Path, *more: str) -> list[dict[str, Any]]:
    return render(helm, chart, f"--values={values}", *files.options(chart), *ALL_KINDS, *more)


@pytest.mark.parametrize(("chart", "values"), INSTALLS)
def test_manifests_fit_the_api_of_three_minor_versions(files: Files, helm: str, chart: str, values: Path) -> None:
    for manifest in install(files, helm, chart, values):
        if manifest["apiVersion"].partition("/")[0] in ("monitoring.coreos.com", "cert-manager.io"):
            continue  # their own operators' kinds: applied to a real cluster by the installs
        for minor in MINORS:
            kubernetes_validate.validate(manifest, minor, strict=True)


@pytest.mark.parametrize(("chart", "values"), INSTALLS)
def test_pods_are_hardened(files: Files, helm: str, chart: str, values: Path) -> None:
    found = install(files, helm, chart, values)
    assert not {item["kind"] for item in found} & {"Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding"}
    pods = pod_specs(found)
    assert len(pods) == 2 + (chart == "aggregator")  # the service, its check; the check of a plan
    for pod in pods:
        assert pod["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        identity = pod["securityContext"]
        assert identity["runAsNonRoot"] is True
        assert identity.get("runAsUser") != 0
        assert identity["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            amounts = container["resources"]
            assert amounts["limits"] == amounts["requests"]
            assert {"cpu", "memory", "ephemeral-storage"} <= set(amounts["limits"])
            assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"
        for volume in pod["volumes"]:
            kinds = {"configMap", "projected", "emptyDir", "persistentVolumeClaim", "downwardAPI"}
            assert set(volume) - {"name"} <= kinds, volume


@pytest.mark.parametrize(("chart", "values"), INSTALLS)
def test_the_service_accepts_the_configuration(
    files: Files, helm: str, chart: str, values: Path, tmp_path: Path
) -> None:
    found = install(files, helm, chart, values)
    text = one(found, "ConfigMap", f"{RELEASE}-config")["data"]["config.yaml"]
    (tmp_path / "config.yaml").write_text(text)
    config = LOADERS[chart](tmp_path / "config.yaml")
    mounts = [mount for pod in pod_specs(found)[:1] for mount in pod["containers"][0]["volumeMounts"]]
    folders = {mount["mountPath"]: mount.get("readOnly", False) for mount in mounts}
    for path in (*config.charters, config.pins, config.identity_key, config.tls.certificate, config.tls.key):
        assert folders[str(path.parent)] is True, path
    assert folders[str(config.state.parent)] is False


@pytest.mark.parametrize(("chart", "values"), INSTALLS)
def test_stateful_set_survives_rollouts(files: Files, helm: str, chart: str, values: Path) -> None:
    found = install(files, helm, chart, values)
    spec = one(found, "StatefulSet")["spec"]
    assert spec["podManagementPolicy"] == "Parallel"
    assert spec["persistentVolumeClaimRetentionPolicy"] == {"whenDeleted": "Retain", "whenScaled": "Retain"}
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] == 60
    container = spec["template"]["spec"]["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    for probe, path in (("startup", "/startupz"), ("readiness", "/readyz"), ("liveness", "/livez")):
        asked = container[f"{probe}Probe"]["httpGet"]
        assert (asked["path"], ports[asked["port"]]) == (path, 9464)
    selector = spec["selector"]["matchLabels"].items()
    assert selector <= spec["template"]["metadata"]["labels"].items()
    check = one(found, "Pod", f"{RELEASE}-check")["metadata"]["labels"]
    assert not selector <= check.items(), "the stateful set would count the check as its own pod"


@pytest.mark.parametrize(("chart", "values"), INSTALLS)
def test_policies_deny_all_of_the_release_first(files: Files, helm: str, chart: str, values: Path) -> None:
    found = install(files, helm, chart, values)
    policies = [item for item in found if item["kind"] == "NetworkPolicy"]
    if values.stem == "node-port":  # the one install that switches them off
        assert policies == []
        return
    deny = one(found, "NetworkPolicy", f"{RELEASE}-deny")["spec"]
    assert set(deny) == {"podSelector", "policyTypes"}
    assert deny["policyTypes"] == ["Ingress", "Egress"]
    for pod in [one(found, "Pod", f"{RELEASE}-check"), one(found, "StatefulSet")["spec"]["template"]]:
        assert deny["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    opened = [rule for item in policies for rule in item["spec"].get("ingress", [])]
    ports = {port["port"] for rule in opened for port in rule["ports"]}
    assert ports <= ({9464, 8443} if chart == "aggregator" else {9464})


@pytest.mark.parametrize("chart", CHARTS)
def test_kinds_that_the_cluster_lacks_are_left_out(files: Files, helm: str, chart: str) -> None:
    values = next(path for path in (parameter.values[1] for parameter in INSTALLS) if watched(chart, path))
    known = {item["kind"] for item in install(files, helm, chart, values)}
    assert "PodMonitor" in known
    absent = render(helm, chart, f"--values={values}", *files.options(chart))
    assert not {item["kind"] for item in absent} & set(KINDS)
    assert [item for item in absent if item["kind"] == "StatefulSet"]


def watched(chart: str, values: Path) -> bool:
    return values.parents[1].name == chart and "monitor:" in values.read_text()


@pytest.mark.parametrize("chart", CHARTS)
def test_documents_keep_their_exact_bytes(files: Files, helm: str, chart: str, tmp_path: Path) -> None:
    """Line ends of another system, spaces and newlines at the end: what was hashed and signed arrives."""
    given = {}
    for key, path in files.of[chart].items():
        if key == "pin":
            continue
        given[key] = tmp_path / f"{key}.yaml"
        given[key].write_bytes(path.read_bytes().replace(b"\n", b"\r\n") + b"# <a & b> \xc3\xa9 {{ }}  \r\n\n\n")
    given["charterNext"] = tmp_path / "next.yaml"
    given["charterNext"].write_bytes(given["charter"].read_bytes() + b"\n")
    given["pin"] = tmp_path / "pin.yaml"
    pinned = [sha256(given[key]) for key in ("charter", "charterNext")]
    given["pin"].write_text('wardround: pin/v1\r\ncurrent: "{}"\r\nnext: "{}"\n\n'.format(*pinned))
    found = render(helm, chart, f"--values={HELM / chart / 'ci/minimal.yaml'}", *files.options(chart, **given))
    mounted = {
        name: b64decode(blob, validate=True)
        for name, blob in one(found, "ConfigMap", f"{RELEASE}-documents")["binaryData"].items()
    }
    names = {
        "charter": "charter.yaml",
        "charterNext": "charter-next.yaml",
        "pin": "pin.yaml",
        "policy": "policy.yaml",
        "charterSignatures": "charter.signatures.yaml",
    }
    assert {key: given[key].read_bytes() for key in given if key in names} == {
        key: mounted[names[key]] for key in given if key in names
    }
    if chart == "aggregator":
        template = one(found, "StatefulSet")["spec"]["template"]
        assert template["metadata"]["annotations"]["wardround.internal/study"].encode() == (
            given["plan.study"].read_bytes()
        )


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("chart", CHARTS)
def test_the_secret_of_site_init_is_the_one_that_is_mounted(files: Files, helm: str, chart: str) -> None:
    values = HELM / chart / "ci/minimal.yaml"
    pod = one(install(files, helm, chart, values), "StatefulSet")["spec"]["template"]["spec"]
    sources = next(volume for volume in pod["volumes"] if volume["name"] == "keys")["projected"]["sources"]
    id = yaml.safe_load(values.read_text())["config"]["id"]
    assert {source["secret"]["name"] for source in sources} == {kubernetes.secret_name(id)}
    assert {item["key"] for source in sources for item in source["secret"]["items"]} == set(kubernetes.KEYS)

"""Every value is used, a bad one is refused in one sentence at `helm install`; what values mean to the network."""

import copy
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.charts import (
    ALL_KINDS,
    CHARTS,
    HELM,
    RELEASE,
    Files,
    helms,
    needs_helm,
    one,
    render,
    template,
)

pytestmark = needs_helm
# Files that every render is given by --set-file; they are told apart by their bytes, in their own test.
FILES = {"charter", "charterNext", "pin", "policy", "charterSignatures", "plan.study"}
CHOICES: dict[str, Any] = {
    "config.id": "no-such-site",
    "config.aggregator": "elsewhere.example.org:8443",
    "config.proxy": "http://proxy.example.org:3128",
    "config.device": "cpu",
    "config.log_level": "error",
    "image.digest": "sha256:" + "1" * 64,
    "image.pullPolicy": "Always",
    "imagePullSecrets": [{"name": "other"}],
    "tls.certManager.issuerRef.kind": "Issuer",
    "tls.certManager.duration": "100h",
    "tls.certManager.renewBefore": "10h",
    "nodeSelector": {"a": "b"},
    "tolerations": [{"key": "a", "operator": "Exists"}],
    "security.groups": [7],
    "resources.cpu": "250m",
    "resources.memory": "3Gi",
    "resources.ephemeralStorage": "3Gi",
    "state.size": "7Gi",
    "service.type": "NodePort",
    "service.annotations": {"a": "b"},
    "service.nodePort": 31000,
    "service.externalTrafficPolicy": "Cluster",
    "service.loadBalancerSourceRanges": ["203.0.113.0/24"],
    "metrics.monitor.interval": "17s",
    "labels": {"a": "b"},
    "metrics.rules.runbooks": "https://runbooks.example/tree/",
    "peers": [{"ipBlock": {"cidr": "203.0.113.0/24"}}],
    "cidrs": ["203.0.113.0/24"],
}


def leaves(values: dict[str, Any], prefix: str = "") -> list[str]:
    """Paths of all values; a mapping of labels is one value."""
    found: list[str] = []
    for key, value in values.items():
        path = f"{prefix}{key}"
        whole = not isinstance(value, dict) or not value or path.endswith(".labels")
        found += [path] if whole else leaves(value, f"{path}.")
    return found


VALUES = {chart: yaml.safe_load((HELM / chart / "values.yaml").read_text()) for chart in CHARTS}
EVERY = [pytest.param(chart, path, id=f"{chart}-{path}") for chart in CHARTS for path in leaves(VALUES[chart])]


def other(path: str, present: Any) -> Any:
    """Another valid value."""
    last = path.rpartition(".")[2]
    for name in (path, path.removeprefix("cli."), last, {"from": "peers", "to": "peers"}.get(last, "")):
        if name in CHOICES and CHOICES[name] != present:
            return CHOICES[name]
    if isinstance(present, bool):
        return not present
    return present + 1 if isinstance(present, int | float) else f"{present or ''}other"


@cache
def context(chart: str) -> dict[str, dict[str, Any]]:
    """The named installs as mappings, which together switch everything on."""
    return {path.stem: yaml.safe_load(path.read_text()) for path in sorted((HELM / chart / "ci").glob("*.yaml"))}


@pytest.mark.slow  # some hundred renders
@pytest.mark.parametrize(("chart", "path"), [case for case in EVERY if case.values[1] not in FILES])
def test_every_value_is_used(files: Files, chart: str, path: str, tmp_path: Path) -> None:
    compiled = HELM / chart / "files" / ("rules.yaml" if "rules" in path else "dashboards")
    if path.startswith(("metrics.rules", "metrics.dashboards")) and not compiled.exists():
        pytest.skip(f"{compiled.relative_to(HELM)} is not there")
    helm = helms()[0]
    for name, values in context(chart).items():
        before = HELM / chart / "ci" / f"{name}.yaml"
        changed = copy.deepcopy(values)
        place, default = changed, VALUES[chart]
        *above, last = path.split(".")
        for key in above:
            default = default[key]
            place = place.setdefault(key, {})
        place[last] = other(path, place.get(last, default[last]))
        after = tmp_path / f"{name}.yaml"
        after.write_text(yaml.safe_dump(changed))
        given = (*files.options(chart), *ALL_KINDS)
        done = template(helm, chart, f"--values={after}", *given)
        if done.returncode != 0:
            assert path.partition(".")[2] in done.stderr.decode(), done.stderr.decode()
            return
        if done.stdout != template(helm, chart, f"--values={before}", *given).stdout:
            return
    pytest.fail(f"{path} changes nothing in any named install")


@pytest.mark.parametrize("chart", CHARTS)
def test_every_file_is_used(files: Files, helm: str, chart: str, tmp_path: Path) -> None:
    minimal = f"--values={HELM / chart / 'ci/minimal.yaml'}"
    before = template(helm, chart, minimal, *files.options(chart)).stdout
    for key, path in files.of[chart].items():
        changed = tmp_path / "changed.yaml"
        changed.write_bytes(path.read_bytes() + b"# changed\n")
        done = template(helm, chart, minimal, *files.options(chart, **{key: changed}))
        assert done.returncode != 0 or done.stdout != before, key


@pytest.mark.parametrize("chart", CHARTS)
def test_a_typo_is_refused_by_name(files: Files, helm: str, chart: str) -> None:
    minimal = f"--values={HELM / chart / 'ci/minimal.yaml'}"
    for typo, word in (("metrics.monitor.enabld=true", "enabld"), ("resorces.cpu=2", "resorces")):
        done = template(helm, chart, minimal, *files.options(chart), f"--set={typo}")
        assert done.returncode != 0
        assert word in done.stderr.decode()


REFUSED = [
    ("keyshare", ["--set=config.id="], "config.id is empty"),
    ("keyshare", ["--set=config.id=alice"], "the charter lists no pod called alice (but ash"),
    ("keyshare", ["--set=config.aggregator=centre"], 'config.aggregator is "centre"'),
    ("keyshare", ["--set=config.proxy=proxy:3128"], "config.proxy is"),
    ("keyshare", ["--set=charter="], "charter is empty: add --set-file charter=charter.yaml"),
    ("keyshare", ["--set=pin="], "pin is empty: add --set-file pin=pin.yaml"),
    ("keyshare", ["--set=charterNext=other"], "charterNext has SHA-256"),
    ("keyshare", ["--set-json=metrics={\"monitor\":{\"enabled\":true}}"], "metrics.monitor.enabled needs metrics.from"),
    ("keyshare", ["--set=config.log_level=loud"], "log_level"),
    ("keyshare", ["--set=security.user=0"], "user"),
    ("keyshare", ["--set=resources.memory=lots"], "memory"),
    ("hospital-node", ["--set=config.id=ash"], "the charter lists no hospital called ash"),
    ("hospital-node", ["--set=config.id=bob"], "policy is the policy of alice, config.id is bob"),
    ("hospital-node", ["--set=policy="], "policy is empty: add --set-file policy=policy.yaml"),
    ("hospital-node", ["--set=data.existingClaim="], "data.existingClaim is empty"),
    ("hospital-node", ["--set=gpu.count=-1"], "count"),
    ("aggregator", ["--set=config.id=ash"], "the charter lists no aggregator called ash (but centre)"),
    ("aggregator", ["--set=plan.study="], "plan.study is empty: add --set-file plan.study=study.yaml"),
    ("aggregator", ["--set=plan.throughRound=-1"], "throughRound"),
    ("aggregator", ["--set=service.type=Ingress"], "type"),
]  # fmt: skip


@pytest.mark.parametrize(("chart", "options", "sentence"), REFUSED, ids=[row[2][:40] for row in REFUSED])
def test_bad_input_is_refused_with_the_next_step(
    files: Files, helm: str, chart: str, options: list[str], sentence: str
) -> None:
    given = [option for option in files.options(chart) if not any(clash(option, bad) for bad in options)]
    done = template(helm, chart, f"--values={HELM / chart / 'ci/minimal.yaml'}", *given, *options)
    assert done.returncode != 0
    assert sentence in done.stderr.decode()


def clash(option: str, bad: str) -> bool:
    """--set-file wins over --set, so the file is left out where the test sets the same value."""
    return option.split("=")[1] == bad.split("=")[1]


def test_another_charter_than_the_pinned_one_is_refused(files: Files, helm: str, tmp_path: Path) -> None:
    other_charter = tmp_path / "charter.yaml"
    other_charter.write_bytes(files.of["keyshare"]["charter"].read_bytes() + b"\n")
    done = template(
        helm,
        "keyshare",
        f"--values={HELM / 'keyshare/ci/minimal.yaml'}",
        *files.options("keyshare", charter=other_charter),
    )
    digest = hashlib.sha256(other_charter.read_bytes()).hexdigest()
    assert done.returncode != 0
    assert f"charter has SHA-256 {digest}, pin.current is" in done.stderr.decode()


def test_a_study_too_large_for_a_pod_template_is_refused(files: Files, helm: str, tmp_path: Path) -> None:
    large = tmp_path / "study.yaml"
    large.write_bytes(files.of["aggregator"]["plan.study"].read_bytes() + b"#" * 200_000)
    options = files.options("aggregator", **{"plan.study": large})
    done = template(helm, "aggregator", f"--values={HELM / 'aggregator/ci/minimal.yaml'}", *options)
    assert done.returncode != 0
    assert "at most 131072 travel with a pod template" in done.stderr.decode()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], [{"ports": [{"protocol": "TCP", "port": 443}]}]),
        (
            ["--set=networkPolicy.aggregator.cidrs={192.0.2.1/32}"],
            [{"ports": [{"protocol": "TCP", "port": 443}], "to": [{"ipBlock": {"cidr": "192.0.2.1/32"}}]}],
        ),
        (
            ["--set=networkPolicy.aggregator.namespace=centre"],
            [
                {
                    "ports": [{"protocol": "TCP", "port": 8443}],
                    "to": [
                        {
                            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "centre"}},
                            "podSelector": {
                                "matchLabels": {
                                    "app.kubernetes.io/name": "aggregator",
                                    "app.kubernetes.io/component": "service",
                                }
                            },
                        }
                    ],
                }
            ],
        ),
        (["--set=config.proxy=http://proxy:3128"], [{"ports": [{"protocol": "TCP", "port": 3128}]}]),
    ],
    ids=["by-port", "by-cidr", "same-cluster", "proxy"],
)
@pytest.mark.parametrize("chart", ["hospital-node", "keyshare"])
def test_a_dialling_site_reaches_names_and_the_aggregator_only(
    files: Files, helm: str, chart: str, options: list[str], expected: list[dict[str, Any]]
) -> None:
    found = render(helm, chart, f"--values={HELM / chart / 'ci/minimal.yaml'}", *files.options(chart), *options)
    out = one(found, "NetworkPolicy", f"{RELEASE}-out")["spec"]["egress"]
    assert out[1:] == expected
    assert {port["port"] for port in out[0]["ports"]} == {53}


def test_the_plan_is_inside_the_pod_template_and_documents_are_not(files: Files, helm: str, tmp_path: Path) -> None:
    """A new plan makes a revision; a new charter or policy restarts nothing."""
    minimal = {chart: f"--values={HELM / chart / 'ci/minimal.yaml'}" for chart in CHARTS}

    def pod(chart: str, *options: str, **given: Path) -> Any:
        found = render(helm, chart, minimal[chart], *files.options(chart, **given), *options)
        return one(found, "StatefulSet")["spec"]["template"]

    study = tmp_path / "study.yaml"
    study.write_bytes(files.of["aggregator"]["plan.study"].read_bytes() + b"\n")
    before = pod("aggregator")
    assert pod("aggregator", **{"plan.study": study}) != before
    assert pod("aggregator", "--set=plan.throughRound=7") != before
    following, pin = tmp_path / "next.yaml", tmp_path / "pin.yaml"
    following.write_bytes(files.of["keyshare"]["charter"].read_bytes() + b"# next\n")
    digest = hashlib.sha256(following.read_bytes()).hexdigest()
    for chart in CHARTS:
        pin.write_bytes(files.of[chart]["pin"].read_bytes() + f'next: "{digest}"\n'.encode())
        assert pod(chart, charterNext=following, pin=pin) == pod(chart)
    policy = tmp_path / "policy.yaml"
    policy.write_bytes(files.of["hospital-node"]["policy"].read_bytes() + b"# again\n")
    assert pod("hospital-node", policy=policy) == pod("hospital-node")


def test_history_shows_name_digest_and_target(files: Files, helm: str) -> None:
    values = f"--values={HELM / 'aggregator/ci/exposed.yaml'}"
    found = render(helm, "aggregator", values, *files.options("aggregator"))
    digest = hashlib.sha256(files.of["aggregator"]["plan.study"].read_bytes()).hexdigest()
    name = yaml.safe_load(files.of["aggregator"]["plan.study"].read_bytes())["name"]
    cause = one(found, "StatefulSet")["metadata"]["annotations"]["kubernetes.io/change-cause"]
    assert cause == f"study {name} ({digest[:12]}) through round 20"


def test_a_gpu_brings_its_image_device_class_and_limit(files: Files, helm: str) -> None:
    values = f"--values={HELM / 'hospital-node/ci/gpu.yaml'}"
    found = render(helm, "hospital-node", values, *files.options("hospital-node"))
    pod = one(found, "StatefulSet")["spec"]["template"]["spec"]
    assert pod["runtimeClassName"] == "nvidia"
    assert pod["containers"][0]["image"].endswith("-cuda")
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
    config = yaml.safe_load(one(found, "ConfigMap", f"{RELEASE}-config")["data"]["config.yaml"])
    assert (config["device"], config["threads"]) == ("cuda", 4)


@pytest.mark.parametrize(("cpu", "threads"), [("500m", 1), ("1500m", 2), ("3", 3), ("2.5", 3)])
def test_training_starts_as_many_threads_as_it_has_cores(files: Files, helm: str, cpu: str, threads: int) -> None:
    values = f"--values={HELM / 'hospital-node/ci/minimal.yaml'}"
    found = render(helm, "hospital-node", values, *files.options("hospital-node"), f"--set=resources.cpu={cpu}")
    assert yaml.safe_load(one(found, "ConfigMap", f"{RELEASE}-config")["data"]["config.yaml"])["threads"] == threads

"""What of the charts is made, not written: `make charts`; a test proves it fresh.

- templates/: the shared templates, copied from common/ so that a chart holds all that its site installs;
- values.schema.json: the service's own configuration model and the models below, with the comments of values.yaml;
- README.md: the table of values, between its two marks.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, create_model
from pydantic.alias_generators import to_camel
from ruamel.yaml import YAML

from services.aggregator.config import Config as AggregatorConfig
from services.common.documents.site import DialingConfig, SiteConfig
from services.hospital_node.config import HospitalConfig

HELM = Path(__file__).parent
SHARED: tuple[str, ...] = (
    "_wardround.tpl",
    "statefulset.yaml",
    "configmap.yaml",
    "pdb.yaml",
    "certificate.yaml",
    "networkpolicy.yaml",
)
SHARED = (*SHARED, "monitoring.yaml", "tests/check.yaml")
DIALING = ("_dialing.tpl", "networkpolicy-out.yaml")
COMMON = {"aggregator": SHARED, "hospital-node": (*SHARED, *DIALING), "keyshare": (*SHARED, *DIALING)}
# What the templates mount or decide themselves; every other field of a configuration is a value under `config`.
PLACED = frozenset(
    {"charters", "pins", "identity_key", "tls", "state", "http", "admin_socket", "listen", "study", "through_round"}
    | {"initial_model", "charter_signatures", "policy", "data", "backbones"}
)
BEGIN, END = "<!-- values: made by `make charts` -->", "<!-- end of values -->"


class Values(BaseModel):
    """A mapping of values: camelCase as Helm's users write it, nothing unknown."""

    model_config = ConfigDict(alias_generator=to_camel, extra="forbid")


class Amounts(Values):
    """Requests and limits alike."""

    cpu: int | float | str = Field(pattern=r"^([1-9][0-9]*m|[0-9]+(\.[0-9]+)?)$")
    memory: str = Field(pattern=r"^[1-9][0-9]*([KMGT]i?)?$")
    ephemeral_storage: str = Field(pattern=r"^[1-9][0-9]*([KMGT]i?)?$")


class Image(Values):
    """One image."""

    repository: str = Field(min_length=1)
    tag: str
    digest: str = Field(pattern="^(sha256:[0-9a-f]{64})?$")
    pull_policy: Literal["IfNotPresent", "Always", "Never"]


class Cli(Values):
    """The command's image and amounts."""

    image: Image
    resources: Amounts


class NamedSecret(Values):
    """A reference."""

    name: str = Field(min_length=1)


class Toleration(Values):
    """As Kubernetes has it."""

    key: str | None = None
    operator: Literal["Exists", "Equal"] | None = None
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    toleration_seconds: int | None = None


class Expression(Values):
    """One matchExpressions entry."""

    key: str
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    values: list[str] | None = None


class Selector(Values):
    """A label selector."""

    match_labels: dict[str, str] | None = None
    match_expressions: list[Expression] | None = None


class IpBlock(Values):
    """Addresses."""

    cidr: str
    except_: list[str] | None = Field(default=None, alias="except")


class Peer(Values):
    """A NetworkPolicy peer."""

    pod_selector: Selector | None = None
    namespace_selector: Selector | None = None
    ip_block: IpBlock | None = None


class IssuerRef(Values):
    """cert-manager's."""

    name: str
    kind: Literal["Issuer", "ClusterIssuer"]
    group: str


class CertManager(Values):
    """The leaf's issuing."""

    enabled: bool
    issuer_ref: IssuerRef
    duration: str = Field(pattern="^([0-9]+h)?([0-9]+m)?([0-9]+s)?$")
    renew_before: str = Field(pattern="^([0-9]+h)?([0-9]+m)?([0-9]+s)?$")


class Tls(Values):
    """TLS."""

    cert_manager: CertManager


class Security(Values):
    """Who the process is."""

    user: int | None = Field(default=None, ge=1, le=2**31 - 1)
    groups: list[int]


class Claim(Values):
    """A volume of the release's own."""

    size: str = Field(pattern=r"^[1-9][0-9]*([KMGT]i?)?$")
    storage_class_name: str


class Budget(Values):
    """The disruption budget."""

    block_drains: bool


class Peers(Values):
    """Peers under `from`."""

    from_: list[Peer] = Field(alias="from")


class Targets(Values):
    """Peers under `to`."""

    to: list[Peer]


class Dns(Targets):
    """The cluster's DNS."""

    port: int = Field(ge=1, le=65535)


class Reach(Values):
    """Where the aggregator is."""

    namespace: str
    cidrs: list[str]


class Outward(Values):
    """The network policy of a role that only dials out."""

    enabled: bool
    dns: Dns
    aggregator: Reach
    proxy: Targets


class Inward(Values):
    """The network policy of the aggregator."""

    enabled: bool
    clients: Peers


class Monitor(Values):
    """The PodMonitor."""

    enabled: bool
    interval: str = Field(pattern="^[0-9]+(ms|s|m|h)$")
    labels: dict[str, str]


class Labelled(Values):
    """Something that is switched on and found by labels."""

    enabled: bool
    labels: dict[str, str]


class Rules(Labelled):
    """The alert rules."""

    runbooks: str = Field(pattern="^(https?://.+/)?$")


class Metrics(Values):
    """What Prometheus and Grafana get."""

    from_: list[Peer] = Field(alias="from")
    monitor: Monitor
    rules: Rules
    dashboards: Labelled


class Chart(Values):
    """What all three have."""

    charter: str
    charter_next: str
    pin: str
    secret_name: str
    tls: Tls
    image: Image
    image_pull_secrets: list[NamedSecret]
    cli: Cli
    resources: Amounts
    node_selector: dict[str, str]
    tolerations: list[Toleration]
    security: Security
    state: Claim
    pdb: Budget
    metrics: Metrics
    global_: dict[str, Any] | None = Field(default=None, alias="global")  # Helm adds it below a parent chart


class Plan(Values):
    """What an operator rolls out."""

    study: str
    through_round: int = Field(ge=0, le=10**6)


class Service(Values):
    """The one way in for others."""

    type: Literal["ClusterIP", "NodePort", "LoadBalancer"]
    port: int = Field(ge=1, le=65535)
    annotations: dict[str, str]
    node_port: int = Field(ge=0, le=65535)
    external_traffic_policy: Literal["Cluster", "Local"]
    load_balancer_source_ranges: list[str]


class Existing(Values):
    """A claim that somebody else made."""

    existing_claim: str


class Data(Existing):
    """The images."""

    sub_path: str


class Gpu(Values):
    """Accelerators."""

    count: int = Field(ge=0, le=64)
    resource: str = Field(min_length=1)
    runtime_class_name: str


class Aggregator(Chart):
    """deploy/helm/aggregator"""

    charter_signatures: str
    plan: Plan
    service: Service
    network_policy: Inward


class KeyShare(Chart):
    """deploy/helm/keyshare"""

    network_policy: Outward


class HospitalNode(KeyShare):
    """deploy/helm/hospital-node"""

    policy: str
    data: Data
    backbones: Existing
    gpu: Gpu


MODELS: dict[str, tuple[type[Chart], type[SiteConfig]]] = {
    "aggregator": (Aggregator, AggregatorConfig),
    "hospital-node": (HospitalNode, HospitalConfig),
    "keyshare": (KeyShare, DialingConfig),
}


def schema(chart: str) -> str:
    """values.schema.json of one chart."""
    values, service = MODELS[chart]
    fields: dict[str, Any] = {}
    for name, field in service.model_fields.items():
        if name not in PLACED:
            # An empty text stands for "none": Helm takes a null in a values file for "no such key".
            fields[name] = (str if type(None) in get_args(field.annotation) else field.annotation, field)
    config = create_model("Config", __config__=ConfigDict(extra="forbid"), **fields)
    whole = create_model(values.__name__, __base__=values, config=(config, ...))
    found = whole.model_json_schema()
    comments = {row[0]: row[2] for row in rows(chart)}
    _describe(found, found, "", comments)
    ordered = {"$schema": "http://json-schema.org/draft-07/schema#", **_inlined(found, found["$defs"])}
    ordered.pop("$defs")
    return json.dumps(ordered, indent=2, ensure_ascii=False) + "\n"


def _inlined(node: Any, definitions: dict[str, Any]) -> Any:
    """`node` without references: every place has its own description, and each Helm reads them alike."""
    if isinstance(node, list):
        return [_inlined(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        target = definitions[node["$ref"].rpartition("/")[2]]
        return _inlined({**target, **{key: value for key, value in node.items() if key != "$ref"}}, definitions)
    kept = {key: value for key, value in node.items() if key not in ("title", "default") or isinstance(value, dict)}
    return {key: _inlined(value, definitions) for key, value in kept.items()}


def _describe(node: dict[str, Any], whole: dict[str, Any], path: str, comments: dict[str, str]) -> None:
    """Descriptions from values.yaml in place of the classes'."""
    if "$ref" in node:
        node.update(whole["$defs"][node.pop("$ref").rpartition("/")[2]])
    node.pop("description", None)
    if path in comments:
        node["description"] = comments[path]
    node["properties"] = {key: dict(value) for key, value in node.get("properties", {}).items()}
    for key, value in node["properties"].items():
        _describe(value, whole, f"{path}.{key}".lstrip("."), comments)
    if not node["properties"]:
        del node["properties"]


def rows(chart: str) -> list[tuple[str, str, str]]:
    """(path, default, comment) of every commented value, in the file's order."""
    text = (HELM / chart / "values.yaml").read_text()
    defaults = YAML(typ="safe", pure=True).load(text)
    found, path, comment = [], [], []  # type: ignore[var-annotated]  # three lists of one kind each
    for line in text.splitlines():
        if match := re.match(r"( *)# (.*)", line):
            comment.append(match[2])
        elif (match := re.match(r"( *)([A-Za-z_]+):", line)) and (comment or match):
            path[len(match[1]) // 2 :] = [match[2]]
            if comment:
                value = defaults
                for key in path:
                    value = value[key]
                shown = "" if isinstance(value, dict) and "{" not in line else f"`{json.dumps(value)}`"
                found.append((".".join(path), shown, " ".join(comment)))
            comment = []
        else:
            comment = []
    return found


def readme(chart: str) -> str:
    """README.md with its table made anew."""
    text = (HELM / chart / "README.md").read_text()
    lines = ["| value | default | meaning |", "|---|---|---|"]
    lines += [f"| `{path}` | {default} | {comment} |" for path, default, comment in rows(chart)]
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return "\n".join([f"{before}{BEGIN}", *lines, f"{END}{after}"])


def made() -> dict[Path, str]:
    """Every made file with its content."""
    files: dict[Path, str] = {}
    for chart, names in COMMON.items():
        for name in names:
            files[HELM / chart / "templates" / name] = (HELM / "common" / name).read_text()
        files[HELM / chart / "values.schema.json"] = schema(chart)
        files[HELM / chart / "README.md"] = readme(chart)
    return files


def main() -> int:
    """Write what is not fresh; with --check only name it (exit code 1)."""
    stale = {path: text for path, text in made().items() if not path.exists() or path.read_text() != text}
    for path, text in stale.items():
        print(f"{path.relative_to(HELM.parent.parent)}: {'stale' if '--check' in sys.argv else 'made'}")
        if "--check" not in sys.argv:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return int(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())

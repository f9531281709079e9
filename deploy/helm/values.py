"""The values of the three charts as models, beside what each service's own configuration says."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel


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

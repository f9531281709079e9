"""What a site gives to its own cluster: the Secret with its keys, and the chart's values that it begins with."""

import json
from base64 import b64encode
from pathlib import Path

from services.common.ids import Role

MANIFEST, VALUES = "secret.yaml", "site.yaml"
KEYS = ("identity.pem", "tls.pem", "tls-key.pem")
"""The Secret's keys, as the charts mount them: files of `site init`."""

CHARTS = {Role.HOSPITAL: "hospital-node", Role.POD: "keyshare", Role.AGGREGATOR: "aggregator"}
_FILES = {Role.HOSPITAL: ("policy",), Role.POD: (), Role.AGGREGATOR: ("charterSignatures", "plan.study")}


def secret_name(id: str) -> str:
    """The Secret's name."""
    return f"wardround-{id}"


def secret_manifest(id: str, files: dict[str, bytes]) -> bytes:
    """The Secret of site `id`; `files` by the names of `site init`. No namespace: `kubectl apply -n` says it."""
    lines = [
        "# As secret as identity.pem. kubectl apply -n NAMESPACE -f secret.yaml; again after `wardround site renew`.",
        "apiVersion: v1",
        "kind: Secret",
        "type: Opaque",
        "metadata:",
        f"  name: {secret_name(id)}",
        "  labels:",
        "    app.kubernetes.io/part-of: wardround",
        "data:",
        *(f"  {key}: {b64encode(files[key]).decode()}" for key in KEYS),
    ]
    return ("\n".join(lines) + "\n").encode()


def renewed_secret(folder: Path, id: str, fresh: dict[str, bytes]) -> bytes:
    """The Secret again, with the `fresh` files in place of those in `folder`."""
    return secret_manifest(id, {key: fresh.get(key) or (folder / key).read_bytes() for key in KEYS})


def site_values(role: Role, id: str, aggregator: str) -> bytes:
    """The chart's values of site `id`; what only the site knows is left empty, and the chart asks for it."""
    documents = "".join(f" --set-file {key}={_file_of(key)}" for key in ("charter", "pin", *_FILES[role]))
    lines = [
        f"# helm install {id} deploy/helm/{CHARTS[role]} -n NAMESPACE -f site.yaml{documents}",
        "config:",
        f"  id: {json.dumps(id)}",
    ]
    if role is not Role.AGGREGATOR:
        lines.append(f"  aggregator: {json.dumps(aggregator)}  # host:port")
    lines.append(f"secretName: {secret_name(id)}  # kubectl apply -n NAMESPACE -f secret.yaml")
    if role is Role.HOSPITAL:
        lines += ["data:", '  existingClaim: ""  # the claim with metadata.csv and the images']
    return ("\n".join(lines) + "\n").encode()


def _file_of(value: str) -> str:
    return {"charterSignatures": "charter.signatures.yaml", "plan.study": "study.yaml"}.get(value, f"{value}.yaml")

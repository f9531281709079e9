"""What a site gives to its own cluster: the Secret with its keys, as text that `kubectl apply` takes."""

from base64 import b64encode
from pathlib import Path

MANIFEST = "secret.yaml"
KEYS = {"identity.pem": "identity.pem", "tls.crt": "tls.pem", "tls.key": "tls-key.pem"}
"""The Secret's keys, as the charts mount them, and the files of `site init` that they hold."""


def secret_name(id: str) -> str:
    """The Secret's name, which the charts take as their default."""
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
        *(f"  {key}: {b64encode(files[file]).decode()}" for key, file in KEYS.items()),
    ]
    return ("\n".join(lines) + "\n").encode()


def renewed_secret(folder: Path, id: str, fresh: dict[str, bytes]) -> bytes:
    """The Secret again, with the `fresh` files in place of those in `folder`."""
    return secret_manifest(id, {file: fresh.get(file) or (folder / file).read_bytes() for file in KEYS.values()})

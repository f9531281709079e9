"""What of the charts is made, not written: `make charts`; a test proves it fresh.

- templates/: the shared templates, copied from common/ so that a chart holds all that its site installs;
- values.schema.json: the service's own configuration model and those of values.py, with the comments of values.yaml;
- README.md: the table of values, between its two marks.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any, get_args

from pydantic import ConfigDict, create_model
from ruamel.yaml import YAML

from deploy.helm.values import Aggregator, Chart, HospitalNode, KeyShare
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
    "monitoring.yaml",
    "tests/check.yaml",
)
DIALING = ("_dialing.tpl", "networkpolicy-out.yaml")
COMMON = {"aggregator": SHARED, "hospital-node": (*SHARED, *DIALING), "keyshare": (*SHARED, *DIALING)}
# What the templates mount or decide themselves; every other field of a configuration is a value under `config`.
PLACED = frozenset(
    {"charters", "pins", "identity_key", "tls", "state", "http", "admin_socket", "listen", "study", "through_round"}
    | {"initial_model", "charter_signatures", "policy", "data", "backbones"}
)
BEGIN, END = "<!-- values: made by `make charts` -->", "<!-- end of values -->"
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

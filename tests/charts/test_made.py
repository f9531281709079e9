"""What is generated is fresh, and says what the services' own models say."""

import json
import tomllib
from typing import Any

import jsonschema
import pytest
import yaml

from deploy.helm import generate
from tests.support.charts import CHARTS, HELM, INSTALLS, ROOT


def test_generated_files_are_fresh() -> None:
    stale = [str(path) for path, text in generate.made().items() if not path.exists() or path.read_text() != text]
    assert not stale, f"run `make charts`: {stale}"


@pytest.mark.parametrize("chart", CHARTS)
def test_version_is_the_distributions(chart: str) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    described = yaml.safe_load((HELM / chart / "Chart.yaml").read_text())
    assert (described["version"], described["appVersion"]) == (version, version)
    assert "kubeVersion" not in described, "`helm template` without a cluster may claim an old version"


@pytest.mark.parametrize("chart", CHARTS)
def test_every_field_of_the_configuration_is_a_value_or_placed(chart: str) -> None:
    _, config = generate.MODELS[chart]
    values = yaml.safe_load((HELM / chart / "values.yaml").read_text())["config"]
    assert set(values) | (set(config.model_fields) & generate.PLACED) == set(config.model_fields)
    assert not set(values) & generate.PLACED


@pytest.mark.parametrize("chart", CHARTS)
def test_defaults_are_the_services_own(chart: str) -> None:
    _, config = generate.MODELS[chart]
    values = yaml.safe_load((HELM / chart / "values.yaml").read_text())["config"]
    for name, value in values.items():
        field = config.model_fields[name]
        if not field.is_required():
            assert value == ("" if field.default is None else field.default), name


@pytest.mark.parametrize("chart", CHARTS)
def test_every_value_has_a_comment(chart: str) -> None:
    values = yaml.safe_load((HELM / chart / "values.yaml").read_text())
    commented = {path for path, _, _ in generate.rows(chart)}
    missing = [path for path in leaves(values) if not any(path == c or path.startswith(f"{c}.") for c in commented)]
    assert not missing


@pytest.mark.parametrize("chart", CHARTS)
def test_a_typo_is_refused_at_every_depth(chart: str) -> None:
    schema = json.loads((HELM / chart / "values.schema.json").read_text())
    values = yaml.safe_load((HELM / chart / "values.yaml").read_text())
    validator = jsonschema.Draft7Validator(schema)
    assert validator.is_valid(values)
    for path in ["", *mappings(values)]:
        mutated = json.loads(json.dumps(values))
        place = mutated
        for key in filter(None, path.split(".")):
            place = place[key]
        place["throughRuond"] = 1  # in a mapping of free labels it is refused for being a number
        assert not validator.is_valid(mutated), path or "top level"


@pytest.mark.parametrize(("chart", "values"), INSTALLS)
def test_named_installs_fit_the_schema(chart: str, values: Any) -> None:
    schema = json.loads((HELM / chart / "values.schema.json").read_text())
    merged = merge(yaml.safe_load((HELM / chart / "values.yaml").read_text()), yaml.safe_load(values.read_text()))
    jsonschema.Draft7Validator(schema).validate(merged)


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """As Helm merges: mappings by key, a null takes a key away."""
    merged = dict(below)
    for key, value in above.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def leaves(values: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in values.items():
        path = f"{prefix}{key}"
        found += leaves(value, f"{path}.") if isinstance(value, dict) and value else [path]
    return found


def mappings(values: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in values.items():
        if isinstance(value, dict):
            found += [f"{prefix}{key}", *mappings(value, f"{prefix}{key}.")]
    return found

"""Any single unknown key, anywhere in any document, is refused by its path, with the nearest valid key."""

import copy
import difflib
import io
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from services.common.documents.pin import Pin
from services.common.documents.strict import Section, load
from services.common.errors import ServiceError
from tests.support.documents import make_documents, make_policy, make_study

_STUDY = make_study()
_KINDS: list[Section] = [
    make_documents(pods=3, threshold=3, hospitals=("alice", "bob", "carol")).charter.document,
    _STUDY.document,
    make_policy("alice", _STUDY).document,
    Pin(wardround="pin/v1", current="ab" * 32),
]


def plain(value: Any) -> Any:
    """A section as lists and dicts, None left out."""
    if isinstance(value, Section):
        return {key: plain(getattr(value, key)) for key in type(value).model_fields if getattr(value, key) is not None}
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def mappings(data: Any, path: str = "") -> list[tuple[str, dict[str, Any]]]:
    """Every mapping in the document with its dotted path."""
    if isinstance(data, dict):
        inner = [m for key, value in data.items() for m in mappings(value, f"{path}.{key}" if path else key)]
        return [(path, data), *inner]
    if isinstance(data, list):
        return [m for i, value in enumerate(data) for m in mappings(value, f"{path}[{i}]")]
    return []


def at(document: Section, path: str) -> Any:
    """By walking the object, not the annotations: an independent way to the same keys."""
    found: Any = document
    for part in path.replace("[", ".[").split(".") if path else []:
        if isinstance(found, dict):
            found = found[part]
        else:
            found = found[int(part[1:-1])] if part.startswith("[") else getattr(found, part)
    return found


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_unknown_key_is_refused_with_the_nearest(data: st.DataObject) -> None:
    document = _KINDS[data.draw(st.integers(0, len(_KINDS) - 1))]
    tree = copy.deepcopy(plain(document))
    # A table by hospital has the hospitals' ids as its keys: its list of keys is open.
    places = [(path, mapping) for path, mapping in mappings(tree) if isinstance(at(document, path), Section)]
    path, mapping = places[data.draw(st.integers(0, len(places) - 1))]
    valid = list(type(at(document, path)).model_fields)
    word = data.draw(
        st.one_of(
            st.from_regex(r"[a-z][a-z_]{0,12}", fullmatch=True),
            st.sampled_from(valid).map(lambda key: key[:-1] + "x"),
            st.sampled_from(valid).map(str.upper),
        ).filter(lambda key: key not in valid and key not in ("null", "true", "false"))
    )
    mapping[word] = data.draw(st.sampled_from([1, "x", None, [], {}]))
    out = io.BytesIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.representer.ignore_aliases = lambda _: True
    yaml.dump(tree, out)
    with pytest.raises(ServiceError) as caught:
        load(type(document), out.getvalue(), "file")
    prefix = f"{path}." if path else ""
    named = caught.value.detail.split("the nearest is ")[1].split(":")[0]
    assert f"the key {prefix}{word} is unknown" in caught.value.detail
    assert named.startswith(prefix)
    assert named.removeprefix(prefix) in valid
    near = {key: difflib.SequenceMatcher(None, key, word).ratio() for key in valid}
    assert near[named.removeprefix(prefix)] == max(near.values())

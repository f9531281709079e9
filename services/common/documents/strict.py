"""Strict documents: frozen models over exact bytes; whatever is not expected is a refusal.

`load` reads YAML 1.2 (so 1e-5 is a number) without anchors, aliases, tags or duplicate keys, never turns
one type into another, and says in ONE sentence what is wrong, at which line, and what to do.
Not here: meaning across fields (charter.py, shape.py), signatures, files.
"""

import datetime
import difflib
import types
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from services.common.errors import Reason, ServiceError

MAX_DOCUMENT_BYTES = 2**20

_TAG = "tag:yaml.org,2002:"
_SCALARS = {_TAG + kind for kind in ("str", "int", "float", "bool", "null", "timestamp")}
_Path = tuple[str | int, ...]


class Section(BaseModel):
    """A part of a document. Unknown keys are refused, values never change after loading."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _read_paths(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML has no paths: a text where a field is a Path. Nothing else changes its type."""
        return _with_paths(cls.model_fields[info.field_name or ""].annotation, value)


class Document(Section):
    """A whole file; `wardround` names its kind and version."""


T = TypeVar("T", bound=Section)


def load(cls: type[T], blob: bytes, name: str) -> T:
    """Parse the exact bytes of the file called `name` as `cls`. Raises INVALID_DOCUMENT, one sentence."""
    data, lines = _parse(blob, name)
    if not isinstance(data, dict):
        raise _refusal(name, lines.get(()), f"must be a mapping of keys to values ({', '.join(cls.model_fields)})")
    _check_kind(cls, data, name, lines)
    try:
        return cls.model_validate(data, strict=True)
    except ValidationError as error:
        raise _translate(cls, error, name, lines) from None


def refuse(name: str, sentence: str) -> ServiceError:
    """An INVALID_DOCUMENT about the file `name`, for rules across fields."""
    return ServiceError(Reason.INVALID_DOCUMENT, f"{name}: {sentence}")


def hex_bytes(text: str, size: int, name: str, path: str) -> bytes:
    """The `size` bytes that `text` spells in lower-case hex. Raises INVALID_DOCUMENT naming `path`."""
    if len(text) != 2 * size or any(c not in "0123456789abcdef" for c in text):
        raise refuse(name, f"{path} must be exactly {2 * size} lower-case hex digits, got {_shown(text)}")
    return bytes.fromhex(text)


def peek(blob: bytes, name: str) -> dict[str, Any]:
    """The top level of a document whose kind is not known yet, unchecked. Raises INVALID_DOCUMENT."""
    data, _ = _parse(blob, name)
    if not isinstance(data, dict):
        raise refuse(name, "must be a mapping of keys to values")
    return data


def _with_paths(annotation: Any, value: Any) -> Any:
    if isinstance(value, str) and (annotation is Path or Path in get_args(annotation)):
        return Path(value)
    if isinstance(value, tuple) and get_origin(annotation) is tuple:
        return tuple(_with_paths(get_args(annotation)[0], item) for item in value)
    return value


def _parse(blob: bytes, name: str) -> tuple[Any, dict[_Path, int]]:
    if len(blob) > MAX_DOCUMENT_BYTES:
        raise refuse(name, f"{len(blob)} bytes, at most {MAX_DOCUMENT_BYTES} are read: is it the right file?")
    try:
        text = blob.decode("utf-8")
    except UnicodeDecodeError as error:
        raise refuse(name, f"not UTF-8 at byte {error.start}: save it as UTF-8 text") from None
    if text.startswith("\ufeff"):
        raise refuse(name, "begins with a byte order mark: save it as UTF-8 without one")
    lines: dict[_Path, int] = {}
    yaml = YAML(typ="safe", pure=True)
    try:
        node = yaml.compose(text)
        return (None if node is None else _value(yaml, node, (), lines, name)), lines
    except DuplicateKeyError as error:
        raise _refusal(name, _line(error), "a key is written twice: keep one of them") from None
    except MarkedYAMLError as error:
        problem = (error.problem or error.context or "not readable").replace("\n", " ")
        raise _refusal(name, _line(error), f"is not YAML here ({problem}): check indentation and quotes") from None
    except RecursionError:
        raise refuse(name, "is nested too deeply: is it the right file?") from None
    except (YAMLError, ValueError) as error:
        reason = str(error).replace("\n", " ")[:120]
        raise refuse(name, f"is not YAML ({reason}): check quotes and control characters") from None


def _line(error: MarkedYAMLError) -> int | None:
    mark = error.problem_mark or error.context_mark
    return None if mark is None else int(mark.line) + 1


def _value(yaml: YAML, node: Node, path: _Path, lines: dict[_Path, int], name: str) -> Any:
    """The node as plain dict, tuple and scalars; `lines` gets the line of every path."""
    line = int(node.start_mark.line) + 1
    lines.setdefault(path, line)
    if node.anchor:
        raise _refusal(name, line, f"the anchor &{node.anchor} is not allowed: write the value out where it is needed")
    if isinstance(node, MappingNode) and node.tag == _TAG + "map":
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key_line = int(key_node.start_mark.line) + 1
            if key_node.tag != _TAG + "str" or not isinstance(key_node.value, str):
                raise _refusal(name, key_line, f"the key {_shown(key_node.value)} must be a plain word (quote it)")
            key = key_node.value
            if key in found:
                raise _refusal(name, key_line, f"the key {_dotted((*path, key))} is written twice: keep one of them")
            lines[(*path, key)] = key_line
            found[key] = _value(yaml, value_node, (*path, key), lines, name)
        return found
    if isinstance(node, SequenceNode) and node.tag == _TAG + "seq":
        return tuple(_value(yaml, item, (*path, i), lines, name) for i, item in enumerate(node.value))
    if isinstance(node, ScalarNode) and node.tag in _SCALARS:
        try:
            return yaml.constructor.construct_document(node)
        except (ValueError, OverflowError):
            raise _refusal(name, line, f"{_dotted(path)} cannot be read: quote it if it is a text") from None
    raise _refusal(name, line, f"the tag {node.tag} is not allowed: write plain text, numbers, lists and mappings")


def _check_kind(cls: type[Section], data: dict[str, Any], name: str, lines: dict[_Path, int]) -> None:
    """Another kind of document is named as such, not by the keys that it happens to lack."""
    field = cls.model_fields.get("wardround")
    if field is None:
        return
    wanted, found = get_args(field.annotation)[0], data.get("wardround")
    if found is None:
        raise _refusal(name, None, f"does not say what it is: begin it with `wardround: {wanted}`")
    if found != wanted:
        raise _refusal(name, lines.get(("wardround",)), f"is {_shown(found)}, but {wanted} is needed here")


def _translate(cls: type[Section], error: ValidationError, name: str, lines: dict[_Path, int]) -> ServiceError:
    """ONE sentence: an unknown key first (a misspelt one is missing as well), then wrong values, then missing ones."""
    order = {"extra_forbidden": 0, "missing": 2}
    first = min(error.errors(include_url=False), key=lambda problem: order.get(problem["type"], 1))
    path: _Path = first["loc"]
    line = next((lines[path[:n]] for n in range(len(path), -1, -1) if path[:n] in lines), None)
    return _refusal(name, line, _sentence(cls, path, first["type"], first["msg"], first))


def _sentence(cls: type[Section], path: _Path, kind: str, message: str, problem: Any) -> str:
    where = _dotted(path)
    if kind == "extra_forbidden":
        valid = list(_section_at(cls, path[:-1]).model_fields)
        nearest = difflib.get_close_matches(str(path[-1]), valid, n=1, cutoff=0.0)[0]
        return f"the key {where} is unknown; the nearest is {_dotted((*path[:-1], nearest))}: rename or remove it"
    description = _description(cls, path)
    about = f" ({description})" if description else ""
    if kind == "missing":
        return f"{where} is missing: add it{about}"
    limit = message.removeprefix("Input should be ").removeprefix("Value should ")
    value = problem["input"]
    hint = ""
    if kind == "string_type" and isinstance(value, int | float | datetime.date):
        hint = ", in quotes"
    shown = "" if isinstance(value, dict | tuple) else f", got {_shown(value)}"
    return f"{where} must be {limit}{hint}{shown}{about}: correct it"


def _section_at(cls: type[Section], path: _Path) -> type[Section]:
    """The section whose keys stand at `path`."""
    found: Any = cls
    for step in path:
        if isinstance(step, int):
            continue
        found = next(iter(_sections(found.model_fields[step].annotation)))
    section: type[Section] = found
    return section


def _sections(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    if get_origin(annotation) in (tuple, Union, types.UnionType):
        return [section for inner in get_args(annotation) for section in _sections(inner)]
    return []


def _description(cls: type[Section], path: _Path) -> str | None:
    names = [step for step in path if isinstance(step, str)]
    if not names:
        return None
    section: Any = cls
    for step in names[:-1]:
        inner = _sections(section.model_fields[step].annotation) if step in section.model_fields else []
        if not inner:
            return None
        section = inner[0]
    field = section.model_fields.get(names[-1])
    return None if field is None else field.description


def _refusal(name: str, line: int | None, sentence: str) -> ServiceError:
    where = name if line is None else f"{name} line {line}"
    return ServiceError(Reason.INVALID_DOCUMENT, f"{where}: {sentence}")


def _dotted(path: _Path) -> str:
    out = ""
    for step in path:
        out += f"[{step}]" if isinstance(step, int) else f".{step}" if out else step
    return out or "the document"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

"""Facts as JSON and back, by what their classes declare: dataclasses and named tuples of bytes, text and numbers.

Bytes stand in hex, a record inside a record as an object, a tuple as a list. What the classes say is the schema: a
record of another kind or shape was written by another version.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from services.common.errors import Reason, ServiceError
from services.common.store.database import NEW_STORE

T = TypeVar("T")
_known: dict[type[Any], dict[str, Any]] = {}


def to_json(fact: object) -> tuple[str, dict[str, Any]]:
    """(kind, payload): the class' name and its fields."""
    return type(fact).__name__, {name: _plain(getattr(fact, name)) for name in _hints(type(fact))}


def from_json(kinds: Mapping[str, type[T]], kind: str, payload: Mapping[str, Any]) -> T:
    """The fact again; `kinds` by name. Raises UNKNOWN_SCHEMA."""
    cls = kinds.get(kind)
    if cls is None:
        raise _another_build(f"event {kind!r} is not known here")
    try:
        return _record(cls, payload)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _another_build(f"event {kind} has another shape than here") from error


def _another_build(what: str) -> ServiceError:
    return ServiceError(
        Reason.UNKNOWN_SCHEMA,
        f"{what}: a newer service wrote the store, then upgrade this one, or a build from before the first release, "
        f"then {NEW_STORE}",
    )


def _hints(cls: type[Any]) -> dict[str, Any]:
    """Field to type, in order; empty for what is no record. Read off the class once."""
    if cls not in _known:
        record = dataclasses.is_dataclass(cls) or hasattr(cls, "_fields")
        _known[cls] = typing.get_type_hints(cls) if record else {}
    return _known[cls]


def _record(cls: type[T], payload: Mapping[str, Any]) -> T:
    hints = _hints(cls)
    return cls(**{name: _typed(hints[name], value) for name, value in payload.items()})


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if names := _hints(type(value)):
        return {name: _plain(getattr(value, name)) for name in names}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _typed(hint: Any, value: Any) -> Any:
    if hint is bytes:
        return bytes.fromhex(value)
    if isinstance(hint, types.GenericAlias):
        arguments = typing.get_args(hint)
        if arguments[-1] is Ellipsis:
            return tuple(_typed(arguments[0], item) for item in value)
        return tuple(_typed(part, item) for part, item in zip(arguments, value, strict=True))
    return _record(hint, value) if isinstance(hint, type) and _hints(hint) else value

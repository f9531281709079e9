"""A strict codec for the blobs that are signed or hashed (protocol.md P-3, §10).

The bytes are ordinary protobuf (the schema is protos/wardround/protocol/v1/protocol.proto), but only
ONE encoding of a message is accepted: fields ascending, no unknown field, no repeated singular field,
no explicit zero, shortest varints, no trailing byte, exact lengths. Protobuf's own parser merges
repeats and keeps unknown fields silently, so it never sees a blob here.

A message is a frozen dataclass whose fields are declared with `u`, `raw`, `data`, `text`, `ident`,
`nested`, `many`; `encode` and `decode` do the rest.
Not here: signatures (`signing`), meaning (`certificate`, `custody`).
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

from services.common.errors import Reason, ServiceError
from services.common.ids import check_id

T = TypeVar("T")

_VARINT, _LENGTH = 0, 2
_classes: dict[type, dict[int, tuple[str, "_Kind"]]] = {}


@dataclass(frozen=True)
class _Kind:
    """How one field travels. `size` is exact when set, `maximum` bounds a value or a length."""

    tag: int
    form: str  # u | bytes | text | ident | message
    maximum: int
    size: int | None = None
    message: type | None = None
    repeated: bool = False


def u(tag: int, maximum: int = 2**64 - 1) -> Any:
    """An unsigned integer 0..maximum."""
    return dataclasses.field(metadata={"kind": _Kind(tag, "u", maximum)})


def raw(tag: int, size: int) -> Any:
    """Exactly `size` bytes."""
    return dataclasses.field(metadata={"kind": _Kind(tag, "bytes", size, size)})


def data(tag: int, maximum: int, secret: bool = False) -> Any:
    """0..maximum bytes; `secret` keeps them out of the repr."""
    return dataclasses.field(metadata={"kind": _Kind(tag, "bytes", maximum)}, repr=not secret)


def text(tag: int, maximum: int) -> Any:
    """UTF-8 of 0..maximum bytes."""
    return dataclasses.field(metadata={"kind": _Kind(tag, "text", maximum)})


def ident(tag: int) -> Any:
    """A DNS label: the id of a member."""
    return dataclasses.field(metadata={"kind": _Kind(tag, "ident", 63)})


def nested(tag: int, message: type) -> Any:
    """One message, always present."""
    return dataclasses.field(metadata={"kind": _Kind(tag, "message", 2**31, message=message)})


def many(tag: int, message: type | None = None, *, size: int | None = None, maximum: int = 4096) -> Any:
    """A list of at most `maximum` messages, or of byte strings of exactly `size`."""
    if message is not None:
        kind = _Kind(tag, "message", maximum, message=message, repeated=True)
    else:
        kind = _Kind(tag, "bytes", maximum, size, repeated=True)
    return dataclasses.field(metadata={"kind": kind})


def encode(message: Any) -> bytes:
    """The one encoding of `message`. Raises MALFORMED where a field is out of its declared limits."""
    out = bytearray()
    for name, kind in _by_tag(type(message)).values():
        value = getattr(message, name)
        if kind.repeated:
            if len(value) > kind.maximum:
                raise _malformed(message, name, f"more than {kind.maximum} entries")
            for item in value:
                _append(out, kind.tag, _payload(message, name, kind, item))
        elif kind.form == "u":
            if not isinstance(value, int) or not 0 <= value <= kind.maximum:
                raise _malformed(message, name, f"not an integer in 0..{kind.maximum}")
            if value:
                out += _varint(kind.tag << 3 | _VARINT) + _varint(value)
        else:
            payload = _payload(message, name, kind, value)
            if payload or kind.form == "message":
                _append(out, kind.tag, payload)
    return bytes(out)


def decode(cls: type[T], blob: bytes) -> T:
    """Parse `blob` as `cls`. Raises MALFORMED for anything but the one encoding of a valid message."""
    kinds = _by_tag(cls)
    values: dict[str, Any] = {}
    position, last = 0, 0
    while position < len(blob):
        key, position = _read_varint(cls, blob, position)
        tag, wire = key >> 3, key & 7
        if tag not in kinds:
            raise _malformed(cls, f"field {tag}", "unknown")
        name, kind = kinds[tag]
        if tag < last or (tag == last and not kind.repeated):
            raise _malformed(cls, name, "repeated or out of order")
        last = tag
        if wire != (_VARINT if kind.form == "u" else _LENGTH):
            raise _malformed(cls, name, "wrong wire type")
        number, position = _read_varint(cls, blob, position)
        if kind.form == "u":
            if not 0 < number <= kind.maximum:
                raise _malformed(cls, name, f"not in 1..{kind.maximum} (zero is left out)")
            values[name] = number
            continue
        if number > len(blob) - position:
            raise _malformed(cls, name, "truncated")
        value = _parse(cls, name, kind, bytes(blob[position : position + number]))
        position += number
        if kind.repeated:
            items = values.setdefault(name, [])
            if len(items) >= kind.maximum:
                raise _malformed(cls, name, f"more than {kind.maximum} entries")
            items.append(value)
        else:
            values[name] = value
    for name, kind in kinds.values():
        if kind.repeated:
            values[name] = tuple(values.get(name, ()))
        elif name not in values:
            if kind.form in ("message", "ident") or kind.size:
                raise _malformed(cls, name, "missing")
            values[name] = {"u": 0, "text": ""}.get(kind.form, b"")
    return cls(**values)


def peek_ident(cls: type, field: str, blob: bytes) -> str:
    """The id that `blob` claims in its ident `field`, to look up the key that must have signed it.

    Nothing else is looked at, and nothing may be believed before the signature verified: `decode` then
    reads the blob strictly. Raises MALFORMED where there is no such field or no id in it.
    """
    tag = next(tag for tag, (name, _) in _by_tag(cls).items() if name == field)
    position = 0
    while position < len(blob):
        key, position = _read_varint(cls, blob, position)
        number, position = _read_varint(cls, blob, position)
        if key == tag << 3 | _LENGTH:
            claimed = bytes(blob[position : position + number])
            return check_id(claimed.decode("ascii", "replace"), field)
        if key & 7 == _LENGTH:
            position += number
        elif key & 7 != _VARINT:
            break
    raise _malformed(cls, field, "missing")


def _by_tag(cls: type) -> dict[int, tuple[str, _Kind]]:
    """Tag to (name, kind), ascending by tag; read off the class once."""
    found = _classes.get(cls)
    if found is None:
        kinds = [(f.name, f.metadata["kind"]) for f in dataclasses.fields(cls)]
        found = _classes[cls] = {kind.tag: (name, kind) for name, kind in sorted(kinds, key=lambda item: item[1].tag)}
    return found


def _payload(message: Any, name: str, kind: _Kind, value: Any) -> bytes:
    if kind.form == "message":
        if not isinstance(value, kind.message or object):
            raise _malformed(message, name, "of another type")
        return encode(value)
    if kind.form == "ident":
        return check_id(value, name).encode()
    payload = value.encode() if kind.form == "text" else bytes(value)
    _check_length(message, name, kind, payload)
    return payload


def _parse(cls: type, name: str, kind: _Kind, payload: bytes) -> Any:
    if kind.message is not None:
        return decode(kind.message, payload)
    if not kind.repeated and not payload:
        raise _malformed(cls, name, "empty (an empty field is left out)")
    _check_length(cls, name, kind, payload)
    if kind.form == "bytes":
        return payload
    try:
        decoded = payload.decode()
    except UnicodeDecodeError as error:
        raise _malformed(cls, name, "not UTF-8") from error
    return check_id(decoded, name) if kind.form == "ident" else decoded


def _check_length(owner: Any, name: str, kind: _Kind, payload: bytes) -> None:
    if kind.size is not None and len(payload) != kind.size:
        raise _malformed(owner, name, f"{len(payload)} bytes, must be exactly {kind.size}")
    if kind.size is None and len(payload) > kind.maximum:
        raise _malformed(owner, name, f"{len(payload)} bytes, at most {kind.maximum}")


def _append(out: bytearray, tag: int, payload: bytes) -> None:
    out += _varint(tag << 3 | _LENGTH) + _varint(len(payload)) + payload


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _read_varint(cls: type, blob: bytes, position: int) -> tuple[int, int]:
    if position < len(blob) and blob[position] < 0x80:  # nearly every key and most lengths
        return blob[position], position + 1
    number = 0
    for count in range(10):
        if position >= len(blob):
            raise _malformed(cls, "varint", "truncated")
        byte = blob[position]
        position += 1
        number |= (byte & 0x7F) << (7 * count)
        if byte < 0x80:
            if (byte == 0 and count) or number >= 2**64:
                raise _malformed(cls, "varint", "not in its shortest form")
            return number, position
    raise _malformed(cls, "varint", "longer than 10 bytes")


def _malformed(owner: Any, name: str, why: str) -> ServiceError:
    title = owner.__name__ if isinstance(owner, type) else type(owner).__name__
    return ServiceError(Reason.MALFORMED, f"{title}.{name}: {why}")

"""P-3: one encoding of a message and no other; messages.py and the .proto say the same."""

import dataclasses
import inspect
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.errors import Reason, ServiceError
from services.common.secagg import messages
from services.common.secagg.blob import decode, encode
from wardround.protocol.v1 import protocol_pb2

CLASSES = [
    cls for _, cls in inspect.getmembers(messages, inspect.isclass)
    if dataclasses.is_dataclass(cls) and cls.__module__ == messages.__name__
]  # fmt: skip
IDS = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,8}[a-z0-9])?", fullmatch=True)


def instances(cls: type) -> st.SearchStrategy[Any]:
    """Any valid message of `cls`, lists kept short."""
    fields = {}
    for field in dataclasses.fields(cls):
        kind = field.metadata["kind"]
        if kind.form == "u":
            one: st.SearchStrategy[Any] = st.integers(0, kind.maximum)
        elif kind.form == "ident":
            one = IDS
        elif kind.form == "message":
            one = instances(kind.message)
        elif kind.form == "text":
            one = st.text(max_size=min(kind.maximum // 4, 20)).filter(_encodable)
        else:
            size = kind.size
            one = st.binary(min_size=size or 0, max_size=size or min(kind.maximum, 40))
        fields[field.name] = st.lists(one, max_size=3).map(tuple) if kind.repeated else one
    return st.builds(cls, **fields)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


ALL = st.sampled_from(CLASSES).flatmap(instances)


@settings(max_examples=300, deadline=None)
@given(ALL)
def test_every_message_equals_its_protobuf_deterministically_serialised(message: Any) -> None:
    blob = encode(message)
    parsed = getattr(protocol_pb2, type(message).__name__).FromString(blob)
    assert parsed.SerializeToString(deterministic=True) == blob
    assert decode(type(message), blob) == message


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_field_has_the_tag_name_and_type_of_the_proto(cls: type) -> None:
    descriptor = protocol_pb2.DESCRIPTOR.message_types_by_name[cls.__name__]
    here = {field.name: field.metadata["kind"] for field in dataclasses.fields(cls)}
    assert {field.name: field.number for field in descriptor.fields} == {name: kind.tag for name, kind in here.items()}
    for field in descriptor.fields:
        kind = here[field.name]
        expected = {
            "u": (FieldDescriptor.TYPE_UINT32, FieldDescriptor.TYPE_UINT64),
            "bytes": (FieldDescriptor.TYPE_BYTES,),
            "text": (FieldDescriptor.TYPE_STRING,),
            "ident": (FieldDescriptor.TYPE_STRING,),
            "message": (FieldDescriptor.TYPE_MESSAGE,),
        }[kind.form]
        assert field.type in expected
        if field.type == FieldDescriptor.TYPE_UINT32:
            assert kind.maximum < 2**32
        if kind.form == "message":
            assert field.message_type.name == kind.message.__name__


def test_the_proto_has_no_message_more() -> None:
    assert set(protocol_pb2.DESCRIPTOR.message_types_by_name) == {cls.__name__ for cls in CLASSES}


@settings(max_examples=300, deadline=None)
@given(ALL, st.data())
def test_no_other_bytes_decode_to_the_same_message_p_3(message: Any, data: st.DataObject) -> None:
    """P-3: whatever decodes, re-encodes to exactly the bytes given."""
    blob = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(blob)))
        blob[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    try:
        again = decode(type(message), bytes(blob))
    except ServiceError as refused:
        assert refused.reason is Reason.MALFORMED  # noqa: PT017 - either outcome is right, a third is not
        return
    assert encode(again) == blob


L = messages.Lock(bytes(32), bytes(32), 3, "pod-0")
BLOB = encode(L)


@pytest.mark.parametrize(
    ("blob", "why"),
    [
        (BLOB + b"\x2a\x00", "unknown"),
        (BLOB + BLOB[-7:], "repeated"),
        (BLOB[34:68] + BLOB[:34] + BLOB[68:], "order"),
        (BLOB + b"\0", "unknown"),
        (BLOB[:-1], "truncated"),
        (BLOB[:68], "missing"),
        (b"\x0a\x1f" + bytes(31) + BLOB[34:], "exactly 32"),
        (BLOB.replace(b"\x18\x03", b"\x18\x00"), "zero is left out"),
        (BLOB.replace(b"\x18\x03", b"\x18\x83\x00"), "shortest"),
        (BLOB.replace(b"\x18\x03", b"\x18" + b"\xff" * 9 + b"\x7f"), "shortest"),
        (BLOB.replace(b"\x18\x03", b"\x18" + b"\xff" * 10 + b"\x01"), "longer than 10"),
        (BLOB.replace(b"\x18\x03", b"\x18\x81\x20"), "not in 1..4096"),
        (BLOB.replace(b"\x18\x03", b"\x1a\x01\x03"), "wire type"),
        (BLOB.replace(b"\x18\x03", b"\x18"), "order|truncated|unknown|wire|not in"),
        (b"\x80", "truncated"),
        (BLOB.replace(b"pod-0", b"Pod-0"), "DNS label"),
    ],
)
def test_blobs_that_are_not_the_one_encoding_are_refused_p_3(blob: bytes, why: str) -> None:
    """P-3, §9: unknown, repeated and disordered fields, trailing bytes, wrong lengths, long varints."""
    with pytest.raises(ServiceError, match=why) as refused:
        decode(messages.Lock, blob)
    assert refused.value.reason is Reason.MALFORMED


def test_empty_fields_wrong_text_and_long_lists_are_refused() -> None:
    accepted = messages.Accepted("a", bytes(32))
    for cls, blob, why in (
        (messages.LaneClass, b"\x0a\x00", "empty"),
        (messages.LaneClass, b"\x0a\x01\xff", "UTF-8"),
        (messages.LaneClass, b"\x0a\x21" + b"a" * 33, "at most 32"),
        (
            messages.AbandonCertificate,
            encode(messages.AbandonCertificate((messages.Signed(b"", bytes(64)),))) * 17,
            "more than 16",
        ),
    ):
        with pytest.raises(ServiceError, match=why):
            decode(cls, blob)
    for message, why in (
        (messages.AcceptList(bytes(32), "a", (accepted,) * 4097), "more than 4096"),
        (messages.AcceptList(bytes(32), "a", (L,)), "another type"),  # type: ignore[arg-type]  # on purpose
        (messages.Lock(bytes(32), bytes(32), -1, "a"), "not an integer"),
        (messages.Lock(bytes(32), bytes(32), 1.5, "a"), "not an integer"),  # type: ignore[arg-type]  # on purpose
        (messages.Lock(bytes(31), bytes(32), 1, "a"), "exactly 32"),
    ):
        with pytest.raises(ServiceError, match=why):
            encode(message)
    assert "seed" not in repr(messages.Lock(bytes(32), bytes(32), 1, "a"))

"""Every RPC of every wardround service has a row in the authority table, and every reason a code and a number."""

import importlib
from pathlib import Path

import pytest

from services.common.errors import Reason
from services.common.rpc.authority import AUTHORITY
from services.common.rpc.errors import CODES
from wardround.error.v1 import error_pb2

ROOT = Path(__file__).parents[2]


def all_methods() -> set[str]:
    found: set[str] = set()
    for proto in sorted((ROOT / "protos/wardround").glob("*/v1/*.proto")):
        name = ".".join(proto.relative_to(ROOT / "protos").with_suffix("").parts)
        descriptor = importlib.import_module(f"{name}_pb2").DESCRIPTOR
        for service in descriptor.services_by_name.values():
            found |= {f"/{service.full_name}/{method.name}" for method in service.methods}
    return found


def test_every_rpc_has_a_row_and_every_row_an_rpc() -> None:
    assert len(all_methods()) > 15
    assert set(AUTHORITY) == all_methods()


@pytest.mark.parametrize("method", sorted(AUTHORITY))
def test_each_rpc_is_for_one_role(method: str) -> None:
    assert len(AUTHORITY[method]) == 1


def test_every_reason_has_a_grpc_code_and_a_number_in_the_proto() -> None:
    assert set(CODES) == set(Reason)
    numbered = {
        value.name.removeprefix("ERROR_REASON_")
        for value in error_pb2.DESCRIPTOR.enum_types_by_name["ErrorReason"].values
    }
    assert numbered == {"UNSPECIFIED", *(reason.value for reason in Reason)}

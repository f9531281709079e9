"""One table: reason to gRPC code; a `ServiceError` crosses the wire as google.rpc.ErrorInfo and comes out the same."""

from collections.abc import Iterable

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import ErrorInfo  # type: ignore[import-untyped]  # ships .pyi without py.typed
from google.rpc.status_pb2 import Status  # type: ignore[import-untyped]  # the same

from services.common.errors import Reason, ServiceError

DOMAIN = "wardround"
_DETAILS = "grpc-status-details-bin"
_INTERNAL = "internal error"
# Trailers beyond 8 KiB are dropped by HTTP/2 peers; the text travels twice, once percent-encoded (3 bytes for 1).
_MOST_DETAIL = 1024
_MOST_METADATA = 1024

CODES: dict[Reason, grpc.StatusCode] = {
    Reason.MALFORMED: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.TOO_LARGE: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.BAD_SIGNATURE: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.BAD_DIGEST: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.INVALID_DOCUMENT: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.INVALID_DATA: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.NOT_FINITE: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.OUT_OF_BOUND: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Reason.UNKNOWN_MEMBER: grpc.StatusCode.PERMISSION_DENIED,
    Reason.NOT_PERMITTED: grpc.StatusCode.PERMISSION_DENIED,
    Reason.POLICY_REFUSES: grpc.StatusCode.PERMISSION_DENIED,
    Reason.BUDGET_EXHAUSTED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.WRONG_PHASE: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.WRONG_CORE: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.BURNED: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.NOT_LIVE: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.LOCKED: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.ABANDONED: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.CLOSED: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.BELOW_QUORUM: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.BELOW_COHORT: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.ROLLED_BACK: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.LATE: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.UNKNOWN_SCHEMA: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.UNSAFE_STORE: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.CONFLICT: grpc.StatusCode.ALREADY_EXISTS,
    Reason.STALE_VERSION: grpc.StatusCode.ABORTED,
    Reason.STORAGE: grpc.StatusCode.UNAVAILABLE,
    Reason.UNREACHABLE: grpc.StatusCode.UNAVAILABLE,
    Reason.INTERNAL: grpc.StatusCode.INTERNAL,
}

# What gRPC itself says, without one of our servers behind it.
_BARE: dict[grpc.StatusCode, Reason] = {
    grpc.StatusCode.UNAVAILABLE: Reason.UNREACHABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED: Reason.UNREACHABLE,
    grpc.StatusCode.CANCELLED: Reason.UNREACHABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Reason.TOO_LARGE,
    grpc.StatusCode.UNIMPLEMENTED: Reason.NOT_FOUND,
    grpc.StatusCode.UNAUTHENTICATED: Reason.NOT_PERMITTED,
    grpc.StatusCode.PERMISSION_DENIED: Reason.NOT_PERMITTED,
    grpc.StatusCode.INVALID_ARGUMENT: Reason.MALFORMED,
}


def to_status(error: ServiceError) -> tuple[grpc.StatusCode, str, bytes]:
    """(code, message, serialized google.rpc.Status with an ErrorInfo). INTERNAL keeps its detail to itself."""
    code = CODES[error.reason]
    hidden = error.reason is Reason.INTERNAL
    detail = _INTERNAL if hidden else _cut(error.detail, _MOST_DETAIL)
    info = ErrorInfo(reason=error.reason.value, domain=DOMAIN)
    room = _MOST_METADATA
    for key, value in () if hidden else sorted(error.metadata.items()):
        room -= len(key) + len(value.encode())
        if room < 0:
            break
        info.metadata[key] = value
    packed = AnyMessage()
    packed.Pack(info)
    number: int = code.value[0]
    return code, detail, Status(code=number, message=detail, details=[packed]).SerializeToString()


def abort(context: grpc.ServicerContext, error: ServiceError) -> None:
    """End the RPC with this refusal; raises, as grpc's own abort does."""
    code, detail, status = to_status(error)
    context.set_trailing_metadata(((_DETAILS, status),))
    context.abort(code, detail)


def from_rpc_error(error: grpc.RpcError) -> ServiceError:
    """The refusal that the server sent, or what gRPC itself said in our words."""
    if not hasattr(error, "trailing_metadata"):  # a bare RpcError carries nothing
        return ServiceError(Reason.INTERNAL, "an RPC failed without a status")
    info = _error_info((item.key, item.value) for item in error.trailing_metadata() or ())
    detail = error.details() or ""
    if info is not None:
        return ServiceError(Reason(info.reason), detail, **dict(info.metadata))
    code = error.code()
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        detail = "no answer within the deadline; the other side may be down or slow: try again later"
    return ServiceError(_BARE.get(code, Reason.INTERNAL), detail or code.name)


def _error_info(trailers: Iterable[tuple[str, bytes]]) -> ErrorInfo | None:
    for key, value in trailers:
        if key != _DETAILS:
            continue
        info = ErrorInfo()
        try:
            for detail in Status.FromString(value).details:
                if detail.Unpack(info) and info.domain == DOMAIN and info.reason in list(Reason):
                    return info
        except DecodeError:
            return None
    return None


def _cut(text: str, most: int) -> str:
    data = text.encode()
    return text if len(data) <= most else data[: most - 3].decode(errors="ignore") + "..."

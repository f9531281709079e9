"""`Signed` between its wire form and the core's own type."""

from services.common.errors import Reason, ServiceError
from services.common.secagg import messages
from wardround.protocol.v1 import protocol_pb2

_SIGNATURE = 64
_MOST = 1 << 22


def to_wire(signed: messages.Signed) -> protocol_pb2.Signed:
    """As a message; blob and signature are copied byte for byte."""
    return protocol_pb2.Signed(blob=signed.blob, signature=signed.signature)


def from_wire(signed: protocol_pb2.Signed) -> messages.Signed:
    """As the core's type, nothing verified yet; raises MALFORMED for a missing blob or a wrong signature length."""
    if not 0 < len(signed.blob) <= _MOST or len(signed.signature) != _SIGNATURE:
        raise ServiceError(
            Reason.MALFORMED,
            f"a signed message has 1 to {_MOST} bytes and a signature of {_SIGNATURE}, "
            f"not {len(signed.blob)} and {len(signed.signature)}: sign and send it again",
        )
    return messages.Signed(blob=signed.blob, signature=signed.signature)

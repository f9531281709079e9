"""Names of sites and the roles they play."""

import re
from enum import StrEnum

from services.common.errors import Reason, ServiceError

_ID = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


class Role(StrEnum):
    """Who a certificate speaks for."""

    AGGREGATOR = "aggregator"
    POD = "pod"
    HOSPITAL = "hospital"
    OPERATOR = "operator"


def check_id(text: str, what: str = "id") -> str:
    """Return `text` if it is a DNS label (protocol.md §10); else raise MALFORMED."""
    if not isinstance(text, str) or _ID.fullmatch(text) is None:
        shown = text if len(text) <= 80 else text[:77] + "..."
        raise ServiceError(
            Reason.MALFORMED,
            f"{what} {shown!r} is not a DNS label: use 1 to 63 of a-z, 0-9 and '-', not at either end",
        )
    return text

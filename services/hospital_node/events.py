"""What a ledger's events say: a study was joined, a vector was debited, a debit was worse than thought, the data were
checked (privacy.md §7).

Their bytes are canonical JSON with a `kind`; a kind or field that is not known is refused, never skipped. They hold
what happened, never ε. Not here: the chain that binds them (ledger.py), what they cost (spending.py).
"""

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from services.common.dp.accounting import Event
from services.common.dp.noise import effective_multiplier
from services.common.errors import Reason, ServiceError


@dataclass(frozen=True)
class Planned:
    """All releases of one kind that a study may make of one split, spare rounds included: q, σ and T, fixed at joining.

    `solo_multiplier` is what the hospital's own share alone gives.
    """

    split: str
    sampling_rate: float
    noise_multiplier: float
    solo_multiplier: float
    steps: int

    def event(self) -> Event:
        """At n_min and k under `shared`."""
        return Event(self.sampling_rate, self.noise_multiplier, self.steps)

    def solo_event(self) -> Event:
        """With this hospital's share alone."""
        return Event(self.sampling_rate, self.solo_multiplier, self.steps)


@dataclass(frozen=True)
class Joined:
    """The first event of a study: what it may release in all, and the site's caps at that moment.

    `study` is the hex digest, `dataset_delta` δ_total. Under `none` the plan is empty and δ is 0.
    """

    study: str
    name: str
    delta: float
    rounds: int
    plan: tuple[Planned, ...]
    study_epsilon: float
    dataset: str
    dataset_epsilon: float
    dataset_delta: float


@dataclass(frozen=True)
class Debit:
    """One release of one split of the data set. Digests are hex, Δ₂ and S_h in integers.

    `noise_multiplier` is z of what may be opened: of this hospital's share alone under `local`, of the n_min − k honest
    shares together under `shared` (L-3). `scale` is S_h, this hospital's own share, so the solo event follows.
    `vector` names the draw of sampling and noise: the same vector under another attempt is no second debit.
    """

    mechanism: str
    split: str
    sampling_rate: float
    noise_multiplier: float
    steps: int
    sensitivity: float
    scale: int
    minimum_cohort: int
    colluding_hospitals: int
    delta: float
    study: str
    round: int
    attempt: int
    manifest: str
    model: str
    vector: str

    def event(self) -> Event:
        """What ε is derived from: at n_min and k under `shared`."""
        return Event(self.sampling_rate, self.noise_multiplier, self.steps)

    def solo_event(self) -> Event:
        """The same release when all the others collude, cheat or fail: this hospital's share alone (ε_solo)."""
        alone = effective_multiplier((self.scale,), self.sensitivity) if self.scale else 0.0
        return Event(self.sampling_rate, alone, self.steps)


@dataclass(frozen=True)
class Exposed:
    """L-3: the debits of this round count with the hospital's own noise alone. `reason` is the alarm in one sentence.

    A cohort below n_min, a certificate that is not valid, or a membership that nobody here asked for: then the pods
    or the identity key do not do what the shared noise rests on.
    """

    study: str
    round: int
    reason: str


@dataclass(frozen=True)
class Checked:
    """The data that the study's following vectors are made from passed their check (`data.require_check`, ADR 0016).

    `data` is the data set's digest under the site's secret key, hex: the same data, the same value, and no more.
    """

    study: str
    data: str
    verdict: str = "passed"


LedgerEvent = Joined | Debit | Exposed | Checked
_KINDS: dict[str, type[Joined] | type[Debit] | type[Exposed] | type[Checked]] = {
    "joined": Joined,
    "debit": Debit,
    "exposed": Exposed,
    "checked": Checked,
}
_NAMES = {cls: kind for kind, cls in _KINDS.items()}


def encode_event(event: LedgerEvent) -> bytes:
    """The bytes that the chain's head covers."""
    fields = {"kind": _NAMES[type(event)], **asdict(event)}
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


@lru_cache(maxsize=1 << 14)
def decode_event(blob: bytes) -> LedgerEvent:
    """The event of its exact bytes. Raises MALFORMED."""
    try:
        fields: dict[str, Any] = json.loads(blob)
        kind = _KINDS[fields.pop("kind")]
        if kind is Joined:
            fields["plan"] = tuple(Planned(**planned) for planned in fields["plan"])
        event = kind(**fields)
        whole = encode_event(event) == blob
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise ServiceError(
            Reason.MALFORMED, f"{blob[:60]!r}… is no ledger event of this version: use the version that wrote it"
        )
    return event

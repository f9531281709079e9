"""A hospital's yes to one round: policy, ledger (privacy.md L-2) and data check, before a model is downloaded.

It is asked for at every claim of the aggregator. All that a yes follows from is named in `_Basis`: while that stays, so
does the yes, and what the round would cost is not worked out again. Not here: the decision itself (policy.py).
"""

import datetime
from dataclasses import dataclass

from services.common.clock import Clock
from services.common.documents.charter import LoadedCharter
from services.common.documents.policy import LoadedPolicy
from services.common.documents.shape import round_shape
from services.common.documents.study import LoadedStudy
from services.common.secagg.messages import LedgerMark
from services.hospital_node.datacheck import require_check
from services.hospital_node.events import Checked
from services.hospital_node.ledger import Ledger
from services.hospital_node.policy import Projection, decide
from services.hospital_node.ports import Consents, Trainer
from services.hospital_node.release import round_debits
from services.hospital_node.spending import Caps
from services.hospital_node.store import Store


@dataclass(frozen=True)
class _Basis:
    """`paid`: the round's vector has been debited already (L-1: an attempt is no second debit)."""

    charter: bytes
    study: bytes
    round: int
    model: bytes
    policy: bytes
    ledger: LedgerMark
    paid: bool
    today: datetime.date


class Consent:
    """One hospital's; one thread asks."""

    def __init__(self, consents: Consents, ledger: Ledger, store: Store, trainer: Trainer, clock: Clock) -> None:
        self.data: Checked | None = None  # where the study requires a check of them
        self._consents = consents
        self._ledger = ledger
        self._store = store
        self._trainer = trainer
        self._clock = clock
        self._given: _Basis | None = None

    def require(
        self, charter: LoadedCharter, study: LoadedStudy, number: int, model: bytes, figures: dict[str, float]
    ) -> None:
        """Raise the refusal of round `number`, which starts from `model`, if there is one; `figures` get what is left.

        POLICY_REFUSES, BUDGET_EXHAUSTED.
        """
        today = datetime.datetime.fromtimestamp(self._clock.now_ms() / 1000, datetime.UTC).date()
        policy = self._consents.policy()
        kept, mark = self._store.vector(study.digest, number), self._ledger.mark()
        paid = kept is not None and self._ledger.debited(kept.name)
        basis = _Basis(charter.digest, study.digest, number, model, policy.digest, mark, paid, today)
        if basis != self._given:
            vector = kept.name if kept is not None else ""
            projection = self.projection(policy, charter, study, number, model, vector, paid=paid)
            figures["rounds_left"] = float(projection.rounds_left)
            figures["rounds_planned"] = float(max(0, study.document.rounds - number + 1))
            refusal = decide(policy, charter, study, projection, today)
            if refusal is not None:
                raise refusal
            self._given = basis
        self.data = require_check(study, self._consents, self._trainer, self.data)

    def figures(self, study: bytes) -> dict[str, float]:
        """ε of a study and of the data set as ledger and policy have it now; from any thread. Raises INVALID_DOCUMENT.

        Functions of the study and the rounds, not of the data.
        """
        return self._ledger.account().figures(study.hex(), *_caps(self._consents.policy(), study))

    def projection(
        self,
        policy: LoadedPolicy,
        charter: LoadedCharter,
        study: LoadedStudy,
        number: int,
        model: bytes,
        vector: str = "",
        *,
        paid: bool = False,
    ) -> Projection:
        """What round `number` would cost more than has been paid for its `vector` already, and what is left then."""
        cost = round_debits(study, round_shape(charter, study, number), model, vector)
        study_cap, caps = _caps(policy, study.digest)
        return self._ledger.account().project(
            cost,
            [debit for debit in cost if debit.split == "train"],  # none in the last round, when none remains
            remaining=max(0, study.document.rounds - number + 1),
            study_cap=study_cap,
            caps=caps,
            paid=paid,
        )


def _caps(policy: LoadedPolicy, study: bytes) -> tuple[float, Caps]:
    """ε that the policy allows the study, none where it does not list it; what it allows the data set."""
    allowed = policy.allowed(study)
    caps = Caps(policy.document.dataset_epsilon, policy.document.dataset_delta)
    return 0.0 if allowed is None else allowed.epsilon, caps

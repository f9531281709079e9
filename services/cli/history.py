"""What happened in each round, folded from the aggregator's event log (`evidence/aggregator/log.jsonl`). Pure.

The log is the aggregator's own note: results, receipts and certificates are signed, the times in it are not. So it
tells how a study went, and proves nothing that `verify` does not prove from the signed files.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field

from services.aggregator import facts as f
from services.aggregator.state import Phase, State, evolve
from services.common.errors import Reason, ServiceError
from services.common.secagg.messages import OUTCOME_ACCEPTED


@dataclass
class AttemptStory:
    """One try at a round. `ended` is accepted, rejected, abandoned, failed, stalled, or empty while it is open."""

    number: int
    ended: str = ""
    reason: str = ""
    submitted: tuple[str, ...] = ()
    cohort: tuple[str, ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()  # (hospital, the pod that refused it)
    dropped_pod: str = ""


@dataclass
class RoundStory:
    """One round: `seconds` by phase in the order of their first appearance, over all attempts."""

    number: int
    kind: str
    opened: int  # Unix milliseconds
    seconds: dict[str, float] = field(default_factory=dict)
    attempts: list[AttemptStory] = field(default_factory=list)
    declined: dict[str, str] = field(default_factory=dict)
    named: tuple[str, ...] = ()
    disputed: tuple[str, ...] = ()
    stalled: str = ""

    @property
    def total(self) -> float:
        """Seconds from the opening to the end."""
        return sum(self.seconds.values())

    @property
    def last(self) -> AttemptStory:
        """The attempt that the round ended with."""
        return self.attempts[-1] if self.attempts else AttemptStory(0)

    def fate(self, hospital: str) -> str:
        """cohort, left out, submitted (and no cohort came of it), declined, or absent: at the round's last attempt."""
        last = self.last
        if hospital in last.cohort:
            return "cohort"
        if hospital in dict(last.left_out):
            return "left out"
        if hospital in last.submitted:
            return "submitted"
        return "declined" if hospital in self.declined else "absent"


def read_log(lines: Iterable[str]) -> list[f.Fact]:
    """The facts of log.jsonl. Raises MALFORMED naming the line, UNKNOWN_SCHEMA for a newer log."""
    found = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            kind, payload = row["kind"], row["payload"]
        except (ValueError, KeyError, TypeError):
            raise ServiceError(
                Reason.MALFORMED, f"line {number} of the aggregator's log is no event: collect the evidence again"
            ) from None
        found.append(f.from_json(kind, payload))
    return found


def tell(facts: Iterable[f.Fact]) -> list[RoundStory]:
    """The story of every round that was opened, ascending."""
    state, stories = State(), list[RoundStory]()
    for fact in facts:
        before, state = state, evolve(state, fact)
        if isinstance(fact, f.Opened):
            stories.append(RoundStory(fact.round, fact.kind, fact.at))
        if not stories:
            continue
        if state.phase is not before.phase and before.phase not in (Phase.IDLE, Phase.FINISHED):
            seconds, phase = stories[-1].seconds, before.phase.value
            seconds[phase] = seconds.get(phase, 0.0) + max(0, fact.at - before.entered) / 1000
        _add(stories[-1], fact)
    return stories


def _add(story: RoundStory, fact: f.Fact) -> None:
    if isinstance(fact, f.Proposed):
        story.attempts.append(AttemptStory(fact.attempt))
    last = story.last
    match fact:
        case f.Declined():
            story.declined[fact.hospital] = fact.reason
        case f.Submitted():
            last.submitted = (*last.submitted, fact.hospital)
        case f.CohortFixed():
            last.cohort, last.left_out, last.dropped_pod = fact.members, fact.left_out, fact.dropped_pod
        case f.Verified():
            story.named, story.disputed = fact.named, fact.disputed
        case f.AbandonDecided():
            last.ended, last.reason = "abandoned", fact.reason
        case f.AttemptFailed():
            last.ended, last.reason = "failed", fact.reason
        case f.Stalled():
            last.ended, last.reason, story.stalled = "stalled", fact.reason, fact.reason
        case f.Concluded():
            last.ended = "accepted" if fact.outcome == OUTCOME_ACCEPTED else "rejected"
            last.reason = fact.reason
        case _:
            pass

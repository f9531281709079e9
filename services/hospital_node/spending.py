"""What a ledger's events cost a patient, and what one more round would (privacy.md §6, §7: L-2, L-3). Pure.

- A patient is in one split for the data set's life, so it pays for that split only: every ε is the largest over the
  splits, never their sum.
- Within a study q, σ and T were fixed when it was joined: its events compose by the privacy loss distribution.
- Across studies, chosen one after another, the least of two bounds counts: the sum of the studies' (ε, δ), in which
  every other study stands with all that it had planned, and a Rényi filter over what really happened. Which one it is
  may depend on what was released, so each has half of δ_total. A study that went beyond its plan has no place in the
  sum: then only the filter counts.
- Solo figures take each event at the noise of this hospital's own share.
Not here: where the events are kept (ledger.py), what follows from a projection (policy.py).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from services.common.dp.accounting import Event, epsilon
from services.common.dp.renyi import RenyiFilter
from services.hospital_node.events import Debit, Exposed, Joined, LedgerEvent
from services.hospital_node.policy import Projection

Rule = Literal["sum", "filter"]
_SHARE = 0.5  # of δ_total, for each of the two bounds


@dataclass(frozen=True)
class Caps:
    """What the site allows its data set in all: fixed beforehand, as the filter demands. `delta` is δ_total."""

    epsilon: float
    delta: float


@dataclass(frozen=True)
class Total:
    """ε of the data set over all studies, by the bound that is smaller. `sum_delta` is the studies' δ together."""

    epsilon: float
    rule: Rule
    sum_delta: float


class Account:
    """The events of one ledger, oldest first, with L-3 applied: an exposed round counts at its solo event."""

    def __init__(self, events: Iterable[LedgerEvent]) -> None:
        everything = tuple(events)
        self.joined = {event.study: event for event in everything if isinstance(event, Joined)}
        self.debits = tuple(event for event in everything if isinstance(event, Debit))
        self.exposed = {(event.study, event.round) for event in everything if isinstance(event, Exposed)}
        self._laws = self._merged(self.debits)

    def studies(self) -> tuple[str, ...]:
        """Hex digests, in the order in which they were joined."""
        return tuple(dict.fromkeys((*self.joined, *(debit.study for debit in self.debits))))

    def figures(self, study: str, study_cap: float, caps: Caps) -> dict[str, float]:
        """What is shown of a study (hex) and its data set, by the names of metrics and status."""
        spent, dataset = self.study(study), self.dataset(caps).epsilon
        return {
            "epsilon_spent": spent,
            "epsilon_left": max(0.0, study_cap - spent),
            "epsilon_solo": self.study(study, solo=True),
            "dataset_epsilon_spent": dataset,
            "dataset_epsilon_left": max(0.0, caps.epsilon - dataset),
            "dataset_epsilon_solo": self.dataset(caps, solo=True).epsilon,
        }

    def splits(self, study: str, solo: bool = False) -> dict[str, float]:
        """ε of one study by split at its own δ; infinite where something left without noise (`none`)."""
        return self._splits([debit for debit in self._laws if debit.study == study], solo)

    def study(self, study: str, solo: bool = False) -> float:
        """ε of one study: 0.0 before its first event."""
        return max(self.splits(study, solo).values(), default=0.0)

    def dataset(self, caps: Caps, solo: bool = False) -> Total:
        """ε of the data set; the last study to spend is the one whose plan is not counted ahead."""
        if any(debit.mechanism == "none" for debit in self.debits):
            return Total(math.inf, "sum", 0.0)
        return self._dataset(self._laws, self.debits[-1].study if self.debits else "", caps, solo)

    def project(
        self,
        cost: Sequence[Debit],
        plain: Sequence[Debit],
        *,
        remaining: int,
        study_cap: float,
        caps: Caps,
        paid: bool = False,
    ) -> Projection:
        """What one more round of `cost` would bring, and how many rounds of `plain` still fit (L-2).

        `cost` is not empty; `paid` when its vector has been debited already, so that sending it again costs nothing.
        `remaining` bounds the rounds that are counted. Only noised events are held against caps: a release under
        `none` has no ε that any cap could bound, and the policy allows it by its own words or not at all.
        """
        first, held, more, each = cost[0], _noised(self._laws), _noised(cost), _noised(plain)
        mine = tuple(debit for debit in held if debit.study == first.study)

        def study_after(debits: tuple[Debit, ...]) -> float:
            return max(self._splits((*mine, *debits)).values(), default=0.0)

        def dataset_after(debits: tuple[Debit, ...]) -> Total:
            return self._dataset((*held, *debits), first.study, caps)

        def fits(rounds: int) -> bool:
            ahead = tuple(replace(debit, steps=debit.steps * rounds) for debit in each)
            return study_after(ahead) <= study_cap and dataset_after(ahead).epsilon <= caps.epsilon

        new = () if paid else more
        after = dataset_after(new)
        return Projection(
            round=first.round,
            study_spent=study_after(()),
            study_after=study_after(new),
            dataset_spent=dataset_after(()).epsilon,
            dataset_after=after.epsilon,
            dataset_rule=after.rule,
            dataset_sum_delta=after.sum_delta,
            rounds_left=largest(fits, remaining) if plain else 0,
            repeated=any(
                d.mechanism == "none" and d.model == first.model and d.split == first.split and d.vector != first.vector
                for d in self.debits
            ),
        )

    def _merged(self, debits: Iterable[Debit]) -> tuple[Debit, ...]:
        """The same cost in the fewest debits: those of one study that differ in nothing but the round are one with
        all their steps. An exposed round stays apart: it counts by another law."""
        first: dict[tuple[object, ...], Debit] = {}
        steps: dict[tuple[object, ...], int] = {}
        for debit in debits:
            law = (debit.study, debit.split, debit.mechanism, debit.sampling_rate, debit.noise_multiplier)
            key = (*law, debit.sensitivity, debit.scale, debit.delta, (debit.study, debit.round) in self.exposed)
            first.setdefault(key, debit)
            steps[key] = steps.get(key, 0) + debit.steps
        return tuple(replace(debit, steps=steps[key]) for key, debit in first.items())

    def _event(self, debit: Debit, solo: bool) -> Event:
        alone = solo or (debit.study, debit.round) in self.exposed
        return debit.solo_event() if alone else debit.event()

    def _splits(self, debits: Sequence[Debit], solo: bool = False) -> dict[str, float]:
        """By split; `debits` are of one study."""
        found = {}
        for split in dict.fromkeys(debit.split for debit in debits):
            mine = [debit for debit in debits if debit.split == split]
            bare = any(debit.mechanism == "none" for debit in mine)
            events = [self._event(debit, solo) for debit in mine]
            found[split] = math.inf if bare else _compose(events, min(debit.delta for debit in mine))
        return found

    def _dataset(self, debits: Sequence[Debit], current: str, caps: Caps, solo: bool = False) -> Total:
        """The worst split of noised `debits`; `current` is the study that may still stop anywhere in its plan."""
        studies = tuple(dict.fromkeys(debit.study for debit in debits))
        delta = sum(max(debit.delta for debit in debits if debit.study == study) for study in studies)
        filter_bound = RenyiFilter(caps.epsilon, _SHARE * caps.delta)
        worst = Total(0.0, "sum", delta)
        for split in dict.fromkeys(debit.split for debit in debits):
            mine = [debit for debit in debits if debit.split == split]
            summed = math.inf
            if delta <= _SHARE * caps.delta:
                summed = sum(self._in_sum(study, split, mine, study == current, solo) for study in studies)
            filtered = filter_bound.spent(self._event(debit, solo) for debit in mine)
            found = Total(min(summed, filtered), "sum" if summed <= filtered else "filter", delta)
            worst = max(worst, found, key=lambda total: total.epsilon)
        return worst

    def _in_sum(self, study: str, split: str, debits: Sequence[Debit], is_current: bool, solo: bool) -> float:
        """What a study weighs in the sum: what it spent if it is the current one, else all that it planned."""
        mine = [debit for debit in debits if debit.study == study]
        if is_current:
            return self._splits(mine, solo).get(split, 0.0)
        joined = self.joined.get(study)
        if joined is None or not self._within_plan(joined, split, mine):
            return math.inf
        plan = [planned for planned in joined.plan if planned.split == split]
        return _compose([p.solo_event() if solo else p.event() for p in plan], joined.delta)

    def _within_plan(self, joined: Joined, split: str, debits: Sequence[Debit]) -> bool:
        left: dict[tuple[float, float], int] = {}
        for planned in joined.plan:
            if planned.split == split:
                law = (planned.sampling_rate, planned.noise_multiplier)
                left[law] = left.get(law, 0) + planned.steps
        for debit in debits:
            event = self._event(debit, solo=False)
            law = (event.sampling_rate, event.noise_multiplier)
            left[law] = left.get(law, 0) - event.steps
        return min(left.values(), default=0) >= 0


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest count in 0..most that fits; `fits` is monotone."""
    if most <= 0 or fits(most):
        return max(0, most)
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _noised(debits: Iterable[Debit]) -> tuple[Debit, ...]:
    return tuple(debit for debit in debits if debit.mechanism != "none")


def _compose(events: Iterable[Event], delta: float) -> float:
    steps: dict[tuple[float, float], int] = {}
    for event in events:
        law = (event.sampling_rate, event.noise_multiplier)
        steps[law] = steps.get(law, 0) + event.steps
    # One event a law: composing the same mechanism n times is the accountant's fast path, and a cache key.
    return _epsilon(tuple((*law, steps[law]) for law in sorted(steps)), delta)


@lru_cache(maxsize=4096)
def _epsilon(laws: tuple[tuple[float, float, int], ...], delta: float) -> float:
    return epsilon([Event(*law) for law in laws], delta)

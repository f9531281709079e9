"""Which cohort to lock (P-24) and whose sums to use (P-23): pure functions over what the pods signed."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from services.aggregator.facts import Pair, Submitted
from services.common.secagg.cohort import Cohort
from services.common.secagg.messages import Accepted
from services.common.secagg.roster import Roster

Claims = Mapping[int, Mapping[str, tuple[bytes, bool]]]
"""piece: {pod: (vector digest of its sum, whether the sum itself came)}"""


def choose_cohort(
    manifest: bytes,
    lists: Mapping[str, tuple[Pair, ...]],
    submissions: Mapping[str, Submitted],
    roster: Roster,
    minimum: int,
) -> tuple[Cohort, tuple[tuple[str, str], ...], str] | None:
    """P-24: (U, who was left out and by which pod, the dropped pod or "") or None where no U of n_min can be had.

    U = the submissions accepted by every pod that answered; if fewer than `minimum` organisations are left, the one
    pod with the shortest list is dropped, unless that leaves fewer than q. At most n_max, in order of arrival.
    """
    drops = [""]
    if len(lists) > roster.committee.quorum:
        drops.append(min(lists, key=lambda pod: (len(lists[pod]), pod)))
    for dropped in drops:
        kept = {pod: set(pairs) for pod, pairs in lists.items() if pod != dropped}
        pairs = [(hospital, submission.header_digest) for hospital, submission in submissions.items()]
        refused = [(pair[0], pod) for pair in pairs for pod in sorted(kept) if pair not in kept[pod]]
        out = {hospital for hospital, _ in refused}
        accepted = [pair for pair in pairs if pair[0] not in out][: roster.maximum_cohort]
        if len({roster.hospitals[hospital].organisation for hospital, _ in accepted}) >= minimum:
            members = tuple(Accepted(*pair) for pair in sorted(accepted, key=lambda pair: pair[0].encode()))
            return Cohort(manifest, members), tuple(refused), dropped
    return None


@dataclass(frozen=True)
class Comparison:
    """What to ask next, or whose sum to use for each piece (`settled`: () = no majority, None = not yet)."""

    release: tuple[tuple[str, int], ...] = ()
    digest: tuple[tuple[str, int], ...] = ()
    settled: tuple[str, ...] | None = None
    named: tuple[str, ...] = ()
    disputed: tuple[str, ...] = ()
    how: str = ""
    doomed: bool = False  # too few holders of a piece are left for this attempt


def compare(
    claims: Claims,
    asked: Mapping[tuple[str, int], bool],
    pods: tuple[str, ...],
    *,
    roster: Roster,
    verify: str,
    able: frozenset[str],
    lost: frozenset[str],
) -> Comparison:
    """P-23 over all pieces. `pods` are those of the manifest, `asked` (pod, piece) pairs, True = for the sum itself.

    Each piece: one holder's sum and another's digest (`one`), or t holders' (`full`, or all that still answer). On a
    mismatch every answering holder's sum; the majority's is used, the others are named if at least t agree against
    them, else all who spoke are in dispute.
    """
    committee = roster.committee
    alone = committee.threshold == committee.pods
    wanted = 1 if alone else committee.threshold if verify == "full" else 2
    load: Counter[str] = Counter(pod for (pod, _), whole in asked.items() if whole)
    spread: Counter[str] = Counter(pod for (pod, _), whole in asked.items() if not whole)
    release: list[tuple[str, int]] = []
    digests: list[tuple[str, int]] = []
    chosen: list[str] = []
    named: set[str] = set()
    disputed: set[str] = set()
    hopeless = waiting = False
    for piece in range(len(committee.pieces)):
        holders = [roster.pods[index].id for index in committee.holders(piece) if roster.pods[index].id in pods]
        said = claims.get(piece, {})
        left = [pod for pod in holders if pod not in lost or pod in said]
        if len(left) < min(wanted, 2) or not any(pod not in lost or said[pod][1] for pod in left):
            return Comparison(doomed=True)
        answering = [pod for pod in holders if pod in able]
        open_sums = [pod for pod in answering if asked.get((pod, piece)) and not said.get(pod, (b"", False))[1]]
        open_digests = [pod for pod in answering if asked.get((pod, piece)) is False and pod not in said]
        votes = Counter(vector for vector, _ in said.values())
        if len(votes) > 1:
            more = [pod for pod in answering if not said.get(pod, (b"", False))[1] and pod not in open_sums]
            release += [(pod, piece) for pod in more]
            if more or open_sums:
                waiting = True
                continue
            vector, count = votes.most_common(1)[0]
            owner = next((pod for pod, (v, whole) in sorted(said.items()) if v == vector and whole), None)
            against = {pod for pod, (v, _) in said.items() if v != vector}
            if 2 * count <= len(said) or owner is None:
                disputed |= set(said)
                hopeless = True
                continue
            if count >= committee.threshold:
                named |= against
            else:
                disputed |= set(said)
            chosen.append(owner)
            continue
        owner = next((pod for pod, (_, whole) in sorted(said.items()) if whole), None)
        spare = [pod for pod in answering if (pod, piece) not in asked or (pod in said and not said[pod][1])]
        if owner is None and not open_sums and spare:
            best = min(spare, key=lambda pod: (load[pod], pod))
            load[best] += 1
            release.append((best, piece))
            open_sums = [best]
        fresh = [pod for pod in answering if pod not in said and pod not in open_sums and pod not in open_digests]
        missing = wanted - len(set(said) | set(open_sums) | set(open_digests))
        for pod in sorted(fresh, key=lambda pod: (spread[pod], load[pod], pod))[: max(0, missing)]:
            spread[pod] += 1
            digests.append((pod, piece))
            open_digests.append(pod)
        least = min(wanted, 2) if not set(answering) - set(said) else wanted
        if owner is None or open_sums or len(said) < least:
            waiting = True
        else:
            chosen.append(owner)
    if release or digests or waiting:
        return Comparison(tuple(release), tuple(digests))
    how = "sentinels only" if alone else verify
    return Comparison((), (), () if hopeless else tuple(chosen), tuple(sorted(named)), tuple(sorted(disputed)), how)

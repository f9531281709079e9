"""The committee of key-share pods: pieces, holders, quorum (protocol.md §2, P-1).

Pieces are all (t-1)-subsets T of the m pods, in lexicographic order; piece T is held by every pod NOT in
T. So any t-1 pods lack one whole piece, and any t pods hold all. Pods are indices 0..m-1 here: their
positions in the charter.
"""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

from services.common.errors import Reason, ServiceError
from services.common.secagg.messages import MAX_PIECES, MAX_PODS


@dataclass(frozen=True)
class Assignment:
    """Which pod sums which pieces: `release` sends the vector, `digest` only its digest, from another holder."""

    release: dict[int, tuple[int, ...]]
    digest: dict[int, tuple[int, ...]]


@dataclass(frozen=True)
class Committee:
    """m `pods`, of which t (`threshold`) open everything, q (`quorum`) fix a cohort, s (`slack`) may be rolled back."""

    pods: int
    threshold: int
    quorum: int
    slack: int = 0

    def check(self) -> None:
        """P-1: raise INVALID_DOCUMENT unless no two disjoint views of the cohort can both reach a quorum."""
        m, t, q, s = self.pods, self.threshold, self.quorum, self.slack
        if not 2 <= t <= m <= MAX_PODS:
            raise _unsafe(f"threshold {t} of {m} pods: 2 ≤ threshold ≤ pods ≤ {MAX_PODS} must hold")
        if s < 0 or q > m:
            raise _unsafe(f"quorum {q} of {m} pods with slack {s}: quorum ≤ pods and slack ≥ 0 must hold")
        if not 2 * q - m > t - 1 + s:
            least = (m + t - 1 + s) // 2 + 1
            advice = f"take quorum {least}" if least <= m else "no quorum is safe: add pods or lower threshold or slack"
            raise _unsafe(
                f"quorum {q} of {m} pods with threshold {t} and slack {s} lets two cohorts be certified "
                f"(2·quorum − pods must exceed threshold − 1 + slack): {advice}"
            )
        if math.comb(m, t - 1) > MAX_PIECES:
            raise _unsafe(f"{math.comb(m, t - 1)} pieces for {t} of {m} pods: at most {MAX_PIECES}")

    @cached_property
    def pieces(self) -> tuple[tuple[int, ...], ...]:
        """The pods EXCLUDED from piece j, for j = 0, 1, …"""
        return tuple(combinations(range(self.pods), self.threshold - 1))

    def holders(self, piece: int) -> tuple[int, ...]:
        """The pods that hold `piece`, ascending."""
        return tuple(pod for pod in range(self.pods) if pod not in self.pieces[piece])

    def pieces_of(self, pod: int) -> tuple[int, ...]:
        """The pieces that `pod` holds, ascending: C(m-1, t-1) of them."""
        return tuple(j for j, excluded in enumerate(self.pieces) if pod not in excluded)

    @property
    def may_be_down(self) -> int:
        """Pods that may be down, refusing or silent, all together: m - q."""
        return self.pods - self.quorum

    def assign(self, answering: Collection[int], copies: int = 1) -> Assignment:
        """Share the pieces out among the `answering` pods, evenly and the same way every time.

        Each piece gets one holder for release and up to `copies` others for digest (P-23: 1 for
        `verify: one`, threshold - 1 for `full`); a piece with too few answering holders gets fewer.
        Raises BELOW_QUORUM where a piece has no answering holder at all.
        """
        able = {j: {pod for pod in self.holders(j) if pod in set(answering)} for j in range(len(self.pieces))}
        for j, pods in able.items():
            if not pods:
                raise ServiceError(
                    Reason.BELOW_QUORUM,
                    f"no answering pod holds piece {j} (pods {list(self.holders(j))} do): wait for one of them",
                )
        release = _spread(able)
        left = {j: pods - {release[j]} for j, pods in able.items()}
        digest: list[tuple[int, int]] = []
        for _ in range(copies):
            chosen = _spread({j: pods for j, pods in left.items() if pods})
            digest += chosen.items()
            left = {j: left[j] - {pod} for j, pod in chosen.items()}
        return Assignment(_by_pod(release.items()), _by_pod(digest))


def _spread(able: dict[int, set[int]]) -> dict[int, int]:
    """One able pod for each piece, the busiest pod as idle as can be: augmenting paths under a rising cap."""
    chosen: dict[int, int] = {}
    for cap in range(1, len(able) + 1):
        for piece in able:
            if piece not in chosen:
                _place(piece, able, chosen, cap, set())
        if len(chosen) == len(able):
            break
    return chosen


def _place(piece: int, able: dict[int, set[int]], chosen: dict[int, int], cap: int, seen: set[int]) -> bool:
    """Give `piece` to a pod with room under `cap`, moving other pieces where that makes room."""
    for pod in sorted(able[piece] - seen):
        seen.add(pod)
        held = [other for other, holder in chosen.items() if holder == pod]
        if len(held) < cap or any(_place(other, able, chosen, cap, seen) for other in held):
            chosen[piece] = pod
            return True
    return False


def _by_pod(pairs: Iterable[tuple[int, int]]) -> dict[int, tuple[int, ...]]:
    found: dict[int, list[int]] = {}
    for piece, pod in sorted(pairs):
        found.setdefault(pod, []).append(piece)
    return {pod: tuple(found[pod]) for pod in sorted(found)}


def _unsafe(detail: str) -> ServiceError:
    return ServiceError(Reason.INVALID_DOCUMENT, f"committee: {detail}")

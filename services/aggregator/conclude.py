"""The end of a round: tally, gate, server step, signed result and Close (protocol.md §4 steps 9 and 10, §7).

Everything is computed from files and state alone and writes only blobs by digest: after a crash it is done again
with the same outcome.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from services.aggregator import facts, gate, metrics
from services.aggregator.next_model import next_model
from services.aggregator.round import State
from services.aggregator.store import Store
from services.aggregator.tally import SumCheck, class_sums, unmask
from services.common.documents.study import LoadedStudy
from services.common.errors import Reason, ServiceError
from services.common.secagg import blob as codec
from services.common.secagg.encoding import LaneTable, dequantise
from services.common.secagg.messages import (
    OUTCOME_ACCEPTED,
    OUTCOME_REJECTED,
    ZERO_DIGEST,
    Close,
    Result,
)
from services.common.secagg.signing import Signer, digest

_MOST_RELEASED = 65_536


@dataclass(frozen=True)
class Outcome:
    """What the sum led to. `sum` is the vector digest of Σ, `sum_file` the SHA-256 under which it is stored."""

    accepted: bool
    reason: str
    figures: dict[str, float]
    sums: dict[str, list[float]]  # released metric lanes
    sum: bytes
    sum_file: bytes
    model: bytes
    version: int
    kept: bytes  # SHA-256 of what the server keeps beside that model, empty where it keeps nothing
    figure: str
    verdict: str


def conclude(
    state: State, table: LaneTable, study: LoadedStudy, store: Store, *, hospitals: int, signer: Signer, at: int
) -> facts.Concluded:
    """The fact that ends the round of `state` (phase VERIFIED, every chosen sum on disk). Raises STORAGE.

    `hospitals`: N, those of the round's charter.
    """
    outcome = (
        _tally(state, table, study, store, hospitals)
        if state.chosen
        else _rejected(state, "the pods' sums differ and no majority agrees", ZERO_DIGEST, ZERO_DIGEST)
    )
    code = OUTCOME_ACCEPTED if outcome.accepted else OUTCOME_REJECTED
    result = signer.sign(
        "result",
        codec.encode(
            Result(
                charter=state.charter,
                study=study.digest,
                round=state.round,
                attempt=state.attempt,
                manifest=state.M,
                outcome=code,
                cohort=state.cohort_digest,
                certificate=hashlib.sha256(state.certificate).digest(),
                sum=outcome.sum,
                model=outcome.model,
                version=outcome.version,
                previous_result=state.previous_result,
                released=_released(state, outcome),
            )
        ),
    )
    close = signer.sign("close", codec.encode(Close(state.charter, study.digest, state.round)))
    return facts.Concluded(
        at=at, outcome=code, reason=outcome.reason, result=result, result_digest=digest("result", result.blob),
        close=close, sum=outcome.sum_file, model=outcome.model, version=outcome.version, figure=outcome.figure,
        kept=outcome.kept,
    )  # fmt: skip


def _tally(state: State, table: LaneTable, study: LoadedStudy, store: Store, hospitals: int) -> Outcome:
    place = (state.round, state.attempt)
    vectors = [store.vectors.submission(*place, state.submissions[who].header_digest) for who in state.members]
    pieces = [store.vectors.piece(*place, pod, piece) for piece, pod in enumerate(state.chosen)]
    check = SumCheck(table, len(state.members))
    sum_file = store.blobs.write(check.add(chunk) for chunk in unmask(table, vectors, pieces))
    document = study.document
    names = {lane.name for lane in table.lanes}
    if "parameter" in names and document.privacy.mechanism != "shared":
        check.check_norm("parameter", document.encoding.update_clip)
        if "control" in names:
            check.check_norm("control", document.encoding.control_clip)
    if check.fault:
        return _rejected(state, check.fault, check.digest.result(), sum_file)
    path = store.blobs.path(sum_file)
    figures, sums, verdict = _judge(state, table, study, path)
    figure = figures.get(document.gate.metric)
    shown = repr(figure) if figure is not None and "gate" in names else ""
    total = check.digest.result()
    if not verdict.keep and state.gated is not None:
        back = state.gated
        return Outcome(
            False,
            verdict.reason,
            figures,
            sums,
            total,
            sum_file,
            back.model,
            back.version,
            back.kept,
            "",
            "rolled back",
        )
    model, version, kept = state.model, state.version, state.kept
    if "parameter" in names:
        try:
            model, kept = _step(state, table, study, store, hospitals, path)
            version = state.newest_version + 1
        except ServiceError as error:
            if error.reason is not Reason.NOT_FINITE:
                raise
            return _rejected(state, error.detail, total, sum_file)
    return Outcome(True, "", figures, sums, total, sum_file, model, version, kept, shown, "accepted")


def released_figures(
    table: LaneTable, study: LoadedStudy, path: Path
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """(figures by name, summed counts by lane class) that the sum in `path` releases; `verify` does it again."""
    classes = len(study.document.model.classes)
    names = {lane.name for lane in table.lanes}
    sums = {
        name: dequantise(class_sums(table, name, path), table.lane_class(name).fraction_bits)
        for name in sorted(names & {"gate", "confusion", "histogram"})
    }
    figures: dict[str, float] = {}
    if "gate" in sums:
        figures = gate.gate_figures(sums["gate"][:classes].tolist(), sums["gate"][classes:].tolist())
    if "confusion" in sums:
        histogram = sums["histogram"].reshape(classes, 2, -1)
        figures = gate.final_figures(sums["confusion"].reshape(classes, classes), histogram)
    return figures, {name: values.tolist() for name, values in sums.items()}


def _judge(
    state: State, table: LaneTable, study: LoadedStudy, path: Path
) -> tuple[dict[str, float], dict[str, list[float]], gate.Verdict]:
    document = study.document
    figures, sums = released_figures(table, study, path)
    verdict = gate.Verdict(True)
    if "gate" in sums:
        metric = document.gate.metric
        passed = state.gated.figure if state.gated is not None else None
        verdict = gate.judge(figures.get(metric), passed, document.gate.largest_drop, metric)
        metrics.GATE.labels("kept" if verdict.keep else "rolled_back").inc()
    return figures, sums, verdict


def _step(
    state: State, table: LaneTable, study: LoadedStudy, store: Store, hospitals: int, path: Path
) -> tuple[bytes, bytes]:
    """(the next model, what is kept beside it) by digest, both on the disk. Raises NOT_FINITE."""
    kept = store.blobs.path(state.kept) if state.kept else None
    model, members = store.blobs.path(state.model), len(state.members)
    keeps, pairs = next_model(study.document, state.round, members, hospitals, table, model, kept, path)
    if not keeps:
        return store.blobs.write(numbers for numbers, _ in pairs), b""
    with store.blobs.partial("kept", 0) as file:

        def numbers_of_model() -> Iterator[bytes]:
            for numbers, slots in pairs:
                file.append(slots)
                yield numbers

        return store.blobs.write(numbers_of_model()), file.finish()


def _rejected(state: State, reason: str, total: bytes, sum_file: bytes) -> Outcome:
    return Outcome(False, reason, {}, {}, total, sum_file, state.model, state.version, state.kept, "", "rejected")


def _released(state: State, outcome: Outcome) -> bytes:
    """Canonical JSON: keys ascending, no spaces. Metric sums are left out where they would not fit."""
    body = {
        "kind": state.kind,
        "verdict": outcome.verdict,
        "reason": outcome.reason,
        "cohort": len(state.members),
        "figures": outcome.figures,
        "verify": state.how,
        "named": list(state.named),
        "disputed": list(state.disputed),
    }
    for sums in ({"sums": outcome.sums}, {}):
        text = json.dumps({**body, **sums}, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
        if len(text) <= _MOST_RELEASED:
            return text
    raise ServiceError(Reason.TOO_LARGE, "the released figures do not fit a result")

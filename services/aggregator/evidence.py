"""Everything that `wardround verify` checks, as files made from the log and the blobs (docs: "Evidence").

Read from the log each time: nothing is kept twice, and what is exported is what was stored.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from services.aggregator import facts as f
from services.aggregator.charters import Charters
from services.aggregator.round import State, evolve
from services.aggregator.store import Store
from services.common.secagg import blob as codec
from services.common.secagg.messages import Signed


@dataclass(frozen=True)
class File:
    """One file of the evidence: bytes, or where they lie. `path` is relative, '/'-separated."""

    path: str
    data: bytes | Path


def evidence(store: Store, charters: Charters, study: bytes) -> Iterator[File]:
    """The files of one study. Charters that were in force before the last one lie in `charters/HEX.yaml`, the pods'
    signatures on them in `signatures/HEX.yaml`."""
    stored = store.facts(study)
    used = list(dict.fromkeys(fact.charter for fact in stored if isinstance(fact, f.Opened)))
    newest = used[-1] if used else charters.pinned.current.digest
    yield File("charter.yaml", charters.get(newest).blob)
    for digest in used[:-1]:
        yield File(f"charters/{digest.hex()}.yaml", charters.get(digest).blob)
        if (signatures := charters.signatures(digest)) is not None:
            yield File(f"signatures/{digest.hex()}.yaml", signatures)
    if (signatures := charters.signatures(newest)) is not None:
        yield File("charter.signatures.yaml", signatures)
    yield File("study.yaml", store.blobs.path(study))
    yield from _models(store, stored)
    state = State()
    for fact in stored:
        state = evolve(state, fact)
        for name, data in _of_round(store, state, fact):
            yield File(f"rounds/{state.round:04d}/{name}", data)
    rows = [{"version": event.version, "kind": event.kind, "payload": event.payload} for event in store.events(study)]
    lines = (json.dumps(row, sort_keys=True, separators=(",", ":")) for row in rows)
    yield File("log.jsonl", "".join(line + "\n" for line in lines).encode())


def _models(store: Store, stored: list[f.Fact]) -> Iterator[File]:
    versions: dict[int, bytes] = {}
    for fact in stored:
        if isinstance(fact, f.Opened | f.Concluded):
            versions[fact.version] = fact.model
    for version, model in sorted(versions.items()):
        yield File(f"models/v{version:04d}.safetensors", store.blobs.path(model))


def _of_round(store: Store, state: State, fact: f.Fact) -> Iterator[tuple[str, bytes | Path]]:
    a = state.attempt
    match fact:
        case f.Manifested():
            yield f"manifest-{a}.blob", fact.manifest
        case f.Endorsed():
            yield f"endorse-{a}-{fact.pod}.signed", _signed(fact.endorsement)
        case f.Submitted():
            yield f"header-{a}-{fact.hospital}.signed", _signed(fact.header)
            yield f"receipt-{a}-{fact.hospital}.signed", _signed(fact.receipt)
        case f.Listed():
            yield f"accept-{a}-{fact.pod}.signed", _signed(fact.accept_list)
        case f.Certified():
            yield f"certificate-{a}.blob", fact.certificate
        case f.Claimed():
            kind = "release" if fact.released else "digest"
            yield f"{kind}-{a}-{fact.pod}-{fact.piece}.signed", _signed(fact.claim)
        case f.Abandoned():
            yield f"abandon-{a}.blob", fact.certificate
        case f.Concluded():
            if store.blobs.has(fact.sum):
                yield "sum.bin", store.blobs.path(fact.sum)
            yield "result.signed", _signed(fact.result)
            yield "close.signed", _signed(fact.close)


def _signed(signed: Signed) -> bytes:
    return codec.encode(signed)

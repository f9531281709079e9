"""One round at a hospital, resumable at every step (protocol.md §4 steps 4, 5, 10; §5 P-10; privacy.md L-1, L-2).

`advance` is called with the aggregator's newest claim, again and again; what is done already is found in the store.
    consent → model → evaluation and training → x on disk → [manifest] → checks → y made, its seeds on disk
    → ONE transaction {pending record, debit} → upload → receipt → [result] → membership → scrub
Killed anywhere: a pending record is sent again byte for byte; x is reused under the next attempt with an abandon
certificate; before that a new vector is drawn. `checkpoint(name)` is passed at each of `ports.STEPS`: tests kill there.
Not here: the loop and its threads (node.py), what makes an attempt valid (attempt.py).
"""

import logging
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

from services.common.clock import Clock
from services.common.documents.charter import LoadedCharter
from services.common.documents.shape import RoundShape, check_study, core_for, round_shape, total_rounds
from services.common.documents.strategies import most_model_bytes
from services.common.documents.study import LoadedStudy, load_study
from services.common.errors import Reason, ServiceError
from services.common.secagg import sealing
from services.common.secagg.certificate import CheckedManifest, check_manifest, check_receipt
from services.common.secagg.signing import Signer, digest
from services.common.store.blobs import BlobStore
from services.hospital_node.attempt import check_attempt
from services.hospital_node.client import AggregatorClient, ManifestAnswer, Phase, RoundState, Upload
from services.hospital_node.consent import Consent
from services.hospital_node.control import own_control
from services.hospital_node.ledger import Ledger
from services.hospital_node.policy import decide_study
from services.hospital_node.ports import Consents, Progress, Trainer
from services.hospital_node.release import Counts, encode_round, round_debits, study_plan
from services.hospital_node.results import follow_results
from services.hospital_node.store import Store, Submission, Vector
from services.hospital_node.submission import mask, masked_chunks, sign_header
from services.hospital_node.vectorfile import checking_vector, damaged, reading_vector, write_vector

_PASSING = frozenset({"waiting", "fetching", "trained", "submitting"})  # in every round: the status says them, no log
_log = logging.getLogger(__name__)


class Participation:
    """One hospital's part in the rounds of one aggregator. One thread calls `advance`."""

    def __init__(
        self,
        hospital: str,
        signer: Signer,
        consents: Consents,
        *,
        client: AggregatorClient,
        store: Store,
        models: BlobStore,
        trainer: Trainer,
        clock: Clock,
        report: Callable[[Progress], None] = lambda progress: None,
        checkpoint: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.hospital = hospital
        self.store = store
        self.ledger = Ledger(store.database)
        self.consent = Consent(consents, self.ledger, store, trainer, clock)
        self._signer = signer
        self._consents = consents
        self._client = client
        self._models = models
        self._trainer = trainer
        self._clock = clock
        self._report = report
        self._checkpoint = checkpoint
        self.progress = Progress()
        self._studies: dict[bytes, LoadedStudy] = {}
        self._checked: set[bytes] = set()  # charters that the study of `_studies` was held against
        self._drawn: Vector | None = None  # x that this life wrote: masked once without being looked at again

    def advance(self, state: RoundState, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Do all that `state` allows: follow results, scrub what is over, prepare a vector, submit it.

        Raises ServiceError: a refusal (nothing left, nothing will under this state) or a fault worth a retry.
        """
        if not state.study:
            self._say("idle", "no study is open")
            return
        self.progress.take(state.study, state.round, state.attempt)
        self._refuse_halted(state.study)
        charter = self._charter(state.charter)
        refusal = decide_study(self._consents.policy(), state.study)
        if refusal is not None:
            raise refusal
        study = self._study(state.study, charter)
        self.progress.study_name = study.document.name
        self.progress.figures["rounds_total"] = float(total_rounds(study))
        self._follow(study, state)
        if self.store.scrub(study.digest, state.closed_round):
            self._checkpoint("scrubbed")
        if state.phase is Phase.FINISHED:
            self.progress.figures |= {"rounds_left": 0.0, "rounds_planned": 0.0}
            self._say("finished", f"study {study.document.name} is complete")
        elif state.phase not in (Phase.TRAINING, Phase.COLLECTING) or state.round <= state.closed_round:
            self._say("waiting", "no round is open for submissions")
        else:
            self._take_part(charter, study, state, should_stop)

    def _take_part(
        self, charter: LoadedCharter, study: LoadedStudy, state: RoundState, should_stop: Callable[[], bool]
    ) -> None:
        self._check_round(study, state)
        pending = self.store.submission(state.manifest) if state.phase is Phase.COLLECTING else None
        if pending is not None and pending.receipt is not None:
            self._say("submitted", "the aggregator has this round's vector; its receipt is stored")
            return
        if pending is not None:
            self._say("submitting", "uploading the masked vector")
            self._upload(pending, charter)  # paid for, perhaps half sent: the same bytes, whatever the policy says now
            return
        self._check_model(study, state)
        self.consent.require(charter, study, state.round, state.model, self.progress.figures)
        self._checkpoint("consented")
        kept = self.store.vector(study.digest, state.round)
        vector = self._prepare(charter, study, state, kept, should_stop)
        if vector is None:
            self._say("stopped", "the round ended, or this process is stopping, before training was done")
        elif state.phase is Phase.TRAINING:
            self._say("trained", "waiting for the round's manifest")
        else:  # after a training the manifest that came with the claim may be that of an attempt which is over
            self._submit(charter, study, vector, state.endorsed if vector == kept else None)

    def _prepare(
        self,
        charter: LoadedCharter,
        study: LoadedStudy,
        state: RoundState,
        kept: Vector | None,
        should_stop: Callable[[], bool],
    ) -> Vector | None:
        """x under (study, round): the stored one, else one new draw of sampling and noise. None when stopped."""
        if kept is not None and (kept.charter, kept.model) == (charter.digest, state.model):
            return kept
        if kept is not None and any(sent.round == state.round for sent in self.store.sent(study.digest, state.round)):
            raise ServiceError(
                Reason.WRONG_CORE,
                f"round {state.round} has another charter or model than the vector that was submitted in it (P-16): "
                "nothing is trained, the vector is kept",
            )
        self._say("fetching", "downloading the model")
        shape, path, update = round_shape(charter, study, state.round), self._model(state.model, study), None
        self._checkpoint("model-fetched")
        self._say("training", "training on the ward's images")
        counts = self._evaluate(study, shape, path)
        if shape.kind == "train":
            control = own_control(self.store, study)
            update = self._trainer.train(study, state.round, path, state.model, should_stop, control)
            if update is None:
                return None
        self._checkpoint("trained")
        chunks = encode_round(study.document, shape, update, counts, lambda: secrets.token_bytes(32))
        stored = write_vector(self.store.blobs, shape.table.total_bytes, chunks)
        self._checkpoint("vector-stored")
        vector = Vector(study.digest, state.round, secrets.token_hex(16), charter.digest, state.model, stored)
        self.store.keep_vector(vector)
        self._drawn = vector
        self._trainer.forget()
        self._checkpoint("vector-kept")
        return vector

    def _evaluate(self, study: LoadedStudy, shape: RoundShape, model: Path) -> Counts | None:
        if shape.kind == "final":
            return self._trainer.evaluate(study, model, "test")
        return self._trainer.evaluate(study, model, "validation") if shape.has_gate else None

    def _submit(self, charter: LoadedCharter, study: LoadedStudy, vector: Vector, came: ManifestAnswer | None) -> None:
        self._say("submitting", "masking and uploading the vector")
        answer = came or self._client.manifest(study.digest, vector.round)
        own = core_for(charter, study, vector.round, self.store.chain(study.digest).digest, vector.model)
        checked = check_attempt(
            answer.manifest,
            answer.endorsements,
            answer.abandons,
            roster=charter.roster,
            own=own,
            sent=self.store.sent(study.digest, own.round),
            now_ms=self._clock.now_ms(),
        )
        self._checkpoint("manifest-checked")
        pending = self.store.submission(checked.M)
        if pending is not None:
            self._upload(pending, charter)
        else:
            self._upload(self._pend(charter, study, vector, checked), charter, fresh=True)

    def _pend(self, charter: LoadedCharter, study: LoadedStudy, vector: Vector, checked: CheckedManifest) -> Submission:
        """Mask, then debit and pending record in ONE transaction, before the first byte leaves (L-1)."""
        round_number, attempt = checked.core.round, checked.proposal.attempt
        drawn, self._drawn = self._drawn, None
        with (
            reading_vector(self.store.blobs, vector.x)
            if drawn == vector
            else checking_vector(self.store.blobs, vector.x, checked.table.total_bytes)
        ) as fill:
            masked = mask(fill, checked, self.hospital)
        seeds = self.store.blobs.write([sealing.pack_seeds(masked.seeds)])
        self._checkpoint("masked")
        shape = round_shape(charter, study, round_number)
        debits = round_debits(study, shape, vector.model, vector.name, attempt=attempt, manifest=checked.M)
        joined = self.ledger.account().joined.get(study.digest.hex())
        joining = joined or study_plan(charter, study, self._consents.policy())
        with self.store.database.transaction() as connection:
            paid = self.ledger.debited(vector.name)
            mark = self.ledger.mark() if paid else self.ledger.debit(connection, joining, debits, self.consent.data)
            header = sign_header(masked, checked, self.hospital, mark, self._signer)
            pending = Submission(
                study=study.digest,
                round=round_number,
                attempt=attempt,
                manifest=checked.M,
                manifest_blob=checked.blob,
                charter=charter.digest,
                core=checked.core_digest,
                vector_name=vector.name,
                header=header,
                header_digest=digest("header", header.blob),
                boxes=masked.boxes,
                chunk_digests=masked.chunk_digests,
                seeds=seeds,
                vector=masked.vector,
            )
            self.store.pend(connection, pending)
            self._checkpoint("in-transaction")
        self._checkpoint("debited")
        # P-10: x of earlier rounds is scrubbed as soon as a higher round is submitted.
        self.store.scrub(study.digest, round_number - 1)
        return pending

    def _upload(self, pending: Submission, charter: LoadedCharter, fresh: bool = False) -> None:
        """Send a pending record, from the chunk that the aggregator lacks, byte for byte what was first made.

        `fresh`: it was made just now, so the aggregator lacks all of it and need not be asked.
        """
        checked = check_manifest(pending.manifest_blob, charter.roster)
        next_chunk, receipt = (
            (0, None) if fresh else self._client.upload_status(pending.manifest, pending.header_digest)
        )
        if receipt is None:
            upload = Upload(pending.header, pending.boxes, pending.chunk_digests)
            receipt = self._client.submit(upload, next_chunk, self._chunks(pending, checked, next_chunk))
            self._checkpoint("uploaded")
        check_receipt(receipt, checked, pending.header, self.hospital, pending.vector)
        self.store.keep_receipt(pending.manifest, receipt)
        self._checkpoint("receipt-kept")
        self._say("submitted", "the aggregator has this round's vector; its receipt is stored")

    def _chunks(self, pending: Submission, checked: CheckedManifest, first: int) -> Iterator[bytes]:
        """y from chunk `first` on, made again from x and the seeds that were stored before it first left."""
        vector = self.store.vector(pending.study, pending.round)
        if vector is None or vector.name != pending.vector_name or not self.store.blobs.has(pending.seeds):
            raise damaged()
        packed = self.store.blobs.path(pending.seeds).read_bytes()
        seeds = sealing.unpack_seeds(packed, len(checked.roster.committee.pieces))
        with reading_vector(self.store.blobs, vector.x) as fill:
            for chunk in masked_chunks(fill, checked, self.hospital, seeds, pending.chunk_digests, first):
                yield chunk
                self._checkpoint("chunk-sent")

    def _follow(self, study: LoadedStudy, state: RoundState) -> None:
        """Take new signed results; an alarm stops the study here for good."""
        rosters = {charter: loaded.roster for charter, loaded in self._consents.held_charters().items()}
        while state.previous_result and state.previous_result != self.store.chain(study.digest).digest:
            held = self.store.chain(study.digest).round
            came = state.newest_result if state.newest_result_after == held else None
            answers = (came,) if came is not None else self._client.results(study.digest, held)
            if not answers:
                break  # the claim does not end in a chain: the manifest's own check will refuse it
            follow_results(self.store, self.ledger, self.hospital, study, rosters, answers)
            self._checkpoint("result-checked")
        self.progress.model_version = self.store.chain(study.digest).version

    def _check_round(self, study: LoadedStudy, state: RoundState) -> None:
        """Refuse a replayed round before anything is trained for it; `check_attempt` holds the mark again later."""
        highest = self.store.highest_sent(study.digest)
        if state.round <= self.store.chain(study.digest).round or state.round < highest:
            raise ServiceError(
                Reason.CLOSED, f"round {state.round} is over at this hospital, which has taken part up to {highest}"
            )

    def _check_model(self, study: LoadedStudy, state: RoundState) -> None:
        """The model that a round starts from is the study's first, or the one that the last signed result names."""
        chain = self.store.chain(study.digest)
        expected = chain.model or bytes.fromhex(study.document.model.initial)
        if state.model != expected:
            raise ServiceError(
                Reason.WRONG_CORE,
                f"round {state.round} offers model {state.model.hex()[:12]}…, the chain of signed results leads to "
                f"{expected.hex()[:12]}…: nothing is trained; compare with another hospital",
            )

    def _model(self, model: bytes, study: LoadedStudy) -> Path:
        """The model file by digest, resumed where an earlier life stopped; older ones are dropped."""
        if not self._models.has(model):
            with self._models.partial(model.hex()) as partial:
                self._client.fetch_model(model, partial, most_model_bytes(study.document))
        for file in (self._models.folder / "blobs").iterdir():
            if file.name != model.hex():
                self._models.delete(bytes.fromhex(file.name))
        return self._models.path(model)

    def _study(self, study_digest: bytes, charter: LoadedCharter) -> LoadedStudy:
        """The study by SHA-256, held against the charter."""
        study = self._studies.get(study_digest)
        if study is None:
            study = load_study(self._client.study(study_digest))
            if study.digest != study_digest:
                raise ServiceError(
                    Reason.BAD_DIGEST,
                    f"the aggregator's study has SHA-256 {study.digest.hex()[:12]}…, not {study_digest.hex()[:12]}…",
                )
            self._studies, self._checked = {study_digest: study}, set()
        if charter.digest not in self._checked:
            check_study(charter, study)
            self._checked.add(charter.digest)
        return study

    def _charter(self, charter_digest: bytes) -> LoadedCharter:
        charter = self._consents.charters().get(charter_digest)
        if charter is None:
            raise ServiceError(
                Reason.WRONG_CORE,
                f"the round runs under charter {charter_digest.hex()[:12]}…, which is not pinned here: read it, then "
                "`wardround charter verify --confirm`",
            )
        charter.roster.hospital(self.hospital)
        return charter

    def _refuse_halted(self, study: bytes) -> None:
        if (detail := self.store.halted(study)) is not None:
            raise ServiceError(Reason.CONFLICT, f"this study is stopped here: {detail}")

    def _say(self, phase: str, detail: str) -> None:
        self.progress.phase, self.progress.detail = phase, detail
        level = logging.DEBUG if phase in _PASSING else logging.INFO
        place = {"round": self.progress.round, "attempt": self.progress.attempt}
        _log.log(level, "%s: %s", phase, detail, extra=place)
        self._report(self.progress)

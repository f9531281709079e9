"""The closed list of reasons why a service refuses, free of any transport.

The edge (`rpc.errors`) maps each reason to one gRPC status code and back; a caller on the other side
of the wire catches the same `ServiceError` with the same `Reason`.
"""

from enum import StrEnum


class Reason(StrEnum):
    """Why something was refused. The comment says what the caller does about it."""

    MALFORMED = "MALFORMED"  # fix the request, never retry
    TOO_LARGE = "TOO_LARGE"  # fix the request, never retry
    BAD_SIGNATURE = "BAD_SIGNATURE"  # fix the request, never retry
    BAD_DIGEST = "BAD_DIGEST"  # fix the request, never retry (a corrupted chunk: send it again)
    INVALID_DOCUMENT = "INVALID_DOCUMENT"  # fix the file, never retry
    INVALID_DATA = "INVALID_DATA"  # fix the data set, never retry
    NOT_FINITE = "NOT_FINITE"  # a failed training: nothing is submitted
    OUT_OF_BOUND = "OUT_OF_BOUND"  # a value beyond its lane's bound: a local error
    NOT_FOUND = "NOT_FOUND"  # stop
    UNKNOWN_MEMBER = "UNKNOWN_MEMBER"  # stop: the charter does not list this site
    NOT_PERMITTED = "NOT_PERMITTED"  # stop: this role may not call this
    POLICY_REFUSES = "POLICY_REFUSES"  # stop: the site's own policy does not allow it
    BUDGET_EXHAUSTED = "BUDGET_EXHAUSTED"  # stop until an operator acts
    WRONG_PHASE = "WRONG_PHASE"  # wait for the next phase
    WRONG_CORE = "WRONG_CORE"  # another core, charter or proposal than the one this role computed or holds
    BURNED = "BURNED"  # this (round, attempt) cannot be used any more: take the next attempt
    NOT_LIVE = "NOT_LIVE"  # the pod waits for high-water marks, or has no keys of this manifest
    LOCKED = "LOCKED"  # a lock stands against it
    ABANDONED = "ABANDONED"  # the attempt was given up
    CLOSED = "CLOSED"  # the round is over
    BELOW_QUORUM = "BELOW_QUORUM"  # wait for more pods
    BELOW_COHORT = "BELOW_COHORT"  # wait for more hospitals
    ROLLED_BACK = "ROLLED_BACK"  # a store or ledger went back in time: an operator must act
    CONFLICT = "CONFLICT"  # alarm: two different things under one name
    LATE = "LATE"  # after the deadline or the lock: wait for the next round
    STALE_VERSION = "STALE_VERSION"  # somebody wrote first: read again, retry at once
    UNKNOWN_SCHEMA = (
        "UNKNOWN_SCHEMA"  # a store of a newer version: upgrade the service; of an earlier build: begin anew
    )
    UNSAFE_STORE = "UNSAFE_STORE"  # the store may not be used (locked, volatile, not durable)
    STORAGE = "STORAGE"  # the disk is full or failing: back off
    UNREACHABLE = "UNREACHABLE"  # back off and retry
    INTERNAL = "INTERNAL"  # detail only in the refusing side's own log


class ServiceError(Exception):
    """A refusal with its reason; `detail` names the thing, the limit and the next step for a person."""

    def __init__(self, reason: Reason, detail: str, **metadata: str) -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason = reason
        self.detail = detail
        self.metadata = metadata

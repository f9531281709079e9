"""The ledger: its chain, and what it takes and refuses (privacy.md §7)."""

import threading
from pathlib import Path

import pytest

from services.common.errors import Reason, ServiceError
from services.common.store.database import Database, open_database
from services.hospital_node.events import Debit, Exposed, LedgerEvent, decode_event, encode_event
from services.hospital_node.ledger import SCHEMA, Ledger, verify_export
from tests.support.ledgers import DEBIT, debit, joined, planned


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return open_database(tmp_path / "ledger.sqlite", (SCHEMA,))


@pytest.fixture
def ledger(database: Database) -> Ledger:
    return Ledger(database)


def add(ledger: Ledger, database: Database, *events: LedgerEvent) -> None:
    with database.transaction() as connection:
        ledger.append(connection, events)


def test_joining_is_written_once_before_the_first_debit_of_a_study(ledger: Ledger, database: Database) -> None:
    """L-2: q, σ and T are fixed at joining; a second round adds its debits alone."""
    joining = joined(planned(3))
    for number in (1, 2):
        with database.transaction() as connection:
            ledger.debit(connection, joining, [debit(number)])
    assert ledger.events() == (joining, debit(1), debit(2))
    assert ledger.debits() == (debit(1), debit(2))


def test_l1_a_vector_is_debited_or_not(ledger: Ledger, database: Database) -> None:
    add(ledger, database, debit(1))
    assert ledger.debited("v1")
    assert not ledger.debited("x")


def test_l3_exposure_is_appended_once_and_only_where_something_was_spent(ledger: Ledger, database: Database) -> None:
    """L-3: an event after the debit, never a rewritten one; the debit itself stays as it was."""
    add(ledger, database, debit(1))
    for number in (1, 1, 2):
        with database.transaction() as connection:
            ledger.expose(connection, DEBIT.study, number, "a cohort of 2")
    assert ledger.events() == (debit(1), Exposed(DEBIT.study, 1, "a cohort of 2"))


def test_readers_beside_the_writer_see_every_event_once(ledger: Ledger, database: Database) -> None:
    """Whoever asks for figures reads in a thread of its own while rounds debit."""
    written = 150
    faults: list[tuple[LedgerEvent, ...]] = []

    def read() -> None:
        while len(events := ledger.events()) < written and not faults:
            if events != tuple(debit(number) for number in range(1, len(events) + 1)):
                faults.append(events)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for number in range(1, written + 1):
        add(ledger, database, debit(number))
        assert len(ledger.account().debits) == number  # the writer never decides by an older reading
    for reader in readers:
        reader.join(30)
    assert not faults
    assert not any(reader.is_alive() for reader in readers)


def test_what_was_read_in_a_transaction_that_was_rolled_back_is_forgotten(ledger: Ledger, database: Database) -> None:
    def undone(number: int) -> None:
        with database.transaction() as connection:
            ledger.append(connection, [debit(number)])
            assert ledger.debited(f"v{number}")
            raise ZeroDivisionError

    add(ledger, database, debit(1))
    with pytest.raises(ZeroDivisionError):
        undone(2)
    assert ledger.events() == (debit(1),)
    with pytest.raises(ZeroDivisionError):
        undone(3)
    add(ledger, database, debit(4), debit(5))
    assert ledger.events() == (debit(1), debit(4), debit(5))
    assert ledger.account().debits == (debit(1), debit(4), debit(5))


@pytest.mark.parametrize(
    "blob",
    [
        encode_event(debit(1)).replace(b'"debit"', b'"refund"'),
        encode_event(debit(1)).replace(b'"steps":1', b'"steps":1,"more":2'),
        encode_event(debit(1)).replace(b'"steps":1', b'"steps": 1'),
        encode_event(joined(planned(1))).replace(b'"plan":[', b'"plan":[[],'),
        b"[]",
        b"\xff",
    ],
    ids=["kind", "field", "spaces", "plan", "list", "bytes"],
)
def test_event_of_another_version_is_refused_not_skipped(blob: bytes) -> None:
    with pytest.raises(ServiceError) as refused:
        decode_event(blob)
    assert refused.value.reason is Reason.MALFORMED


def test_ledger_stores_what_happened_and_no_epsilon_spent() -> None:
    """§7: ε is derived. The caps in force at joining are the only ε that stand there."""
    assert not any("epsilon" in name for name in Debit.__dataclass_fields__)
    assert decode_event(encode_event(joined(planned(2)))) == joined(planned(2))


def test_chain_goes_on_after_a_restart_and_starts_anew_nowhere(ledger: Ledger, database: Database) -> None:
    """L-4: {sequence, head} rise together; two fresh ledgers with equal events have other heads (32 random bytes)."""
    start = ledger.mark()
    assert start.sequence == 0
    add(ledger, database, debit(1))
    first = ledger.mark()
    add(ledger, database, debit(2))
    assert (first.sequence, ledger.mark().sequence) == (1, 2)
    path = database.path
    database.close()
    again = open_database(path, (SCHEMA,))
    assert Ledger(again).mark() != first
    other = Ledger(open_database(path.with_name("other.sqlite"), (SCHEMA,)))
    assert other.mark().head != start.head


def test_events_cannot_be_changed_or_removed(ledger: Ledger, database: Database) -> None:
    """Append-only: the store itself refuses."""
    add(ledger, database, debit(1))
    for statement in ("UPDATE ledger SET event = x'00'", "DELETE FROM ledger"):
        with pytest.raises(Exception, match="ledger events"), database.transaction() as connection:
            connection.execute(statement)


def test_ledger_damaged_on_disk_is_refused_at_start(ledger: Ledger, database: Database) -> None:
    """L-5: whoever writes around the triggers is found by the chain, and the first broken link is named."""
    add(ledger, database, debit(1), debit(2), debit(3))
    with database.transaction() as connection:
        connection.execute("DROP TRIGGER ledger_stays")
        connection.execute(
            "UPDATE ledger SET event = CAST(replace(CAST(event AS TEXT), '6.0', '9.0') AS BLOB) WHERE sequence = 2"
        )
    with pytest.raises(ServiceError, match="event 2") as refused:
        Ledger(database)
    assert refused.value.reason is Reason.ROLLED_BACK


def test_l5_export_verifies_offline(ledger: Ledger, database: Database) -> None:
    add(ledger, database, debit(1), debit(2))
    assert verify_export(ledger.export()) == ledger.mark()
    assert verify_export([]) is None

"""The ledger's chain and its transaction, for whatever is changed and wherever it fails."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.errors import ServiceError
from services.common.store.database import open_database
from services.hospital_node.events import Debit
from services.hospital_node.ledger import SCHEMA, Ledger, verify_export

DEBITS = st.lists(
    st.builds(
        Debit,
        mechanism=st.sampled_from(["local", "none"]),
        split=st.sampled_from(["train", "validation", "test"]),
        sampling_rate=st.floats(0.01, 1.0),
        noise_multiplier=st.floats(0.5, 20),
        steps=st.integers(1, 100),
        sensitivity=st.floats(1, 1e9),
        scale=st.integers(256, 2**40),
        minimum_cohort=st.integers(2, 9),
        colluding_hospitals=st.integers(0, 4),
        delta=st.floats(1e-9, 1e-3),
        study=st.binary(min_size=32, max_size=32).map(bytes.hex),
        round=st.integers(1, 1000),
        attempt=st.integers(1, 64),
        manifest=st.binary(min_size=32, max_size=32).map(bytes.hex),
        model=st.binary(min_size=32, max_size=32).map(bytes.hex),
        vector=st.binary(min_size=16, max_size=16).map(bytes.hex),
    ),
    min_size=1,
    max_size=5,
)


def exported(debits: list[Debit]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        database = open_database(Path(folder) / "l.sqlite", (SCHEMA,))
        ledger = Ledger(database)
        for debit in debits:
            with database.transaction() as connection:
                ledger.append(connection, [debit])
        assert list(ledger.debits()) == debits
        database.close()
        return "".join(line + "\n" for line in ledger_lines(folder))


def ledger_lines(folder: str) -> list[str]:
    database = open_database(Path(folder) / "l.sqlite", (SCHEMA,))
    try:
        return list(Ledger(database).export())
    finally:
        database.close()


@settings(max_examples=25, deadline=None)
@given(debits=DEBITS, data=st.data())
def test_any_flipped_byte_of_an_export_is_found(debits: list[Debit], data: st.DataObject) -> None:
    """L-5: verify fails on one flipped bit anywhere, on a missing line, and on two lines in the wrong order."""
    text = exported(debits)
    assert verify_export(text.splitlines()) is not None
    place = data.draw(st.integers(0, len(text.encode()) - 1))
    damaged = bytearray(text.encode())
    damaged[place] ^= 1 << data.draw(st.integers(0, 7))
    lines = damaged.decode("utf-8", "replace").split("\n")
    if place != len(damaged) - 1:  # the very last byte is the file's own end of line
        with pytest.raises(ServiceError):
            verify_export(lines[:-1] if lines[-1] == "" else lines)
    kept = text.splitlines()
    if len(kept) > 1:
        with pytest.raises(ServiceError):
            verify_export(kept[1:])
        with pytest.raises(ServiceError):
            verify_export([*kept[:-2], kept[-1], kept[-2]])


@settings(max_examples=25, deadline=None)
@given(debits=DEBITS, dies_after=st.integers(0, 5))
def test_debit_and_pending_record_are_one(debits: list[Debit], dies_after: int) -> None:
    """L-1: a transaction that fails at any place leaves neither debit nor record, and the chain where it was."""
    with tempfile.TemporaryDirectory() as folder:
        database = open_database(Path(folder) / "l.sqlite", (SCHEMA, "CREATE TABLE pending (name TEXT) STRICT"))
        ledger = Ledger(database)
        before = ledger.mark()

        class FullDiskError(Exception):
            pass

        def release(fail: bool) -> None:
            with database.transaction() as connection:
                for number, debit in enumerate(debits):
                    if fail and number == dies_after:
                        raise FullDiskError
                    ledger.append(connection, [debit])
                connection.execute("INSERT INTO pending VALUES ('x')")
                if fail:
                    raise FullDiskError

        with pytest.raises(FullDiskError):
            release(fail=True)
        assert ledger.mark() == before
        assert database.query("SELECT count(*) FROM pending") == [(0,)]
        release(fail=False)
        assert ledger.mark().sequence == len(debits)
        assert database.query("SELECT count(*) FROM pending") == [(1,)]
        database.close()

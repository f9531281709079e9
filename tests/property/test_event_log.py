"""The contract of an event log, against a plain dict: whatever is appended, in whatever order, from wherever."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from services.common.errors import Reason, ServiceError
from services.common.store.database import open_database
from services.common.store.events import SCHEMA, EventLog

STREAMS = st.sampled_from(["round/1", "round/2", "ε"])
PAYLOADS = st.dictionaries(
    st.text(max_size=5), st.none() | st.booleans() | st.integers() | st.text(max_size=20), max_size=3
)
EVENTS = st.lists(st.tuples(st.sampled_from(["Opened", "Locked"]), PAYLOADS), max_size=3)


class EventLogContract(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.model: dict[str, list[tuple[str, dict[str, Any]]]] = {}
        self.open()

    def open(self) -> None:
        self.database = open_database(Path(self.folder.name) / "s.db", [SCHEMA])
        self.log = EventLog(self.database)

    def teardown(self) -> None:
        self.database.close()
        self.folder.cleanup()

    @rule(stream=STREAMS, events=EVENTS)
    def append(self, stream: str, events: list[tuple[str, dict[str, Any]]]) -> None:
        held = self.model.setdefault(stream, [])
        assert self.log.append(stream, len(held), events, "test") == len(held) + len(events)
        held += events

    @rule(stream=STREAMS, events=EVENTS, off=st.integers(-3, 3).filter(bool))
    def append_at_another_version(self, stream: str, events: list[tuple[str, dict[str, Any]]], off: int) -> None:
        expected = len(self.model.get(stream, [])) + off
        with pytest.raises(ServiceError) as caught:
            self.log.append(stream, expected, events, "test")
        assert caught.value.reason is Reason.STALE_VERSION

    @rule(stream=STREAMS, events=EVENTS)
    def append_in_a_transaction_that_fails(self, stream: str, events: list[tuple[str, dict[str, Any]]]) -> None:
        def fail() -> None:
            with self.database.transaction():
                self.log.append(stream, len(self.model.get(stream, [])), events, "test")
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail()

    @rule()
    def reopen(self) -> None:
        self.database.close()
        self.open()

    @rule(stream=STREAMS, after=st.integers(0, 5))
    def read_the_rest(self, stream: str, after: int) -> None:
        found = [(event.kind, event.payload) for event in self.log.read(stream, after)]
        assert found == self.model.get(stream, [])[after:]

    @invariant()
    def everything_is_there_in_order(self) -> None:
        assert self.log.streams() == sorted(name for name, held in self.model.items() if held)
        for stream, held in self.model.items():
            found = self.log.read(stream)
            assert [event.version for event in found] == list(range(1, len(held) + 1))
            assert [(event.kind, event.payload) for event in found] == held
            assert self.log.version(stream) == len(held)


EventLogContract.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
TestEventLog = EventLogContract.TestCase


def test_events_cannot_be_changed_or_removed(tmp_path: Path) -> None:
    database = open_database(tmp_path / "s.db", [SCHEMA])
    EventLog(database).append("s", 0, [("Opened", {})], "test")
    for statement in ("UPDATE events SET kind = 'x'", "DELETE FROM events"):
        with pytest.raises(Exception, match="events"), database.transaction() as connection:
            connection.execute(statement)
    assert len(EventLog(database).read("s")) == 1
    database.close()


def test_a_number_that_json_cannot_carry_is_refused(tmp_path: Path) -> None:
    database = open_database(tmp_path / "s.db", [SCHEMA])
    with pytest.raises(ValueError, match="JSON"):
        EventLog(database).append("s", 0, [("Opened", {"epsilon": float("nan")})], "test")
    assert EventLog(database).streams() == []
    database.close()

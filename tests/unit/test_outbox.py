"""The bounded line of messages behind a stream that a site keeps open."""

import threading
from itertools import islice

import pytest

from services.common.errors import Reason, ServiceError
from services.common.rpc.outbox import Outbox


def test_messages_leave_in_order_and_whoever_makes_them_waits_for_the_line() -> None:
    outbox = Outbox(0)
    made: list[int] = []

    def make() -> None:
        for number in range(1, 6):
            outbox.put(number)
            made.append(number)

    maker = threading.Thread(target=make)
    maker.start()
    taken = list(islice(outbox, 6))
    maker.join()
    assert taken == [0, 1, 2, 3, 4, 5]
    assert made == [1, 2, 3, 4, 5]


def test_the_end_of_the_stream_frees_whoever_waits_on_either_side() -> None:
    outbox, ended = Outbox(0), []
    outbox.put(1)  # now it is full

    def make() -> None:
        with pytest.raises(ServiceError) as refused:
            outbox.put(2)
        ended.append(refused.value.reason)

    maker = threading.Thread(target=make)
    maker.start()
    outbox.close()
    maker.join(30)
    assert ended == [Reason.UNREACHABLE]
    assert list(outbox) == []  # what nobody can hear is not sent
    with pytest.raises(ServiceError):
        outbox.put(3)

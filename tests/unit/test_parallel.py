"""Work on several threads whose outcomes come in order, and what happens when nobody takes them."""

import subprocess
import sys
import threading
from itertools import islice

import pytest

from services.common.secagg.parallel import in_order


def test_outcomes_come_in_order_and_only_so_many_are_under_way() -> None:
    lock, begun, taken, most = threading.Lock(), 0, 0, 0

    def work(number: int) -> int:
        nonlocal begun, most
        with lock:
            begun += 1
            most = max(most, begun - taken)
        return number * number

    for number, outcome in enumerate(in_order(work, range(50), workers=3)):
        assert outcome == number * number
        with lock:
            taken += 1
    assert taken == 50
    assert most <= 2 * 3 + 1  # one is with the taker


def test_a_failure_comes_in_its_place_and_nothing_works_on_after_it() -> None:
    begun: list[int] = []

    def work(number: int) -> int:
        begun.append(number)
        if number == 2:
            raise ValueError("2 is broken")
        return number

    outcomes = in_order(work, range(100), workers=2)
    assert list(islice(outcomes, 2)) == [0, 1]
    with pytest.raises(ValueError, match="2 is broken"):
        next(outcomes)
    done = len(begun)
    assert done < 10
    assert list(outcomes) == []
    assert len(begun) == done


ABANDONED = """
import concurrent.futures.thread, gc, threading
from services.common.secagg.parallel import in_order

gate = threading.Event()

def abandon():
    outcomes = in_order(lambda number: number == 0 or gate.wait(), range(100), workers=2)
    next(outcomes)
    cycle = [outcomes]
    cycle.append(cycle)

gc.disable()
for lock in (threading._shutdown_locks_lock, concurrent.futures.thread._global_shutdown_lock):
    abandon()
    with lock:  # as a thread holds it that starts or submits
        assert gc.collect() > 0
gate.set()
"""


def test_an_abandoned_one_may_be_collected_in_any_thread() -> None:
    """A hospital hung for ever when the collector ran in a starting thread and met a vector that was given up."""
    done = subprocess.run([sys.executable, "-c", ABANDONED], timeout=120, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

"""Numbered pieces of work on all cores, their outcomes in order. OpenSSL, hashlib and numpy free the interpreter."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import cpu_count
from typing import TypeVar

WORKERS = min(cpu_count(), 8)  # each may hold several MiB
T = TypeVar("T")


def in_order(work: Callable[[int], T], numbers: range, workers: int = WORKERS) -> Iterator[T]:
    """`work` of each number on `workers` threads, in order; at most 2 * workers under way or waiting to be taken."""
    if workers == 1 or len(numbers) <= 1:
        yield from map(work, numbers)
        return
    pool = ThreadPoolExecutor(workers)
    waiting: deque[Future[T]] = deque()
    try:
        for number in numbers:
            waiting.append(pool.submit(work, number))
            if len(waiting) >= 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except GeneratorExit:
        # The taker left early. Perhaps the garbage collector says so, inside any thread: one that works here, or one
        # that just starts and holds a lock which ending a thread needs. So nothing is waited for; a pool that nobody
        # holds ends its threads by itself.
        for future in waiting:
            future.cancel()
        raise
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()

"""mpmath for one thread at a time: its precision, and the constants that it remembers, belong to the whole process."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_alone = threading.Lock()


@contextmanager
def exact(bits: int) -> Iterator[Any]:
    """mpmath at `bits` of precision, which no other thread changes meanwhile; not to be entered twice."""
    import mpmath  # only who draws noise or proves an ε needs it

    with _alone, mpmath.workprec(bits):
        yield mpmath

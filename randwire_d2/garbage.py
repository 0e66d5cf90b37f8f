"""Turn off Python's garbage collection while millions of live objects are created."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Turn off the garbage collector during the block.

    It looks through all objects each time that they have become a quarter more: of the labels of
    COCO that takes longer than the labels' JSON itself. What is made meanwhile then counts as old,
    and is not looked through for each of the two younger generations.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        # What a program has frozen stays so. (Python 3.12 has frozen objects of its own, so there
        # nothing grows old here, and is looked through once more.)
        if not gc.get_freeze_count():
            gc.freeze()
            gc.unfreeze()  # into the oldest generation
        if was_enabled:
            gc.enable()

"""Turn off Python's garbage collection while millions of live objects are created."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Turn off the garbage collector during the block.

    The collector traverses all objects each time their number has grown by a quarter; for COCO's
    labels that takes longer than parsing their JSON. After the block, the objects that it created
    are in the oldest generation, so that collections of the younger generations skip them.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        # Objects that a program has frozen stay frozen. (Python 3.12 has frozen objects itself, so
        # there nothing moves to the oldest generation here, and objects are traversed once more.)
        if not gc.get_freeze_count():
            gc.freeze()
            gc.unfreeze()  # into the oldest generation
        if was_enabled:
            gc.enable()

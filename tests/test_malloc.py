"""What malloc does with freed memory."""

import ctypes
import subprocess
import sys

import pytest

from randwire_d2 import malloc

FAULTS = """
import resource, runpy, sys
if sys.argv[1:]:
    runpy.run_path(sys.argv[1])["keep_freed_memory"]()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(2**27)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library's malloc")
def test_freed_memory_is_kept() -> None:
    """Wrong: pages come from Linux anew, whether the process asked for that or not."""
    given = ([], [malloc.__file__])
    freed, kept = (
        int(subprocess.run([sys.executable, "-c", FAULTS, *args], stdout=subprocess.PIPE).stdout)
        for args in given
    )
    assert freed > 10 * (kept + 1)

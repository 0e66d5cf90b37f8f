"""The library of the CPU's operators: compiled for this machine by its C++ compiler, and cached."""

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

# Without an OpenMP library, which PyTorch has loaded already: two of them would each have threads
# of their own, which wait for work in busy loops.
COMPILE = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-fopenmp", "-c")
FOLDER = Path(__file__).parent

logger = logging.getLogger(__name__)


def built() -> Path:
    """The library's file; it is compiled if need be, by one process at a time."""
    import fcntl  # not on Windows

    compiler = shutil.which(os.environ.get("CXX") or "c++")
    if compiler is None:
        raise FileNotFoundError("there is no C++ compiler; the environment variable CXX names one")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    # A home folder may be shared by machines whose instructions differ.
    sources = sorted(FOLDER.glob("*.cpp"))
    texts = [p.read_text(encoding="utf-8") for p in (*sources, *sorted(FOLDER.glob("*.h")))]
    key = (*texts, *COMPILE, version.stdout, platform.machine(), _instructions())
    digest = hashlib.sha256("\0".join(key).encode()).hexdigest()[:16]
    folder = (
        Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
        / "randwire_d2"
    )
    path = folder / f"cpu_kernels_{digest}.so"
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system gives it back if this process dies
        if not path.is_file():
            start = time.perf_counter()
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                objects = [str(Path(scratch) / f"{source.stem}.o") for source in sources]
                library = str(Path(scratch) / "kernels.so")
                for command in (
                    *((compiler, *COMPILE, str(s), "-o", o) for s, o in zip(sources, objects)),
                    (compiler, "-shared", *objects, "-o", library),
                ):
                    subprocess.run(command, capture_output=True, text=True, check=True)
                os.replace(library, path)
            seconds = time.perf_counter() - start
            logger.info(f"Compiled the CPU's operators in {seconds:.1f} s, into {path}")
    return path


def _instructions() -> str:
    """What the CPU knows, as far as Linux tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({x for x in lines if x.startswith(("flags", "Features", "model"))}))

"""Processes that torchrun, or a launcher that sets the same variables, has already started."""

import argparse
import json
import logging
import os
import pickle
import sys
import time
import uuid
import zlib
from base64 import b64decode, b64encode
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from torch import distributed
from torch.distributed.rendezvous import rendezvous

from ...garbage import uncollected
from ...text import one_line
from .slurm import is_submitted
from .threads import share_cores
from .watch import watched

_ANSWER = timedelta(seconds=10)
_LEAD = 5.0  # seconds
_PART = 3 << 18  # bytes; they become 1 MiB of text, and a value in the store may have 8 MiB
_T = TypeVar("_T")
_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launched:
    """The place of this process among those of a launcher.

    Attributes:
        rank, world_size: its rank among all processes, and their number.
        local_rank, local_world_size: the same among the processes of this machine.
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int

    @classmethod
    def here(cls) -> "Launched | None":
        """Read the environment variables; None if no such launcher has started this process."""
        if _missing():
            return None
        return cls(*(int(os.environ[name]) for name in _VARIABLES))

    def check(self, args: argparse.Namespace) -> None:
        """
        Raises:
            ValueError: the options contradict the launcher, or a restart would begin anew.
        """
        machines = self.world_size // self.local_world_size
        if machines * self.local_world_size != self.world_size:
            raise ValueError(
                f"torchrun has {self.world_size} processes, {self.local_world_size} of them on "
                "this machine: start as many on each (--nproc-per-node)"
            )
        flags = {
            "num_gpus": (1, self.local_world_size),
            "num_machines": (1, machines),
            "machine_rank": (0, self.rank // self.local_world_size),
        }
        for flag, (default, actual) in flags.items():
            if (given := getattr(args, flag)) not in (default, actual):
                raise ValueError(
                    f"--{flag.replace('_', '-')} {given}: torchrun has started the processes "
                    f"already, and says {actual}; leave it out"
                )
        restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
        if int(restarts) and not args.resume and not args.eval_only:
            raise ValueError(
                f"torchrun --max-restarts {restarts} restarts the same command, which would begin "
                "anew: add --resume; a run without checkpoints then simply begins"
            )

    def run(
        self, main: Callable[..., Any], args: tuple[Any, ...], on_cpu: bool, timeout: float
    ) -> Any:
        """Call ``main(*args)`` in this process, ``watched`` with a ``timeout``, after making a
        process group like that of Detectron2's ``launch``."""
        if on_cpu:
            share_cores(self.local_world_size)
        else:
            torch.cuda.set_device(self.local_rank)
        if self.world_size == 1:
            return main(*args)
        if self.rank:  # the first one's log is enough
            logging.getLogger("randwire_d2").handlers.clear()
        distributed.init_process_group(
            "gloo" if on_cpu else "nccl",
            store=_store(self),
            rank=self.rank,
            world_size=self.world_size,
            timeout=DEFAULT_TIMEOUT,
        )
        comm.create_local_process_group(self.local_world_size)
        comm.synchronize()
        return watched(main, timeout, *args)

    def share(self, name: str, make: Callable[[], _T]) -> _T:
        """``made_once`` among the processes of this machine."""
        machine, store = self.rank // self.local_world_size, _store(self)
        call = store.add(f"shares/{name}/{self.rank}", 1)  # a program may share several objects
        here = distributed.PrefixStore(f"share/{name}/{machine}/{call}", store)
        if self.local_rank:
            packed = _receive(here, self.local_world_size - 1)
            with uncollected():
                made: _T = pickle.loads(zlib.decompress(packed))
            return made
        try:
            made = make()
            packed = zlib.compress(pickle.dumps(made, pickle.HIGHEST_PROTOCOL), level=1)
            for i in range(0, len(packed), _PART):
                here.set(str(i), b64encode(packed[i : i + _PART]).decode())  # a value is text
        except BaseException as e:  # whatever ends this process, the others must not wait for it
            here.set("made", json.dumps({"error": one_line(e, 5000) or type(e).__name__}))
            raise
        here.set("made", json.dumps({"bytes": len(packed)}))
        return made


def _missing() -> list[str]:
    return [name for name in (*_VARIABLES, *_ADDRESS) if name not in os.environ]


def made_once(name: str, make: Callable[[], _T], take: Callable[[_T], object] | None = None) -> _T:
    """Call ``make`` in one of a launcher's processes on this machine, before they are a group;
    return its result in all of them. The other processes also call ``take`` with it.

    All processes of all machines call this, with the same names in the same order.

    Raises:
        ValueError: ``make`` has failed; in the other processes, with the same line.
    """
    launched = Launched.here()
    if launched is None or launched.local_world_size == 1:
        return make()
    made = launched.share(name, make)
    if take is not None and launched.local_rank:
        take(made)
    return made


def said_once(line: str) -> bool:
    """Print a line on stderr in one of torchrun's processes on this machine, once per start.

    The machine's first process is preferred, since --local-ranks-filter 0 shows only its output.

    Returns:
        Whether the line was printed; False without torchrun, or if its store does not answer.
    """
    launched = Launched.here()
    if launched is None or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return False
    machine = launched.rank // launched.local_world_size
    said = f"said/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}/{machine}/{line}"
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = distributed.TCPStore(*address, wait_for_workers=False, timeout=_ANSWER)
        end = time.monotonic() + (_LEAD if launched.local_rank else 0)
        while time.monotonic() < end and not store.check([said]):
            time.sleep(0.05)
        if store.add(f"{said}/by", 1) == 1:
            print(line, file=sys.stderr, flush=True)
            store.set(said, "")
        store.wait([said])  # torchrun ends all processes as soon as one has ended
    except RuntimeError:  # DistError, as in _receive
        return False
    return True


def _receive(here: distributed.Store, receivers: int) -> bytes:
    try:
        made = json.loads(here.get("made"))
        if "error" not in made:
            parts = list(map(str, range(0, made["bytes"], _PART)))
            packed = b"".join(b64decode(here.get(part)) for part in parts)
            if here.add("received", 1) == receivers:  # delete it: the store outlives a training
                for part in parts:
                    here.delete_key(part)
            return packed
    except RuntimeError as e:  # DistError, whose class differs between versions of PyTorch
        raise ValueError(
            "the first process of this machine, which looks at the data for all, does not answer: "
            f"it has ended, or taken more than {DEFAULT_TIMEOUT}"
        ) from e
    raise ValueError(made["error"])


@cache
def _store(launched: Launched) -> distributed.Store:
    """The store through which the processes find each other."""
    store, _, _ = next(
        rendezvous("env://", launched.rank, launched.world_size, timeout=DEFAULT_TIMEOUT)
    )
    # torchrun keeps its store over restarts, with the addresses of the earlier processes (PyTorch's
    # issue 135712), and each machine counts only the restarts that it has caused.
    return distributed.PrefixStore(agree(store, launched.rank, launched.world_size), store)


def agree(store: distributed.Store, rank: int, world_size: int) -> str:
    """Agree on a name for this start of the processes, which no other start has.

    Each process writes a random name. The first process publishes all names that it finds, until
    each other process has found its own among them. So entries of earlier starts are replaced.

    Raises:
        TimeoutError: a process has not joined in time.
    """
    mine = uuid.uuid4().hex
    store.set(f"start/{rank}", mine)
    deadline = time.monotonic() + DEFAULT_TIMEOUT.total_seconds()
    while time.monotonic() < deadline:
        if rank == 0:
            others = [store.get(f"start/{i}").decode() for i in range(1, world_size)]
            store.set("starts", json.dumps([mine, *others]))
            joined = [f"joined/{name}/{mine}" for name in others]
            if store.check(joined):
                return mine
        elif (names := json.loads(store.get("starts")))[rank : rank + 1] == [mine]:
            store.set(f"joined/{mine}/{names[0]}", "")
            return str(names[0])
        time.sleep(0.05)
    raise TimeoutError(f"not all of {world_size} processes have come within {DEFAULT_TIMEOUT}")


def count_processes(args: argparse.Namespace) -> tuple[int, int]:
    """The number of processes of a command line's run, in total and on this machine.

    Raises:
        ValueError: see ``is_submitted`` and ``Launched.check``; or a launcher has set only some of
            the variables, so that each of its processes would train alone.
    """
    if is_submitted(args):
        return args.slurm.nodes * args.slurm.gpus, args.slurm.gpus
    launched = Launched.here()
    if launched is None:
        if args.num_gpus * args.num_machines == 1:
            _check_alone()
        return args.num_gpus * args.num_machines, args.num_gpus
    launched.check(args)
    return launched.world_size, launched.local_world_size


def _check_alone() -> None:
    size = os.environ.get("WORLD_SIZE", "1")
    if "RANK" in os.environ and size != "1":
        raise ValueError(
            f"WORLD_SIZE {size} and RANK say that this is one of several processes, but "
            f"{', '.join(_missing())} is not set: set it in each, as torchrun does, or unset RANK"
        )

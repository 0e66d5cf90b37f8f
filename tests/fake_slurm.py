"""Stand-ins for sbatch, srun, scontrol, squeue, sacct and scancel: a cluster that is this machine.

A job starts at once, in the background. ``folder/queue/JOB`` holds its script, its options, and the
process ids of its tasks, which a test may signal as Slurm does.
"""

import os
import signal
from pathlib import Path

from helpers import wait_until

# One program, which does what its name says.
PROGRAM = r"""#!/bin/bash
option() { sed -n "s/^#SBATCH --$1=//p" "$script"; }

start() {  # the job $number, for the first time or again
    queue=$FAKE_SLURM/$number
    script=$queue/script
    nodes=$(option nodes) tasks=$(option ntasks-per-node)
    count=$(option array | sed -n 's/^0-\([0-9]*\).*/\1/p')
    export SLURM_JOB_NODELIST=localhost SLURM_JOB_ID=$number
    export SLURM_JOB_NUM_NODES=${nodes:-1} SLURM_NTASKS=$((${nodes:-1} * ${tasks:-1}))
    for i in $(seq 0 "${count:-0}"); do
        if [ -n "$count" ]; then export SLURM_ARRAY_JOB_ID=$number SLURM_ARRAY_TASK_ID=$i; fi
        mkdir -p "$queue/runs"
        touch "$queue/runs/$i"
        setsid bash -c 'bash "$0"; rm "$1"' "$script" "$queue/runs/$i" \
            > /dev/null 2>> "$queue/errors" &
    done
}

sbatch() {
    number=$(ls "$FAKE_SLURM" | wc -l)
    mkdir "$FAKE_SLURM/$number"
    cp "${@: -1}" "$FAKE_SLURM/$number/script"
    start
    echo "Submitted batch job $number"
}

scontrol() {  # requeue JOB: it starts again once all of it has ended
    export number=$2 queue=$FAKE_SLURM/$2
    echo x >> "$queue/restarts"
    export SLURM_RESTART_COUNT=$(wc -l < "$queue/restarts")
    export -f option start
    # Not among the task's processes, which are killed.
    touch "$queue/requeued"
    setsid bash -c '
        while [ "$(ls "$queue/runs")" ]; do sleep 0.1; done
        start
        rm "$queue/requeued"' > /dev/null 2>&1 < /dev/null &
}

srun() {
    kills=
    while [[ "$1" == -* ]]; do
        case "$1" in
            --output) output=$2; shift ;;
            --error) error=$2; shift ;;
            --kill-on-bad-exit=1) kills=1 ;;
        esac
        shift
    done
    name=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    set -m  # a task's processes are a group
    pids=()
    for i in $(seq 0 $((SLURM_NTASKS - 1))); do
        each=$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))
        file() { echo "$1" | sed "s/%j/$SLURM_JOB_ID/; s/%A_%a/$name/; s/%t/$i/"; }
        SLURM_PROCID=$i SLURM_LOCALID=$((i % each)) SLURM_NODEID=$((i / each)) \
            "$@" >> "$(file "$output")" 2>> "$(file "$error")" &
        pids+=($!)
    done
    echo "${pids[@]}" > "$FAKE_SLURM/$SLURM_JOB_ID/pids"
    status=0
    for _ in "${pids[@]}"; do
        if ! wait -n; then
            status=1
            if [ -n "$kills" ]; then
                for pid in "${pids[@]}"; do kill -KILL -- -"$pid" 2> /dev/null; done
            fi
        fi
    done
    return $status
}

squeue() {  # --noheader --jobs JOB
    queue=$FAKE_SLURM/${3%_*}
    [[ $3 == *_* ]] && one=${3#*_}
    if [ -e "$queue/requeued" ] || [ "$(ls "$queue/runs/$one" 2> /dev/null)" ]; then echo "$3"; fi
}

sacct() { :; }  # as on a cluster without accounting
scancel() { :; }

"$(basename "$0")" "$@"
"""
NAMES = ("sbatch", "srun", "scontrol", "squeue", "sacct", "scancel")


class FakeSlurm:
    """The stand-ins, in a folder of their own.

    Attributes:
        environment: with which they are found, and Slurm's own programs, if any, are not.
        queue: a folder for each job.
    """

    def __init__(self, folder: Path) -> None:
        programs, self.queue = folder / "bin", folder / "queue"
        for path in (programs, self.queue):
            path.mkdir()
        for name in NAMES:
            (programs / name).write_text(PROGRAM)
            (programs / name).chmod(0o755)
        self.environment = {
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "FAKE_SLURM": str(self.queue),
        }

    def script(self, job: int) -> str:
        return (self.queue / str(job) / "script").read_text()

    def send(self, number: signal.Signals, job: int, task: int | None = None) -> None:
        """Signal a job's tasks, without their children, as Slurm does; or kill all of them."""
        pids = [int(pid) for pid in (self.queue / str(job) / "pids").read_text().split()]
        for pid in pids if task is None else [pids[task]]:
            os.kill(-pid if number == signal.SIGKILL else pid, number)

    def wait(self, job: int) -> None:
        """Until a job that is not put back into the queue any more has ended."""
        folder = self.queue / str(job)
        wait_until(lambda: not (self._runs(folder) or (folder / "requeued").exists()))

    def pretend(self, job: int, ended: bool = False) -> None:
        """Put a job that does nothing into the queue, or remove it."""
        (self.queue / str(job)).mkdir(exist_ok=True)
        requeued = self.queue / str(job) / "requeued"
        requeued.unlink() if ended else requeued.touch()

    @staticmethod
    def _runs(folder: Path) -> bool:
        return (folder / "runs").is_dir() and any((folder / "runs").iterdir())

    def end(self) -> None:
        """Kill what a test that failed has left running."""
        for folder in self.queue.iterdir():
            if self._runs(folder):
                self.send(signal.SIGKILL, int(folder.name))

"""Run a sweep: Figures 3 and 6 of the paper, and Tables 2 to 5 over five seeds.

    python tools/compare_generators.py configs/sweeps/miniature.yaml --jobs 2
    python tools/compare_generators.py configs/sweeps/figure3.yaml --jobs 4 --num-gpus 2
    python tools/compare_generators.py configs/sweeps/table3.yaml --num-gpus 8
    python tools/compare_generators.py configs/sweeps/table5.yaml --num-gpus 8 \\
        --slurm timeout_min=2880 slurm_partition=gpu cpus_per_task=64

A sweep's file (explained in randwire_d2/experiments/sweep.py) names configs, seeds, and in most
cases generators. tools/pretrain_imagenet.py or tools/train_net.py trains each network, in its own
folder below --output. After an interruption, give the same command again: it skips finished runs,
and resumes those that had begun. It lists runs that failed; --retry tries them again. At the end,
and at each Ctrl-C, it writes table.md and results.json and, if it compares generators, a picture of
the finished runs. --report does only that.
"""

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from ..command import TOOL, module_of, own_script, process, program
from ..config_files import config_path
from ..drawing.style import FORMATS, save_figure
from ..engine.processes.slurm import TIME_LIMIT, Queue, parse_parameters
from ..experiments import sweep_results
from ..experiments.sweep import load_sweep
from ..experiments.sweep_run import Run, check_weights
from ..experiments.trainings import Local, Slurm, Training, visible_gpus
from ..files import check_folder, write_or_print
from ..modeling import NODE_OP_REGISTRY
from ..wiring import GRAPH_REGISTRY, parse_graph
from .frame import at_least, framed, parser_of, say

SCRIPT = "compare_generators.py"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(SCRIPT, __doc__, "%(prog)s SWEEP [options] [KEY VALUE ...]")
    parser.add_argument(
        "sweep", metavar="SWEEP", help="a sweep's file, such as configs/sweeps/figure3.yaml"
    )
    parser.add_argument(
        "opts", nargs="*", metavar="KEY VALUE", help="keys of every run's config, and their values"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="the folder for the runs and the results (default: output/<the sweep's name>)",
    )
    parser.add_argument(
        "--figure", choices=FORMATS, default=".png", help="the picture's format (default: .png)"
    )
    how = parser.add_argument_group("training")
    how.add_argument(
        "--jobs", type=at_least(1), default=1, help="the number of trainings at a time (default: 1)"
    )
    how.add_argument(
        "--num-gpus",
        type=at_least(1),
        default=1,
        help="the number of GPUs of each training, or of its processes on a CPU (default: 1); if "
        "CUDA_VISIBLE_DEVICES is set, only these GPUs are used",
    )
    how.add_argument(
        "--slurm",
        nargs="*",
        metavar="NAME=VALUE",
        help="submit each training to Slurm, with these parameters of submitit's AutoExecutor "
        f"(default: timeout_min={TIME_LIMIT}, and a CPU for each process and each of its workers)",
    )
    how.add_argument("--retry", action="store_true", help="also train the runs that failed before")
    how.add_argument("--report", action="store_true", help="train nothing; only write the results")
    args = parser.parse_intermixed_args(argv)
    args.output = args.output or Path("output", Path(args.sweep).stem)
    try:
        parse_parameters(args.slurm or ())
    except ValueError as e:
        parser.error(f"--slurm: {e}")
    return args


def training(run: Run) -> Training:
    conversion = run.weights.conversion if run.weights is not None else ()
    convert = (*process_of(run, "convert_checkpoint.py"), *conversion)
    return Training(run, tuple(process_of(run, run.tool)), convert if conversion else ())


def process_of(run: Run, script: str) -> list[str]:
    """The command that starts a tool for a run, through the user's own script if the run's graph
    model or node operation is registered there.

    Raises:
        ValueError: such a part is not registered in a script that can be started again.
    """
    model, node_op = parse_graph(run.setting.generator)[0], run.setting.node_op
    parts = {model: GRAPH_REGISTRY.get(model)}
    if node_op in NODE_OP_REGISTRY:
        parts[node_op] = NODE_OP_REGISTRY.get(node_op)
    own = [n for n, part in parts.items() if part.__module__.split(".")[0] != "randwire_d2"]
    if not own:
        return process(script)
    started = own_script()
    if started is None or not hasattr(sys.modules["__main__"], "__file__"):  # a notebook
        raise ValueError(
            f"{own[0]} is your own, and the trainings of a sweep are processes of their own: call "
            "randwire_d2.cli.compare_generators.main() in a script that registers it"
        )
    return ["env", f"{TOOL}={module_of(script)}", sys.executable, os.path.abspath(started)]


def launcher(args: argparse.Namespace, runs: Sequence[Run]) -> Local | Slurm:
    """Choose what starts the trainings: this machine, or Slurm.

    Raises:
        ValueError: a training needs more GPUs than this machine has.
    """
    if args.slurm is not None:
        defaults = {
            "name": Path(args.sweep).stem,
            "timeout_min": TIME_LIMIT,
            "cpus_per_task": args.num_gpus * (1 + max(run.workers for run in runs)),
            **({} if all(run.on_cpu for run in runs) else {"gpus_per_node": args.num_gpus}),
        }
        parameters = {**defaults, **parse_parameters(args.slurm)}
        return Slurm(Queue(args.output / "slurm", parameters))
    gpus = () if all(run.on_cpu for run in runs) else visible_gpus()
    local = Local(args.jobs, args.num_gpus, gpus)
    if local.shares:
        say(
            f"{program(SCRIPT)}: warning: --jobs {args.jobs} × --num-gpus {args.num_gpus} are more "
            f"than the {len(gpus)} GPUs here: trainings share them"
        )
    return local


def train(trainings: Mapping[Run, Training], launch: Local | Slurm, retry: bool) -> None:
    runs = [*trainings]
    for run in runs:
        run.claim()
        if retry:
            run.failure.unlink(missing_ok=True)
    states = {run: run.status() for run in runs}
    wanted = [trainings[run] for run in runs if states[run].state == "unfinished"]
    form = "{desc}{percentage:3.0f}%|{bar}| {n:.2f} of {total} runs [{elapsed}<{remaining}]"
    done = sum(status.progress for status in states.values())
    with tqdm(total=len(runs), initial=done, bar_format=form) as bar:

        def watch() -> None:
            for run in runs:
                if states[run].state != "finished":
                    states[run] = run.status()
            failed = sum(status.state == "failed" for status in states.values())
            bar.set_description(f"{failed} failed" if failed else "", refresh=False)
            bar.n = sum(status.progress for status in states.values())
            bar.refresh()

        launch(wanted, watch)


def report(args: argparse.Namespace, runs: Sequence[Run]) -> None:
    found = sweep_results.report(runs)
    print(found.table, flush=True)
    write_or_print(found.table, args.output / "table.md")
    write_or_print(found.data, args.output / "results.json")
    if found.figure is not None:
        print(f"Picture: {save_figure(found.figure, args.output / f'comparison{args.figure}')}")


@framed(SCRIPT)
def main(argv: Sequence[str] | None = None) -> None:
    if tool := os.environ.get(TOOL):
        importlib.import_module(f"randwire_d2.cli.{tool}").main()
        sys.exit()
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    check_folder("--output", args.output)
    runs = load_sweep(config_path(args.sweep), args.output, args.opts, args.num_gpus)
    for run in runs:
        run.check()
    trainings, launch = {}, None
    if not args.report:
        check_weights(runs)
        trainings = {run: training(run) for run in runs}  # raises if one can't be started
        launch = launcher(args, runs)
    os.makedirs(args.output, exist_ok=True)
    try:
        if launch is not None:
            train(trainings, launch, args.retry)
    except KeyboardInterrupt:
        jobs = "" if args.slurm is None else " Slurm's jobs go on by themselves."
        print(f"Interrupted; give the same command again to continue.{jobs}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    finally:
        report(args, runs)
    states = [run.status().state for run in runs]
    if "failed" in states:
        sys.exit(f"{program(SCRIPT)}: some runs failed; --retry tries them again")
    left = len(states) - states.count("finished")
    if left and launch is not None:
        sys.exit(
            f"{program(SCRIPT)}: {left} of {len(runs)} runs are not finished: other processes "
            "train them, or were ended. Later, give the same command again"
        )

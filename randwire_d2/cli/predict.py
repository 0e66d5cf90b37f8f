"""Predict with a trained detector or classifier: images, folders, videos, or a data set.

    python tools/predict.py output/my_run my_images 'more/**/*.png' clip.mp4 --output predictions
    python tools/predict.py model_best.pth --dataset coco_2017_val --output predictions

The folder DIR then contains:

- results.json, in COCO's format (for a classifier, the five best classes of each image)
- images.json, the file of each image's id; and results.csv, with both
- pictures/, the images and videos with what was found
- for a panoptic detector, panoptic.json and panoptic/, in COCO's panoptic format
- job.json, the checkpoint and the inputs

Images get the ids 1, 2, ... in the order in which they are given, then frames of videos. Images of
a data set keep their ids. An input that can't be read or computed, such as one that is too large
for the memory, is named and skipped; the exit status is then 1.

After an error, Ctrl-C or SIGTERM, results.partial.json and similar files contain what was found so
far. The same command with --resume continues from there, or from what SIGKILL has left: it skips
images that are done, begins an unfinished video anew, and ends with the same files as an
uninterrupted prediction.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from .. import data
from ..data.detection.classes import category_ids
from ..data.images.reading import check_channels
from ..devices import device_here
from ..engine import register_data
from ..engine.config.weights import check_class_names
from ..engine.launch import add_renamed_class
from ..engine.processes.signals import sigterm_as_ctrl_c
from ..files import check_folder
from ..inference.deployment.runtime import AUTO, CHOICES, EAGER, LEAST_IMAGES, in_runtime
from ..inference.inputs import files_as_inputs, find_inputs
from ..inference.models.classifier import TOP, Classifier
from ..inference.models.detector import Detector
from ..inference.models.loading import load_model
from ..inference.prediction.job import Job
from ..inference.prediction.output import PICTURES, RESULTS, picture_path, segments_path
from ..inference.prediction.unfinished import NOTE, STAMPS, check_note, read_note
from ..malloc import keep_freed_memory
from ..text import named, prefixed
from .frame import at_least, framed, parser_of

SCRIPT = "predict.py"


@framed(SCRIPT)
def main(argv: Sequence[str] | None = None) -> None:
    """Run the tool; exit with status 1 if an input, or all of them, could not be predicted."""
    args = _parse_args(argv)
    job = _prepare(args)
    if job.finished:
        job.review()
        print(f"The prediction is finished; its results are in {job.folder / RESULTS}")
    else:
        _run(job)
    if job.broken:
        sys.exit(f"{len(job.broken)} of the inputs could not be predicted: {named(job.broken)}")


def _run(job: Job) -> None:
    with sigterm_as_ctrl_c():
        results = job.run()
    pictures = job.folder / PICTURES
    drawn = f", the pictures in {pictures}" if job.pictures and pictures.is_dir() else ""
    print(f"{results} results are in {job.folder / RESULTS}{drawn}")
    # The scores of a resumed prediction are not known; panoptic results always show stuff.
    if 0 < job.best < job.least_drawn and not job.resume and job.panoptic is None:
        empty = "the pictures show nothing" if job.pictures else "nothing would be drawn"
        print(
            f"No score reaches {job.least_drawn} (--score-threshold), so {empty}: the best is "
            f"{job.best:.3f}"
        )
    if job.labelled:
        first, among = (f"{number / job.labelled:.2%}" for number in job.right)
        since = " that --resume has added" if job.resume else ""
        print(f"Of {job.labelled} labelled images{since}, top-1 is {first}, top-{TOP} {among}")


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(SCRIPT, __doc__)
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT_OR_RUN",
        help="a .pth file, a folder of tools/publish_model.py or hf://OWNER/NAME, a file of "
        "tools/export_model.py, or the OUTPUT_DIR of a training (its model_best.pth, else "
        "model_final.pth, else its last checkpoint)",
    )
    parser.add_argument(
        "inputs", metavar="INPUT", nargs="*", help="images, videos, folders of them, or globs"
    )
    parser.add_argument("--output", metavar="DIR", required=True, help="the folder for the results")
    parser.add_argument(
        "--dataset",
        metavar="NAME",
        help="a registered data set instead of INPUTs; 'test' is the one the model was tested on",
    )
    add_renamed_class(parser, "--dataset")
    parser.add_argument(
        "--score-threshold",
        type=float,
        metavar="SCORE",
        help="the least score (0 ... 1) of a detection that is drawn and written (default: "
        f"{Detector.least_drawn} to be drawn; all are written). What lies below the model's own "
        "SCORE_THRESH_TEST, 0.05 by default, is not found at all",
    )
    parser.add_argument(
        "--batch",
        type=at_least(1),
        default=1,
        metavar="IMAGES",
        help="how many images are computed at once, by a detector only if they have one size "
        "(default: 1); with another number, results differ in their last digits",
    )
    parser.add_argument("--device", help="cpu or cuda:1, say (default: a GPU if there is one)")
    parser.add_argument(
        "--runtime",
        choices=CHOICES,
        default=AUTO,
        help="the program that computes: eager is PyTorch; onnx and openvino run an export of the "
        f"model on a CPU. auto, the default, is eager below {LEAST_IMAGES} images and on a GPU; "
        "for more images on a CPU, it is the one that is installed and computes the first images "
        "fastest. Results differ in their last digits",
    )
    parser.add_argument("--no-pictures", action="store_true", help="draw nothing")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument(
        "--overwrite", action="store_true", help="replace files of the same names in DIR"
    )
    existing.add_argument(
        "--resume",
        action="store_true",
        help="continue the unfinished prediction in DIR; begin one if DIR is empty; do nothing if "
        "it is finished",
    )
    args = parser.parse_args(argv)
    if args.score_threshold is not None and not 0 <= args.score_threshold <= 1:
        parser.error(f"--score-threshold must be 0 ... 1; got {args.score_threshold}")
    if bool(args.inputs) == bool(args.dataset):
        parser.error("give either INPUTs or --dataset NAME")
    if args.renamed_class and not args.dataset:
        parser.error("--renamed-class goes with --dataset NAME")
    return args


# -------------------------------------------------------------------------------------------------
# Before any work
# -------------------------------------------------------------------------------------------------


def _prepare(args: argparse.Namespace) -> Job:
    folder = Path(args.output)
    check_folder("--output", folder)
    noted = read_note(folder) if args.resume else None
    if noted is None and folder.is_dir() and any(folder.iterdir()) and not args.overwrite:
        raise ValueError(
            f"--resume: {args.output!r} is not empty, and holds no prediction to go on with; name "
            "another folder, or --overwrite in place of --resume"
            if args.resume
            else f"--output {args.output!r} is not empty; name another folder, or add --overwrite"
            + (", or --resume to go on with what is there" if (folder / NOTE).exists() else "")
        )
    device_here("--device", args.device)
    inputs = find_inputs(args.inputs)
    keep_freed_memory()
    model = load_model(args.checkpoint, args.device)
    check_channels(model.cfg)
    if args.dataset:
        register_data(model.cfg)
        records = _dataset_records(model, args.dataset, args.renamed_class)
        names = [i.name for i in files_as_inputs([record["file_name"] for record in records])]
    else:
        images = [i for i in inputs if not i.is_video]
        records = [{"file_name": i.path, "image_id": n} for n, i in enumerate(images, start=1)]
        names = [i.name for i in images]
    job = Job(
        model,
        records,
        names,
        videos=[i for i in inputs if i.is_video],
        folder=folder,
        batch=args.batch,
        score_threshold=args.score_threshold,
        pictures=not args.no_pictures,
        resume=noted is not None,
        stamps=noted[STAMPS] if noted else {},
    )
    _refuse_to_draw_over_inputs(job)
    if isinstance(model, Detector) and model.stuff is not None and not model.stuff.known:
        print(
            "Stuff is called stuff 1, stuff 2, …: the checkpoint has no names of it, and its "
            f"DATASETS.TRAIN {tuple(model.cfg.DATASETS.TRAIN)} is not registered here"
        )
    runtime = args.runtime
    if noted is not None:
        usual = {AUTO: noted.get("--runtime"), EAGER: None}
        runtime = usual.get(runtime, runtime)  # the earlier runtime, even if another is faster now
        check_note(folder, noted, {**job.note(), "--runtime": runtime})
    if runtime is not None and not job.finished:
        job.model = in_runtime(model, runtime, job.total, job.inputs(), print)
    return job


def _dataset_records(
    model: Detector | Classifier, name: str, renamed: Sequence[Sequence[str]]
) -> list[dict[str, Any]]:
    """The records of a data set; its category ids become the model's."""
    cfg = model.cfg
    if name == "test":
        if len(cfg.DATASETS.TEST) != 1:
            raise ValueError(f"--dataset test: DATASETS.TEST is {cfg.DATASETS.TEST}; name one")
        (name,) = cfg.DATASETS.TEST
    data.register_folders([name])
    if name not in DatasetCatalog:
        raise ValueError(
            f"--dataset: no data set {name!r} is registered here; the model's own are "
            f"{', '.join(map(repr, [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]))}"
        )
    metadata = MetadataCatalog.get(name)
    for path in (metadata.get("json_file"), metadata.get("image_root")):
        if path:
            data.existing_path(name, path)
    records = DatasetCatalog.get(name)
    kind, key = ("classifier", "classes") if model.classifies else ("detector", "thing_classes")
    names = metadata.get(key) or []
    if not names:
        raise ValueError(
            f"--dataset {name!r} is no data set of a {kind}, as the model is one: its metadata "
            f"have no {key}"
        )
    if len(names) != len(model.class_names):
        raise ValueError(
            f"--dataset {name!r} has the classes {named(names)}, the model "
            f"{named(model.class_names)}"
        )
    with prefixed(f"--dataset {name!r}"):
        check_class_names(model.class_names, names, renamed)
    if isinstance(model, Detector):
        model.category_ids = category_ids(metadata) or list(range(len(names)))
    return [
        {**record, "image_id": record.get("image_id", n)} for n, record in enumerate(records, 1)
    ]


def _refuse_to_draw_over_inputs(job: Job) -> None:
    videos = [(v.path, v.name, True) for v in job.videos]
    images = [(r["file_name"], name, False) for r, name in zip(job.records, job.names)]
    sources = {os.path.realpath(path): path for path, _, _ in [*videos, *images]}
    written = [segments_path(job.folder, name) for _, name, _ in images if job.panoptic]
    if job.pictures:
        written += [picture_path(job.folder, name, video) for _, name, video in [*videos, *images]]
    for path in written:
        if os.path.realpath(path) in sources:
            raise ValueError(
                f"{path} is an INPUT, and would be drawn over; choose another --output"
                + (", and move this one there to --resume" if job.resume else "")
            )

"""RandAugment, MixUp and CutMix in the training of a classifier: as in their papers, repeatable."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from helpers import ROOT
from launching import small
from torch import Tensor, nn
from torchvision.transforms import v2

from randwire_d2.classification import ClassificationTrainer, load_config
from randwire_d2.classification.data import TrainingStream, train_transform
from randwire_d2.config import classifier_config, merge_file
from randwire_d2.engine import argument_parser
from randwire_d2.modeling import ImageClassifier

C78 = ROOT / "configs" / "imagenet" / "randwire_c78_250ep.yaml"


def config(*options: object) -> CfgNode:
    cfg = classifier_config()
    merge_file(cfg, str(C78))
    cfg.merge_from_list(list(options))
    return cfg


class Watched(nn.Module):
    """Three classes from the images' means; remembers what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, images: Tensor) -> Tensor:
        self.seen = images
        return self.fc(images.mean(dim=(2, 3)))


def classifier(*options: object) -> ImageClassifier:
    torch.manual_seed(0)
    arguments = ImageClassifier.from_config(
        config("MODEL.CLASSIFIER.NUM_CLASSES", 3, "MODEL.RANDWIRE.CHANNELS", 8, *options)
    )
    return ImageClassifier(**{**arguments, "network": Watched()})


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(256, (6, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return {"image": images, "label": torch.tensor([0, 1, 2, 2, 1, 0])}


def parts(model: ImageClassifier) -> Tensor:
    """Of each image (N, 3, H, W) that the network saw, how much is its own pixels, not those of
    the one before it; and it must be nothing else."""
    own = model.preprocess(batch()["image"])
    other = own.roll(1, 0)
    share = (model.network.seen - other) / (own - other)
    return share[(own - other).abs() > 0.2]


def expected_loss(model: ImageClassifier, share: float) -> float:
    labels = batch()["label"]
    with torch.no_grad():
        logits = model.network(model.network.seen)
        own, other = (
            F.cross_entropy(logits, target, label_smoothing=0.1)
            for target in (labels, labels.roll(1))
        )
    return float(share * own + (1 - share) * other)


def test_mixup_mixes_images_and_losses_in_one_proportion() -> None:
    """Wrong: labels are mixed otherwise than images, or a test is."""
    model = classifier("INPUT.MIXUP_ALPHA", 0.8).train()
    shares = set()
    for seed in range(5):
        torch.manual_seed(seed)
        (loss,) = model(batch()).values()
        found = parts(model)
        assert (found - found.mean()).abs().max() < 1e-4
        share = found.mean().item()
        assert loss.item() == pytest.approx(expected_loss(model, share), rel=1e-4)
        shares.add(round(share, 4))
        torch.manual_seed(seed)
        (again,) = model(batch()).values()
        assert torch.equal(loss, again), "it draws from another generator"
    assert len(shares) == 5 and all(0 <= share <= 1 for share in shares)
    model.eval()(batch())
    assert torch.equal(model.network.seen, model.preprocess(batch()["image"]))


def test_cutmix_puts_a_box_of_another_image_into_each() -> None:
    """Wrong: the part of the loss is not that of the area."""
    model, shares = classifier("INPUT.CUTMIX_ALPHA", 1.0).train(), set()
    for seed in range(5):
        torch.manual_seed(seed)
        (loss,) = model(batch()).values()
        own = model.preprocess(batch()["image"])
        kept = (model.network.seen == own).all(dim=1)
        assert ((model.network.seen == own.roll(1, 0)).all(dim=1) | kept).all()
        share = kept[0].float().mean().item()
        assert loss.item() == pytest.approx(expected_loss(model, share), rel=1e-4)
        shares.add(share)
    assert len(shares) > 1


def test_the_accuracy_of_mixed_images_is_that_of_the_larger_part() -> None:
    model = classifier("INPUT.CUTMIX_ALPHA", 1.0).train()
    for seed in range(5):
        torch.manual_seed(seed)
        model(batch())
        images, targets = model.preprocess(batch()["image"]), batch()["label"]
        torch.manual_seed(seed)
        assert model.mix is not None
        _, mixed = model.mix(images, targets)
        hits = model.network(model.network.seen).argmax(1) == mixed.argmax(1)
        assert model.train_top1 == pytest.approx(100 * hits.float().mean().item())


def test_with_both_a_batch_draws_one_and_without_them_nothing_is_mixed() -> None:
    """Wrong: the paper's recipe, the default, mixes or augments."""
    both = classifier("INPUT.MIXUP_ALPHA", 0.8, "INPUT.CUTMIX_ALPHA", 1.0).mix
    assert isinstance(both, v2.RandomChoice)
    assert [(type(mix), mix.alpha) for mix in both.transforms] == [
        (v2.MixUp, 0.8),
        (v2.CutMix, 1.0),
    ]
    assert classifier().mix is None
    assert not any(isinstance(t, v2.RandAugment) for t in train_transform(config()).transforms)


def test_randaugment_is_a_function_of_the_position(folders: Path) -> None:
    """Wrong: it is not applied, by other numbers than the config's, or draws from a generator that
    neither seed nor position determines."""
    cfg = config("INPUT.RAND_AUGMENT.NUM_OPS", 3, "INPUT.RAND_AUGMENT.MAGNITUDE", 20,
                 "INPUT.TRAIN_CROP_SIZE", 32)  # fmt: skip
    (found,) = (t for t in train_transform(cfg).transforms if isinstance(t, v2.RandAugment))
    assert (found.num_ops, found.magnitude) == (3, 20)
    records = [{"file_name": str(path), "label": 0} for path in sorted(folders.glob("train/*/*"))]
    plain = TrainingStream(records, config("INPUT.TRAIN_CROP_SIZE", 32), seed=1)
    first, second = (TrainingStream(records, cfg, seed=1) for _ in range(2))
    changed = 0
    for position in (3, 0, 7, 1):
        np.random.seed(position)
        image = first[position]["image"]
        torch.manual_seed(position)
        assert torch.equal(second[position]["image"], image)
        changed += not torch.equal(plain[position]["image"], image)
    assert changed >= 3


def test_a_training_with_all_of_them(folders: Path, tmp_path: Path) -> None:
    """Wrong: they do not go with the real network, loader and evaluator."""
    options = [*small(folders), "SOLVER.MAX_ITER", 2, "OUTPUT_DIR", tmp_path,
               "INPUT.MIXUP_ALPHA", 0.8, "INPUT.CUTMIX_ALPHA", 1.0, "TEST.EVAL_PERIOD", 0,
               "INPUT.RAND_AUGMENT.NUM_OPS", 2]  # fmt: skip
    args = argument_parser().parse_args(["--config-file", str(C78), *map(str, options)])
    trainer = ClassificationTrainer(load_config(args))
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert trainer.iter == 2 and "classification/top1" in trainer.last_evaluation


@pytest.mark.parametrize(
    ("key", "value", "limit"),
    [
        ("INPUT.RAND_AUGMENT.NUM_OPS", -1, "at least 0"),
        ("INPUT.RAND_AUGMENT.MAGNITUDE", 31, "within 0 … 30"),
        ("INPUT.MIXUP_ALPHA", -0.1, "at least 0"),
        ("INPUT.CUTMIX_ALPHA", -0.1, "at least 0"),
    ],
)
def test_a_value_out_of_range_is_refused(key: str, value: float, limit: str) -> None:
    args = argument_parser().parse_args(["--config-file", str(C78), key, str(value)])
    with pytest.raises(ValueError, match=f"^{key} must be {limit}; got {value}$"):
        load_config(args)

"""An image as a network gets it: its file, its crop, its channels."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from detectron2.config import CfgNode
from detectron2.data.detection_utils import _apply_exif_orientation
from detectron2.utils.file_io import PathManager
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import v2

from ...text import one_line
from .names import why_no_image
from .probing import check_kind, why_deep


def read_rgb(path: str, *, upright: bool = False) -> Image.Image:
    """An image file as RGB.

    Args:
        upright: turned as its EXIF says, as OpenCV and Detectron2 read it. Data sets of
            classification are not: ImageFolder reads them so, and ImageNet's pretrained weights
            and figures are of images that were read so.

    Raises:
        ValueError: it can't be read, or has more than 8 bits per channel; one line.
    """
    try:
        with open_image(path) as image:
            return (turn_upright(image) if upright else image).convert("RGB")
    except Exception as e:  # damaged bytes fail in as many ways as there are bytes
        raise ValueError(f"{path} can't be read: {one_line(e) or type(e).__name__}") from e


def turn_upright(image: Image.Image) -> Image.Image:
    """An image as its EXIF says. A TIFF is turned when Pillow decodes it, which takes the tag away;
    before, Detectron2 would see the tag and turn the image again."""
    image.load()
    turned: Image.Image = _apply_exif_orientation(image)
    return turned


@contextmanager
def open_image(path: str) -> Iterator[Image.Image]:
    """An image file, not decoded yet.

    Raises:
        ValueError: it is no image, has more than 8 bits per channel, or is PostScript; one line.
    """
    with PathManager.open(path, "rb") as f:
        try:
            opened = Image.open(f)
        except UnidentifiedImageError as e:
            raise ValueError(why_no_image(path)) from e
        with opened as image:
            check_kind(image)
            if reason := why_deep(image):
                raise ValueError(reason)
            yield image


def check_pixels(image: object) -> None:
    """
    Raises:
        ValueError: it is no image as OpenCV reads one; one line.
    """
    kind = type(image).__name__
    if isinstance(image, np.ndarray):
        if image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size:
            return
        kind = f"{image.dtype} of the shape {image.shape}"
    raise ValueError(
        f"an image must be an array (H, W, 3) of uint8; got {kind} (cv2.imread gives None of a "
        "file that it can't read)"
    )


def center_crop(size: int, ratio: float) -> v2.Transform:
    """PIL image to (3, size, size) of uint8: its centre, once its shorter side is size / ratio."""
    resize = v2.Resize(round(size / ratio))
    return v2.Compose([resize, v2.CenterCrop(size), v2.PILToTensor()])


def order_channels(image: Tensor, input_format: str) -> Tensor:
    """An RGB image (3, H, W) in the order of INPUT.FORMAT."""
    return image.flip(0) if input_format == "BGR" else image


def check_channels(cfg: CfgNode) -> None:
    """
    Raises:
        ValueError: no image that INPUT.FORMAT reads can be normalised by MODEL.PIXEL_MEAN and
            PIXEL_STD; one line.
    """
    means, stds, order = cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, cfg.INPUT.FORMAT
    if len(means) != len(stds):
        raise ValueError(
            "MODEL.PIXEL_MEAN and MODEL.PIXEL_STD must have a value each for every channel; got "
            f"{list(means)} and {list(stds)}"
        )
    read = 1 if order == "L" else 3
    if read not in (1, len(means)):  # a single one is normalised by each of several values
        way_out = (
            "set INPUT.FORMAT L"
            if len(means) == 1
            else "read yours with a mapper of your own, as GUIDE.md says under Channels"
        )
        raise ValueError(
            f"INPUT.FORMAT {order} reads {read} channels, and MODEL.PIXEL_MEAN has {len(means)}: "
            f"{way_out}"
        )

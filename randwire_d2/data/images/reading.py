"""Prepare an image for a network: read, rotate and crop it, and order its channels."""

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
    """Read an image file as RGB.

    Args:
        upright: whether to rotate it as its EXIF says, as OpenCV and Detectron2 do. ImageFolder
            does not, so this is False for classification data: ImageNet's pretrained weights and
            published accuracies are of images without rotation.

    Raises:
        ValueError: the image can't be read, or has more than 8 bits per channel; one line.
    """
    try:
        with open_image(path) as image:
            return (turn_upright(image) if upright else image).convert("RGB")
    except Exception as e:  # damaged files raise many kinds of errors
        raise ValueError(f"{path} can't be read: {one_line(e) or type(e).__name__}") from e


def turn_upright(image: Image.Image) -> Image.Image:
    """Rotate an image as its EXIF says. Pillow rotates a TIFF while decoding, and removes the tag;
    so it is decoded first, else it would be rotated twice."""
    image.load()
    turned: Image.Image = _apply_exif_orientation(image)
    return turned


@contextmanager
def open_image(path: str) -> Iterator[Image.Image]:
    """Open an image file without decoding it.

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
        ValueError: it is not an array (H, W, 3) of uint8, as OpenCV reads an image; one line.
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
    """A transform from a PIL image to uint8 (3, size, size): resize the shorter side to size /
    ratio, then crop the centre."""
    resize = v2.Resize(round(size / ratio))
    return v2.Compose([resize, v2.CenterCrop(size), v2.PILToTensor()])


def order_channels(image: Tensor, input_format: str) -> Tensor:
    """Reorder the channels of an RGB image (3, H, W) as INPUT.FORMAT, RGB or BGR, says."""
    return image.flip(0) if input_format == "BGR" else image


def check_channels(cfg: CfgNode) -> None:
    """
    Raises:
        ValueError: the number of channels of INPUT.FORMAT does not fit MODEL.PIXEL_MEAN and
            PIXEL_STD; one line.
    """
    means, stds, order = cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, cfg.INPUT.FORMAT
    if len(means) != len(stds):
        raise ValueError(
            "MODEL.PIXEL_MEAN and MODEL.PIXEL_STD must have a value each for every channel; got "
            f"{list(means)} and {list(stds)}"
        )
    read = 1 if order == "L" else 3
    if read not in (1, len(means)):  # a single channel is broadcast to several values
        way_out = (
            "set INPUT.FORMAT L"
            if len(means) == 1
            else "read yours with a mapper of your own, as GUIDE.md says under Channels"
        )
        raise ValueError(
            f"INPUT.FORMAT {order} reads {read} channels, and MODEL.PIXEL_MEAN has {len(means)}: "
            f"{way_out}"
        )

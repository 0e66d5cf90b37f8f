"""Scenes of textured, rotated, partly hidden shapes over clutter, drawn with numpy and shapely.

A scene is painted back to front: background, distractors, then objects with a few more distractors
among them. One random generator draws everything, and every vertex is on a grid of 1/16 pixel. So
rounding differences between platforms or versions of GEOS change neither pixels nor annotations.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import numpy as np
import shapely
from shapely import MultiPolygon, Polygon
from shapely.geometry.base import BaseGeometry

Array = np.ndarray
Window = tuple[slice, slice]

GRID = 1 / 16  # pixels
SUBSAMPLES = 4  # per pixel and axis, for anti-aliasing
PLACEMENT_TRIES = 20  # after so many the object is left out
MIN_PIECE = 4.0  # pixels; the smallest area of a visible piece, which must be possible to label


@dataclass(frozen=True)
class ShapesConfig:
    """The number of images in the detection set, and their difficulty."""

    name: ClassVar[str] = "randwire_shapes"  # the name of the data set; not in the digest

    seed: int = 0
    num_train: int = 2000
    num_val: int = 240
    image_size: int = 128  # pixels; images are square
    objects: tuple[int, int] = (1, 5)  # per image, both inclusive
    scale: tuple[float, float] = (0.2, 0.6)  # an object's diameter in image sizes
    stretch: float = 1.25  # largest ratio of an object's two axes
    clutter: int = 5  # most distractors behind the objects
    occluders: int = 1  # most distractors among and before them
    min_visible: float = 0.5  # least part of an object's area that stays visible
    texture: float = 0.4  # in [0, 1]; the contrast between the two colours of a texture
    # The least difference in lightness, of 255, between objects, which are lighter, and the rest.
    # Without this order, a short training would mostly learn what an edge is.
    contrast: float = 40.0
    noise: int = 8  # the largest noise of a pixel, of 255

    @property
    def digest(self) -> str:
        """A hash of the config, eight hex digits."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:8]

    def categories(self, index: int) -> Sequence[int]:
        """The classes that the objects of image ``index`` may have, as indices into CLASSES."""
        return range(len(CLASSES))


@dataclass(frozen=True)
class ClassificationShapesConfig(ShapesConfig):
    """The config of the classification set: small images of one object each.

    A backbone is pretrained on it for the detection set. So its objects look the same and have the
    same sizes in pixels, as far as they fit. A sixth of the images is of each class.
    """

    name: ClassVar[str] = "randwire_shapes_cls"

    num_train: int = 18000
    num_val: int = 600
    image_size: int = 48
    objects: tuple[int, int] = (1, 1)
    scale: tuple[float, float] = (0.5, 0.92)
    min_visible: float = 0.7  # an object that the edge cuts off must still show its class

    def categories(self, index: int) -> Sequence[int]:
        return (index % len(CLASSES),)


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene; only ``area`` includes its hidden and cut-off parts."""

    category: int  # index into CLASSES
    area: float  # the area of the whole shape in pixels
    visible: Polygon | MultiPolygon  # in pixels; (0, 0) is the image's upper left corner
    coverage: Array  # (H, W) in [0, 1]: the part of each pixel that shows the object


@dataclass(frozen=True)
class Scene:
    """An image (H, W, 3), uint8, RGB, and its objects from back to front."""

    image: Array
    objects: tuple[SceneObject, ...]


def draw_scene(config: ShapesConfig, rng: np.random.Generator, categories: Sequence[int]) -> Scene:
    """Draw one scene; generators in equal states give equal scenes.

    An object's class is one of ``categories`` (indices into CLASSES), all equally likely. An object
    is left out if no place is found for it.
    """
    size = config.image_size
    canvas = np.zeros((size, size, 3))
    _paint(rng, config, canvas, np.ones((size, size)), is_object=False)
    for _ in range(rng.integers(config.clutter + 1)):
        window, alpha = _coverage(_place(rng, config, _distractor(rng)), size)
        _paint(rng, config, canvas[window], alpha, is_object=False)

    objects: list[SceneObject] = []
    layers = [True] * rng.integers(*config.objects, endpoint=True)
    layers += [False] * rng.integers(config.occluders + 1)
    for is_object in rng.permutation(layers):
        for _ in range(PLACEMENT_TRIES):
            category = categories[int(rng.integers(len(categories)))] if is_object else None
            added = _add_layer(rng, config, canvas, objects, category)
            if added is not None:
                objects = added
                break
    canvas += rng.integers(-config.noise, config.noise, canvas.shape, endpoint=True)
    return Scene(np.clip(np.rint(canvas), 0, 255).astype(np.uint8), tuple(objects))


def _add_layer(
    rng: np.random.Generator,
    config: ShapesConfig,
    canvas: Array,
    objects: list[SceneObject],
    category: int | None,
) -> list[SceneObject] | None:
    """Paint an object, or a distractor if ``category`` is None, over a scene, in place.

    Returns the objects with their new visible parts; or None, without painting, if the new layer
    would make one of them, or is itself, impossible to label.
    """
    size = config.image_size
    outline = _distractor(rng) if category is None else OUTLINES[CLASSES[category]]
    ring = _place(rng, config, outline)
    shape = Polygon(ring)
    if not shape.is_valid:  # a stroke that crosses itself
        return None
    seen = [
        replace(o, visible=shapely.difference(o.visible, shape, grid_size=GRID)) for o in objects
    ]
    if category is not None:
        visible = shapely.intersection(shape, shapely.box(0, 0, size, size), grid_size=GRID)
        seen.append(SceneObject(category, shape.area, visible, np.zeros((size, size))))
    if not all(_can_label(o.visible, config.min_visible * o.area) for o in seen):
        return None
    window, alpha = _coverage(ring, size)
    _paint(rng, config, canvas[window], alpha, is_object=category is not None)
    for o in seen:
        o.coverage[window] *= 1 - alpha
    if category is not None:
        seen[-1].coverage[window] = alpha
    return seen


def _can_label(visible: BaseGeometry, min_area: float) -> bool:
    """Whether the region is made of polygons without holes, none of them tiny."""
    if not isinstance(visible, Polygon | MultiPolygon) or visible.area < min_area:
        return False
    pieces = shapely.get_parts(visible)
    return all(not p.interiors and p.area >= MIN_PIECE for p in pieces)


# -------------------------------------------------------------------------------------------------
# Outlines: (V, 2) vertices inside the circle of radius 1 around (0, 0)
# -------------------------------------------------------------------------------------------------


def _polar(angles: Array, radius: Array | float = 1.0) -> Array:
    return np.stack([radius * np.cos(angles), radius * np.sin(angles)], axis=1)


def _turn(n: int) -> Array:
    """n angles evenly spaced over a full turn."""
    return np.arange(n) * (2 * math.pi / n)


def _polygon(points: str) -> Array:
    return np.array([point.split() for point in points.split(",")], float)


def _crescent() -> Array:
    # Both arcs end at the tips, at +-60 degrees of the outer, unit circle.
    tip, inner_centre = math.radians(60), 0.35
    inner_tip = math.atan2(math.sin(tip), math.cos(tip) - inner_centre)
    inner_radius = math.sin(tip) / math.sin(inner_tip)
    outer = _polar(np.linspace(tip, 2 * math.pi - tip, 24))
    inner = _polar(np.linspace(2 * math.pi - inner_tip, inner_tip, 20)[1:-1], inner_radius)
    return np.concatenate([outer, inner + np.array([inner_centre, 0])])


OUTLINES: dict[str, Array] = {
    "circle": _polar(_turn(32)),
    "triangle": _polar(_turn(3)),
    "square": _polar(_turn(4)),
    "star": _polar(_turn(10), np.tile([1.0, 0.42], 5)),
    "cross": _polygon("3 1, 1 1, 1 3, -1 3, -1 1, -3 1, -3 -1, -1 -1, -1 -3, 1 -3, 1 -1, 3 -1")
    / math.sqrt(10),
    "crescent": _crescent(),
}
CLASSES: tuple[str, ...] = tuple(OUTLINES)


def _distractor(rng: np.random.Generator) -> Array:
    """Draw the outline of a distractor: a lobed blob or a tapering, bent stroke."""
    if rng.random() < 0.5:
        angles = _turn(28)
        radius = np.ones(28)
        for frequency in (2, 3, 4):
            amplitude, phase = rng.uniform(0.12, 0.3), rng.uniform(0, 2 * math.pi)
            radius += amplitude * np.cos(frequency * angles + phase)
        return _polar(angles, radius / radius.max())
    # A quadratic Bezier curve from (-1, 0) to (1, 0), given a width by its normals.
    t = np.linspace(0, 1, 12)
    bend, width = rng.uniform(-1.2, 1.2), rng.uniform(0.06, 0.2)
    spine = np.stack([2 * t - 1, 2 * t * (1 - t) * bend], axis=1)
    normal = np.stack([-(1 - 2 * t) * bend, np.ones(12)], axis=1)
    normal *= (width * (1 - 0.7 * t) / np.sqrt((normal**2).sum(axis=1)))[:, None]
    return np.concatenate([spine + normal, (spine - normal)[::-1]])


def _place(rng: np.random.Generator, config: ShapesConfig, outline: Array) -> Array:
    """Stretch, turn, scale and move an outline; its centre lies inside the image."""
    low, high = config.scale
    radius = config.image_size / 2 * low * (high / low) ** rng.random()  # log-uniform
    stretch = config.stretch ** rng.uniform(-0.5, 0.5)
    angle, axis = rng.uniform(0, 2 * math.pi, 2)
    points = outline @ _rotation(axis) @ np.diag([stretch, 1 / stretch]) @ _rotation(angle)
    centre = rng.uniform(0, config.image_size, 2)
    return np.rint((radius * points + centre) / GRID) * GRID


def _rotation(angle: float) -> Array:
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, s], [-s, c]])


# -------------------------------------------------------------------------------------------------
# Paint
# -------------------------------------------------------------------------------------------------


def _coverage(ring: Array, size: int) -> tuple[Window, Array]:
    """The part of each pixel that is inside a ring (V, 2), by the even-odd rule.

    Returns the window of the (size, size) image that the ring touches, and (h, w) in [0, 1] there.
    """
    left, top = np.clip(np.floor(ring.min(axis=0)), 0, size).astype(int)
    right, bottom = np.clip(np.ceil(ring.max(axis=0)), 0, size).astype(int)
    n = SUBSAMPLES
    h, w = (bottom - top) * n, (right - left) * n
    # Where each edge (x0, y0)-(x1, y1) crosses each line of samples, inside and outside swap.
    x0, y0 = ((ring - [left, top]) * n - 0.5).T[:, :, None]
    x1, y1 = np.roll(x0, -1, axis=0), np.roll(y0, -1, axis=0)
    rows = np.arange(h)
    edge, row = np.nonzero((y0 <= rows) != (y1 <= rows))
    x0, y0, x1, y1 = (v[edge, 0] for v in (x0, y0, x1, y1))
    column = np.ceil(x0 + (row - y0) * (x1 - x0) / (y1 - y0))
    swaps = np.zeros((h, w + 1), np.int8)
    np.add.at(swaps, (row, np.clip(column, 0, w).astype(int)), 1)
    inside = np.cumsum(swaps[:, :w], axis=1, dtype=np.int8) & 1
    alpha = inside.reshape(h // n, n, w // n, n).sum(axis=(1, 3), dtype=np.float32) / n**2
    return (slice(top, bottom), slice(left, right)), alpha


def _paint(
    rng: np.random.Generator,
    config: ShapesConfig,
    canvas: Array,
    alpha: Array,
    *,
    is_object: bool,
) -> None:
    """Blend a random texture into the canvas (h, w, 3), in place, by alpha (h, w)."""
    first, second = (_colour(rng, config.contrast, light=is_object) for _ in range(2))
    u, v = np.meshgrid(np.arange(alpha.shape[1]), np.arange(alpha.shape[0]))
    texture = TEXTURES[rng.integers(len(TEXTURES))]
    period, angle = rng.uniform(5, 14), rng.uniform(0, 2 * math.pi)
    c, s = math.cos(angle) / period, math.sin(angle) / period
    mix = config.texture * texture(c * u + s * v, c * v - s * u, period, rng)
    paint = first + (second - first) * mix[..., None]
    canvas += (paint - canvas) * alpha[..., None]


def _colour(rng: np.random.Generator, contrast: float, *, light: bool) -> Array:
    """A colour (3,) whose mean is above, or below, mid-grey by at least half the contrast."""
    while True:
        colour = rng.integers(256, size=3).astype(np.float32)
        lightness = colour.mean() - 127.5
        if (lightness if light else -lightness) >= contrast / 2:
            return colour


# A texture maps coordinates u, v (h, w), in periods, to the share in [0, 1] of the second of two
# colours; ``period`` is in pixels, so that an edge is one pixel wide.


def _bands(u: Array, period: float) -> Array:
    return np.clip((np.abs(u % 1 - 0.5) - 0.25) * period + 0.5, 0, 1)


def _plain(u: Array, v: Array, period: float, rng: np.random.Generator) -> Array:
    return np.zeros_like(u)


def _gradient(u: Array, v: Array, period: float, rng: np.random.Generator) -> Array:
    return (u - u.min()) / max(np.ptp(u), 1)


def _stripes(u: Array, v: Array, period: float, rng: np.random.Generator) -> Array:
    return _bands(u, period)


def _checks(u: Array, v: Array, period: float, rng: np.random.Generator) -> Array:
    a, b = _bands(u, period), _bands(v, period)
    return a + b - 2 * a * b


def _dots(u: Array, v: Array, period: float, rng: np.random.Generator) -> Array:
    distance = np.sqrt((u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2)
    return np.clip((0.3 - distance) * period + 0.5, 0, 1)


def _noise(u: Array, v: Array, period: float, rng: np.random.Generator) -> Array:
    """Values drawn on a grid, interpolated linearly."""
    u, v = u - u.min(), v - v.min()
    i, j = v.astype(int), u.astype(int)
    y, x = v - i, u - j
    z = rng.random((int(v.max()) + 2, int(u.max()) + 2))
    upper = z[i, j] * (1 - x) + z[i, j + 1] * x
    lower = z[i + 1, j] * (1 - x) + z[i + 1, j + 1] * x
    return upper * (1 - y) + lower * y


Texture = Callable[[Array, Array, float, np.random.Generator], Array]
TEXTURES: tuple[Texture, ...] = (_plain, _gradient, _stripes, _checks, _dots, _noise)

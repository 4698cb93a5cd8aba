"""Drawn product pictures: outlines, patterns, walls and shadows, put together with Pillow."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

Colour = tuple[int, int, int]
Point = tuple[float, float]

COLOURS: dict[str, Colour] = {
    "red": (206, 46, 46),
    "blue": (38, 92, 196),
    "yellow": (238, 196, 38),
    "green": (48, 148, 74),
    "purple": (130, 66, 168),
    "orange": (236, 124, 36),
    "turquoise": (36, 178, 178),
    "pink": (236, 122, 172),
    "brown": (122, 78, 48),
    "black": (44, 46, 54),
}
PATTERNS = ("plain", "stripes", "dots", "checks", "zigzag")
BACKGROUNDS: dict[str, Colour] = {
    "cream": (244, 238, 224),
    "mist": (226, 233, 240),
    "sage": (226, 236, 224),
    "blush": (244, 228, 226),
    "stone": (228, 226, 222),
}

FINE = 2  # pictures are drawn at this multiple of their size and reduced, for smooth edges


def put_together(
    canvas: Image.Image,
    body: Image.Image,
    surface: Image.Image,
    details: Image.Image,
    jitter: float,
    random: np.random.Generator,
) -> None:
    """Cover a body with its surface and details, turn and move it a little, and paste it with a shadow.

    Args:
        canvas: RGB; the product is pasted onto it.
        body: mask of the product's body, L.
        surface: what covers the body, RGB.
        details: what lies above it, RGBA.
        jitter: scales the turn, size and position.
        random: the source of random numbers.
    """
    product = Image.new("RGBA", body.size)
    product.paste(surface, mask=body)
    product.alpha_composite(rounded(body))
    product.alpha_composite(details)
    product = place(product, jitter, random)
    shadow = shadow_of(product)
    canvas.paste(shadow, mask=shadow)
    canvas.paste(product, mask=product)


def finish(canvas: Image.Image, pixels: int, noise: float, random: np.random.Generator) -> Image.Image:
    """Return the canvas at its final size, with noise of this standard deviation (of 255) on every pixel."""
    small = canvas.convert("RGB").resize((pixels, pixels), Image.Resampling.BOX)
    noisy = np.asarray(small, np.float64) + noise * random.standard_normal((*small.size, 3))
    return Image.fromarray(np.clip(np.rint(noisy), 0, 255).astype(np.uint8))


class Pen:
    """Draws on a unit square: the body, which takes the pattern, and details, which keep their own colour.

    Args:
        body: L; filled where the body is.
        details: RGBA.
        colour: of the product; details are darker.
        stretch: factors of width and height about the middle.
    """

    def __init__(
        self, body: Image.Image, details: Image.Image, colour: Colour, stretch: tuple[float, float] = (1.0, 1.0)
    ) -> None:
        self.side, self._stretch = body.width, stretch
        self._body, self._details = ImageDraw.Draw(body), ImageDraw.Draw(details)
        self.dark, self.light = shade(colour, 0.55), shade(colour, 1.25)

    def _scaled(self, points: Sequence[Point]) -> list[Point]:
        if self._stretch == (1.0, 1.0):
            return [(x * self.side, y * self.side) for x, y in points]
        wide, high = self._stretch
        return [((0.5 + wide * (x - 0.5)) * self.side, (0.5 + high * (y - 0.5)) * self.side) for x, y in points]

    def polygon(self, *points: Point) -> None:
        """Fill a polygon of the body."""
        self._body.polygon(self._scaled(points), fill=255)

    def ellipse(self, left: float, top: float, right: float, bottom: float) -> None:
        """Fill an ellipse of the body."""
        self._body.ellipse(self._scaled([(left, top), (right, bottom)]), fill=255)

    def box(self, left: float, top: float, right: float, bottom: float, round_by: float = 0.03) -> None:
        """Fill a rounded rectangle of the body."""
        self._body.rounded_rectangle(self._scaled([(left, top), (right, bottom)]), round_by * self.side, fill=255)

    def cut(self, *points: Point) -> None:
        """Take a polygon away from the body."""
        self._body.polygon(self._scaled(points), fill=0)

    def line(self, *points: Point, width: float = 0.03, colour: Colour | None = None) -> None:
        """Draw a line with round ends as a detail."""
        ends = self._scaled(points)
        thick = round(width * self.side)
        self._details.line(ends, fill=colour or self.dark, width=thick, joint="curve")
        for x, y in (ends[0], ends[-1]):  # round ends
            self._details.ellipse(
                [x - thick / 2, y - thick / 2, x + thick / 2, y + thick / 2], fill=colour or self.dark
            )

    def arc(self, box: tuple[float, float, float, float], start: float, end: float, width: float = 0.035) -> None:
        """Draw a part of an ellipse's outline as a detail; angles in degrees, clockwise from the right."""
        corners = self._scaled([(box[0], box[1]), (box[2], box[3])])
        self._details.arc(corners, start, end, fill=self.dark, width=round(width * self.side))

    def disc(self, left: float, top: float, right: float, bottom: float, colour: Colour | None = None) -> None:
        """Fill an ellipse as a detail."""
        self._details.ellipse(self._scaled([(left, top), (right, bottom)]), fill=colour or self.dark)

    def patch(self, *points: Point, colour: Colour | None = None) -> None:
        """Fill a polygon as a detail."""
        self._details.polygon(self._scaled(points), fill=colour or self.dark)


def _mug(pen: Pen) -> None:
    pen.arc((0.56, 0.36, 0.86, 0.70), -100, 100, width=0.055)
    pen.box(0.22, 0.26, 0.68, 0.78, 0.06)
    pen.disc(0.22, 0.22, 0.68, 0.32)


def _desk_lamp(pen: Pen) -> None:
    pen.line((0.42, 0.80), (0.36, 0.52), (0.58, 0.34), width=0.035)
    pen.patch((0.24, 0.84), (0.60, 0.84), (0.54, 0.78), (0.30, 0.78))
    pen.disc(0.61, 0.45, 0.75, 0.59, (255, 240, 180))
    pen.polygon((0.52, 0.22), (0.66, 0.18), (0.88, 0.46), (0.50, 0.60))


def _tote_bag(pen: Pen) -> None:
    pen.arc((0.34, 0.12, 0.66, 0.64), 180, 360)
    pen.polygon((0.22, 0.38), (0.78, 0.38), (0.84, 0.84), (0.16, 0.84))


def _chair(pen: Pen) -> None:
    for foot, top in ((0.26, 0.30), (0.74, 0.70), (0.36, 0.38), (0.64, 0.62)):
        pen.line((foot, 0.88), (top, 0.60), width=0.035)
    pen.box(0.30, 0.14, 0.70, 0.50, 0.05)
    pen.polygon((0.28, 0.54), (0.72, 0.54), (0.78, 0.66), (0.22, 0.66))


def _water_bottle(pen: Pen) -> None:
    pen.box(0.34, 0.30, 0.66, 0.88, 0.08)
    pen.polygon((0.43, 0.20), (0.57, 0.20), (0.62, 0.34), (0.38, 0.34))
    pen.patch((0.43, 0.10), (0.57, 0.10), (0.57, 0.20), (0.43, 0.20))


def _sneaker(pen: Pen) -> None:
    pen.polygon((0.12, 0.34), (0.36, 0.34), (0.52, 0.50), (0.80, 0.56), (0.88, 0.70), (0.12, 0.70))
    pen.patch((0.10, 0.69), (0.90, 0.69), (0.88, 0.78), (0.12, 0.78))
    for step in range(3):
        pen.line((0.38 + 0.07 * step, 0.42 + 0.05 * step), (0.46 + 0.07 * step, 0.37 + 0.05 * step), width=0.018)


def _vase(pen: Pen) -> None:
    pen.ellipse(0.26, 0.38, 0.74, 0.88)
    pen.polygon((0.40, 0.16), (0.60, 0.16), (0.57, 0.44), (0.43, 0.44))
    pen.disc(0.38, 0.13, 0.62, 0.20)


def _wall_clock(pen: Pen) -> None:
    pen.ellipse(0.16, 0.16, 0.84, 0.84)
    pen.arc((0.16, 0.16, 0.84, 0.84), 0, 360, width=0.04)
    pen.line((0.50, 0.50), (0.50, 0.28), width=0.03)
    pen.line((0.50, 0.50), (0.64, 0.58), width=0.03)
    pen.disc(0.46, 0.46, 0.54, 0.54)


def _umbrella(pen: Pen) -> None:
    pen.line((0.50, 0.14), (0.50, 0.80), width=0.028)
    pen.arc((0.50, 0.74, 0.64, 0.90), 0, 180, width=0.028)
    pen.ellipse(0.12, 0.16, 0.88, 0.86)
    pen.cut((0.0, 0.52), (1.0, 0.52), (1.0, 1.0), (0.0, 1.0))
    for left in (0.12, 0.373, 0.627):
        pen.ellipse(left, 0.47, left + 0.253, 0.57)


def _teapot(pen: Pen) -> None:
    pen.arc((0.04, 0.40, 0.38, 0.72), 80, 280, width=0.04)
    pen.polygon((0.66, 0.62), (0.92, 0.34), (0.96, 0.38), (0.74, 0.78))
    pen.ellipse(0.20, 0.36, 0.78, 0.84)
    pen.patch((0.36, 0.38), (0.62, 0.38), (0.56, 0.31), (0.42, 0.31))
    pen.disc(0.45, 0.22, 0.53, 0.31)


def _shirt(pen: Pen) -> None:
    pen.polygon(
        (0.36, 0.18), (0.64, 0.18), (0.92, 0.34), (0.82, 0.50), (0.70, 0.44), (0.70, 0.86), (0.30, 0.86), (0.30, 0.44),
        (0.18, 0.50), (0.08, 0.34),
    )  # fmt: skip
    pen.patch((0.40, 0.17), (0.60, 0.17), (0.50, 0.30))


def _cushion(pen: Pen) -> None:
    pen.box(0.18, 0.22, 0.82, 0.80, 0.14)
    for x, y in ((0.20, 0.24), (0.80, 0.24), (0.20, 0.78), (0.80, 0.78)):
        pen.disc(x - 0.05, y - 0.05, x + 0.05, y + 0.05)


SHAPES: dict[str, Callable[[Pen], None]] = {
    "mug": _mug,
    "desk lamp": _desk_lamp,
    "tote bag": _tote_bag,
    "chair": _chair,
    "water bottle": _water_bottle,
    "sneaker": _sneaker,
    "vase": _vase,
    "wall clock": _wall_clock,
    "umbrella": _umbrella,
    "teapot": _teapot,
    "shirt": _shirt,
    "cushion": _cushion,
}


def shade(colour: Colour, factor: float) -> Colour:
    """Return a colour times a factor, each channel from 0 to 255."""
    red, green, blue = (min(255, max(0, round(channel * factor))) for channel in colour)
    return red, green, blue


def pattern_surface(pattern: str, colour: Colour, side: int, random: np.random.Generator) -> Image.Image:
    """Fill a square with a colour and, in near-white, one of the patterns at a random phase."""
    pitch = 0.13  # of the picture's width
    across, down = ((np.arange(side, dtype=np.float32) / side + random.random()) / pitch for _ in range(2))
    x, y = across[None, :] % 1, down[:, None] % 1  # position within one repeat, (1, side) and (side, 1)
    if pattern == "stripes":
        light = x < 0.42
    elif pattern == "dots":
        light = (x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.075
    elif pattern == "checks":
        light = (x < 0.5) ^ (y < 0.5)
    elif pattern == "zigzag":
        light = (1.25 * down[:, None] + 0.9 * np.abs(x - 0.5)) % 1 < 0.42
    else:
        light = np.zeros((1, 1), bool)
    mask = Image.fromarray(np.broadcast_to(light, (side, side)).astype(np.uint8) * 255)
    surface = Image.new("RGB", (side, side), colour)
    surface.paste((248, 246, 240), mask=mask)
    return surface


def wall(colour: Colour, side: int) -> Image.Image:
    """A wall that is lit from above and a floor a little darker."""
    fade = np.linspace(1.03, 0.93, side)
    fade[round(0.74 * side) :] *= 0.95
    column = np.clip(np.array(colour) * fade[:, None, None], 0, 255)  # (side, 1, 3)
    return Image.fromarray(column.astype(np.uint8)).resize((side, side), Image.Resampling.NEAREST)


def rounded(body: Image.Image) -> Image.Image:
    """Shade a body from left to right, so that it looks solid."""
    across = np.abs(np.linspace(-0.9, 1.1, body.width)) ** 2 * 70
    shade = Image.fromarray(np.broadcast_to(across.astype(np.uint8), (body.height, body.width)).copy())
    layer = Image.new("RGBA", body.size, (20, 16, 30, 0))
    layer.putalpha(ImageChops.multiply(shade, body))
    return layer


def shadow_of(product: Image.Image) -> Image.Image:
    """A soft shadow below and to the right."""
    small = product.getchannel("A").reduce(8).filter(ImageFilter.GaussianBlur(2))
    soft = small.resize(product.size, Image.Resampling.BILINEAR)
    soft = ImageChops.offset(soft, product.width // 50, product.width // 40)
    layer = Image.new("RGBA", product.size, (30, 26, 40, 0))
    layer.putalpha(soft.point(lambda alpha: round(alpha * 0.28)))
    return layer


def place(product: Image.Image, jitter: float, random: np.random.Generator) -> Image.Image:
    """Turn, scale and move a product a little."""
    angle, grow, right, down = random.uniform(-1, 1, size=4) * jitter * (12.0, 0.15, 0.06, 0.06)
    side = product.width
    scale, turn = 1 / (0.92 + grow), math.radians(angle)
    cos, sin, centre = math.cos(turn) * scale, math.sin(turn) * scale, side / 2
    # the affine map takes a point of the output to its source
    moved_x, moved_y = centre + right * side, centre + down * side
    coefficients = (
        cos, sin, centre - cos * moved_x - sin * moved_y,
        -sin, cos, centre + sin * moved_x - cos * moved_y,
    )  # fmt: skip
    return product.transform(product.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)

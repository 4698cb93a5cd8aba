"""A drawn catalogue with known truth: products as pictures with titles, and users whose taste depends on both.

The demo and the tests run on it. A title names brand, material and category; colour and pattern are only in the
picture; the category is in both. Each user's weights of looks and words are known, so it is also known how much a model
can gain from each side. `CatalogueSettings` decides how hard each side is.

Every random draw comes from one seed: the same settings write the same bytes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ConfigError

Colour = tuple[int, int, int]
Point = tuple[float, float]

# No brand, material or category is a word for a colour or a pattern: only the picture shows looks.
BRANDS = (
    "Norwick",
    "Alvora",
    "Brennet",
    "Castell",
    "Dunmore",
    "Elgarde",
    "Fenwick",
    "Garrow",
    "Halden",
    "Iverno",
    "Jarrow",
    "Kestrel",
    "Lomond",
    "Marlow",
    "Ostrava",
    "Penrith",
)
CATEGORIES: dict[str, tuple[str, ...]] = {
    "mug": ("ceramic", "steel", "glass", "bamboo"),
    "desk lamp": ("oak", "steel", "glass", "bamboo"),
    "tote bag": ("linen", "cotton", "leather", "cork"),
    "chair": ("oak", "bamboo", "leather", "steel"),
    "water bottle": ("steel", "glass", "bamboo", "ceramic"),
    "sneaker": ("cotton", "leather", "linen", "cork"),
    "vase": ("ceramic", "glass", "oak", "cork"),
    "wall clock": ("oak", "steel", "cork", "bamboo"),
    "umbrella": ("cotton", "linen", "bamboo", "leather"),
    "teapot": ("ceramic", "steel", "glass", "bamboo"),
    "shirt": ("cotton", "linen", "leather", "bamboo"),
    "cushion": ("cotton", "linen", "leather", "cork"),
}
MATERIALS = tuple(sorted({material for materials in CATEGORIES.values() for material in materials}))
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


@dataclass(frozen=True, kw_only=True)
class CatalogueSettings:
    """How large the catalogue is, how hard each modality is, and how users choose.

    The settings decide which modality is easy: `noise`, `jitter`, `colours` and `patterns` make pictures harder;
    `told_by_brand` makes titles sufficient; `looks` shifts what users want.
    """

    products: int = 400
    users: int = 600
    seed: int = 0

    # pictures
    pixels: int = 128  # width and height of a picture
    noise: float = 10.0  # standard deviation of the noise on every pixel, of 255
    jitter: float = 1.0  # scales rotation (12 degrees), size (15 %) and position (6 %)
    colours: int = 8  # palette size, at most 10
    patterns: int = 5  # kinds of pattern, at most 5

    # titles
    brands: int = 12  # at most 16
    categories: int = 10  # at most 12
    told_by_brand: float = 0.0  # share of products with their brand's colour: with 1, a title predicts the colour

    # users
    looks: tuple[float, float] = (2.0, 2.0)  # Beta distribution of a user's weight on looks; (2, 2) has mean one half
    sharpness: float = 2.2  # scale of the utilities before the softmax; 0 is a random choice
    drift: float = 0.8  # weight of the latest items; the weight of taste is 1
    memory: float = 0.5  # factor of that weight for each later item
    popularity: float = 0.25  # standard deviation of an item's popularity
    shortest: int = 6  # items of a history
    longest: int = 16

    def __post_init__(self) -> None:
        limits = {
            "colours": (1, len(COLOURS)),
            "patterns": (1, len(PATTERNS)),
            "brands": (1, len(BRANDS)),
            "categories": (1, len(CATEGORIES)),
            "users": (1, 10**7),
            "products": (self.longest + 1, 10**6),
            "shortest": (1, self.longest),
            "pixels": (32, 1024),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(
                    f"catalogue setting {name} is {value}", f"a number from {low} to {high}", f"change {name}"
                )


@dataclass(frozen=True)
class Product:
    """One product: what its title names, what only its picture shows, and how the picture is drawn."""

    item_id: str
    brand: str
    material: str
    category: str
    model: int
    colour: str
    pattern: str
    background: str
    popularity: float  # in units of utility before `sharpness`

    @property
    def title(self) -> str:
        """The words that a shop would print; nothing about looks."""
        return f"{self.brand} {self.material} {self.category} {self.model}"

    @property
    def caption(self) -> str:
        """Words for the whole item, looks first."""
        return f"{self.colour} {self.pattern} {self.category} {self.material} {self.brand}"


# The attributes of a taste, by the side that shows them to a model.
TEXT_ATTRIBUTES = ("brand", "material", "category")
LOOKS_ATTRIBUTES = ("colour", "pattern")


@dataclass(frozen=True)
class Population:
    """Users with known taste, and their choices."""

    looks_weight: np.ndarray  # (U,) in [0, 1]: share of looks in a user's taste
    taste: np.ndarray  # (U, A) utility of each attribute value, weights included
    attributes: list[str]  # A names, "brand=Norwick"
    choices: list[np.ndarray]  # U × (n_u,) product rows, in time order


def draw_catalogue(
    out: Path, products: int = 400, users: int = 600, seed: int = 0, settings: CatalogueSettings | None = None
) -> CatalogueSettings:
    """Draw a catalogue and simulate its users.

    Writes `items.parquet` (item_id, title, image_path, caption, category and the truth columns brand, material,
    model, colour, pattern, background, popularity), `interactions.parquet` (user_id, item_id, timestamp in seconds),
    `images/` and `truth.json` (settings, and each user's taste).

    Args:
        out: Folder to write; files of an earlier catalogue in it are replaced.
        products: Products to draw.
        users: Users to simulate.
        seed: Seed of everything.
        settings: Everything else; the arguments replace its products, users and seed.

    Returns:
        The settings used.

    Raises:
        ConfigError: a setting is out of range.
    """
    used = dataclasses.replace(settings or CatalogueSettings(), products=products, users=users, seed=seed)
    catalogue, people, pictures = (np.random.default_rng([seed, part]) for part in range(3))
    items = invent_products(used, catalogue)
    population = simulate_users(used, items, people)
    (out / "images").mkdir(parents=True, exist_ok=True)
    for item in items:
        picture = draw_product(item, used, pictures)
        picture.save(out / "images" / f"{item.item_id}.jpg", quality=90)
    _item_table(items).write_parquet(out / "items.parquet")
    _interaction_table(items, population, people).write_parquet(out / "interactions.parquet")
    schema.write_json(out / "truth.json", _truth(used, population))
    return used


# --- products -----------------------------------------------------------------------------------------------


def invent_products(settings: CatalogueSettings, random: np.random.Generator) -> list[Product]:
    """Return products with independently drawn attributes, except for the material, which suits the category."""
    brands = BRANDS[: settings.brands]
    categories = list(CATEGORIES)[: settings.categories]
    colours = list(COLOURS)[: settings.colours]
    house_colour = {brand: colours[number % len(colours)] for number, brand in enumerate(brands)}
    models = 100 + 10 * random.permutation(settings.products)
    items = []
    for number in range(settings.products):
        brand = str(random.choice(brands))
        category = categories[number % len(categories)]
        colour = str(random.choice(colours))
        if random.random() < settings.told_by_brand:
            colour = house_colour[brand]
        items.append(
            Product(
                item_id=f"P{number:04d}",
                brand=brand,
                material=str(random.choice(CATEGORIES[category])),
                category=category,
                model=int(models[number]),
                colour=colour,
                pattern=str(random.choice(PATTERNS[: settings.patterns])),
                background=str(random.choice(list(BACKGROUNDS))),
                popularity=float(settings.popularity * random.standard_normal()),
            )
        )
    return items


def _item_table(items: Sequence[Product]) -> pl.DataFrame:
    return pl.DataFrame(
        {
            schema.ITEM_ID: [item.item_id for item in items],
            schema.TITLE: [item.title for item in items],
            schema.IMAGE_PATH: [f"{item.item_id}.jpg" for item in items],
            "caption": [item.caption for item in items],
            **{
                name: [getattr(item, name) for item in items]
                for name in ("category", "brand", "material", "model", "colour", "pattern", "background", "popularity")
            },
        }
    )


# --- users --------------------------------------------------------------------------------------------------


def attribute_matrix(items: Sequence[Product], names: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Return the one-hot attributes of the items, (I, A), and the names of the A columns ("colour=red")."""
    columns = [f"{name}={value}" for name in names for value in sorted({getattr(item, name) for item in items})]
    index = {column: number for number, column in enumerate(columns)}
    matrix = np.zeros((len(items), len(columns)))
    for row, item in enumerate(items):
        for name in names:
            matrix[row, index[f"{name}={getattr(item, name)}"]] = 1.0
    return matrix, columns


def simulate_users(settings: CatalogueSettings, items: Sequence[Product], random: np.random.Generator) -> Population:
    """Let users choose one item after another, none twice, by a softmax over utilities.

    utility = sharpness · (taste of the item's attributes + drift · similarity to the latest items + popularity).
    A user's weight on looks scales colour and pattern in both terms; one minus it scales brand, material and category.
    """
    text, text_names = attribute_matrix(items, TEXT_ATTRIBUTES)
    looks, looks_names = attribute_matrix(items, LOOKS_ATTRIBUTES)
    attributes = np.hstack([text, looks])  # (I, A)
    weight = random.beta(*settings.looks, size=settings.users)  # (U,)
    # equal variance on both sides: a sum of three attributes against a sum of two
    per_side = np.hstack(
        [
            np.repeat((1 - weight)[:, None] / math.sqrt(len(TEXT_ATTRIBUTES)), text.shape[1], axis=1),
            np.repeat(weight[:, None] / math.sqrt(len(LOOKS_ATTRIBUTES)), looks.shape[1], axis=1),
        ]
    )  # (U, A)
    taste = 2.0 * per_side * random.standard_normal((settings.users, attributes.shape[1]))
    own = taste @ attributes.T + np.array([item.popularity for item in items])  # (U, I)
    lengths = random.integers(settings.shortest, settings.longest + 1, size=settings.users)
    everybody = np.arange(settings.users)
    latest = np.zeros_like(taste)  # (U, A), the fading memory of earlier choices
    free = np.zeros_like(own)  # minus infinity where already chosen
    steps = []
    for _ in range(settings.longest):
        likeness = (2.0 * per_side * latest) @ attributes.T
        utility = settings.sharpness * (own + settings.drift * likeness) + free
        # the largest of utility + Gumbel noise is a draw from the softmax of the utilities
        chosen = np.argmax(utility + random.gumbel(size=utility.shape), axis=1)
        free[everybody, chosen] = -np.inf
        latest = settings.memory * latest + (1 - settings.memory) * attributes[chosen]
        steps.append(chosen)
    rows = np.stack(steps, axis=1)  # (U, longest)
    return Population(weight, taste, text_names + looks_names, [row[:n] for row, n in zip(rows, lengths, strict=True)])


def _interaction_table(items: Sequence[Product], population: Population, random: np.random.Generator) -> pl.DataFrame:
    """One row per choice; users start within a year and come back after days."""
    users: list[str] = []
    chosen: list[str] = []
    times: list[np.ndarray] = []
    for number, rows in enumerate(population.choices):
        start = 1_700_000_000 + int(random.integers(0, 365 * 86_400))
        gaps = random.integers(3_600, 14 * 86_400, size=len(rows))
        users.extend([f"U{number:04d}"] * len(rows))
        chosen.extend(items[row].item_id for row in rows)
        times.append(start + np.cumsum(gaps))
    return pl.DataFrame({schema.USER_ID: users, schema.ITEM_ID: chosen, "timestamp": np.concatenate(times)})


def _truth(settings: CatalogueSettings, population: Population) -> dict[str, object]:
    return {
        "settings": dataclasses.asdict(settings),
        "text_attributes": list(TEXT_ATTRIBUTES),
        "looks_attributes": list(LOOKS_ATTRIBUTES),
        "attributes": population.attributes,
        "users": {
            f"U{number:04d}": {
                "looks_weight": round(float(population.looks_weight[number]), 4),
                "taste": np.round(population.taste[number], 3).tolist(),
            }
            for number in range(len(population.choices))
        },
    }


# --- pictures -----------------------------------------------------------------------------------------------

_FINE = 2  # pictures are drawn at this multiple of their size and reduced, for smooth edges


def draw_product(item: Product, settings: CatalogueSettings, random: np.random.Generator) -> Image.Image:
    """Draw one product as an RGB picture of `settings.pixels` squared."""
    side = settings.pixels * _FINE
    colour = _shade(COLOURS[item.colour], 1 + 0.06 * random.standard_normal())
    canvas = _background(BACKGROUNDS[item.background], side)
    body, details = Image.new("L", (side, side)), Image.new("RGBA", (side, side))
    SHAPES[item.category](_Pen(body, details, colour))
    surface = _pattern(item.pattern, colour, side, random)
    product = Image.new("RGBA", (side, side))
    product.paste(surface, mask=body)
    product.alpha_composite(_rounded(body))
    product.alpha_composite(details)
    product = _place(product, settings.jitter, random)
    shadow = _shadow(product)
    canvas.paste(shadow, mask=shadow)
    canvas.paste(product, mask=product)
    small = canvas.convert("RGB").resize((settings.pixels, settings.pixels), Image.Resampling.BOX)
    noisy = np.asarray(small, np.float64) + settings.noise * random.standard_normal((*small.size, 3))
    return Image.fromarray(np.clip(np.rint(noisy), 0, 255).astype(np.uint8))


class _Pen:
    """Draws on a unit square: the body, which takes the pattern, and details, which keep their own colour."""

    def __init__(self, body: Image.Image, details: Image.Image, colour: Colour) -> None:
        self.side = body.width
        self._body, self._details = ImageDraw.Draw(body), ImageDraw.Draw(details)
        self.dark, self.light = _shade(colour, 0.55), _shade(colour, 1.25)

    def _scaled(self, points: Sequence[Point]) -> list[Point]:
        return [(x * self.side, y * self.side) for x, y in points]

    def polygon(self, *points: Point) -> None:
        self._body.polygon(self._scaled(points), fill=255)

    def ellipse(self, left: float, top: float, right: float, bottom: float) -> None:
        self._body.ellipse(self._scaled([(left, top), (right, bottom)]), fill=255)

    def box(self, left: float, top: float, right: float, bottom: float, round_by: float = 0.03) -> None:
        self._body.rounded_rectangle(self._scaled([(left, top), (right, bottom)]), round_by * self.side, fill=255)

    def cut(self, *points: Point) -> None:
        self._body.polygon(self._scaled(points), fill=0)

    def line(self, *points: Point, width: float = 0.03, colour: Colour | None = None) -> None:
        ends = self._scaled(points)
        thick = round(width * self.side)
        self._details.line(ends, fill=colour or self.dark, width=thick, joint="curve")
        for x, y in (ends[0], ends[-1]):  # round ends
            self._details.ellipse(
                [x - thick / 2, y - thick / 2, x + thick / 2, y + thick / 2], fill=colour or self.dark
            )

    def arc(self, box: tuple[float, float, float, float], start: float, end: float, width: float = 0.035) -> None:
        corners = self._scaled([(box[0], box[1]), (box[2], box[3])])
        self._details.arc(corners, start, end, fill=self.dark, width=round(width * self.side))

    def disc(self, left: float, top: float, right: float, bottom: float, colour: Colour | None = None) -> None:
        self._details.ellipse(self._scaled([(left, top), (right, bottom)]), fill=colour or self.dark)

    def patch(self, *points: Point, colour: Colour | None = None) -> None:
        self._details.polygon(self._scaled(points), fill=colour or self.dark)


def _mug(pen: _Pen) -> None:
    pen.arc((0.56, 0.36, 0.86, 0.70), -100, 100, width=0.055)
    pen.box(0.22, 0.26, 0.68, 0.78, 0.06)
    pen.disc(0.22, 0.22, 0.68, 0.32)


def _desk_lamp(pen: _Pen) -> None:
    pen.line((0.42, 0.80), (0.36, 0.52), (0.58, 0.34), width=0.035)
    pen.patch((0.24, 0.84), (0.60, 0.84), (0.54, 0.78), (0.30, 0.78))
    pen.disc(0.61, 0.45, 0.75, 0.59, (255, 240, 180))
    pen.polygon((0.52, 0.22), (0.66, 0.18), (0.88, 0.46), (0.50, 0.60))


def _tote_bag(pen: _Pen) -> None:
    pen.arc((0.34, 0.12, 0.66, 0.64), 180, 360)
    pen.polygon((0.22, 0.38), (0.78, 0.38), (0.84, 0.84), (0.16, 0.84))


def _chair(pen: _Pen) -> None:
    for foot, top in ((0.26, 0.30), (0.74, 0.70), (0.36, 0.38), (0.64, 0.62)):
        pen.line((foot, 0.88), (top, 0.60), width=0.035)
    pen.box(0.30, 0.14, 0.70, 0.50, 0.05)
    pen.polygon((0.28, 0.54), (0.72, 0.54), (0.78, 0.66), (0.22, 0.66))


def _water_bottle(pen: _Pen) -> None:
    pen.box(0.34, 0.30, 0.66, 0.88, 0.08)
    pen.polygon((0.43, 0.20), (0.57, 0.20), (0.62, 0.34), (0.38, 0.34))
    pen.patch((0.43, 0.10), (0.57, 0.10), (0.57, 0.20), (0.43, 0.20))


def _sneaker(pen: _Pen) -> None:
    pen.polygon((0.12, 0.34), (0.36, 0.34), (0.52, 0.50), (0.80, 0.56), (0.88, 0.70), (0.12, 0.70))
    pen.patch((0.10, 0.69), (0.90, 0.69), (0.88, 0.78), (0.12, 0.78))
    for step in range(3):
        pen.line((0.38 + 0.07 * step, 0.42 + 0.05 * step), (0.46 + 0.07 * step, 0.37 + 0.05 * step), width=0.018)


def _vase(pen: _Pen) -> None:
    pen.ellipse(0.26, 0.38, 0.74, 0.88)
    pen.polygon((0.40, 0.16), (0.60, 0.16), (0.57, 0.44), (0.43, 0.44))
    pen.disc(0.38, 0.13, 0.62, 0.20)


def _wall_clock(pen: _Pen) -> None:
    pen.ellipse(0.16, 0.16, 0.84, 0.84)
    pen.arc((0.16, 0.16, 0.84, 0.84), 0, 360, width=0.04)
    pen.line((0.50, 0.50), (0.50, 0.28), width=0.03)
    pen.line((0.50, 0.50), (0.64, 0.58), width=0.03)
    pen.disc(0.46, 0.46, 0.54, 0.54)


def _umbrella(pen: _Pen) -> None:
    pen.line((0.50, 0.14), (0.50, 0.80), width=0.028)
    pen.arc((0.50, 0.74, 0.64, 0.90), 0, 180, width=0.028)
    pen.ellipse(0.12, 0.16, 0.88, 0.86)
    pen.cut((0.0, 0.52), (1.0, 0.52), (1.0, 1.0), (0.0, 1.0))
    for left in (0.12, 0.373, 0.627):
        pen.ellipse(left, 0.47, left + 0.253, 0.57)


def _teapot(pen: _Pen) -> None:
    pen.arc((0.04, 0.40, 0.38, 0.72), 80, 280, width=0.04)
    pen.polygon((0.66, 0.62), (0.92, 0.34), (0.96, 0.38), (0.74, 0.78))
    pen.ellipse(0.20, 0.36, 0.78, 0.84)
    pen.patch((0.36, 0.38), (0.62, 0.38), (0.56, 0.31), (0.42, 0.31))
    pen.disc(0.45, 0.22, 0.53, 0.31)


def _shirt(pen: _Pen) -> None:
    pen.polygon(
        (0.36, 0.18), (0.64, 0.18), (0.92, 0.34), (0.82, 0.50), (0.70, 0.44), (0.70, 0.86), (0.30, 0.86), (0.30, 0.44),
        (0.18, 0.50), (0.08, 0.34),
    )  # fmt: skip
    pen.patch((0.40, 0.17), (0.60, 0.17), (0.50, 0.30))


def _cushion(pen: _Pen) -> None:
    pen.box(0.18, 0.22, 0.82, 0.80, 0.14)
    for x, y in ((0.20, 0.24), (0.80, 0.24), (0.20, 0.78), (0.80, 0.78)):
        pen.disc(x - 0.05, y - 0.05, x + 0.05, y + 0.05)


SHAPES: dict[str, Callable[[_Pen], None]] = {
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


def _shade(colour: Colour, factor: float) -> Colour:
    red, green, blue = (min(255, max(0, round(channel * factor))) for channel in colour)
    return red, green, blue


def _pattern(pattern: str, colour: Colour, side: int, random: np.random.Generator) -> Image.Image:
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


def _background(colour: Colour, side: int) -> Image.Image:
    """A wall that is lit from above and a floor a little darker."""
    fade = np.linspace(1.03, 0.93, side)
    fade[round(0.74 * side) :] *= 0.95
    column = np.clip(np.array(colour) * fade[:, None, None], 0, 255)  # (side, 1, 3)
    return Image.fromarray(column.astype(np.uint8)).resize((side, side), Image.Resampling.NEAREST)


def _rounded(body: Image.Image) -> Image.Image:
    """Shade a body from left to right, so that it looks solid."""
    across = np.abs(np.linspace(-0.9, 1.1, body.width)) ** 2 * 70
    shade = Image.fromarray(np.broadcast_to(across.astype(np.uint8), (body.height, body.width)).copy())
    layer = Image.new("RGBA", body.size, (20, 16, 30, 0))
    layer.putalpha(ImageChops.multiply(shade, body))
    return layer


def _shadow(product: Image.Image) -> Image.Image:
    """A soft shadow below and to the right."""
    small = product.getchannel("A").reduce(8).filter(ImageFilter.GaussianBlur(2))
    soft = small.resize(product.size, Image.Resampling.BILINEAR)
    soft = ImageChops.offset(soft, product.width // 50, product.width // 40)
    layer = Image.new("RGBA", product.size, (30, 26, 40, 0))
    layer.putalpha(soft.point(lambda alpha: round(alpha * 0.28)))
    return layer


def _place(product: Image.Image, jitter: float, random: np.random.Generator) -> Image.Image:
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

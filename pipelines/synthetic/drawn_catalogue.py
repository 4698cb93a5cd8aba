"""A drawn catalogue with known truth: products as pictures with titles, and users whose taste depends on both.

The demo and the tests run on it. A title names brand, material and category; colour and pattern are only in the
picture; the category is in both. Each user's weights of looks and words are known, so it is also known how much a model
can gain from each side. `CatalogueSettings` decides how hard each side is.

Every random draw comes from one seed: the same settings write the same bytes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from PIL import Image

from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ConfigError
from vlm2rec.pipelines.synthetic.pictures import (
    BACKGROUNDS,
    COLOURS,
    FINE,
    PATTERNS,
    SHAPES,
    Pen,
    finish,
    pattern_surface,
    put_together,
    shade,
    wall,
)

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
        require_within(self, limits)


def require_within(settings: object, limits: Mapping[str, tuple[int, int]]) -> None:
    """Raise `ConfigError` for a catalogue setting below the first or above the second number of its limits."""
    for name, (low, high) in limits.items():
        value = getattr(settings, name)
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
    ids = [item.item_id for item in items]
    interaction_table(ids, population.choices, people).write_parquet(out / "interactions.parquet")
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


def attribute_matrix(items: Sequence[object], names: Sequence[str]) -> tuple[np.ndarray, list[str]]:
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


def interaction_table(
    item_ids: Sequence[str], choices: Sequence[np.ndarray], random: np.random.Generator
) -> pl.DataFrame:
    """Return one row per choice; users start within a year and come back after days.

    Args:
        item_ids: id of each product.
        choices: U × (n_u,) product rows, in time order.
        random: the source of random numbers.
    """
    users: list[str] = []
    chosen: list[str] = []
    times: list[np.ndarray] = []
    for number, rows in enumerate(choices):
        start = 1_700_000_000 + int(random.integers(0, 365 * 86_400))
        gaps = random.integers(3_600, 14 * 86_400, size=len(rows))
        users.extend([f"U{number:04d}"] * len(rows))
        chosen.extend(item_ids[row] for row in rows)
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


def draw_product(item: Product, settings: CatalogueSettings, random: np.random.Generator) -> Image.Image:
    """Draw one product as an RGB picture of `settings.pixels` squared."""
    side = settings.pixels * FINE
    colour = shade(COLOURS[item.colour], 1 + 0.06 * random.standard_normal())
    canvas = wall(BACKGROUNDS[item.background], side)
    body, details = Image.new("L", (side, side)), Image.new("RGBA", (side, side))
    SHAPES[item.category](Pen(body, details, colour))
    surface = pattern_surface(item.pattern, colour, side, random)
    put_together(canvas, body, surface, details, settings.jitter, random)
    return finish(canvas, settings.pixels, settings.noise, random)

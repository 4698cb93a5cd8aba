"""A drawn catalogue in which titles are a shortcut that suffices in training, and looks decide at test.

A title is what a shop would print ("Harrowgate Tea Merchants Assam Loose Leaf Tea Fair Trade, 250 g"), in words that a
language model has read. It says which of 24 kinds a product is, and nothing about its looks: colour, pattern and
proportions are drawn independently of every word, and only the picture shows them. Three kinds share an outline, so a
picture does not tell the kind either: neither side can replace the other.

A user buys within one kind, and of this kind what looks right. In a batch of eight users the targets' kinds mostly
differ: a model that reads only titles can bring its training loss to about .2. Among the test candidates are several
products of the target's kind, which titles cannot tell apart: there only looks help, and the history shows which ones.
Images have clutter, changing light and moved products. The mean colour tells a product's colour half of the time and
its pattern hardly ever. So a model has to learn where to look.

What there is to gain with the defaults, N@20 among 101 candidates (a random order: .070): by the user's kind alone .61,
by the true taste of looks alone .31, with the outline .73, by kind and taste .94; by what histories show of both .87.

Every random draw comes from one seed: the same settings write the same bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from PIL import Image, ImageDraw

from vlm2rec.embedder.contract import schema
from vlm2rec.pipelines.synthetic.drawn_catalogue import attribute_matrix, interaction_table, require_within
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
from vlm2rec.pipelines.synthetic.shop_words import KINDS, Kind

PROPORTIONS = {"slender": (0.74, 1.12), "broad": (1.12, 0.78)}  # factors of width and height
LOOKS = ("colour", "pattern", "proportions")


@dataclass(frozen=True, kw_only=True)
class LooksSettings:
    """How large the catalogue is, how hard pictures are to read, and how users choose."""

    products: int = 1920
    users: int = 2400
    seed: int = 0

    # titles
    kinds: int = 24  # at most 24; fewer kinds put more products of the target's kind among the candidates

    # pictures
    pixels: int = 160  # width and height of a picture
    colours: int = 5  # palette size, at most 10
    patterns: int = 4  # kinds of pattern, at most 5
    clutter: int = 4  # other things in the picture, in any colour
    light: float = 0.12  # standard deviation of the logarithm of the light's strength; a third of it for each channel
    jitter: float = 1.8  # scales rotation (12 degrees), size (15 %) and position (6 %)
    noise: float = 10.0  # standard deviation of the noise on every pixel, of 255

    # users
    sharpness: float = 4.0  # scale of the utility of looks before the softmax; 0 is a random choice within the kind
    wander: float = 0.02  # share of choices from a kind that is not the user's own
    popularity: float = 0.2  # standard deviation of an item's popularity, in units of utility after `sharpness`
    shortest: int = 6  # items of a history
    longest: int = 10

    def __post_init__(self) -> None:
        limits = {
            "products": (self.longest + 1, 10**6),
            "users": (1, 10**7),
            "kinds": (1, len(KINDS)),
            "pixels": (32, 1024),
            "colours": (1, len(COLOURS)),
            "patterns": (1, len(PATTERNS)),
            "clutter": (0, 50),
            "shortest": (1, self.longest),
        }
        require_within(self, limits)


@dataclass(frozen=True)
class ShopProduct:
    """One product: its title, and what only its picture shows."""

    item_id: str
    title: str
    kind: Kind
    brand: str
    colour: str
    pattern: str
    proportions: str
    background: str
    popularity: float

    @property
    def looks(self) -> str:
        """The label of everything that a user's taste depends on and no title tells."""
        return f"{self.colour} {self.pattern} {self.proportions}"

    @property
    def caption(self) -> str:
        """Words for the whole item, looks first."""
        return f"{self.looks} {self.kind.name}"


@dataclass(frozen=True)
class Shoppers:
    """Users with known kind and taste, and their choices."""

    kind: np.ndarray  # (U,) index of the user's kind
    taste: np.ndarray  # (U, A) utility of each value of `LOOKS`
    attributes: list[str]  # A names, "colour=red"
    choices: list[np.ndarray]  # U × (n_u,) product rows, in time order


def draw_looks_catalogue(
    out: Path, products: int, users: int, seed: int = 0, settings: LooksSettings | None = None
) -> LooksSettings:
    """Draw a catalogue and simulate its users.

    Writes `items.parquet` (item_id, title, image_path, caption, category, looks and the truth columns kind, form,
    brand, colour, pattern, proportions, background, popularity), `interactions.parquet` (user_id, item_id, timestamp
    in seconds), `images/` and `truth.json` (settings, and each user's kind and taste).

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
    used = dataclasses.replace(settings or LooksSettings(), products=products, users=users, seed=seed)
    catalogue, people, pictures = (np.random.default_rng([seed, part]) for part in range(3))
    items = invent_shop(used, catalogue)
    shoppers = simulate_shoppers(used, items, people)
    (out / "images").mkdir(parents=True, exist_ok=True)
    for item in items:
        draw_shop_product(item, used, pictures).save(out / "images" / f"{item.item_id}.jpg", quality=90)
    _item_table(items).write_parquet(out / "items.parquet")
    ids = [item.item_id for item in items]
    interaction_table(ids, shoppers.choices, people).write_parquet(out / "interactions.parquet")
    schema.write_json(out / "truth.json", _truth(used, shoppers))
    return used


# --- products -----------------------------------------------------------------------------------------------


def invent_shop(settings: LooksSettings, random: np.random.Generator) -> list[ShopProduct]:
    """Return products of every kind in equal numbers; looks are drawn independently of the kind and of the title."""
    kinds = KINDS[: settings.kinds]
    order = random.permutation(settings.products)
    used: set[str] = set()
    items = []
    for number in range(settings.products):
        kind = kinds[order[number] % len(kinds)]
        brand, title = _new_title(kind, used, random)
        items.append(
            ShopProduct(
                item_id=f"P{number:04d}",
                title=title,
                kind=kind,
                brand=brand,
                colour=str(random.choice(list(COLOURS)[: settings.colours])),
                pattern=str(random.choice(PATTERNS[: settings.patterns])),
                proportions=str(random.choice(list(PROPORTIONS))),
                background=str(random.choice(list(BACKGROUNDS))),
                popularity=float(settings.popularity * random.standard_normal()),
            )
        )
    return items


_TITLES = (
    "{brand} {noun}, {material}, {feature}, {size}",
    "{brand} {material} {noun} {feature}, {size}",
    "{noun} by {brand}, {size}, {feature}, {material}",
    "{material} {noun}, {size}, {feature} – {brand}",
)
_TRIES = 50  # a kind has nearly three thousand titles; only a far larger catalogue repeats them


def _new_title(kind: Kind, used: set[str], random: np.random.Generator) -> tuple[str, str]:
    """Return (brand, title); the title is new while the words of the kind last."""
    for _ in range(_TRIES):
        words = {
            "noun": str(random.choice(kind.nouns)),
            "brand": str(random.choice(kind.makers)),
            "material": str(random.choice(kind.materials)),
            "feature": str(random.choice(kind.features)),
            "size": str(random.choice(kind.sizes)),
        }
        title = str(random.choice(_TITLES)).format(**words)
        if title not in used:
            break
    used.add(title)
    return words["brand"], title


def _item_table(items: Sequence[ShopProduct]) -> pl.DataFrame:
    return pl.DataFrame(
        {
            schema.ITEM_ID: [item.item_id for item in items],
            schema.TITLE: [item.title for item in items],
            schema.IMAGE_PATH: [f"{item.item_id}.jpg" for item in items],
            "caption": [item.caption for item in items],
            "category": [item.kind.name for item in items],
            "form": [item.kind.form for item in items],
            **{
                name: [getattr(item, name) for item in items]
                for name in ("looks", *LOOKS, "brand", "background", "popularity")
            },
        }
    )


# --- users --------------------------------------------------------------------------------------------------


def simulate_shoppers(settings: LooksSettings, items: Sequence[ShopProduct], random: np.random.Generator) -> Shoppers:
    """Let users choose one item after another, none twice: first the kind, then by a softmax over looks.

    utility = sharpness · (taste of colour + taste of pattern + taste of proportions) + popularity, among the items of
    the user's own kind, or for a share `wander` of the choices of a kind drawn at random. A user who has bought a whole
    kind goes on with the others.
    """
    looks, attributes = attribute_matrix(items, LOOKS)
    names = [kind.name for kind in KINDS[: settings.kinds]]
    kinds = np.array([names.index(item.kind.name) for item in items])
    own = random.integers(len(names), size=settings.users)
    taste = random.standard_normal((settings.users, len(attributes)))
    utility = settings.sharpness * taste @ looks.T + np.array([item.popularity for item in items])  # (U, I)
    lengths = random.integers(settings.shortest, settings.longest + 1, size=settings.users)
    everybody = np.arange(settings.users)
    steps = []
    for _ in range(settings.longest):
        wanders = random.random(settings.users) < settings.wander
        wanted = np.where(wanders, random.integers(len(names), size=settings.users), own)
        # the largest of utility + Gumbel noise is a draw from the softmax of the utilities
        scores = utility + random.gumbel(size=utility.shape)
        scores[kinds[None, :] != wanted[:, None]] -= _OTHER_KIND
        chosen = np.argmax(scores, axis=1)
        utility[everybody, chosen] = -np.inf
        steps.append(chosen)
    rows = np.stack(steps, axis=1)  # (U, longest)
    return Shoppers(own, taste, attributes, [row[:n] for row, n in zip(rows, lengths, strict=True)])


_OTHER_KIND = 1e6  # far below every utility, and above minus infinity


def _truth(settings: LooksSettings, shoppers: Shoppers) -> dict[str, object]:
    return {
        "settings": dataclasses.asdict(settings),
        "attributes": shoppers.attributes,
        "users": {
            f"U{number:04d}": {
                "kind": KINDS[shoppers.kind[number]].name,
                "taste": np.round(shoppers.taste[number], 3).tolist(),
            }
            for number in range(len(shoppers.choices))
        },
    }


# --- pictures -----------------------------------------------------------------------------------------------


def _tin(pen: Pen) -> None:
    pen.box(0.26, 0.30, 0.74, 0.84, 0.04)
    pen.disc(0.25, 0.22, 0.75, 0.36)
    pen.line((0.27, 0.76), (0.73, 0.76), width=0.018)


def _book(pen: Pen) -> None:
    pen.box(0.24, 0.18, 0.78, 0.84, 0.02)
    pen.patch((0.24, 0.18), (0.32, 0.18), (0.32, 0.84), (0.24, 0.84))
    pen.patch((0.76, 0.21), (0.80, 0.21), (0.80, 0.82), (0.76, 0.82), colour=(240, 236, 226))


FORMS: dict[str, Callable[[Pen], None]] = {
    "bag": SHAPES["tote bag"],
    "bottle": SHAPES["water bottle"],
    "tin": _tin,
    "shirt": SHAPES["shirt"],
    "shoe": SHAPES["sneaker"],
    "cushion": SHAPES["cushion"],
    "mug": SHAPES["mug"],
    "book": _book,
}


def draw_shop_product(item: ShopProduct, settings: LooksSettings, random: np.random.Generator) -> Image.Image:
    """Draw one product among other things as an RGB picture of `settings.pixels` squared."""
    side = settings.pixels * FINE
    colour = shade(COLOURS[item.colour], 1 + 0.06 * random.standard_normal())
    canvas = wall(BACKGROUNDS[item.background], side)
    _add_clutter(canvas, settings.clutter, random)
    body, details = Image.new("L", (side, side)), Image.new("RGBA", (side, side))
    FORMS[item.kind.form](Pen(body, details, colour, PROPORTIONS[item.proportions]))
    surface = pattern_surface(item.pattern, colour, side, random)
    put_together(canvas, body, surface, details, settings.jitter, random)
    gains = np.exp(settings.light * (random.standard_normal() + random.standard_normal(3) / 3))
    lit = np.clip(np.asarray(canvas.convert("RGB"), np.float64) * gains, 0, 255)
    return finish(Image.fromarray(lit.astype(np.uint8)), settings.pixels, settings.noise, random)


def _add_clutter(canvas: Image.Image, count: int, random: np.random.Generator) -> None:
    """Put a cloth of any colour on the floor, and boxes and balls of any colour on the canvas."""
    side, pen = canvas.width, ImageDraw.Draw(canvas)
    palette = list(COLOURS.values())
    for number in range(count):
        colour = shade(palette[int(random.integers(len(palette)))], random.uniform(0.8, 1.2))
        wide, high, x, y = random.uniform(size=4) * (0.22, 0.22, 1.0, 1.0) + (0.1, 0.1, 0.0, 0.0)
        if number == 0:
            top = random.uniform(0.7, 0.85) * side
            pen.rectangle((0, top, side, side), fill=colour)
            continue
        # near the edges: the product hides what lies in the middle
        x = x * 0.3 if random.random() < 0.5 else 1 - x * 0.3
        corners = tuple(side * value for value in (x - wide / 2, y - high / 2, x + wide / 2, y + high / 2))
        (pen.ellipse if random.random() < 0.5 else pen.rectangle)(corners, fill=colour)

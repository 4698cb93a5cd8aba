"""The catalogue of looks: titles tell the kind and nothing about looks, and a user's next item needs both."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from vlm2rec.downstream.evaluation.metrics import user_metrics
from vlm2rec.embedder.contract.errors import ConfigError
from vlm2rec.pipelines.synthetic.drawn_catalogue import attribute_matrix
from vlm2rec.pipelines.synthetic.looks_catalogue import (
    FORMS,
    LOOKS,
    PROPORTIONS,
    LooksSettings,
    Shoppers,
    ShopProduct,
    draw_looks_catalogue,
    draw_shop_product,
    invent_shop,
    simulate_shoppers,
)
from vlm2rec.pipelines.synthetic.pictures import COLOURS, PATTERNS
from vlm2rec.pipelines.synthetic.shop_words import KINDS

BATCH = 8


@pytest.fixture(scope="module")
def shop() -> tuple[LooksSettings, list[ShopProduct], Shoppers]:
    """The laboratory's catalogue with a third of its users, without pictures."""
    settings = LooksSettings(users=800)
    items = invent_shop(settings, np.random.default_rng(1))
    return settings, items, simulate_shoppers(settings, items, np.random.default_rng(2))


def kinds_of(items: list[ShopProduct]) -> np.ndarray:
    names = [kind.name for kind in KINDS]
    return np.array([names.index(item.kind.name) for item in items])


def n_at_20(items: list[ShopProduct], shoppers: Shoppers) -> dict[str, float]:
    """Rank each user's last item among 100 untouched ones by what is known of the user: kind, looks, or both."""
    kinds, (looks, _) = kinds_of(items), attribute_matrix(items, LOOKS)
    random = np.random.default_rng(3)
    found: dict[str, list[float]] = {"titles": [], "looks": [], "both": []}
    for user, chosen in enumerate(shoppers.choices):
        others = random.choice(np.setdiff1d(np.arange(len(items)), chosen), 100, replace=False)
        rows = np.concatenate([chosen[-1:], others])
        titles, taste = (kinds[rows] == shoppers.kind[user]).astype(float), looks[rows] @ shoppers.taste[user]
        for name, scores in (("titles", titles), ("looks", taste), ("both", 100 * titles + taste)):
            found[name].append(float(user_metrics(scores[:1], scores[None, 1:])["N@20"][0]))
    return {name: float(np.mean(values)) for name, values in found.items()}


def test_the_next_item_needs_the_title_and_the_looks(shop: tuple[LooksSettings, list[ShopProduct], Shoppers]) -> None:
    _, items, shoppers = shop
    found = n_at_20(items, shoppers)
    assert 0.2 < found["looks"] < 0.45, found
    assert 0.5 < found["titles"] < 0.7, found
    assert found["both"] > found["titles"] + 0.2, found


def test_without_taste_looks_say_nothing() -> None:
    settings = LooksSettings(users=400, sharpness=0.0, popularity=0.0)
    items = invent_shop(settings, np.random.default_rng(1))
    found = n_at_20(items, simulate_shoppers(settings, items, np.random.default_rng(2)))
    assert found["looks"] == pytest.approx(0.07, abs=0.025)
    assert found["both"] == pytest.approx(found["titles"], abs=0.04)


def test_in_a_batch_titles_suffice(shop: tuple[LooksSettings, list[ShopProduct], Shoppers]) -> None:
    """The loss of a model that knows the kind of every title and history, and no more."""
    settings, items, shoppers = shop
    kinds, random = kinds_of(items), np.random.default_rng(4)
    wanted = np.array([kinds[chosen[-3]] for chosen in shoppers.choices])  # the training target of --samples last
    losses, twice = [], []
    for _ in range(400):
        users = random.choice(len(wanted), BATCH, replace=False)
        same = (wanted[users][:, None] == wanted[users][None, :]).sum(axis=1)
        losses.append(np.log(same).mean())
        twice.append((same > 1).mean())
    share = 1 - (1 - 1 / settings.kinds) ** (BATCH - 1)  # of the users that another of the batch has the kind of
    assert np.mean(twice) == pytest.approx(share, abs=0.05)
    assert np.mean(losses) < 0.25
    stays = np.mean(
        [(kinds[chosen] == own).mean() for own, chosen in zip(shoppers.kind, shoppers.choices, strict=True)]
    )
    assert stays > 0.95


def test_no_word_of_a_title_tells_looks(shop: tuple[LooksSettings, list[ShopProduct], Shoppers]) -> None:
    """The mutual information of words and looks is what it is when looks are dealt out anew."""
    _, items, _ = shop
    words = [set(re.findall(r"[^\W\d]+", item.title.lower())) for item in items]
    vocabulary = sorted(set().union(*words))
    assert not {*COLOURS, *PATTERNS, *PROPORTIONS, "white", "striped", "dotted", "checked"} & set(vocabulary)
    holds = np.array([[word in own for word in vocabulary] for own in words], float)
    random = np.random.default_rng(5)
    for name in LOOKS:
        values = [getattr(item, name) for item in items]
        looks = np.array([[value == each for each in sorted(set(values))] for value in values], float)
        real = information(holds, looks)
        dealt = [information(holds, looks[random.permutation(len(looks))]) for _ in range(99)]
        assert (np.array(dealt) >= real).mean() > 0.01, (name, real, np.mean(dealt))


def information(holds: np.ndarray, looks: np.ndarray) -> float:
    """Return the mutual information in nats of each word, (n, W) 0 or 1, with one-hot looks, (n, L), summed."""
    total = 0.0
    for side in (holds, 1 - holds):
        joint = side.T @ looks / len(looks)  # (W, L)
        free = side.mean(axis=0)[:, None] * looks.mean(axis=0)[None]
        total += float(np.sum(joint * np.log(np.where(joint > 0, joint, 1) / np.where(joint > 0, free, 1))))
    return total


def test_titles_are_unlike_each_other_and_name_the_kind(
    shop: tuple[LooksSettings, list[ShopProduct], Shoppers],
) -> None:
    settings, items, _ = shop
    assert len({item.title for item in items}) == settings.products
    makers = [maker for kind in KINDS for maker in kind.makers]
    assert len(set(makers)) == len(makers)
    for item in items:
        assert item.brand in item.title
        assert any(noun in item.title for noun in item.kind.nouns)


def test_three_kinds_share_each_outline() -> None:
    forms = [kind.form for kind in KINDS]
    assert {form: forms.count(form) for form in FORMS} == dict.fromkeys(FORMS, 3)
    assert len({kind.name for kind in KINDS}) == len(KINDS) == 24


def test_a_user_who_bought_a_whole_kind_goes_on_with_others() -> None:
    settings = LooksSettings(products=48, users=50, kinds=24, wander=0.0)
    items = invent_shop(settings, np.random.default_rng(1))
    shoppers = simulate_shoppers(settings, items, np.random.default_rng(2))
    kinds = kinds_of(items)
    for own, chosen in zip(shoppers.kind, shoppers.choices, strict=True):
        assert len(set(chosen.tolist())) == len(chosen)
        assert (kinds[chosen[:2]] == own).all() and (kinds[chosen[2:]] != own).all()


def test_a_catalogue_holds_items_interactions_pictures_and_truth(tmp_path: Path) -> None:
    small = LooksSettings(pixels=48)
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        draw_looks_catalogue(tmp_path / folder, products=30, users=20, seed=seed, settings=small)
    for name in ("items.parquet", "interactions.parquet", "truth.json", "images/P0003.jpg"):
        first, again, other = ((tmp_path / folder / name).read_bytes() for folder in "abc")
        assert first == again
        assert first != other
    items = pl.read_parquet(tmp_path / "a" / "items.parquet")
    truth = json.loads((tmp_path / "a" / "truth.json").read_text())
    assert items.columns[:7] == ["item_id", "title", "image_path", "caption", "category", "form", "looks"]
    assert (items["looks"] == items["colour"] + " " + items["pattern"] + " " + items["proportions"]).all()
    assert pl.read_parquet(tmp_path / "a" / "interactions.parquet")["user_id"].n_unique() == 20
    assert len(truth["users"]["U0000"]["taste"]) == len(truth["attributes"])
    assert truth["settings"]["products"] == 30
    with Image.open(tmp_path / "a" / "images" / "P0003.jpg") as picture:
        assert (picture.size, picture.mode) == ((48, 48), "RGB")


def test_the_mean_colour_of_a_picture_tells_little_of_its_looks() -> None:
    settings = LooksSettings(products=400, pixels=32)
    items = invent_shop(settings, np.random.default_rng(1))
    random = np.random.default_rng(6)
    means = np.stack([np.asarray(draw_shop_product(item, settings, random), float).mean(axis=(0, 1)) for item in items])
    colours = np.array([item.colour for item in items])
    means = (means - means.mean(axis=0)) / means.std(axis=0)
    learnt, tested = np.arange(0, 400, 2), np.arange(1, 400, 2)
    names = sorted(set(colours.tolist()))
    centres = np.stack([means[learnt][colours[learnt] == name].mean(axis=0) for name in names])
    nearest = np.array(names)[((means[tested][:, None] - centres[None]) ** 2).sum(axis=2).argmin(axis=1)]
    assert (nearest == colours[tested]).mean() < 0.6  # a fifth by chance


def test_a_picture_shows_colour_pattern_and_proportions() -> None:
    settings = LooksSettings(clutter=0, light=0.0, noise=0.0, jitter=0.0, pixels=64)
    item = next(item for item in invent_shop(settings, np.random.default_rng(1)) if item.kind.form == "cushion")

    def drawn(**looks: str) -> np.ndarray:
        return np.asarray(
            draw_shop_product(dataclasses.replace(item, **looks), settings, np.random.default_rng(0)), int
        )

    base = {"colour": "red", "pattern": "plain", "proportions": "broad"}
    for name, other in (("colour", "blue"), ("pattern", "dots"), ("proportions", "slender")):
        changed = np.abs(drawn(**base) - drawn(**{**base, name: other})).max(axis=2) > 40
        assert changed.mean() > 0.03, name
    red = np.abs(drawn(**base)[:, :, 0] - drawn(**base)[:, :, 2]) > 80
    slender = drawn(**{**base, "proportions": "slender"})
    red_slender = np.abs(slender[:, :, 0] - slender[:, :, 2]) > 80
    assert red.any(axis=0).sum() > red.any(axis=1).sum()
    assert red_slender.any(axis=0).sum() < red_slender.any(axis=1).sum()


@pytest.mark.parametrize("setting", [{"kinds": 25}, {"products": 10}, {"pixels": 8}, {"clutter": -1}])
def test_a_setting_out_of_range_is_refused(setting: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"catalogue setting {next(iter(setting))} is"):
        LooksSettings(**setting)

"""The drawn catalogue: what is written, what a title gives away, and what taste depends on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from vlm2rec.embedder.contract.errors import ConfigError
from vlm2rec.pipelines.synthetic.drawn_catalogue import (
    BRANDS,
    CATEGORIES,
    COLOURS,
    LOOKS_ATTRIBUTES,
    MATERIALS,
    PATTERNS,
    SHAPES,
    TEXT_ATTRIBUTES,
    CatalogueSettings,
    Population,
    Product,
    attribute_matrix,
    draw_catalogue,
    draw_product,
    invent_products,
    simulate_users,
)


def world(**settings: object) -> tuple[CatalogueSettings, list[Product], Population]:
    used = dataclasses.replace(CatalogueSettings(), **settings)
    items = invent_products(used, np.random.default_rng(1))
    return used, items, simulate_users(used, items, np.random.default_rng(2))


def hit_rate_at_10(items: list[Product], population: Population, names: tuple[str, ...]) -> float:
    """Rank each user's last item among 100 untouched ones by the user's true taste, seen through some attributes."""
    matrix, columns = attribute_matrix(items, names)
    taste = population.taste[:, [population.attributes.index(column) for column in columns]]
    random = np.random.default_rng(3)
    hits = []
    for user, chosen in enumerate(population.choices):
        scores = matrix @ taste[user]
        untouched = np.setdiff1d(np.arange(len(items)), chosen)
        others = random.choice(untouched, 100, replace=False)
        better = (scores[others] > scores[chosen[-1]]).sum() + (scores[others] == scores[chosen[-1]]).sum() / 2
        hits.append(better < 10)
    return float(np.mean(hits))


def test_a_catalogue_holds_items_interactions_pictures_and_truth(tmp_path: Path) -> None:
    draw_catalogue(tmp_path, products=40, users=30, seed=4)
    items = pl.read_parquet(tmp_path / "items.parquet")
    interactions = pl.read_parquet(tmp_path / "interactions.parquet")
    truth = json.loads((tmp_path / "truth.json").read_text())
    assert items.columns[:5] == ["item_id", "title", "image_path", "caption", "category"]
    assert items["item_id"].n_unique() == 40
    assert interactions.columns == ["user_id", "item_id", "timestamp"]
    assert interactions["user_id"].n_unique() == 30
    assert set(interactions["item_id"]) <= set(items["item_id"])
    assert truth["settings"]["products"] == 40
    assert len(truth["users"]["U0000"]["taste"]) == len(truth["attributes"])
    for name in items["image_path"]:
        with Image.open(tmp_path / "images" / name) as picture:
            assert (picture.size, picture.mode) == ((128, 128), "RGB")


def test_the_same_seed_writes_the_same_bytes_and_another_seed_other_ones(tmp_path: Path) -> None:
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        draw_catalogue(tmp_path / folder, products=20, users=10, seed=seed)
    for name in ("items.parquet", "interactions.parquet", "truth.json", "images/P0003.jpg"):
        first, again, other = ((tmp_path / folder / name).read_bytes() for folder in "abc")
        assert first == again
        assert first != other


def test_titles_say_brand_material_category_and_nothing_about_looks() -> None:
    _, items, _ = world(products=300, categories=12, colours=10, brands=16)
    looks = {*COLOURS, *PATTERNS}
    for item in items:
        assert item.title == f"{item.brand} {item.material} {item.category} {item.model}"
        assert not looks & set(item.title.lower().split())
        assert {item.colour, item.pattern} <= set(item.caption.split())
    assert len({item.title for item in items}) == 300
    assert not looks & {word for name in (*BRANDS, *MATERIALS, *CATEGORIES) for word in name.lower().split()}


def test_every_category_has_a_drawing_and_its_own_outline() -> None:
    used = CatalogueSettings(noise=0.0, jitter=0.0, categories=12)
    assert set(SHAPES) == set(CATEGORIES)
    pictures = {}
    for category in CATEGORIES:
        item = Product("P", "Norwick", "oak", category, 100, "red", "plain", "stone", 0.0)
        pictures[category] = np.asarray(draw_product(item, used, np.random.default_rng(0)), float)
    wall = np.median(np.stack(list(pictures.values())), axis=0)
    drawn = {category: np.abs(picture - wall).max(-1) > 40 for category, picture in pictures.items()}
    for first in CATEGORIES:
        assert 0.05 < drawn[first].mean() < 0.7
        for second in CATEGORIES:
            if first != second:
                shared = (drawn[first] & drawn[second]).sum() / (drawn[first] | drawn[second]).sum()
                assert shared < 0.9, (first, second)


@pytest.mark.parametrize(("colour", "channel"), [("red", 0), ("blue", 2)])
def test_a_picture_shows_its_colour_and_its_pattern(colour: str, channel: int) -> None:
    used = CatalogueSettings(noise=0.0, jitter=0.0)

    def middle(pattern: str) -> np.ndarray:
        item = Product("P", "Norwick", "oak", "mug", 100, colour, pattern, "stone", 0.0)
        return np.asarray(draw_product(item, used, np.random.default_rng(0)), float)[50:90, 40:70]

    plain = middle("plain")
    assert plain[..., channel].mean() > 2 * plain[..., (channel + 1) % 3].mean()
    spread = {pattern: middle(pattern).std(axis=(0, 1)).max() for pattern in PATTERNS}
    assert spread["plain"] < 15
    assert min(spread[pattern] for pattern in PATTERNS if pattern != "plain") > 40


def test_noise_makes_pictures_noisier() -> None:
    item = Product("P", "Norwick", "oak", "mug", 100, "red", "plain", "stone", 0.0)
    clean, noisy = (
        np.asarray(draw_product(item, CatalogueSettings(noise=noise), np.random.default_rng(0)), float)[:10, :10]
        for noise in (0.0, 20.0)
    )
    assert clean.std(axis=(0, 1)).max() < 3
    assert 14 < noisy.std(axis=(0, 1)).max() < 24


def test_histories_have_the_asked_lengths_and_no_item_twice() -> None:
    _, _, population = world(products=100, users=200, shortest=6, longest=16)
    lengths = {len(chosen) for chosen in population.choices}
    assert lengths == set(range(6, 17))
    assert all(len(set(chosen.tolist())) == len(chosen) for chosen in population.choices)


def test_taste_lies_in_words_and_in_looks_and_both_together_foretell_most() -> None:
    _, items, population = world(users=300)
    words = hit_rate_at_10(items, population, TEXT_ATTRIBUTES)
    looks = hit_rate_at_10(items, population, LOOKS_ATTRIBUTES)
    both = hit_rate_at_10(items, population, TEXT_ATTRIBUTES + LOOKS_ATTRIBUTES)
    assert words > 0.3  # chance is 0.1
    assert looks > 0.3
    assert both > max(words, looks) + 0.1


def test_users_who_do_not_care_for_looks_cannot_be_foretold_by_looks() -> None:
    _, items, population = world(users=300, looks=(0.01, 100.0), drift=0.0)
    assert population.looks_weight.max() < 0.1
    assert hit_rate_at_10(items, population, LOOKS_ATTRIBUTES) < 0.2
    assert hit_rate_at_10(items, population, TEXT_ATTRIBUTES) > 0.6


def test_users_without_sharpness_choose_at_random() -> None:
    _, items, population = world(users=400, sharpness=0.0)
    assert hit_rate_at_10(items, population, TEXT_ATTRIBUTES + LOOKS_ATTRIBUTES) == pytest.approx(0.1, abs=0.05)


def test_drift_makes_neighbours_in_time_alike() -> None:
    def likeness(drift: float) -> float:
        _, items, population = world(users=300, drift=drift)
        matrix, _ = attribute_matrix(items, TEXT_ATTRIBUTES + LOOKS_ATTRIBUTES)
        next_to = np.mean([(matrix[c[:-1]] * matrix[c[1:]]).sum(1).mean() for c in population.choices])
        apart = np.mean([(matrix[c[0]] * matrix[c[-1]]).sum() for c in population.choices])
        return float(next_to - apart)

    assert likeness(1.6) > likeness(0.0) + 0.1


def test_told_by_brand_lets_a_title_foretell_the_colour() -> None:
    def colours_per_brand(share: float) -> float:
        _, items, _ = world(products=400, told_by_brand=share)
        brands = {item.brand for item in items}
        return float(np.mean([len({item.colour for item in items if item.brand == brand}) for brand in brands]))

    assert colours_per_brand(1.0) == 1.0
    assert colours_per_brand(0.0) > 7


def test_five_core_keeps_nearly_all_of_the_default_catalogue() -> None:
    _, items, population = world()
    counts = np.bincount(np.concatenate(population.choices), minlength=len(items))
    assert (counts >= 5).mean() > 0.95
    assert counts.max() < 60


def test_a_setting_out_of_range_is_refused_with_its_name() -> None:
    with pytest.raises(ConfigError, match=r"colours is 11.*1 to 10"):
        CatalogueSettings(colours=11)
    with pytest.raises(ConfigError, match=r"products is 16.*17"):
        CatalogueSettings(products=16)

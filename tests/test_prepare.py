"""`vlm2rec prepare`: filtering, splitting, candidates, the folder it writes, and what it says about bad input."""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from children import Forked, command
from hypothesis import assume, given
from hypothesis import strategies as st

from vlm2rec.embedder.contract import storage
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ConfigError, DataError
from vlm2rec.pipelines import cli, prepare
from vlm2rec.pipelines.catalogue import dataset_writer
from vlm2rec.pipelines.catalogue.negatives import Sequences, draw_candidates, random_items, untouched_counts
from vlm2rec.pipelines.config import PrepareConfig
from vlm2rec.pipelines.reporting.paper import nearest

Row = tuple[str, str, int]


def write_catalogue(
    folder: Path, log: list[Row], items: list[str] | None = None, without_image: tuple[str, ...] = ()
) -> dict[str, Path]:
    """Write items.parquet, interactions.parquet and one tiny file per item; return the paths."""
    ids = sorted({item for _, item, _ in log}) if items is None else items
    (folder / "images").mkdir(parents=True, exist_ok=True)
    pl.DataFrame(
        {"item_id": ids, "title": [f"title of {item}" for item in ids], "price": np.arange(len(ids))}
    ).write_parquet(folder / "items.parquet")
    pl.DataFrame(
        {"user_id": [u for u, _, _ in log], "item_id": [i for _, i, _ in log], "timestamp": [t for _, _, t in log]},
        schema={"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64},
    ).write_parquet(folder / "interactions.parquet")
    for item in ids:
        if item not in without_image:
            (folder / "images" / f"{item}.jpg").write_bytes(b"\xff")
    return {
        "items": folder / "items.parquet",
        "interactions": folder / "interactions.parquet",
        "images": folder / "images",
        "out": folder / "data",
    }


def config(paths: dict[str, Path], **settings: Any) -> PrepareConfig:
    return PrepareConfig(**{**paths, "core": 1, "candidates": 2, "candidate_seeds": (0, 1), **settings})


def a_log(users: int, items: int, length: int, seed: int = 0) -> list[Row]:
    """Draw a log in random file order, with popular items, repeats and many equal times."""
    random = np.random.default_rng(seed)
    size = users * length
    user, time_ = random.integers(0, users, size), random.integers(0, 40, size)
    item = (items * random.random(size) ** 1.7).astype(int)
    return [(f"u{u}", f"i{i}", int(t)) for u, i, t in zip(user, item, time_, strict=True)]


def flags(paths: dict[str, Path], **settings: object) -> list[str]:
    given = {"core": 1, "candidates": 2, "candidate-seeds": "0,1", **paths, **settings}
    return [
        "prepare",
        *(part for key, value in given.items() if value is not None for part in (f"--{key}", str(value))),
    ]


# --- filtering and splitting --------------------------------------------------------------------------------


def brute_force(log: list[Row], core: int, truncate: int = 0) -> dict[str, list[str]]:
    """Each user's items in time order after duplicates, truncation and k-core, by the plainest possible loops."""
    rows = list(dict.fromkeys(log))
    if truncate:
        of_user = {user: sorted((row for row in rows if row[0] == user), key=lambda row: row[2]) for user, _, _ in rows}
        kept = [row for mine in of_user.values() for row in mine[-truncate:]]
        rows = [row for row in rows if row in kept]
    while True:
        users, items = Counter(u for u, _, _ in rows), Counter(i for _, i, _ in rows)
        kept = [(u, i, t) for u, i, t in rows if users[u] >= max(core, 3) and items[i] >= core]
        if len(kept) == len(rows):
            break
        rows = kept
    return {
        user: [i for u, i, _ in sorted(rows, key=lambda row: row[2]) if u == user] for user in {u for u, _, _ in rows}
    }


@pytest.mark.parametrize("core", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("seed", range(6))
def test_core_duplicates_order_and_split_equal_a_brute_force(tmp_path: Path, core: int, seed: int) -> None:
    log = a_log(users=40, items=30, length=7, seed=seed)
    expected = brute_force(log, core)
    dataset = prepare.run(config(write_catalogue(tmp_path, log), core=core, candidates=1))
    assert expected
    assert dataset.user_ids == sorted(expected)
    rows = dataset.sequences.to_pylist()
    assert {row["user_id"]: [*row["train"], row["valid"], row["test"]] for row in rows} == expected
    assert all(row["train"] for row in rows)
    touched = sorted({item for items in expected.values() for item in items})
    assert dataset.warm().item_ids == touched
    assert dataset.item_ids == sorted({item for _, item, _ in log})
    assert dataset.meta["items"] - dataset.meta["cold_items"] == len(touched)
    assert dataset.meta["users"] == len(expected)
    assert dataset.meta["interactions"] == sum(map(len, expected.values()))


@given(seed=st.integers(0, 10**6), core=st.integers(1, 4), truncate=st.integers(0, 9), users=st.integers(5, 40))
def test_truncation_before_the_core_equals_a_brute_force(
    tmp_path_factory: pytest.TempPathFactory, seed: int, core: int, truncate: int, users: int
) -> None:
    log = a_log(users=users, items=25, length=8, seed=seed)
    expected = brute_force(log, core, truncate)
    touched = {item for mine in expected.values() for item in mine}
    assume(all(len(set(mine)) < len(touched) for mine in expected.values()))  # else no candidate is left
    paths = write_catalogue(tmp_path_factory.mktemp("truncated"), log)
    asked = config(paths, core=core, truncate=truncate, candidates=1)
    if not expected:
        with pytest.raises(DataError, match="leaves nothing"):
            prepare.run(asked)
        return
    dataset = prepare.run(asked)
    found = {row["user_id"]: [*row["train"], row["valid"], row["test"]] for row in dataset.sequences.to_pylist()}
    assert found == expected
    assert dataset.meta["rules"].get("truncate", 0) == truncate
    rows = dataset.meta["rows"]["interactions"]
    assert rows["read"] == rows["kept"] + sum(rows["rejected"].values())


def test_truncation_keeps_the_latest_and_names_what_it_left_out(tmp_path: Path) -> None:
    log = [(f"u{user}", f"i{time_ % 7}", 100 - time_ if user else time_) for user in range(4) for time_ in range(6)]
    dataset = prepare.run(config(write_catalogue(tmp_path, log), truncate=4))
    steps = [step["step"] for step in dataset.meta["counts"]]
    assert steps.index("the latest 4 interactions of each user") < steps.index("1-core, users with 3 interactions")
    assert dataset.meta["average_length"] == 4.0
    assert dataset.meta["rows"]["interactions"]["rejected"] == {"before the user's latest 4": 8}
    first = dataset.sequences.to_pylist()[0]
    assert [*first["train"], first["valid"], first["test"]] == ["i2", "i3", "i4", "i5"]


def once(log: list[Row], user_least: int, item_least: int) -> dict[str, list[str]]:
    """Each user's items after both minima of one count, and after the users with fewer than three are gone."""
    rows = list(dict.fromkeys(log))
    users, items = Counter(u for u, _, _ in rows), Counter(i for _, i, _ in rows)
    return brute_force([(u, i, t) for u, i, t in rows if users[u] >= user_least and items[i] >= item_least], 1)


@given(seed=st.integers(0, 10**6), user=st.integers(0, 9), item=st.integers(0, 9), users=st.integers(5, 40))
def test_minima_of_users_and_items_are_counted_once_and_not_again(
    tmp_path_factory: pytest.TempPathFactory, seed: int, user: int, item: int, users: int
) -> None:
    log = a_log(users=users, items=25, length=8, seed=seed)
    expected = once(log, user, item)
    touched = {item for mine in expected.values() for item in mine}
    assume(all(len(set(mine)) < len(touched) for mine in expected.values()))  # else no candidate is left
    asked = config(write_catalogue(tmp_path_factory.mktemp("minima"), log), min_user=user, min_item=item, candidates=1)
    if not expected:
        with pytest.raises(DataError, match="leaves nothing"):
            prepare.run(asked)
        return
    dataset = prepare.run(asked)
    found = {row["user_id"]: [*row["train"], row["valid"], row["test"]] for row in dataset.sequences.to_pylist()}
    assert found == expected
    rules = dataset.meta["rules"]
    assert (rules.get("min_user", 0), rules.get("min_item", 0)) == (user, item)
    rows = dataset.meta["rows"]["interactions"]
    assert rows["read"] == rows["kept"] + sum(rows["rejected"].values())


def test_minima_are_a_step_of_their_own_and_leave_what_a_core_would_drop(tmp_path: Path) -> None:
    # "rare" has two interactions, and one of them is of u9, who has too few himself: the other one stays
    log = [(f"u{user}", f"i{time_}", time_) for user in range(4) for time_ in range(4 + (user > 0))]
    log += [("u0", "rare", 9), ("u9", "rare", 9), ("u9", "i0", 10)]
    paths = write_catalogue(tmp_path, log)
    dataset = prepare.run(config(paths, min_user=3, min_item=2, candidates=1))
    counts = [(each["step"], each["users"], each["items"], each["interactions"]) for each in dataset.meta["counts"]]
    assert ("users with 3 and items with 2 interactions, once", 4, 6, 20) in counts
    assert dataset.frequency().tolist() == [4, 4, 4, 4, 3, 1]
    left_out = dataset.meta["rows"]["interactions"]["rejected"]
    assert left_out == {"not among users with 3 and items with 2 interactions": 2}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"min_user": 3, "core": 5}, r"--min-user 3 with --core 5, which leaves only users with 5 .*--core 1"),
        ({"min_user": 9, "min_item": 5, "core": 5}, r"--min-item 5 with --core 5, which leaves only items with 5"),
        ({"min_item": 1000, "core": 1}, r"'items with 1000 interactions, once' leaves nothing of \d+ users"),
    ],
)
def test_minima_without_effect_or_without_end_are_refused(tmp_path: Path, more: dict[str, int], message: str) -> None:
    paths = write_catalogue(tmp_path, a_log(users=40, items=20, length=6))
    with pytest.raises((ConfigError, DataError), match=message):
        prepare.run(config(paths, **more))
    assert not paths["out"].exists()


def test_a_published_core_is_taken_as_it_is(tmp_path: Path) -> None:
    """`--core 1` removes no row of a 5-core, and after the loss of some items only users below three."""
    core = brute_force(a_log(60, 25, 12), 5)
    every = [(user, item, time_) for user, items in core.items() for time_, item in enumerate(items)]
    assert prepare.run(config(write_catalogue(tmp_path / "whole", every))).meta["interactions"] == len(every)
    lost = {"i0", "i1", "i2", "i3"}
    left = [row for row in every if row[1] not in lost]
    counts = Counter(user for user, _, _ in left)
    enough = [row for row in left if counts[row[0]] >= 3]
    paths = write_catalogue(tmp_path / "part", every, without_image=tuple(lost))
    as_it_is = prepare.run(config(paths))
    assert as_it_is.meta["interactions"] == len(enough) < len(every)
    assert prepare.run(config(paths, core=5)).meta["interactions"] < len(enough)


def test_of_a_dataset_of_the_paper_other_filters_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = a_log(users=80, items=40, length=14)
    paths = write_catalogue(tmp_path, log)
    dataset = prepare.run(config(paths, name="Beauty", core=5))
    found = {(each["users"], each["items"], each["interactions"]) for each in dataset.meta["variants"]}
    expected = set()
    for core, truncate in ((1, 0), (5, 0), (1, 10), (5, 10)):
        kept = brute_force(log, core, truncate)
        items = {item for mine in kept.values() for item in mine}
        expected.add((len(kept), len(items), sum(map(len, kept.values()))))
    assert found == expected
    assert [re.search(r"\((.*)\)", each["step"])[1] for each in dataset.meta["variants"]] == [
        *("--core 1", "--core 5", "--core 1 --truncate 10", "--core 5 --truncate 10")
    ]
    assert "comes nearest to the paper" in " ".join(capsys.readouterr().err.split())
    assert "variants" not in prepare.run(config(paths, out=tmp_path / "other", core=5)).meta


def test_the_nearest_counts_are_by_ratio() -> None:
    paper = {"users": 100, "items": 1000, "interactions": 10_000}
    near, far = (
        {"users": 110, "items": 1000, "interactions": 9000},
        {"users": 100, "items": 500, "interactions": 10_000},
    )
    assert nearest([far, near], paper) == 1
    assert nearest([{"users": 0, "items": 0, "interactions": 0}, far], paper) == 1


def test_the_worlds_of_the_brute_force_test_do_lose_users_and_items() -> None:
    log = a_log(users=40, items=30, length=7, seed=0)
    assert len(set(log)) < len(log)
    sizes = [len(brute_force(log, core)) for core in (1, 4, 5)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[2]


def test_equal_times_keep_the_files_order_in_a_large_file(tmp_path: Path) -> None:
    # large enough that Polars works on it in several pieces at once
    users, length = 300, 1000
    order = np.random.default_rng(1).permutation(users * length)
    log = [(f"u{n % users:03d}", f"i{place}", 0) for place, n in enumerate(order.tolist())]
    items = [f"i{n}" for n in range(users * length)]
    paths = write_catalogue(tmp_path, [], items=items[:1])
    for name in ("1", "2"):
        (tmp_path / f"images/{name}.jpg").write_bytes(b"x")
    pl.DataFrame({"item_id": items, "title": items, "image_path": ["1.jpg"] * len(items)}).write_parquet(paths["items"])
    pl.DataFrame(log, schema=["user_id", "item_id", "timestamp"], orient="row").write_parquet(paths["interactions"])
    dataset = prepare.run(config(paths))
    for row in dataset.sequences.slice(0, 20).to_pylist():
        places = [int(item[1:]) for item in [*row["train"], row["valid"], row["test"]]]
        assert len(places) == length
        assert places == sorted(places)


def test_time_decides_and_not_the_files_order(tmp_path: Path) -> None:
    log = [("u", "d", 4), ("u", "b", 2), ("u", "a", 1), ("u", "c", 3), ("v", "a", -5), ("v", "b", -7), ("v", "e", 0)]
    dataset = prepare.run(config(write_catalogue(tmp_path, log), candidates=1))
    assert dataset.sequences.to_pylist() == [
        {"user_id": "u", "train": ["a", "b"], "valid": "c", "test": "d"},
        {"user_id": "v", "train": ["b"], "valid": "a", "test": "e"},
    ]


def test_no_history_holds_anything_from_after_its_target(tmp_path: Path) -> None:
    log = list({(u, i): (u, i, t) for u, i, t in a_log(users=50, items=40, length=12, seed=3)}.values())
    times = {(u, i): t for u, i, t in log}
    dataset = prepare.run(config(write_catalogue(tmp_path, log), max_history=5))
    compared = 0
    for split in ("valid", "test"):
        histories = dataset.histories(split)
        for number, user in enumerate(histories.user_ids):
            target = times[user, dataset.item_ids[histories.targets[number]]]
            seen = [times[user, dataset.item_ids[row]] for row in histories.of(number)]
            later = [t for (u, _), t in times.items() if u == user and t > target]
            assert seen == sorted(seen) and seen[-1] <= target
            assert len(later) <= (split == "valid")
            compared += len(seen)
    assert compared > 400


def test_a_user_with_two_interactions_is_dropped_even_without_a_core(tmp_path: Path) -> None:
    log = [("two", "a", 1), ("two", "e", 2), ("one", "f", 1)]
    log += [("abc", item, n) for n, item in enumerate("abc")] + [("bcd", item, n) for n, item in enumerate("bcd")]
    dataset = prepare.run(config(write_catalogue(tmp_path, log), candidates=1))
    assert dataset.user_ids == ["abc", "bcd"]
    assert dataset.warm().item_ids == list("abcd")
    assert dataset.item_ids == list("abcdef")
    assert [tuple(step.values()) for step in dataset.meta["counts"]][-3:] == [
        ("exact duplicates removed", 4, 6, 9),
        ("1-core, users with 3 interactions", 2, 4, 6),
        ("cold items kept", 2, 6, 6),
    ]


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("column", ["rating", "overall", "Stars"])
def test_ratings_that_are_not_read_are_named_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], column: str
) -> None:
    log = [(f"u{user}", f"i{item}", item) for user in range(4) for item in range(user, user + 4)]
    paths = write_catalogue(tmp_path, log)
    prepare.run(config(paths))
    assert "is not read" not in said(capsys)
    rated = pl.read_parquet(paths["interactions"]).with_columns(pl.lit(5).alias(column))
    rated.write_parquet(paths["interactions"])
    prepare.run(config(paths))
    text = said(capsys)
    assert text.count("is not read") == 1
    assert f"the column {column!r} of" in text and "each of the 16 rows counts" in text
    # a rating that someone takes as the time is read
    prepare.run(config(paths, time_column=column))
    assert "is not read" not in said(capsys)


def test_equal_times_are_counted_and_so_are_the_users_whose_last_item_they_leave_open(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    apart = [(f"u{user}", f"i{item}", item) for user in range(6) for item in range(user, user + 4)]
    prepare.run(config(write_catalogue(tmp_path / "apart", apart)))
    assert "same user and time" not in said(capsys)
    # u0: the last two at once; u1: the first three at once
    times = {"u0": [1, 2, 3, 3], "u1": [1, 1, 1, 2]}
    tied = [(user, item, times.get(user, [1, 2, 3, 4])[row % 4]) for row, (user, item, _) in enumerate(apart)]
    paths = write_catalogue(tmp_path / "tied", tied)
    prepare.run(config(paths))
    text = said(capsys)
    assert "5 of 24 interactions (21%) have the same user and time as another." in text
    assert "for 1 of 6 users also which item is the last" in text
    prepare.run(config(paths, order="file"))
    assert "same user and time" not in said(capsys)
    # copies of a row are dropped before, and leave nothing open
    prepare.run(config(write_catalogue(tmp_path / "copies", apart + apart)))
    assert "same user and time" not in said(capsys)


def test_every_step_is_counted(tmp_path: Path) -> None:
    log = [(f"u{n}", item, place) for n in range(4) for place, item in enumerate("abcd")]  # 16, the core
    log += [(f"w{n}", item, place) for n in range(2) for place, item in enumerate("efg")]  # 6, the core of their own
    log += [("u0", "a", 0), ("u0", "a", 9)]  # a copy, and the same item at another time
    log += [("u1", "unknown", 1), ("u2", "no title", 1), ("visitor", "blank title", 1), ("u3", "no image", 1)]
    items = [*"abcdefg", "no title", "blank title", "no image", "lonely"]
    paths = write_catalogue(tmp_path, log, items=items, without_image=("no image",))
    title = pl.col("item_id").replace_strict({"no title": None, "blank title": " \t\n"}, default="title")
    pl.read_parquet(paths["items"]).with_columns(title=title).write_parquet(paths["items"])
    counts = prepare.run(config(paths, core=2)).meta["counts"]
    assert [tuple(step.values()) for step in counts] == [
        ("as read", 7, 11, 28),
        ("interactions of known items", 7, 11, 27),
        ("items with a title", 6, 9, 25),
        ("items with an image", 6, 8, 24),
        ("exact duplicates removed", 6, 8, 23),
        ("2-core, users with 3 interactions", 6, 7, 23),
        ("cold items kept", 6, 8, 23),
    ]


def test_the_catalogues_other_columns_and_its_order_are_kept(tmp_path: Path) -> None:
    log = [("u", item, n) for n, item in enumerate("abcd")]
    log += [("v", item, n) for n, item in enumerate("ayd")]
    paths = write_catalogue(tmp_path, log, items=list("dxcbya"), without_image=("x",))
    dataset = prepare.run(config(paths, candidates=1))
    assert dataset.items.column_names == ["item_id", "title", "image_path", "price"]
    assert dataset.items.to_pylist()[1] == {
        "item_id": "c",
        "title": "title of c",
        "image_path": "c.jpg",
        "price": 2,
    }
    assert dataset.item_ids == list("dcbya")


# --- items that nobody has touched, and items without a picture ----------------------------------------------
def test_cold_items_change_no_sequence_and_no_candidate(tmp_path: Path) -> None:
    log = a_log(users=40, items=30, length=7)
    touched = sorted({item for _, item, _ in log})
    paths = write_catalogue(tmp_path, log, items=["cold0", *touched[:9], "cold1", *touched[9:], "cold2", "no image"])
    (paths["images"] / "no image.jpg").unlink()
    for core in (1, 3):
        kept = prepare.run(config(paths, core=core, candidates=3))
        dropped = prepare.run(
            config({**paths, "out": tmp_path / f"drop{core}"}, core=core, candidates=3, cold_items="drop")
        )
        for name in ("sequences", "negatives"):
            assert (kept.path / f"{name}.parquet").read_bytes() == (dropped.path / f"{name}.parquet").read_bytes()
        assert kept.item_ids == ["cold0", *touched[:9], "cold1", *touched[9:], "cold2"]
        warm = kept.warm()
        assert warm.items.equals(dropped.items)
        assert warm.negatives(1).tolist() == dropped.negatives(1).tolist()
        assert warm.histories("test").rows.tolist() == dropped.histories("test").rows.tolist()
        meta, less = kept.meta, dropped.meta
        assert less["cold_items"] == 0 and less["items"] == meta["items"] - meta["cold_items"] == len(warm.item_ids)
        assert meta["items"] == len(kept.item_ids) and meta["sparsity"] == less["sparsity"]
        assert meta["counts"][:-1] == less["counts"] and meta["counts"][-1]["items"] == meta["items"]
        assert meta["counts"][-2]["items"] + meta["cold_items"] == meta["items"]


def test_where_every_item_is_touched_keeping_cold_ones_changes_nothing(tmp_path: Path) -> None:
    paths = write_catalogue(tmp_path, a_log(users=60, items=20, length=9))
    kept = prepare.run(config(paths))
    dropped = prepare.run(config({**paths, "out": tmp_path / "drop"}, cold_items="drop", name="data"))
    assert kept.meta == dropped.meta and kept.meta["cold_items"] == 0 and kept.warm() is kept
    assert kept.meta["counts"][-1]["step"] == "1-core, users with 3 interactions"


@pytest.mark.parametrize("given", [{"images": None}, {"require": ("title",)}])
def test_a_catalogue_without_a_picture_is_prepared_for_its_titles(tmp_path: Path, given: dict[str, Any]) -> None:
    paths = write_catalogue(tmp_path, a_log(users=30, items=20, length=9))
    with_images = prepare.run(config({**paths, "out": tmp_path / "with"}))
    for path in paths["images"].iterdir():
        path.unlink()
    dataset = prepare.run(config(paths, **given))
    assert dataset.meta["image_root"] is None and not dataset.has_images
    assert dataset.items.schema.field("image_path").type == pa.string()
    assert dataset.items.column("image_path").null_count == len(dataset.item_ids)
    assert dataset.sequences == with_images.sequences and dataset.item_ids == with_images.item_ids
    assert "items with an image" not in [step["step"] for step in dataset.meta["counts"]]


def test_what_an_item_needs_is_a_choice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = [(user, item, place) for user in "af" for place, item in enumerate(f"{user * 3}bcde")]
    paths = write_catalogue(tmp_path, log, items=list("abcdefgxy"), without_image=tuple("cdex"))
    title = pl.col("item_id").replace_strict({"b": None, "c": " ", "y": ""}, default="title")
    pl.read_parquet(paths["items"]).with_columns(title=title).write_parquet(paths["items"])

    def rejected() -> list[dict[str, Any]]:
        return pl.read_csv(paths["out"] / "rejects.csv").filter(file="items").to_dicts()

    def kept(require: tuple[str, ...]) -> list[str]:
        return prepare.run(config(paths, require=require, candidates=1)).item_ids

    assert kept(()) == kept(("title", "image")) == list("afg")
    said = capsys.readouterr().err
    assert "3 of 9 items have no title" in said and "3 of 9 items have no image and are left out" in said
    assert [row["reason"].partition(":")[0] for row in rejected()] == [*["no title"] * 3, *["no image"] * 3]
    assert kept(("title",)) == list("adefgx")
    said = " ".join(capsys.readouterr().err.split())
    assert "4 of 9 items have no image and are kept 'c' (row 3): no file c.jpg" in said
    assert [row["item_id"] for row in rejected()] == list("bcy")
    assert kept(("image",)) == list("abfgy")
    assert pq.read_table(paths["out"] / "items.parquet")["title"].to_pylist() == ["title", "", "title", "title", ""]


def test_items_that_are_left_out_are_named_with_the_reason(
    paths: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    outside = paths["images"].with_name("outside")
    outside.mkdir()
    for number in (2, 3, 4, 5):
        image = paths["images"] / f"i{number}.jpg"
        image.rename(outside / image.name)
        image.symlink_to(outside / image.name)
    prepare.run(config(paths))
    said = " ".join(capsys.readouterr().err.split())
    assert "4 of 25 items have no image and are left out" in said
    told = [int(number) for number in re.findall(r"'i(\d)' \(row \d+\): i\1.jpg is a link that leads out", said)]
    assert len(told) == 3 and "5.jpg" not in said
    rejected = pl.read_csv(paths["out"] / "rejects.csv").filter(file="items")
    reason = "no image: i5.jpg is a link that leads out of the image folder"
    assert rejected.filter(item_id="i5")["reason"].to_list() == [reason] and rejected.height == 4


def test_a_column_may_name_the_images(paths: dict[str, Path]) -> None:
    (paths["images"] / "deep").mkdir()
    for image in paths["images"].glob("*.jpg"):
        image.rename(paths["images"] / "deep" / f"p{image.name}")
    items = pl.read_parquet(paths["items"])
    photo = "DEEP\\p" + items["item_id"] + ".JPG"
    items.with_columns(photo.alias("photo"), pl.lit("wrong.jpg").alias("image_path")).write_parquet(paths["items"])
    dataset = prepare.run(config(paths, image_column="photo"))
    assert dataset.image_paths[0] == f"deep/p{dataset.item_ids[0]}.jpg"
    assert set(dataset.items["source_image_path"].to_pylist()) == {"wrong.jpg"}
    assert dataset.items["photo"].to_pylist()[0].startswith("DEEP")


# --- candidates ---------------------------------------------------------------------------------------------


def some_sequences(users: int, items: int, seed: int = 0) -> Sequences:
    random = np.random.default_rng(seed)
    lengths = random.integers(3, 30, users)
    return Sequences(
        random.integers(0, items, lengths.sum()).astype(np.int32), np.concatenate([[0], np.cumsum(lengths)])
    )


@pytest.mark.parametrize(("items", "count"), [(131, 100), (300, 100), (5000, 100), (40, 5)])
def test_candidates_are_the_first_new_untouched_items_of_each_users_stream(items: int, count: int) -> None:
    sequences = some_sequences(200, items)
    drawn = draw_candidates(sequences, range(200), items, count, seed=3)
    for user in range(200):
        touched = set(sequences.items[sequences.offsets[user] : sequences.offsets[user + 1]].tolist())
        stream = random_items(np.array([user]), items, 3, 4000)[0].tolist()
        assert drawn[user].tolist() == [item for item in dict.fromkeys(stream) if item not in touched][:count]


def test_candidates_do_not_depend_on_how_users_are_cut() -> None:
    sequences = some_sequences(500, 700)
    whole = draw_candidates(sequences, range(500), 700, 50, seed=1)
    parts = [draw_candidates(sequences, range(a, min(a + 37, 500)), 700, 50, seed=1) for a in range(0, 500, 37)]
    assert np.array_equal(whole, np.concatenate(parts))


def test_candidates_are_uniform_over_the_untouched_items() -> None:
    users, items, count = 20_000, 60, 10
    sequences = Sequences(np.tile(np.arange(20, dtype=np.int32), users), np.arange(users + 1) * 20)
    drawn = draw_candidates(sequences, range(users), items, count, seed=5)
    often = np.bincount(drawn.ravel(), minlength=items)
    assert often[:20].sum() == 0
    expected = users * count / 40
    # drawing without replacement makes counts less variable than a multinomial's
    assert ((often[20:] - expected) ** 2 / expected).sum() < 72.1  # χ², 39 degrees of freedom, 0.1 %
    together = np.isin(drawn, [20, 59]).all(axis=1).sum() + (np.isin(drawn, [20, 59]).sum(axis=1) == 2).sum()
    assert abs(together - users * (10 * 9) / (40 * 39)) < 5 * np.sqrt(users * 90 / 1560)


def test_every_position_and_seed_has_a_stream_of_its_own() -> None:
    first = random_items(np.arange(200), 1 << 30, 0, 50)
    second = random_items(np.arange(200), 1 << 30, 1, 50)
    assert len(np.unique(np.concatenate([first, second]))) > 19_990
    assert np.array_equal(random_items(np.array([17]), 1 << 30, 1, 20)[0], second[17, :20])
    assert first.min() >= 0
    assert first.max() < 1 << 30


def test_the_streams_are_splitmix64_of_seed_user_and_position() -> None:
    def mix(state: int) -> int:
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        return state ^ (state >> 31)

    golden = 0x9E3779B97F4A7C15
    for seed, user, place in ((0, 0, 0), (1, 0, 3), (2**31 - 1, 999_999, 2)):
        bits = mix((mix((seed + 1) * golden % 2**64) + (user * 2**32 + place) * golden) % 2**64)
        assert random_items(np.array([user]), 12_345, seed, 4)[0, place] == (bits >> 11) * 12_345 >> 53
    assert mix(golden) == 0xE220A8397B1DCDAF  # the first output of SplitMix64 from state 0, as published


def test_stored_candidates_are_untouched_distinct_and_the_same_in_every_run(tmp_path: Path) -> None:
    paths = write_catalogue(tmp_path, a_log(users=60, items=80, length=9))
    dataset = prepare.run(config(paths, candidates=20, candidate_seeds=(4, 0)))
    again = prepare.run(config({**paths, "out": tmp_path / "again"}, candidates=20, candidate_seeds=(0, 4)))
    assert dataset.candidate_seeds == [0, 4]
    assert not np.array_equal(dataset.negatives(0), dataset.negatives(4))
    for seed in (0, 4):
        drawn = dataset.negatives(seed)
        assert drawn.shape == (len(dataset.user_ids), 20)
        assert np.array_equal(drawn, again.negatives(seed))
        for row, user in zip(drawn, dataset.sequences.to_pylist(), strict=True):
            assert len(set(row.tolist())) == 20
            assert not {dataset.item_ids[i] for i in row} & {*user["train"], user["valid"], user["test"]}


def test_a_user_who_touched_too_much_is_named_with_the_number_that_would_work(tmp_path: Path) -> None:
    log = [("all", f"i{n}", n) for n in range(8)] + [("few", f"i{n}", n) for n in range(3)]
    log += [("few", "i0", 9)] * 3
    paths = write_catalogue(tmp_path, log, items=[f"i{n}" for n in range(8)])
    with pytest.raises(DataError, match="user 'all' has 0 left"):
        prepare.run(config(paths))
    log = [("most", f"i{n}", n) for n in range(8)] + [("few", f"i{n}", n) for n in range(6, 10)]
    paths = write_catalogue(tmp_path, log)
    with pytest.raises(DataError, match=r"1 of 2 users .* user 'most' has 2 left.*--candidates 2 or less"):
        prepare.run(config(paths, candidates=3))
    assert not paths["out"].exists()
    assert prepare.run(config(paths, candidates=2)).negatives(0).shape == (2, 2)


def test_repeats_do_not_count_as_touched_twice() -> None:
    sequences = Sequences(np.array([0, 1, 0, 1, 0, 2, 3, 4], np.int32), np.array([0, 5, 8]))
    assert untouched_counts(sequences, 6).tolist() == [4, 3]


# --- the folder ---------------------------------------------------------------------------------------------


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, Path]:
    return write_catalogue(tmp_path, a_log(users=30, items=25, length=8))


def test_files_have_the_promised_columns_for_any_reader(paths: dict[str, Path]) -> None:
    prepare.run(config(paths))
    texts = pa.list_(pa.field("element", pa.string()))
    shapes = {
        "items.parquet": [("item_id", pa.string()), ("title", pa.string()), ("image_path", pa.string())],
        "sequences.parquet": [
            ("user_id", pa.string()),
            ("train", texts),
            ("valid", pa.string()),
            ("test", pa.string()),
        ],
        "negatives.parquet": [("seed", pa.int32()), ("user_id", pa.string()), ("negatives", texts)],
    }
    for name, columns in shapes.items():
        table = pq.read_table(paths["out"] / name)
        assert [(field.name, field.type) for field in table.schema][: len(columns)] == columns
    negatives = pl.read_parquet(paths["out"] / "negatives.parquet")
    assert negatives.schema == {"seed": pl.Int32, "user_id": pl.String, "negatives": pl.List(pl.String)}
    users = pl.read_parquet(paths["out"] / "sequences.parquet")["user_id"].to_list()
    assert negatives.select("seed", "user_id").rows() == [(seed, user) for seed in (0, 1) for user in users]


def test_candidates_are_stored_as_codes_in_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_writer, "_USERS_PER_GROUP", 16)
    long_ids = [(u, f"{i}-{'x' * 200}", t) for u, i, t in a_log(users=40, items=60, length=8)]
    paths = write_catalogue(tmp_path, long_ids)
    dataset = prepare.run(config(paths, candidates=30))
    file = pq.ParquetFile(paths["out"] / "negatives.parquet")
    assert file.metadata.num_row_groups == 2 * 3
    for group in range(file.metadata.num_row_groups):
        column = file.metadata.row_group(group).column(2)
        assert column.path_in_schema == "negatives.list.element"
        assert column.has_dictionary_page
        assert "PLAIN_DICTIONARY" in column.encodings or "RLE_DICTIONARY" in column.encodings
    assert (paths["out"] / "negatives.parquet").stat().st_size < 2 * 40 * 30 * 20
    assert np.array_equal(
        dataset.negatives(1), prepare.run(config(paths, candidates=30, candidate_seeds=(1,))).negatives(1)
    )


@pytest.mark.parametrize("split", ["leave-one-out", "temporal"])
def test_a_group_of_rows_carries_the_ids_that_occur_in_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str
) -> None:
    monkeypatch.setattr(dataset_writer, "_USERS_PER_GROUP", 16)
    items, users = (
        pl.Series([f"{kind}{number:06}" for number in range(count)]) for kind, count in (("i", 9000), ("u", 64))
    )
    drawn = np.random.default_rng(0).integers(0, len(items), 64 * 6).astype(np.int32)
    sequences = Sequences(drawn, np.arange(0, 64 * 6 + 1, 6))
    found, sizes = [], []
    for whole in (10**6, 0):
        monkeypatch.setattr(dataset_writer, "_WHOLE_DICTIONARY", whole)
        files = [tmp_path / f"{name}-{whole}.parquet" for name in ("sequences", "candidates")]
        dataset_writer.write_sequences(sequences, users, items, files[0], split)
        dataset_writer.write_candidates(
            sequences,
            users,
            items,
            PrepareConfig(**dict.fromkeys(("items", "interactions", "out"), tmp_path), candidates=20),
            files[1],
        )
        found.append([pl.read_parquet(file) for file in files])
        sizes.append([bytes_of(file) for file in files])
    for whole_table, table in zip(*found, strict=True):
        assert table.equals(whole_table)
    assert found[1][0]["test"].explode().to_list()[-1] == items[int(drawn[-1])]
    for whole_bytes, own_bytes in zip(*sizes, strict=True):
        assert own_bytes < whole_bytes / 5


def bytes_of(file: Path) -> int:
    """Return the bytes of a Parquet file's columns before compression."""
    metadata = pq.ParquetFile(file).metadata
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    return sum(group.column(place).total_uncompressed_size for group in groups for place in range(group.num_columns))


def test_dataset_json_says_what_was_done(paths: dict[str, Path]) -> None:
    meta = prepare.run(config(paths, core=2, max_history=7, name="Tiny")).meta
    assert meta["name"] == "Tiny"
    assert meta["max_history"] == 7
    assert meta["schema_version"] == 1
    assert meta["negatives"] == {"count": 2, "seeds": [0, 1]}
    assert meta["paper"] is None
    assert meta["rules"]["core"] == 2
    assert meta["average_length"] == meta["interactions"] / meta["users"]
    assert meta["sparsity"] == 1 - meta["interactions"] / (meta["users"] * (meta["items"] - meta["cold_items"]))
    for name in ("items.parquet", "sequences.parquet", "negatives.parquet"):
        assert meta["sha256"][name] == storage.sha256_file(paths["out"] / name)
    assert {path.name for path in paths["out"].iterdir()} == {*meta["sha256"], "rejects.csv", "dataset.json"}


@pytest.mark.parametrize(
    ("name", "paper"),
    [
        ("Toys", "Toys"),
        ("toys_and_games", "Toys"),
        ("Beauty", "Beauty"),
        ("Clothing_Shoes_and_Jewelry", "Clothing"),
        ("SPORTS-and-Outdoors", "Sports"),
        ("All_Beauty", None),
        ("movies", None),
        ("", None),
    ],
)
def test_the_papers_datasets_are_known_by_their_short_and_long_names(name: str, paper: str | None) -> None:
    assert prepare.paper_name(name) == paper


def test_the_counts_stand_next_to_the_papers(paths: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    meta = prepare.run(config({**paths, "out": paths["out"].with_name("Toys_and_Games")})).meta
    assert meta["name"] == "Toys_and_Games"
    assert meta["paper"]["users"] == 15921 and meta["paper"]["items"] == 8383
    assert meta["paper"]["interactions"] == 108336
    output = capsys.readouterr()
    assert output.out == ""
    assert re.search(r"the paper's Toys\s+│\s+15,921\s+│\s+8,383\s+│\s+108,336", output.err)
    assert re.search(r"as read\s+│\s+30\s+│", output.err)


def test_the_image_root_is_relative_so_that_dataset_and_images_can_move_together(paths: dict[str, Path]) -> None:
    beside = prepare.run(config(paths))
    assert beside.meta["image_root"] == "../images"
    beside.require_images()
    inside = paths["out"].with_name("with-images")
    inside.mkdir()
    images = paths["images"].rename(inside / "images")
    dataset = prepare.run(config({**paths, "images": images, "out": inside}))
    assert dataset.meta["image_root"] == "images"
    moved = Dataset(inside.rename(inside.with_name("moved")))
    assert (moved.image_root / moved.image_paths[0]).is_file()


def test_a_rerun_writes_the_same_bytes_and_another_setting_replaces_them(paths: dict[str, Path]) -> None:
    def contents() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in paths["out"].iterdir()}

    prepare.run(config(paths))
    first = contents()
    prepare.run(config(paths))
    assert contents() == first
    assert prepare.run(config(paths, core=6)).meta["rules"]["core"] == 6
    assert contents()["sequences.parquet"] != first["sequences.parquet"]


def test_a_failing_run_leaves_the_old_dataset_as_it_was(paths: dict[str, Path]) -> None:
    prepare.run(config(paths))
    before = {path.name: path.read_bytes() for path in paths["out"].iterdir()}
    with pytest.raises(DataError):
        prepare.run(config(paths, candidates=10_000))
    assert {path.name: path.read_bytes() for path in paths["out"].iterdir()} == before


def test_a_folder_that_is_no_dataset_is_not_touched(paths: dict[str, Path]) -> None:
    paths["out"].mkdir()
    (paths["out"] / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"not empty and not a dataset folder: it holds thesis\.tex"):
        prepare.run(config(paths))
    assert [path.name for path in paths["out"].iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("name", ["sequences.parquet", "dataset.json", "items.parquet"])
def test_a_strangers_file_of_our_name_is_not_touched(paths: dict[str, Path], name: str) -> None:
    paths["out"].mkdir()
    if name.endswith("json"):
        (paths["out"] / name).write_text('{"name": "mine"}')
    else:
        pl.DataFrame({"user": [1]}).write_parquet(paths["out"] / name)
    before = (paths["out"] / name).read_bytes()
    with pytest.raises(ConfigError, match=f"not a dataset folder: it holds {name}"):
        prepare.run(config(paths))
    assert (paths["out"] / name).read_bytes() == before


def test_a_damaged_dataset_is_made_again(paths: dict[str, Path]) -> None:
    prepare.run(config(paths))
    before = (paths["out"] / "sequences.parquet").read_bytes()
    (paths["out"] / "sequences.parquet").write_bytes(before[:-5])
    prepare.run(config(paths))
    assert (paths["out"] / "sequences.parquet").read_bytes() == before


def test_an_input_is_never_overwritten(paths: dict[str, Path]) -> None:
    out = paths["items"].parent
    before = paths["items"].read_bytes()
    with pytest.raises(ConfigError, match=r"would overwrite the input items\.parquet"):
        prepare.run(config({**paths, "out": out}))
    assert paths["items"].read_bytes() == before


def test_a_file_in_the_way_and_a_closed_folder_are_config_errors(paths: dict[str, Path]) -> None:
    paths["out"].write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        prepare.run(config(paths))
    with pytest.raises(ConfigError, match="cannot be written"):
        prepare.run(config({**paths, "out": paths["out"] / "below"}))


def test_a_killed_run_leaves_no_dataset_and_the_next_run_finishes_it(paths: dict[str, Path]) -> None:
    script = (
        "import os, signal, sys\n"
        "from vlm2rec.pipelines import cli, prepare\n"
        "prepare.schema.write_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "sys.argv = ['vlm2rec', *sys.argv[1:]]\n"
        "cli.main()\n"
    )
    prepare.run(config(paths))
    done = {path.name: path.read_bytes() for path in paths["out"].iterdir()}
    killed = Forked(script, *flags(paths))
    assert killed.wait() == -signal.SIGKILL
    assert not (paths["out"] / "dataset.json").exists()
    prepare.run(config(paths))
    assert {path.name: path.read_bytes() for path in paths["out"].iterdir()} == done


def test_an_interrupted_run_cleans_up_and_says_so_by_its_exit_code(paths: dict[str, Path]) -> None:
    script = (
        "import sys, time\n"
        "from vlm2rec.pipelines import cli, prepare\n"
        "def slow(*_):\n"
        "    print('working', flush=True)\n"
        "    time.sleep(60)\n"
        "prepare.read_log = slow\n"
        "sys.argv = ['vlm2rec', *sys.argv[1:]]\n"
        "cli.main()\n"
    )
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        with subprocess.Popen(
            [sys.executable, "-c", script, *flags(paths)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "working\n"
            with pytest.raises(ConfigError, match="another `vlm2rec prepare` is writing"):
                prepare.run(config(paths))
            child.send_signal(number)
            assert child.wait(timeout=20) == code
        assert not paths["out"].exists()


def test_the_folder_of_scratch_files_does_not_stay(paths: dict[str, Path]) -> None:
    log = pl.read_parquet(paths["interactions"])
    packed = paths["interactions"].with_name("log.csv.gz")
    packed.write_bytes(gzip.compress(log.write_csv().encode()))
    whole = prepare.run(config(paths)).sequences
    assert prepare.run(config({**paths, "interactions": packed})).sequences == whole
    assert not (paths["out"] / prepare.WORKING_FOLDER).exists()


# --- every kind of input, through the command line ----------------------------------------------------------


def run_cli(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> tuple[int, str]:
    """Run `vlm2rec` in this process; return its exit code and what it wrote to stderr."""
    monkeypatch.setattr(sys, "argv", ["vlm2rec", *arguments])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    output = capsys.readouterr()
    assert output.out == ""
    assert "Traceback" not in output.err
    return int(stopped.value.code or 0), output.err


def test_the_command_runs_with_default_flags_in_a_process_of_its_own(tmp_path: Path) -> None:
    paths = write_catalogue(tmp_path, a_log(users=60, items=200, length=30))
    arguments = [part for key, value in paths.items() for part in (f"--{key}", str(value))]
    done = command("prepare", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "5-core" in done.stderr
    dataset = Dataset(paths["out"])
    assert dataset.max_history == 10
    assert dataset.candidate_seeds == [0, 1, 2, 3, 4]
    assert dataset.negatives(4).shape == (len(dataset.user_ids), 100)


def test_amazon_2014_files_make_the_same_dataset_as_plain_ones(
    paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = prepare.run(config(paths))
    folder = paths["items"].parent
    items = pl.read_parquet(paths["items"])
    meta = "".join(repr({"asin": i, "title": t, "imUrl": "http://x"}) + "\n" for i, t, _ in items.rows())
    log = "".join(
        json.dumps({"reviewerID": u, "asin": i, "unixReviewTime": t}) + "\n"
        for u, i, t in pl.read_parquet(paths["interactions"]).rows()
    )
    (folder / "meta_Toys.json.gz").write_bytes(gzip.compress(meta.encode()))
    (folder / "reviews_Toys_5.json.gz").write_bytes(gzip.compress(log.encode()))
    amazon = {"items": folder / "meta_Toys.json.gz", "interactions": folder / "reviews_Toys_5.json.gz"}
    code, text = run_cli(monkeypatch, capsys, flags({**paths, **amazon, "out": folder / "amazon"}))
    assert code == 0
    assert "items: Amazon 2014 metadata (Python literal lines), 25 rows" in text
    assert "interactions: Amazon 2014 reviews (JSON lines), 240 rows" in text
    made = Dataset(folder / "amazon")
    assert made.sequences == plain.sequences
    assert made.item_ids == plain.item_ids
    assert np.array_equal(made.negatives(1), plain.negatives(1))


@dataclasses.dataclass
class Broken:
    """One way to break the input: what to change, the exit code, and words of the message."""

    code: int
    words: tuple[str, ...]
    flags: dict[str, object] = dataclasses.field(default_factory=dict)
    items: bytes | None = None
    interactions: bytes | None = None
    remove_images: bool = False


ITEMS = b"item_id,title\n" + b"".join(b"%c,title\n" % letter for letter in b"abcdef")
LOG = b"user_id,item_id,timestamp\n" + b"".join(
    b"%s,%c,%d\n" % (user, item, item)
    for user, items in ((b"u", b"abcd"), (b"v", b"abcd"), (b"w", b"abcd"), (b"x", b"efa"))
    for item in items
)
BROKEN = {
    "nothing is broken": Broken(0, ("average length 3.8",)),
    "items missing": Broken(3, ("nowhere.csv is missing",), {"items": "nowhere.csv"}),
    "interactions missing": Broken(3, ("nowhere.csv is missing",), {"interactions": "nowhere.csv"}),
    "images missing": Broken(3, ("nowhere is missing", "img2dataset"), {"images": "nowhere"}),
    "items empty": Broken(3, ("items.csv is empty",), items=b""),
    "only a header": Broken(3, ("no interactions",), interactions=b"user_id,item_id,timestamp\n"),
    "wrong item column": Broken(
        3, ("no column 'item_id' (did you mean 'itemid'?)", "--item-id-column"), items=ITEMS.replace(b"item_", b"item")
    ),
    "wrong time column": Broken(3, ("no column 'time'", "--time-column"), {"time-column": "time"}),
    "latin-1": Broken(3, ("not UTF-8", "line 3"), items=ITEMS.replace(b"b,title", b"b,caf\xe9")),
    "utf-16": Broken(3, ("UTF-16",), interactions=LOG.decode().encode("utf-16")),
    "duplicate item": Broken(3, ("item id 'a' occurs in rows 1 and 7",), items=ITEMS + b"a,again\n"),
    "null user": Broken(0, ("1 of 16 interactions have no user id", "row 16"), interactions=LOG + b",a,1\n"),
    "null time": Broken(0, ("1 of 16 interactions have no time", "row 16"), interactions=LOG + b"u,a,\n"),
    "unknown item": Broken(
        0,
        ("1 of 16 interactions name 1 items that are not in the catalogue", "'z' (row 16)"),
        interactions=LOG + b"u,z,9\n",
    ),
    "lost zeros": Broken(
        3,
        ("the catalogue has '07' for '7' (row 16; leading zeros differ)", "dtype=str"),
        items=ITEMS + b"07,title\n",
        interactions=LOG + b"u,7,1\n",
    ),
    "no pictures": Broken(3, ("no item of the catalogue has an image", "a.jpg", "img2dataset"), remove_images=True),
    "no titles": Broken(
        3,
        ("step 'items with a title' leaves nothing of 4 users, 6 items and 15 interactions",),
        items=ITEMS.replace(b"title\n", b" \n").replace(b"item_id, ", b"item_id,title"),
    ),
    "two catalogues": Broken(
        3,
        ("step 'interactions of known items' leaves nothing", "['7.0', '8.0']", "['a', 'b', 'c']"),
        interactions=b"user_id,item_id,timestamp\nu,7.0,1\nu,8.0,2\n",
    ),
    "core too high": Broken(3, ("step '9-core' leaves nothing of 4 users", "--core (now 9)"), {"core": 9}),
    "too few candidates": Broken(3, ("--candidates 2 or less",), {"candidates": 3}),
    "images required and not given": Broken(
        2, ("--require image without --images",), {"require": "image", "images": None}
    ),
    "image column without images": Broken(2, ("--image-column without",), {"image-column": "photo", "images": None}),
    "unknown image column": Broken(3, ("no column 'titel' (did you mean 'title'?)",), {"image-column": "titel"}),
    "unknown requirement": Broken(2, ("require", "image"), {"require": "picture"}),
    "seed twice": Broken(2, ("candidate_seeds is [1, 1]",), {"candidate-seeds": "1,1"}),
    "seed below zero": Broken(2, ("candidate_seeds is [-1]",), {"candidate-seeds": "-1"}),
    "core zero": Broken(2, ("core = 0",), {"core": 0}),
    "one column for two": Broken(2, ("are the same",), {"user-id-column": "item_id"}),
    "output is a file": Broken(2, ("is a file",), {"out": "items.csv"}),
    "output is foreign": Broken(2, ("not a dataset folder",), {"out": "images"}),
    "unknown key": Broken(2, ("'cores'", "did you mean 'core'"), {"set": "cores=5"}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_bad_input_is_one_paragraph_with_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    case = BROKEN[name]
    (tmp_path / "images").mkdir()
    for letter in "abcdef":
        (tmp_path / f"images/{letter}.jpg").write_bytes(b"x")
    if case.remove_images:
        for path in (tmp_path / "images").iterdir():
            path.rename(path.with_suffix(".txt"))
    (tmp_path / "items.csv").write_bytes(ITEMS if case.items is None else case.items)
    (tmp_path / "log.csv").write_bytes(LOG if case.interactions is None else case.interactions)
    monkeypatch.chdir(tmp_path)
    given = {
        name: Path(path) for name, path in (("items", "items.csv"), ("interactions", "log.csv"), ("images", "images"))
    }
    before = sorted(tmp_path.iterdir())
    code, text = run_cli(monkeypatch, capsys, flags({**given, "out": Path("data")}, **case.flags))
    assert code == case.code, text
    flat = " ".join(text.split())
    for word in case.words:
        assert word in flat, text
    if code:
        assert sorted(tmp_path.iterdir()) == before
        message = text[text.index("vlm2rec: ") :]
        assert message.count("\n") == 1
        assert "To fix it" in message

"""A catalogue with new items and items without a picture through the whole line: the counts of every step add up."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from vlm2rec.embedder.contract import schema
from vlm2rec.pipelines.cli import app
from vlm2rec.pipelines.synthetic.drawn_catalogue import CatalogueSettings, draw_catalogue

NO_PICTURE, BROKEN = "the item has no image path", 3


class Line:
    """A drawn catalogue and the commands over it, each of which has to end well.

    A fifth of the items are new, that is, nobody has touched them; a tenth have no picture, and some of these are new;
    three have a broken one. The last interaction of some users is with an item that nobody else has, so that it is
    never trained on.
    """

    def __init__(self, folder: Path, items: int, backbone: Path) -> None:
        self.folder, self.backbone, self.said = folder, backbone, ""
        self.counts: list[str] = []
        draw_catalogue(folder / "cat", items, items, settings=CatalogueSettings(pixels=32, shortest=7))
        ids = pl.read_parquet(folder / "cat/items.parquet")[schema.ITEM_ID].to_list()
        drawn = random.Random(0)
        drawn.shuffle(ids)
        new, touched = ids[: items // 5], ids[items // 5 :]
        late = touched[-items // 20 :]  # only ever somebody's last item
        without = [*new[: items // 50], *touched[: items // 10 - items // 50 - 2], *late[:2]]
        broken = [new[-1], touched[-1 - len(late)], late[-1]]
        self.new, self.late, self.without, self.broken = set(new), late, set(without), set(broken)
        self.ids = set(ids)
        log = pl.read_parquet(folder / "cat/interactions.parquet")
        log = log.filter(~pl.col(schema.ITEM_ID).is_in([*new, *late]))
        users = log[schema.USER_ID].unique(maintain_order=True).to_list()
        end = log["timestamp"].max()
        usual = sorted(set(touched) - set(late) - set(log[schema.ITEM_ID]))  # by luck nobody has taken them
        more = [(users[-1 - number], item, end + 1) for number, item in enumerate(usual)]
        more += [(users[number], item, end + 2) for number, item in enumerate(late)]
        self.log = pl.concat([log, pl.DataFrame(more, log.schema, orient="row")])
        self.log.write_parquet(folder / "cat/interactions.parquet")
        for item in without:
            (folder / "cat/images" / f"{item}.jpg").unlink()
        for item in broken:
            (folder / "cat/images" / f"{item}.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a picture")

    def __call__(self, *words: object) -> list[str]:
        """Run `vlm2rec WORDS` and return the lines of stdout; a word that begins with @ is a path in the folder."""
        call = [str(self.folder / word[1:]) if str(word).startswith("@") else str(word) for word in words]
        found = CliRunner().invoke(app, call)
        assert found.exit_code == 0, (words, found.output, found.exception)
        self.said = " ".join(found.output.split())
        return found.stdout.splitlines()

    def count(self, step: str, **numbers: int) -> None:
        self.counts.append(f"{step}: " + ", ".join(f"{name} {number:,}" for name, number in numbers.items()))

    def json(self, path: str) -> Any:
        return json.loads((self.folder / path).read_text())

    def table(self, folder: str) -> pl.DataFrame:
        return pl.concat([pl.from_arrow(pq.read_table(path)) for path in sorted((self.folder / folder).glob("part-*"))])


def cold_users(sequences: pl.DataFrame) -> int:
    """Return how many users' test item is in nobody's training sequence."""
    trained = {item for items in sequences["train"] for item in items}
    return sum(item not in trained for item in sequences["test"])


def run_line(line: Line) -> None:
    items, model = len(line.ids), ("--backbone", line.backbone, "--device", "cpu", "--vision-cache", "off")
    kept, new = items, len(line.new)
    line.count("drawn", items=items, new=new, without_picture=len(line.without), broken=len(line.broken))

    # prepare: no item is lost, and no interaction without a reason
    files = ("--items", "@cat/items.parquet", "--interactions", "@cat/interactions.parquet", "--images", "@cat/images")
    line("prepare", *files, "--require", "title", "--core", 1, "--candidates", 20, "--out", "@data")
    meta = line.json("data/dataset.json")
    catalogue = pl.read_parquet(line.folder / "data/items.parquet")
    assert set(catalogue[schema.ITEM_ID]) == line.ids and len(catalogue) == meta["items"] == items
    assert set(catalogue.filter(pl.col(schema.IMAGE_PATH).is_null())[schema.ITEM_ID]) == line.without
    sequences = pl.read_parquet(line.folder / "data/sequences.parquet")
    touched = {item for row in sequences.iter_rows(named=True) for item in (*row["train"], row["valid"], row["test"])}
    interactions = sum(len(train) + 2 for train in sequences["train"])
    rejects = pl.read_csv(line.folder / "data/rejects.csv")
    assert interactions + len(rejects) == len(line.log) and interactions == meta["interactions"]
    assert meta["cold_items"] == items - len(touched) >= new and not touched & line.new
    line.count(
        "prepare", items=items, cold_items=meta["cold_items"], interactions=interactions, rejected=len(rejects),
        users=len(sequences),
    )  # fmt: skip

    line("finetune", "--data", "@data", *model, "--max-pixels", 3136, "--max-steps", 2, "--batch-size", 4,
         "--valid-users", 4, "--probe-users", 0, "--lora-rank", 2, "--out", "@adapter")  # fmt: skip

    # export: a row for every item, a vector for every title, a reason for every picture that is missing
    export = ("export-items", "--data", "@data", *model, "--adapter", "@adapter", "--max-failures", 1)
    line(*export, "--on-image-error", "text_only", "--shard-size", 64, "--out", "@emb")
    rows, counts = line.table("emb"), line.json("emb/_manifest.json")["counts"]
    assert rows[schema.ITEM_ID].to_list() == catalogue[schema.ITEM_ID].to_list()
    status = Counter(rows[schema.STATUS])
    assert status == {"ok": items - len(line.without) - BROKEN, "text_only": len(line.without) + BROKEN}
    assert counts == {**counts, **status} and sum(counts.values()) == items
    vectors = {view: len(rows) - rows[view].null_count() for view in schema.VIEWS}
    assert vectors == {"fused": kept, "text": kept, "image": items - len(line.without) - BROKEN}
    reasons = Counter(rows.filter(pl.col(schema.STATUS) != "ok")[schema.ERROR])
    assert reasons[NO_PICTURE] == len(line.without) and sum(reasons.values()) == len(line.without) + BROKEN
    line.count("export-items", **status, **{f"{view}_vectors": number for view, number in vectors.items()})
    line.count("reasons", **{f"'{reason}'": number for reason, number in reasons.items()})

    line("verify", "@emb")
    assert f"items {items:,}" in line.said and f"text_only {status['text_only']:,}" in line.said
    line("failures", "@emb")
    assert (
        f"{status['text_only']:,} of {items:,} items" in line.said
        and f"{len(line.without):,} {NO_PICTURE}" in line.said
    )

    # rankings: every user, the cold ones counted beside
    cold = cold_users(sequences)
    assert cold >= len(line.late) - 2
    line(
        *("evaluate", "--data", "@data", "--embeddings", "@emb", "--users-from", "mean"),
        *("--missing", "zero", "--out", "@task1"),
    )
    lack = len((line.without | line.broken) & touched)  # of the items that are ranked
    assert f"items {len(touched)}, {lack} without a vector" in line.said
    line("train-recommender", "--data", "@data", "--embeddings", "@emb", "--model", "SASRec", "--max-epochs", 1,
         "--hidden-size", 16, "--device", "cpu", "--out", "@rec")  # fmt: skip
    for task in ("task1", "rec"):
        found, users = line.json(f"{task}/metrics.json"), pl.read_parquet(line.folder / task / "users.parquet")
        found = found["views"]["fused"] if "views" in found else found
        assert users[schema.USER_ID].n_unique() == len(sequences) and found["cold"]["users"] == cold
    line.count("evaluate and train-recommender", users=len(sequences), cold_targets=cold)

    # index and search: as many vectors as there are, new items among them
    for view in ("fused", "image"):
        line("build-index", "--embeddings", "@emb", "--column", view, "--out", f"@index-{view}")
        found = line.json(f"index-{view}/index.json")
        assert (found["rows"], found["left_out"]) == (vectors[view], items - vectors[view])
        line.count(f"build-index {view}", rows=found["rows"], left_out=found["left_out"])
    lines = line("search", "--index", "@index-fused", "--item", min(line.new), "--k", items)
    neighbours = [text.split("\t")[1] for text in lines if text[:1].isdigit()]
    assert set(neighbours) == line.ids - {min(line.new)} and len(neighbours) == items - 1
    line.count("search", neighbours=len(neighbours))

    # users and recommendations: all users, all interactions, and each k items that they have not seen
    histories = ("--histories", "@data/sequences.parquet", "--history-column", "train")
    line("export-users", *histories, "--embeddings", "@emb", "--out", "@users")
    assert len(line.table("users")) == len(sequences) == line.json("users/_manifest.json")["counts"]["ok"]
    read = line.json("users/_manifest.json")["histories"]
    trained = sum(len(train) for train in sequences["train"])
    assert read["read"] == read["kept"] == trained and not read["unknown_items"]
    for name, source in (("top", ("--index", "@index-fused")), ("by-rec", ("--recommender", "@rec"))):
        line("recommend", *histories, *source, "--k", 5, "--out", f"@{name}")
        rows, seen = line.table(name), dict(sequences.select(schema.USER_ID, "train").iter_rows())
        assert len(rows) == 5 * len(sequences) and rows[schema.ERROR].null_count() == len(rows)
        assert not any(item in seen[user] for user, item in rows.select(schema.USER_ID, schema.ITEM_ID).iter_rows())
        line.count(f"recommend {source[0]}", users=len(sequences), rows=len(rows))

    # codes and other formats: an item with a vector is in them, one without is counted
    for view in ("fused", "image"):
        line("semantic-ids", "--embeddings", "@emb", "--column", view, "--codebook", 8, "--out", f"@ids-{view}")
        codes = pl.read_parquet(line.folder / f"ids-{view}/semantic_ids.parquet")
        assert set(codes[schema.ITEM_ID]) == line.ids
        coded = codes.drop_nulls("codes")["codes"].to_list()
        assert len(coded) == len({tuple(each) for each in coded}) == vectors[view]
        line("convert", "@emb", "--to", "npy", "--columns", view, "--out", f"@npy-{view}")
        written = np.load(line.folder / f"npy-{view}/{view}.npy")
        missing = line.folder / f"npy-{view}/missing.csv"
        lost = len(pl.read_csv(missing)) if missing.exists() else 0
        assert (len(written), lost) == (vectors[view], items - vectors[view])
        line.count(f"semantic-ids and convert {view}", codes=len(coded), rows=len(written), missing=lost)
    print("\n" + "\n".join(line.counts))


def test_a_hundred_items_go_through_the_line(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    run_line(Line(tmp_path, 100, tiny("qwen3_vl")))


@pytest.mark.slow
def test_a_thousand_items_go_through_the_line(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    line = Line(tmp_path, 1000, tiny("qwen3_vl"))
    assert (len(line.ids), len(line.new), len(line.without)) == (1000, 200, 100)
    run_line(line)

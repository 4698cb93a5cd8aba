"""The report: what it shows of a run folder, what it leaves out, and that nothing in it can do harm."""

from __future__ import annotations

import html.parser
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from embedding_folder import write_embeddings

from vlm2rec.downstream.evaluation.metrics import unit_rows
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError
from vlm2rec.pipelines.config import ReportConfig
from vlm2rec.pipelines.experiments.neighbours import Views, disagreeing, nearest, spread_out
from vlm2rec.pipelines.report import METRICS, metrics_table, run
from vlm2rec.pipelines.reporting.style import RANDOM_FLOOR, RunFolder, colour_of, read_run, view_bars
from vlm2rec.pipelines.synthetic.drawn_catalogue import (
    LOOKS_ATTRIBUTES,
    TEXT_ATTRIBUTES,
    Product,
    attribute_matrix,
    draw_catalogue,
)

HOSTILE = "<script>alert('x')</script> & \"lamp\" $\\frac{1}{0}$"


# --- a run folder written by hand ---------------------------------------------------------------------------


def write_dataset(folder: Path) -> pl.DataFrame:
    """A catalogue of 60 drawn products as a dataset folder; the first title is hostile, the last picture is missing."""
    draw_catalogue(folder / "source", products=60, users=40, seed=0)
    items = pl.read_parquet(folder / "source" / "items.parquet")
    items = items.with_columns(
        pl.when(pl.col("item_id") == "P0000").then(pl.lit(HOSTILE)).otherwise("title").alias("title")
    )
    data = folder / "data"
    data.mkdir()
    (folder / "source" / "images" / "P0059.jpg").unlink()
    (folder / "source" / "images").rename(data / "images")
    items.write_parquet(data / "items.parquet")
    histories = pl.read_parquet(folder / "source" / "interactions.parquet").group_by("user_id", maintain_order=True)
    rows = histories.agg(pl.col("item_id")).select(
        "user_id",
        train=pl.col("item_id").list.head(pl.col("item_id").list.len() - 2),
        valid=pl.col("item_id").list.get(-2),
        test=pl.col("item_id").list.get(-1),
    )
    rows.write_parquet(data / "sequences.parquet")
    schema.write_json(
        data / "dataset.json",
        {
            "name": "Drawn products",
            "image_root": "images",
            "max_history": 10,
            "negatives": {"count": 100, "seeds": [0]},
            "counts": [
                {"step": "read", "users": 40, "items": 61, "interactions": 450},
                {"step": "5-core", "users": 40, "items": 60, "interactions": 444},
            ],
            "paper": None,
            "rules": {"core": 5, "max_history": 10},
            "sha256": {},
            "users": 40,
            "items": 60,
            "interactions": 444,
            "average_length": 11.1,
            "sparsity": 0.815,
            "schema_version": 1,
        },
    )
    return items


def write_vectors(folder: Path, items: pl.DataFrame, noise: float) -> None:
    """Vectors in which text knows the words and image the looks."""
    random = np.random.default_rng(0)
    names = ("item_id", "brand", "material", "category", "model", "colour", "pattern", "background", "popularity")
    products = [Product(*row) for row in items.select(names).iter_rows()]
    views = {}
    for view, attributes in (("text", TEXT_ATTRIBUTES), ("image", (*LOOKS_ATTRIBUTES, "category"))):
        known, _ = attribute_matrix(products, attributes)
        values = known @ random.standard_normal((known.shape[1], 16))
        views[view] = (values + noise * random.standard_normal(values.shape)).astype(np.float32)
    fused = views["text"] + views["image"]
    write_embeddings(folder, items["item_id"].to_list(), fused, **views, settings={"backbone": "by hand"})


def numbers(level: float) -> dict[str, float]:
    return {"H@10": 1.4 * level, "H@20": 1.9 * level, "N@10": 0.8 * level, "N@20": level}


def write_users(folder: Path, level: float, view: str | None) -> None:
    random = np.random.default_rng(1)
    rows = [
        {"user_id": f"U{user:04d}", "protocol": protocol, "seed": seed, "view": view}
        | {metric: float(np.clip(level + 0.05 * random.standard_normal(), 0, 1)) for metric in METRICS}
        for user in range(40)
        for protocol, seed in (("candidates", 0), ("full", None))
    ]
    pl.DataFrame(rows, schema_overrides={"seed": pl.Int32, "view": pl.String}).write_parquet(folder / "users.parquet")


def write_evaluation(folder: Path, level: float) -> None:
    folder.mkdir()
    views = {"f2f": 1.0, "t2f": 0.8, "v2f": 0.6, "t2t": 0.8, "v2v": 0.5}
    spaces = {"fused": 0.0, "text": 0.1, "image": -0.1}
    schema.write_json(
        folder / "metrics.json",
        {
            "task": 1,
            "dataset": "Drawn products",
            "split": "test",
            "users_from": "sequence",
            "users": 40,
            "items": 60,
            "seeds": [0, 1],
            "candidates": {view: numbers(level * share) for view, share in views.items()},
            "candidates_std": {view: dict.fromkeys(METRICS, 0.004) for view in views},
            "full": {view: numbers(level * share / 3) for view, share in views.items()},
            "geometry": {
                space: {"A_pos": 0.6 + d, "A_neg": 0.7 + level + d, "U": -1.2 + d, "S": 1 + level / 2 + d}
                for space, d in spaces.items()
            },
        },
    )
    write_users(folder, level, "f2f")


def write_recommender(folder: Path, model: str, start: str, level: float) -> None:
    folder.mkdir()
    schema.write_json(
        folder / "metrics.json",
        {
            "task": 2,
            "dataset": "Drawn products",
            "model": model,
            "start": start,
            "mode": "adapter",
            "users": 40,
            "items": 60,
            "seed": 0,
            "seeds": [0, 1],
            "candidates": numbers(level),
            "candidates_std": dict.fromkeys(METRICS, 0.003),
            "full": numbers(level / 3),
            "recbole": {},
            "epochs": 15,
            "best_epoch": 10,
            "seconds": 5.0,
            "parameters": 100_000,
            "missing": 0,
        },
    )
    write_users(folder, level, None)


def write_curves(folder: Path, loss: str) -> None:
    folder.mkdir()
    random = np.random.default_rng(2)
    train = []
    for step in range(1, 121):
        fall = float(np.exp(-step / 40))
        row = {
            "step": step,
            "epoch": step / 75,
            "loss": 1.2 + fall + 0.1 * random.standard_normal(),
            "margin_text": 0.3 * (1 - fall),
            "margin_image": (0.2 if loss == "vlm2rec" else 0.05) * (1 - fall),
            "norm_ratio_user": 1.1,
            "norm_ratio_item": 1.0,
            "effective_negatives": 6.9,
            "learning_rate": 1e-3,
        }
        if loss == "vlm2rec":
            row |= {
                "wpcl": row["loss"] - 0.1,
                "crtr": 0.2 * fall,
                "weight": 1.7,
                "alpha": 1.0,
                "beta": 1.0 - step / 2000,
            }
        train.append(row)
    valid = [{"step": step, "N@20": 0.1 + step / 1000, "H@20": 0.3, "N@10": 0.1, "H@10": 0.2} for step in (40, 80, 120)]
    schema.write_json(folder / "curves.json", {"train": train, "valid": valid})
    schema.write_json(folder / "vlm2rec.json", {"loss": loss, "prompt": {"mode": "raw"}, "lora_rank": 16})


def write_run(folder: Path) -> Path:
    """A whole run as `vlm2rec demo` leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    items = write_dataset(folder)
    for number, method in enumerate(("vanilla", "sft", "vlm2rec")):
        write_vectors(folder / f"embeddings-{method}", items, noise=3.0 - 1.4 * number)
        write_evaluation(folder / f"evaluate-{method}", 0.15 + 0.1 * number)
    for model in ("SASRec", "GRU4Rec"):
        write_recommender(folder / f"recommender-{model}-id", model, "id", 0.20)
        for number, method in enumerate(("vanilla", "sft", "vlm2rec")):
            write_recommender(folder / f"recommender-{model}-{method}", model, "fused", 0.25 + 0.06 * number)
    for loss in ("sft", "vlm2rec"):
        write_curves(folder / f"adapter-{loss}", loss)
    (folder / "index").mkdir()
    schema.write_json(
        folder / "index" / "index.json",
        {"factory": "Flat", "rows": 60, "column": "fused", "recall@10": 1.0, "search_ms": 0.02},
    )
    stages = [("catalogue", "60 products, 40 users", 2.0), ("make-backbone", "1.1 M parameters", 61.0)]
    schema.write_json(
        folder / "demo.json",
        {
            "created": "2026-01-01T00:00:00+00:00",
            "settings": {"products": 60, "seed": 0},
            "stages": [{"stage": name, "what": what, "seconds": seconds} for name, what, seconds in stages],
            "seconds": 63.0,
            "versions": {"vlm2rec": "0.1.0", "torch": "2.13.0"},
        },
    )
    return folder


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def page(whole_run: Path) -> str:
    return run(ReportConfig(run=whole_run)).read_text(encoding="utf-8")


# --- reading HTML -------------------------------------------------------------------------------------------


@dataclass
class Read(html.parser.HTMLParser):
    """Tags, attributes and text of a page; complains about tags that do not close in order."""

    tags: list[str] = field(default_factory=list)
    attributes: list[tuple[str, str]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)
    tables: list[list[list[str]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in {"meta", "br", "link", "img"}:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in {"td", "th"}:
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if {"td", "th"} & set(self.open) and "small" not in self.open:
            self.tables[-1][-1][-1] += data.strip()


def read(text: str) -> Read:
    parser = Read()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return parser


# --- the whole page -----------------------------------------------------------------------------------------


def test_the_page_is_well_formed_and_has_every_part(page: str) -> None:
    parsed = read(page)
    text = " ".join(" ".join(parsed.texts).split())
    for words in ("What ran", "Task 1", "Task 2", "step by step", "Geometry", "together find", "Settings", "5-core"):
        assert words in text
    assert "Left out" not in text
    assert parsed.tags.count("svg") == 4
    ids = [value for name, value in parsed.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    inside = {value[1:] for name, value in parsed.attributes if name in {"href", "xlink:href"} and value[0] == "#"}
    assert inside <= set(ids)


def test_the_page_fetches_nothing_and_runs_nothing(page: str) -> None:
    parsed = read(page)
    assert not {"script", "iframe", "link", "object", "embed", "form"} & set(parsed.tags)
    assert all(value.startswith("#") for name, value in parsed.attributes if name in {"src", "href", "xlink:href"})
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    assert set(re.findall(r"url\((.{5})", page)) <= {"data:", *(f"#{name}" for name in ("geom", "lear", "task"))}
    assert "@import" not in page


def test_fault_47_hostile_titles_are_text_and_nothing_else(page: str) -> None:
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    parsed = read(page)
    assert ("aria-label", HOSTILE) in parsed.attributes
    assert any(HOSTILE in text for text in parsed.texts)


def test_pictures_are_inline_and_each_is_stored_once(page: str) -> None:
    stored = re.findall(r"\.p(\d+) \{ background-image: url\(data:image/jpeg;base64,[A-Za-z0-9+/=]+\); \}", page)
    assert len(stored) == len(set(stored)) > 20
    used = set(re.findall(r'class="thumb [a-z]* ?p(\d+)"', page))
    assert used == set(stored)


def test_an_item_without_a_readable_picture_is_shown_as_such(page: str) -> None:
    assert "no picture" in page  # the hero strip ends with the last item, whose picture is gone


def test_the_task_1_table_prints_the_measured_numbers_beside_the_papers(page: str) -> None:
    table = read(page).tables[1]
    assert [row[0] for row in table[2:]] == ["Vanilla", "SFT", "VLM2Rec"]
    assert table[4][1:5] == [".490", ".665", ".280", ".350"]
    assert table[4][8] == ".117"
    assert table[4][9:] == [".564", ".682", ".382", ".412"]


def test_the_task_2_tables_start_with_the_id_model(page: str) -> None:
    sasrec, gru = read(page).tables[2:4]
    assert (gru[0][0], sasrec[0][0]) == ("GRU4Rec", "SASRec")
    assert [row[0] for row in sasrec[2:]] == ["ID", "Vanilla", "SFT", "VLM2Rec"]
    assert sasrec[2][4] == ".200"
    assert sasrec[5][9:] == [".535", ".647", ".365", ".393"]
    assert gru[5][9:] == [".506", ".619", ".339", ".367"]


def test_differences_to_vlm2rec_carry_an_interval(page: str) -> None:
    match = re.search(r"VLM2Rec − SFT: \+(0\.\d+) \[\+(0\.\d+), \+(0\.\d+)\]", page)
    assert match is not None
    mean, low, high = map(float, match.groups())
    assert low <= mean <= high
    assert mean == pytest.approx(0.10, abs=0.02)


def test_figures_lie_beside_the_page_and_follow_its_theme_inside(whole_run: Path, page: str) -> None:
    names = {file.name for file in (whole_run / "figures").iterdir()}
    assert names == {"task1-views.svg", "task2-models.svg", "geometry.svg", "learning.svg"}
    standalone = (whole_run / "figures" / "task1-views.svg").read_text()
    assert "#d1500b" in standalone and "var(" not in standalone
    inline = page[page.index("<svg") : page.rindex("</svg>")]
    assert "var(--vlm2rec)" in inline and "#d1500b" not in inline


def test_text_neighbours_share_words_and_image_neighbours_share_looks(page: str) -> None:
    table = next(table for table in read(page).tables if table[0][0] == "attribute")
    head, rows = table[1], {row[0]: row[1:] for row in table[2:]}
    assert head == ["text", "image", "fused"] * 3
    chance = {name: float(values[0]) for name, values in rows.items()}
    text, image = ({name: float(values[-offset]) for name, values in rows.items()} for offset in (3, 2))
    assert text["brand"] > 2 * chance["brand"]
    assert image["colour"] > 2 * chance["colour"]
    assert text["colour"] < 2 * chance["colour"]
    assert image["brand"] < 2 * chance["brand"]


def test_the_same_folder_gives_the_same_page_twice(whole_run: Path, page: str, tmp_path: Path) -> None:
    again = run(ReportConfig(run=whole_run, out=tmp_path / "sub" / "again.html")).read_text(encoding="utf-8")
    date = re.compile(r"Written by vlm2rec on [^.]*\.")
    assert date.sub("", again) == date.sub("", page)


# --- parts of a run -----------------------------------------------------------------------------------------


def test_one_evaluation_alone_makes_a_report(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "my-eval", 0.3)
    text = " ".join(read(run(ReportConfig(run=tmp_path)).read_text(encoding="utf-8")).texts)
    assert "my-eval" in text
    assert "Task 2: there is no output of `vlm2rec train-recommender`" in text
    assert "loss curves: there is no output of `vlm2rec finetune`" in text
    assert "What text, image and both together find" not in text
    assert ".300" in text


@pytest.mark.parametrize("part", ["data", "adapter-sft", "embeddings-vlm2rec", "recommender-SASRec-id", "index"])
def test_any_one_part_alone_makes_a_report(part: str, whole_run: Path, tmp_path: Path) -> None:
    (tmp_path / part).symlink_to(whole_run / part)
    read(run(ReportConfig(run=tmp_path)).read_text(encoding="utf-8"))


def test_embeddings_alone_find_their_dataset_through_the_manifest(whole_run: Path, tmp_path: Path) -> None:
    items = pl.read_parquet(whole_run / "data" / "items.parquet")
    vectors = np.random.default_rng(0).standard_normal((60, 8)).astype(np.float32)
    write_embeddings(tmp_path / "EMB", items["item_id"].to_list(), vectors, data=str(whole_run / "data"))
    text = run(ReportConfig(run=tmp_path)).read_text(encoding="utf-8")
    assert "nearest others by cosine in the EMB vectors" in text
    assert "base64" in text


def test_a_damaged_output_becomes_a_note_and_the_rest_is_shown(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "evaluate-sft", 0.3)
    (tmp_path / "evaluate-vlm2rec").mkdir()
    (tmp_path / "evaluate-vlm2rec" / "metrics.json").write_text("{not json")
    (tmp_path / "embeddings-sft").mkdir()
    (tmp_path / "embeddings-sft" / "part-00000.parquet").write_bytes(b"half")
    text = run(ReportConfig(run=tmp_path)).read_text(encoding="utf-8")
    assert "evaluate-vlm2rec/metrics.json is not readable JSON" in text
    assert "manifest.json does not exist" in text
    assert ".300" in text


def test_a_table_with_missing_numbers_prints_a_dash(tmp_path: Path) -> None:
    (tmp_path / "evaluate-sft").mkdir()
    schema.write_json(
        tmp_path / "evaluate-sft" / "metrics.json",
        {"task": 1, "candidates": {"f2f": {"H@10": 0.25, "N@20": float("nan")}}},
    )
    table = read(run(ReportConfig(run=tmp_path)).read_text(encoding="utf-8")).tables[0]
    assert table[2][1:5] == [".250", "–", "–", "–"]


def test_a_folder_name_that_looks_like_mathematics_is_printed_as_it_is(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "evaluate-_$\\frac$<b>", 0.3)
    write_evaluation(tmp_path / "evaluate-sft", 0.2)
    text = " ".join(read(run(ReportConfig(run=tmp_path)).read_text(encoding="utf-8")).texts)
    assert "_$\\frac$<b>" in text


@pytest.mark.parametrize("content", [None, "notes.txt"])
def test_a_folder_without_any_output_is_refused(content: str | None, tmp_path: Path) -> None:
    if content:
        (tmp_path / content).write_text("hello")
    with pytest.raises(ArtifactError, match="holds no output of vlm2rec"):
        run(ReportConfig(run=tmp_path))
    with pytest.raises(ArtifactError, match="is not a folder"):
        run(ReportConfig(run=tmp_path / "nowhere"))


def test_an_out_that_is_a_folder_is_refused(whole_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder"):
        run(ReportConfig(run=whole_run, out=tmp_path))


# --- pieces -------------------------------------------------------------------------------------------------


def test_the_best_of_each_column_is_marked_and_ties_share_it() -> None:
    runs = {
        "sft": {"candidates": {"H@10": 0.5, "N@20": 0.3}},
        "vlm2rec": {"candidates": {"H@10": 0.5, "N@20": 0.2}},
    }
    rows = metrics_table(RunFolder(Path()), "SASRec", runs).rows
    assert [[cell.best for cell in row.candidates] for row in rows] == [
        [True, False, False, True],
        [True, False, False, False],
    ]


def test_outputs_are_found_by_content_and_named_by_their_folder(whole_run: Path) -> None:
    found = read_run(whole_run)
    assert list(found.evaluations) == ["sft", "vanilla", "vlm2rec"]
    assert set(found.recommenders["SASRec"]) == {"id", "vanilla", "sft", "vlm2rec"}
    assert ("", "sft") in found.users and ("GRU4Rec", "id") in found.users
    assert found.notes == []


def test_the_random_floor_is_that_of_a_uniform_rank() -> None:
    ranks = np.arange(1, 102)
    assert RANDOM_FLOOR["H@10"] == pytest.approx(0.0990, abs=1e-4)
    assert RANDOM_FLOOR["H@20"] == pytest.approx(0.1980, abs=1e-4)
    assert RANDOM_FLOOR["N@20"] == pytest.approx(np.where(ranks <= 20, 1 / np.log2(ranks + 1), 0).mean())


def test_nearest_leaves_the_query_out_and_sorts_by_cosine() -> None:
    angles = np.radians([0, 10, 40, 180])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    places, cosines = nearest(vectors, np.array([0, 3]), 2)
    assert places.tolist() == [[1, 2], [2, 1]]
    assert cosines[0] == pytest.approx(np.cos(np.radians([10, 40])))
    assert nearest(vectors, np.array([0]), 99)[0].shape == (1, 3)


def test_spread_out_items_are_far_from_one_another() -> None:
    angles = np.radians([0, 5, 90, 95, 180])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert spread_out(vectors, 0, 3) == [0, 4, 2]
    assert sorted(spread_out(vectors, 0, 99)) == [0, 1, 2, 3, 4]


def test_the_item_whose_views_disagree_comes_first() -> None:
    random = np.random.default_rng(0)
    text = unit_rows(random.standard_normal((40, 6)))
    image = text.copy()
    image[7] = -text[7]
    worst, shared = disagreeing(Views(np.arange(40), {"text": text, "image": image}, False), 3)
    assert worst[0] == 7
    assert 5 < shared < 10


def test_colours_of_known_methods_stay_and_unknown_ones_differ() -> None:
    methods = ["first", "second", "sft", "vlm2rec"]
    assert len({colour_of(method, methods) for method in methods}) == 4
    assert colour_of("vlm2rec", ["vlm2rec"]) == colour_of("vlm2rec", methods)


def test_a_figure_carries_labelled_axes_and_the_random_line() -> None:
    evaluation = {"candidates": {"f2f": {"H@10": 0.4, "N@20": 0.3}}, "candidates_std": {}}
    picture = view_bars({"vlm2rec": evaluation})
    text = " ".join(read(picture.inline()).texts)
    assert "H@10, 101 candidates" in text and "random" in text and ".099" in text and ".300" in text


def test_metrics_of_another_task_are_noted(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "evaluate-sft", 0.3)
    other: dict[str, Any] = json.loads((tmp_path / "evaluate-sft" / "metrics.json").read_text())
    (tmp_path / "third").mkdir()
    schema.write_json(tmp_path / "third" / "metrics.json", {**other, "task": 3})
    assert any("task 3" in note for note in read_run(tmp_path).notes)

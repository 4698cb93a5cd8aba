"""The page of a study: what it shows of the tables, what it leaves out, and that nothing in it can do harm."""

from __future__ import annotations

import html.parser
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from accessibility import contrast, faults, mixed, palettes
from browser import DESKTOP, PHONE, Browser, axe, chromium
from markupsafe import Markup
from PIL import Image
from study_tables import HOSTILE, SINCE, changed, without, write_study

from vlm2rec.downstream.table import unit_rows
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError
from vlm2rec.pipelines.config import ReportConfig
from vlm2rec.pipelines.experiments.neighbours import Views, disagreeing, nearest, spread_out
from vlm2rec.pipelines.experiments.results import TABLE_NAMES, random_floor
from vlm2rec.pipelines.report import run
from vlm2rec.pipelines.reporting import figures, page, search_page
from vlm2rec.pipelines.reporting.style import COLOURS, OTHERS, VARIABLES
from vlm2rec.pipelines.reporting.tables import Results, ranking_sheet

FIGURES = {
    *("collapse", "collapse-ranks", "differences", "fig1a-views", "fig1b-gradients", "learning"),
    *("table1-geometry", "task2-models"),
}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("written"))


@pytest.fixture(scope="module")
def text(study: Path) -> str:
    return run(ReportConfig(study=study)).read_text(encoding="utf-8")


def drawn(folder: Path) -> str:
    """The page with its figures, as the command draws it."""
    return run(ReportConfig(study=folder)).read_text(encoding="utf-8")


def printed(folder: Path) -> str:
    """The page with empty figures, which take most of the time."""
    return page.render(page.make_page(Results.open(folder), dict.fromkeys(FIGURES, Markup(""))))


def table_of(study: Path, name: str) -> pl.DataFrame:
    return pl.read_parquet(study / f"{name}.parquet")


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


def table(text: str, title: str) -> list[list[str]]:
    """The table whose first heading is `title`."""
    return next(found for found in read(text).tables if found[0][0] == title)


def figure(text: str, beginning: str) -> str:
    found = re.search(rf'aria-label="{beginning}.*?</svg>', text, re.DOTALL)
    return found[0] if found else ""


# --- the whole page -----------------------------------------------------------------------------------------


def test_the_page_is_well_formed_and_has_every_part(text: str) -> None:
    parsed = read(text)
    words = " ".join(" ".join(parsed.texts).split())
    parts = (
        "What ran",
        "Task 1",
        "Task 2",
        "How training treats each modality",
        "Geometry",
        "by both together",
        "settings",
    )
    for part in (*parts, "5-core", "make-backbone", "recall@10 1.0000", "vlm2rec demo", "loss sft", "core 5"):
        assert part in words
    assert parsed.tags.count("svg") == len(FIGURES)
    ids = [value for name, value in parsed.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    inside = {value[1:] for name, value in parsed.attributes if name in {"href", "xlink:href"} and value[0] == "#"}
    assert inside <= set(ids)


def test_the_page_fetches_nothing_and_runs_nothing(text: str) -> None:
    parsed = read(text)
    assert not {"script", "iframe", "link", "object", "embed", "form"} & set(parsed.tags)
    assert all(value.startswith("#") for name, value in parsed.attributes if name in {"src", "href", "xlink:href"})
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    assert set(re.findall(r"url\((.{5})", text)) <= {"data:", *(f"#{name[:4]}" for name in FIGURES)}
    assert "@import" not in text


def test_fault_47_hostile_titles_are_text_and_nothing_else(text: str) -> None:
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    parsed = read(text)
    assert ("aria-label", HOSTILE) in parsed.attributes
    assert any(HOSTILE in words for words in parsed.texts) or ("title", f"{HOSTILE} (P0000)") in parsed.attributes


def test_pictures_are_inline_and_each_is_stored_once(text: str) -> None:
    stored = re.findall(r"\.p(\d+) \{ background-image: url\(data:image/jpeg;base64,[A-Za-z0-9+/=]+\); \}", text)
    assert len(stored) == len(set(stored)) > 20
    used = set(re.findall(r'class="thumb [a-z]* ?p(\d+)"', text))
    assert used <= set(stored) and len(used) > 20


def test_an_item_without_a_readable_picture_is_shown_as_such(study: Path, tmp_path: Path) -> None:
    pictures, query = table_of(study, "pictures"), table_of(study, "neighbours")["query"][0]
    gone = pl.when(pl.col("item_id") != query).then("picture").alias("picture")
    assert "no image" in printed(changed(study, tmp_path, pictures=pictures.with_columns(gone)))
    unreadable = pictures.filter(pl.col("item_id") == "P0059")  # the last of the catalogue, whose file is not there
    assert unreadable["picture"].to_list() == [None]


def test_every_stage_has_a_bar_whose_length_is_its_time(text: str) -> None:
    name = r"<span>([^<]+)<small>([^<]*)</small></span>"
    bar = r'<div aria-hidden="true"><div class="bar" style="width:([\d.]+)%'
    bars = re.findall(name + bar, text)
    assert len(bars) == 1 + 16 + 1
    assert bars[0] == ("make-backbone", "1.1 M parameters", "100.0")
    assert ("finetune", "SFT, seed 0", "98.4") in bars
    assert ("train-recommender GRU4Rec", "ID, seed 0", "8.2") in bars
    assert bars[-1] == ("build-index", "FAISS", "0.8")


def test_of_many_steps_each_kind_has_one_bar(study: Path, tmp_path: Path) -> None:
    cost = table_of(study, "cost")
    many = pl.concat([cost.with_columns(pl.lit(seed, pl.Int32).alias("seed")) for seed in range(5)])
    text = printed(changed(study, tmp_path, cost=many))
    assert text.count('<div class="bar"') == 1 + 5 + 1
    assert "20 times, 4 methods" in text


def test_the_task_1_table_prints_the_measured_numbers_beside_the_papers(text: str) -> None:
    rows = {row[0]: row[1:] for row in table(text, "Task 1")[2:]}
    assert list(rows) == ["SASRec (ID)", "GRU4Rec (ID)", "Vanilla", "SFT", "VLM2Rec"]
    assert rows["VLM2Rec"][:4] == [".4900", ".7700", ".2800", ".3500"]
    assert rows["VLM2Rec"][7] == ".1167"
    assert rows["VLM2Rec"][10:] == [".5644", ".6822", ".3824", ".4121"]


def test_the_task_2_tables_start_with_the_id_model(text: str) -> None:
    sasrec, gru = (table(text, model)[2:] for model in ("SASRec", "GRU4Rec"))
    assert [row[0] for row in sasrec] == ["ID", "Vanilla", "SFT", "VLM2Rec"]
    assert sasrec[0][4] == ".2000"
    assert sasrec[3][11:] == [".5346", ".6466", ".3649", ".3932"]
    assert gru[3][11:] == [".5064", ".6185", ".3386", ".3669"]


def test_differences_to_the_reference_carry_an_interval_and_over_several_seeds_a_test(
    study: Path, text: str, tmp_path: Path
) -> None:
    rows = {row[0]: row[1:] for row in table(text, "Task 1")[2:]}
    assert rows["SFT"][8:10] == ["+.1000", ".020"]
    assert "[+.0800, +.1200]" in text and "paired t-test over 3 seeds" in text
    one = table_of(study, "comparisons").with_columns(pl.lit(1, pl.Int32).alias("seeds"), pl.lit(None).alias("p_holm"))
    alone = printed(changed(study, tmp_path, comparisons=one))
    rows = {row[0]: row[1:] for row in table(alone, "Task 1")[2:]}
    assert rows["SFT"][8:10] == ["+.1000", ".4038"]  # the paper's column follows
    assert "t-test" not in alone and "One seed was run" in alone


def test_figures_lie_beside_the_page_and_follow_its_theme_inside(study: Path, text: str) -> None:
    names = {file.name for file in (study / "figures").iterdir()}
    assert names == {f"{name}.{ending}" for name in FIGURES for ending in ("svg", "png")}
    standalone = (study / "figures" / "fig1a-views.svg").read_text()
    assert "#d1500b" in standalone and "var(" not in standalone
    inline = text[text.index("<svg") : text.rindex("</svg>")]
    assert "var(--vlm2rec)" in inline and "#d1500b" not in inline


def test_text_neighbours_share_words_and_image_neighbours_share_looks(text: str) -> None:
    found = table(text, "attribute")
    assert found[0][2:] == ["VLM2Rec", "Vanilla", "SFT"]
    assert found[1] == ["at random", *["text", "image", "fused"] * 3]
    share = {row[0]: [float(cell.removesuffix(" %")) for cell in row[1:]] for row in found[2:]}
    for attribute, view, other in (("brand", 1, 2), ("colour", 2, 1)):
        chance = share[attribute][0]
        assert share[attribute][view] > 2 * chance > share[attribute][other]


def test_the_same_folder_gives_the_same_page_twice(study: Path, text: str, tmp_path: Path) -> None:
    again = run(ReportConfig(run=study, out=tmp_path / "sub" / "again.html"))
    assert again == tmp_path / "sub" / "again.html"
    assert again.read_text(encoding="utf-8") == text
    assert (tmp_path / "sub" / "figures" / "learning.svg").is_file()


# --- for everyone -------------------------------------------------------------------------------------------


def unmeasured(study: Path, folder: Path) -> Path:
    """The study when there are vectors of one method and nothing else, as in the middle of a demo."""
    few = {name: table_of(study, name).filter(pl.col("method") == "Vanilla") for name in ("neighbours", "common")}
    empty = ("results", "users", "comparisons", "geometry", "views", "curves", "warnings", "cost")
    return changed(study, folder, **few, **{name: table_of(study, name).clear() for name in empty})


def test_neighbours_come_first_then_tables_then_claims(text: str) -> None:
    order = re.findall(r'<section id="([\w-]+)"', text)
    assert order[:3] == ["neighbours", "task1", "task2"]
    assert order[-4:] == ["gates", "claims", "ran", "settings"]
    assert text.index('class="card"') < text.index("<table")


def test_a_page_of_vectors_alone_shows_them_and_claims_nothing(study: Path, tmp_path: Path) -> None:
    text = drawn(unmeasured(study, tmp_path))
    assert re.findall(r'<section id="([\w-]+)"', text) == ["neighbours", "ran", "settings"]
    assert "So far there are vectors, and nothing has been measured" in text and 'class="card"' in text
    assert "N@20 is" not in text and "0 methods" not in text.replace("\n", " ")
    assert faults(text) == []


def test_who_does_not_see_the_page_misses_nothing(text: str) -> None:
    assert faults(text) == []
    item = search_page.Picture("P1", "A lamp", "data:image/jpeg;base64,AAAA")
    assert faults(search_page.render("Nearest to P1", "1 of 9", [item], [item]), ("main",)) == []
    for broken, problem in (
        (text.replace('lang="en"', ""), "no language"),
        (text.replace('scope="row"', "", 1), "a heading of nothing"),
        (re.sub(r'role="img" aria-label="[^"]+"', 'role="img"', text, count=1), "no name"),
        (text.replace("<h2>", "<h4>", 1).replace("</h2>", "</h4>", 1), "h4 follows h1"),
        (text.replace("<main>", "<div>").replace("</main>", "</div>"), "<main>: 0"),
    ):
        assert any(problem in found for found in faults(broken)), problem


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_every_pair_of_colours_can_be_told_apart(mode: str, text: str) -> None:
    colours = palettes(text)[mode]
    heat = mixed(colours["sft"], colours["bg"], 0.45)
    assert "calc(var(--v) * 45%)" in text
    for name in ("ink", "muted", "accent", "yes", "no"):
        assert contrast(colours[name], colours["bg"]) >= 4.5, name
    for name, ground in (("ink", "tint"), ("muted", "tint"), ("ink", "wash"), ("muted", "wash")):
        assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
    assert contrast(colours["ink"], heat) >= 4.5
    for name in (*COLOURS, *(f"other{number}" for number in range(len(OTHERS)))):
        assert contrast(colours[name], colours["bg"]) >= 3, name  # bars and lines


def test_the_page_and_the_figures_have_the_same_colours(text: str) -> None:
    light = palettes(text)["light"]
    assert {VARIABLES[colour]: colour for colour in (*COLOURS.values(), *OTHERS)}.items() <= light.items()


def test_the_page_has_a_form_for_paper(text: str) -> None:
    paper = text.partition("@media print {")[2].partition("</style>")[0]
    for rule in ("break-inside: avoid", "nav, details:not([open]) { display: none; }", "overflow: visible"):
        assert rule in paper
    assert "@media screen and (prefers-color-scheme: dark)" in text  # nobody prints on black


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Browser:
    if chromium() is None:
        pytest.skip("there is no Chromium on this machine")
    return Browser(tmp_path_factory.mktemp("browser"))


@pytest.mark.parametrize(("width", "dark"), [(PHONE, True), (DESKTOP, False)], ids=["phone, dark", "desktop, light"])
def test_nothing_is_wider_than_the_window_and_axe_finds_nothing(
    width: int, dark: bool, browser: Browser, study: Path, text: str
) -> None:
    found = browser.measure(study / "report.html", width, dark, axe() or "")
    assert found["dark"] is dark and found["width"] == width and found["wide"] == []
    assert len(found["figures"]) == len(FIGURES) and len(found["pictures"]) > 50
    if axe() is None:
        pytest.skip("axe-core-python is not installed; everything else held")
    assert found["violations"] == [] and len(found["passes"]) > 25


def test_a_screenshot_has_something_in_every_figure_and_picture(
    browser: Browser, study: Path, text: str, tmp_path: Path
) -> None:
    found = browser.measure(study / "report.html", DESKTOP)
    shot = browser.screenshot(study / "report.html", DESKTOP, found["height"], tmp_path / "page.png")
    picture = np.asarray(Image.open(shot).convert("RGB"), np.int16)
    empty = []
    for each in [*found["figures"], *found["pictures"]]:
        x, y, width, height = (round(side) for side in each["box"])
        part = picture[y : y + height, x : x + width]
        if not part.size or np.ptp(part, axis=(0, 1)).max() < 60:
            empty.append(each["name"])
    missing = table_of(study, "pictures").filter(pl.col("picture").is_null())["title"].to_list()
    assert set(empty) <= set(missing)


# --- parts of a study ---------------------------------------------------------------------------------------


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("comparisons", "geometry")]


@pytest.mark.parametrize("name", ["results", *SLOW, "curves", "warnings", "cost", "neighbours"])
def test_without_any_one_table_the_rest_is_shown(name: str, study: Path, tmp_path: Path) -> None:
    show = drawn if name in ("results", "comparisons", "geometry", "curves") else printed
    read(show(changed(study, tmp_path, **{name: table_of(study, name).clear()})))


def test_task_1_alone_makes_a_page(study: Path, tmp_path: Path) -> None:
    kept = {name: table_of(study, name).filter(pl.col("task") == 1) for name in ("results", "comparisons")}
    empty = {name: table_of(study, name).clear() for name in ("curves", "warnings", "neighbours", "common", "pictures")}
    text = drawn(changed(study, tmp_path, **kept, **empty))
    assert ".3500" in text
    assert not [found for found in read(text).tables if found[0][0] in ("SASRec", "GRU4Rec")]
    assert "How training treats each modality" not in text and "by both together" not in text


def test_a_study_of_an_older_program_still_has_its_page(study: Path, tmp_path: Path) -> None:
    text = printed(changed(study, tmp_path, about=without(study, *SINCE)))
    assert "vlm2rec study" in text and "What ran" in text
    assert "From catalogue to dataset" not in text and "recall@10" not in text


@pytest.mark.usefixtures("undrawn")
def test_table_1_has_pairs_of_one_kind_and_marks_the_papers_column(study: Path, text: str, tmp_path: Path) -> None:
    found = table(text, "State")
    assert {"U users", "U items", "offset", "U‡"} <= {*found[0], *found[1]}
    assert "does not follow from its Eq. 4" in text
    older = table_of(study, "geometry").drop("U_users", "U_items", "offset")
    assert "–" in table(drawn(changed(study, tmp_path, geometry=older)), "State")[2]
    measured = [cell for row in found[2:] for cell in row]
    assert "−.9000" in measured and "−1.6000" in measured


@pytest.mark.usefixtures("undrawn")
def test_table_3_says_which_filter_comes_nearest_to_the_paper(study: Path, tmp_path: Path) -> None:
    counts = [{"step": "5-core", "users": 22_363, "items": 12_101, "interactions": 198_502}]
    variants = [
        {"step": "as it is (--core 1)", "users": 22_363, "items": 12_101, "interactions": 198_502},
        {"step": "cut (--core 5 --truncate 10)", "users": 19_000, "items": 9000, "interactions": 130_000},
    ]
    about = table_of(study, "about").filter(~pl.col("key").is_in(["counts", "variants", "dataset"]))
    facts = {"counts": counts, "variants": variants, "dataset": "Beauty"}
    rows = pl.DataFrame({"key": list(facts), "value": [json.dumps(value) for value in facts.values()]})
    named = {
        each: table_of(study, each).with_columns(pl.lit("Beauty").alias("dataset"))
        for each in ("results", "comparisons", "geometry", "cost")
    }
    text = drawn(changed(study, tmp_path, about=pl.concat([about, rows]), **named))
    found = {row[0]: row[1:] for row in table(text, "step of prepare")}
    assert found["cut (--core 5 --truncate 10) ← nearest to the paper"][3] == "6.8"
    assert found["as it is (--core 1)"][3] == "8.9" and found["the paper’s Beauty"] == [
        "19,757",
        "9,311",
        "137,300",
        "6.9",
    ]


def test_a_row_that_no_ranking_gives_is_not_printed(study: Path, tmp_path: Path) -> None:
    found = table_of(study, "results")
    wrong = (pl.col("method") == "SFT") & (pl.col("task") == 1) & (pl.col("metric") == "N@20")
    broken = found.with_columns(pl.when(wrong).then(0.9).otherwise("value").alias("value"))
    with pytest.raises(ArtifactError, match="metrics of one ranking"):
        printed(changed(study, tmp_path, results=broken))


def test_a_name_that_looks_like_mathematics_is_printed_as_it_is(study: Path, tmp_path: Path) -> None:
    name = "_$\\frac$<b>"
    tables = {
        each: table_of(study, each).with_columns(pl.col("method").replace("SFT", name))
        for each in ("results", "comparisons", "geometry", "curves", "cost", "neighbours", "common", "warnings")
    }
    tables["methods"] = table_of(study, "methods").with_columns(pl.col("name").replace("SFT", name))
    assert name in " ".join(read(drawn(changed(study, tmp_path, **tables))).texts)


@pytest.mark.parametrize("missing", TABLE_NAMES)
def test_a_folder_that_lacks_a_table_is_refused(missing: str, study: Path, tmp_path: Path) -> None:
    changed(study, tmp_path)
    (tmp_path / f"{missing}.parquet").unlink()
    with pytest.raises(ArtifactError, match=rf"{missing}\.parquet"):
        drawn(tmp_path)


@pytest.mark.parametrize("content", [None, "notes.txt"])
def test_a_folder_that_is_no_study_is_refused(content: str | None, tmp_path: Path) -> None:
    if content:
        (tmp_path / content).write_text("hello")
    with pytest.raises(ArtifactError, match=r"is not a study folder.*`vlm2rec study` or `vlm2rec demo`"):
        drawn(tmp_path)
    with pytest.raises(ArtifactError, match="is not a folder"):
        drawn(tmp_path / "nowhere")


def test_an_out_that_is_a_folder_and_a_call_without_one_folder_are_refused(study: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder"):
        run(ReportConfig(study=study, out=tmp_path))
    with pytest.raises(ConfigError, match="no folder is given"):
        run(ReportConfig())
    with pytest.raises(ConfigError, match="are two folders"):
        run(ReportConfig(study=study, run=tmp_path))


@pytest.mark.usefixtures("undrawn")
def test_pictures_beside_a_page_elsewhere_stay_and_old_figures_of_the_study_go(study: Path, tmp_path: Path) -> None:
    few = {name: table_of(study, name).clear() for name in ("curves", "geometry")}
    own, elsewhere = changed(study, tmp_path / "study", **few) / "figures", tmp_path / "thesis" / "figures"
    for folder in (own, elsewhere):
        folder.mkdir(parents=True)
        (folder / "mine.svg").write_text("<svg/>")
    (own / "fig9-old.svg").write_text("<svg><metadata>vlm2rec report</metadata></svg>")
    run(ReportConfig(study=own.parent))
    run(ReportConfig(study=own.parent, out=elsewhere.parent / "page.html"))
    assert not (own / "fig9-old.svg").exists() and (own / "mine.svg").exists()
    assert (elsewhere / "mine.svg").exists() and (elsewhere / "differences.svg").exists()


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("file", ["page.html", "figures/differences.svg", "figures/differences.png"])
def test_a_file_that_is_not_ours_is_never_replaced_by_a_page(file: str, study: Path, tmp_path: Path) -> None:
    mine, out = tmp_path / "thesis" / file, tmp_path / "thesis" / "page.html"
    mine.parent.mkdir(parents=True)
    mine.write_text("precious")
    with pytest.raises(ConfigError, match="has not written it"):
        run(ReportConfig(study=study, out=out))
    assert mine.read_text() == "precious"
    mine.unlink()
    run(ReportConfig(study=study, out=out))
    assert run(ReportConfig(study=study, out=out)) == out, "an earlier page is replaced"


# --- training -----------------------------------------------------------------------------------------------


def test_the_curves_of_every_method_and_view_are_drawn(text: str) -> None:
    ranks = figure(text, "Effective rank of each view")
    for label in ("SFT, text", "SFT, image", "SFT, fused", "VLM2Rec, image"):
        assert ranks.count(f">{label}<") == 1
    assert "Users whose weak modality is the image" in ranks
    learning = figure(text, "Training loss")
    for panel in ("Training loss", "Validation N@20", "Margin of each modality", "Penalty on the negatives"):
        assert panel in learning
    for label in ("SFT, total", "VLM2Rec, total", "VLM2Rec, WPCL", "VLM2Rec, CRTR", "SFT, text", "VLM2Rec, image"):
        assert f">{label}<" in learning
    assert "not recorded" not in ranks + learning
    assert figure(text, "Separability of each view") and figure(text, "Alignment of the update")


def test_what_the_monitor_said_is_repeated_as_text(study: Path, text: str, tmp_path: Path) -> None:
    assert "SFT, seed 0, from step 20 until step 30: image falls behind while text gains: &lt;b&gt;S" in text
    assert "SFT, seed 0, from step 30 to the end:" in text
    assert "<b>S" not in text
    many = pl.concat([table_of(study, "warnings")] * 10)
    assert "SFT, image: 20 warnings, for example: image falls behind" in printed(
        changed(study, tmp_path, warnings=many)
    )


def test_what_training_did_not_record_is_said_or_left_out(study: Path, tmp_path: Path) -> None:
    curves = table_of(study, "curves")
    text = drawn(changed(study, tmp_path, curves=curves.filter(~pl.col("kind").is_in(["probe", "gradients"]))))
    assert figure(text, "Alignment of the update") == figure(text, "Separability of each view") == ""
    assert figure(text, "Effective rank of each view").count("not recorded") == 1
    sft = curves.filter(pl.col("method") == "SFT")  # which has no penalty
    assert figure(drawn(changed(study, tmp_path, curves=sft)), "Training loss").count("not recorded") == 1


# --- pieces -------------------------------------------------------------------------------------------------


def test_the_best_of_each_column_is_marked_and_ties_share_it(study: Path, tmp_path: Path) -> None:
    best = {"H@10": 1.4 * 0.37, "H@20": 1.4 * 0.37 + 0.8 * 0.31}  # H@20 follows: a ranking could have this row
    row = (pl.col("method") == "SFT") & (pl.col("model") == "SASRec") & (pl.col("protocol") == "candidates")
    value = pl.when(row & pl.col("metric").is_in(list(best))).then(pl.col("metric").replace_strict(best, default=0.0))
    tied = table_of(study, "results").with_columns(value.otherwise("value").alias("value"))
    sheet = ranking_sheet(Results.open(changed(study, tmp_path, results=tied)), 2, "SASRec", {})
    assert sheet is not None
    assert [[cell.best for cell in row.cells[:4]] for row in sheet.rows[2:]] == [
        [True, False, False, False],
        [True, True, True, True],
    ]


def test_the_random_floor_is_that_of_a_uniform_rank() -> None:
    ranks = np.arange(1, 102)
    assert random_floor("H@10", 101) == pytest.approx(0.0990, abs=1e-4)
    assert random_floor("H@20", 101) == pytest.approx(0.1980, abs=1e-4)
    assert random_floor("N@20", 101) == pytest.approx(np.where(ranks <= 20, 1 / np.log2(ranks + 1), 0).mean())


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
    worst, shared = disagreeing(Views(np.arange(40), {"text": text, "image": image}), 3)
    assert worst[0] == 7
    assert 5 < shared < 10


def test_colours_of_known_methods_stay_and_unknown_ones_differ(study: Path, tmp_path: Path) -> None:
    methods = table_of(study, "methods")
    others = [
        methods.filter(pl.col("name") == "SFT").with_columns(
            pl.lit(name).alias("name"), pl.lit(None, pl.String).alias("paper")
        )
        for name in ("first", "second")
    ]
    known = figures.colours(Results.open(study))
    more = figures.colours(Results.open(changed(study, tmp_path, methods=pl.concat([*others, methods]))))
    assert len(set(more.values())) == 6
    assert {name: more[name] for name in known} == known


def test_a_figure_carries_labelled_axes_and_the_random_line(text: str) -> None:
    words = " ".join(read(figure(text, "Task 1 with fused").join(("<svg ", ""))).texts)
    assert "H@10, 101 candidates" in words and "random" in words and ".099" in words and ".350" in words


def test_times_are_printed_in_the_unit_that_suits() -> None:
    assert [page.duration(each) for each in (0.01, 2.04, 75.2, 754, 4000)] == [
        *("under 0.1 s", "2.0 s", "75 s", "12 min 34 s", "1.1 h")
    ]

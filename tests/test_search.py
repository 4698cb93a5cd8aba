"""`search` by words, picture and history: the query is encoded as an item is, by the encoder of the export."""

from __future__ import annotations

import html.parser
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm2rec.downstream.index.index import ItemIndex, Neighbour, build_index
from vlm2rec.downstream.table import EmbeddingTable
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError, DataError, ModelError
from vlm2rec.embedder.contract.storage import sha256_file
from vlm2rec.embedder.export.shorten import shorten
from vlm2rec.pipelines import build_index as command
from vlm2rec.pipelines import cli, export_items, queries
from vlm2rec.pipelines.config import ExportConfig, SearchConfig

Tiny = Callable[[str], Path]


@pytest.fixture(scope="module")
def world(tiny: Tiny, drawn_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a backbone, embeddings of it, and an index of their fused vectors."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(tiny("qwen2_5_vl"), folder / "backbone")
    export_items.run(
        ExportConfig(
            data=drawn_dataset,
            backbone=str(folder / "backbone"),
            out=folder / "embeddings",
            max_pixels=56 * 56,
            dtype="float32",
            device="cpu",
            vision_cache="off",
        )
    )
    build_index(folder / "embeddings", folder / "index")
    return folder


@pytest.fixture(scope="module")
def dataset(drawn_dataset: Path) -> Dataset:
    return Dataset(drawn_dataset)


def asks(world: Path, **more: Any) -> SearchConfig:
    return SearchConfig(**{"index": world / "index", "k": 5, "device": "cpu", **more})


def search(world: Path, **more: Any) -> list[Neighbour]:
    return command.search(asks(world, **more))


def near(table: EmbeddingTable, query: np.ndarray, k: int = 5, without: tuple[str, ...] = ()) -> list[str]:
    """Return the nearest items by the book."""
    vectors = table.vectors / np.linalg.norm(table.vectors, axis=1, keepdims=True)
    order = np.argsort(-(vectors @ (query / np.linalg.norm(query))), kind="stable")
    return [table.item_ids[row] for row in order if table.item_ids[row] not in without][:k]


def ids(found: list[Neighbour]) -> list[str]:
    return [each.item_id for each in found]


# --- words and pictures -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("row", [0, 17])
def test_words_and_pictures_get_the_vectors_of_items_to_the_bit(world: Path, dataset: Dataset, row: int) -> None:
    index = ItemIndex.open(world / "index")
    about = queries.about_export(index)
    picture = Path(str(dataset.image_root)) / dataset.image_paths[row]
    for asked, view in (
        ({"text": dataset.titles[row]}, schema.TEXT),
        ({"image": picture}, schema.IMAGE),
        ({"text": dataset.titles[row], "image": picture}, schema.FUSED),
    ):
        found = queries.encoded(about, asks(world, **asked), "here")
        assert found.tobytes() == EmbeddingTable.open(world / "embeddings", view).vectors[row].tobytes()


def test_the_words_of_a_title_find_what_its_item_finds(world: Path, dataset: Dataset) -> None:
    by_item = search(world, item=dataset.item_ids[3], against="text")
    by_words = search(world, text=dataset.titles[3], against="text", k=6)
    twins = {name for name, title in zip(dataset.item_ids, dataset.titles, strict=True) if title == dataset.titles[3]}
    assert by_words[0].item_id in twins and by_words[0].cosine == pytest.approx(1, abs=1e-6)
    rest = [each for each in by_words if each.item_id != dataset.item_ids[3]][:5]
    assert [each.cosine for each in rest] == [each.cosine for each in by_item]
    assert rest[0].title == dataset.titles[dataset.item_ids.index(rest[0].item_id)]


@pytest.mark.parametrize("against", ["fused", "text", "image"])
def test_a_view_to_compare_with_is_searched_exactly(world: Path, dataset: Dataset, against: Any) -> None:
    text = EmbeddingTable.open(world / "embeddings", schema.TEXT).vectors[5]
    expected = near(EmbeddingTable.open(world / "embeddings", against), text)
    assert ids(search(world, text=dataset.titles[5], against=against)) == expected


def test_a_photo_of_one_s_own_finds_items(world: Path, tmp_path: Path) -> None:
    Image.new("RGB", (90, 60), "orange").save(tmp_path / "photo.png")
    found = search(world, image=tmp_path / "photo.png", against="image")
    assert len(found) == 5 and [each.cosine for each in found] == sorted((e.cosine for e in found), reverse=True)


def test_short_vectors_are_searched_with_a_short_query(world: Path, dataset: Dataset, tmp_path: Path) -> None:
    shorten(world / "embeddings", tmp_path / "short", dim=16, storage="int8")
    build_index(tmp_path / "short", tmp_path / "index")
    found = search(world, index=tmp_path / "index", text=dataset.titles[2], against="text", k=1)
    assert found[0].title == dataset.titles[2] and found[0].cosine == pytest.approx(1, abs=1e-3)


# --- histories ----------------------------------------------------------------------------------------------------
def test_a_history_is_the_mean_of_its_items_and_does_not_find_them(world: Path, dataset: Dataset) -> None:
    history = tuple(dataset.item_ids[row] for row in (4, 9, 4))
    table = EmbeddingTable.open(world / "embeddings")
    expected = near(table, table.vectors[[4, 9, 4]].mean(0), without=history)
    assert ids(search(world, history=history)) == expected


def test_with_the_backbone_a_history_is_encoded_as_evaluate_does(world: Path, dataset: Dataset) -> None:
    from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
    from vlm2rec.embedder.encoders.item_features import ItemFeatures, encode_rows

    encoder = ItemEncoder.load(world / "backbone", device="cpu", dtype="float32", max_pixels=56 * 56)
    vector = encode_rows(encoder, ItemFeatures(dataset, encoder), [[4, 9]])["fused"][0]
    history = (dataset.item_ids[4], dataset.item_ids[9])
    found = search(world, history=history, backbone=str(world / "backbone"))
    assert ids(found) == near(EmbeddingTable.open(world / "embeddings"), vector, without=history)


# --- where the encoder is -----------------------------------------------------------------------------------------
def test_manifest_and_index_know_the_encoder(world: Path) -> None:
    manifest = schema.read_manifest(world / "embeddings")
    assert manifest[schema.ENCODER]["backbone"] == str(world / "backbone")
    assert ItemIndex.open(world / "index").meta["export"][schema.ENCODER] == manifest[schema.ENCODER]
    assert schema.ENCODER not in manifest["settings"]  # where it lay decides no vector


def test_an_index_alone_is_enough_for_words(world: Path, dataset: Dataset, tmp_path: Path) -> None:
    expected = search(world, text=dataset.titles[5])
    (world / "embeddings").rename(world / "away")
    try:
        assert search(world, text=dataset.titles[5]) == expected
        for needs in ({"text": "mug", "against": "text"}, {"history": (dataset.item_ids[0],)}):
            with pytest.raises(ArtifactError, match="give it with --embeddings"):
                search(world, **needs)
        found = search(world, text=dataset.titles[5], against="text", embeddings=world / "away")
        assert found[0].title == dataset.titles[5]
    finally:
        (world / "away").rename(world / "embeddings")


def test_a_moved_encoder_is_named_and_another_one_refused(
    world: Path, dataset: Dataset, tiny: Tiny, tmp_path: Path
) -> None:
    expected = search(world, text=dataset.titles[1])
    (world / "backbone").rename(world / "moved")
    try:
        with pytest.raises(ModelError, match=r"no longer on this machine.*--backbone"):
            search(world, text="mug")
        assert search(world, text=dataset.titles[1], backbone=str(world / "moved")) == expected
        with pytest.raises(ArtifactError, match="was exported with backbone_hash"):
            search(world, text="mug", backbone=str(tiny("qwen2_vl")))
    finally:
        (world / "moved").rename(world / "backbone")
    shutil.copytree(world / "backbone", tmp_path / "changed")
    config = tmp_path / "changed" / "preprocessor_config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(ArtifactError, match="processor_hash"):
        search(world, text="mug", backbone=str(tmp_path / "changed"))


def test_folders_of_an_earlier_version_are_searched_once_the_encoder_is_named(
    world: Path, dataset: Dataset, tmp_path: Path
) -> None:
    expected = search(world, text=dataset.titles[1])
    shutil.copytree(world / "index", tmp_path / "index")
    meta = schema.read_json(tmp_path / "index" / schema.INDEX_FILE, "", "")
    del meta["export"][schema.ENCODER]
    schema.write_json(tmp_path / "index" / schema.INDEX_FILE, meta)
    with pytest.raises(ConfigError, match=r"earlier vlm2rec.*--backbone"):
        search(world, index=tmp_path / "index", text="mug")
    given = {"index": tmp_path / "index", "text": dataset.titles[1], "backbone": str(world / "backbone")}
    assert search(world, **given) == expected
    del meta["export"]  # the embeddings folder tells the same
    schema.write_json(tmp_path / "index" / schema.INDEX_FILE, meta)
    assert search(world, **given) == expected
    with pytest.raises(ArtifactError, match="build-index"):
        search(world, **{**given, "embeddings": None, "index": _without_embeddings(tmp_path / "index", meta)})


def _without_embeddings(folder: Path, meta: dict[str, Any]) -> Path:
    schema.write_json(folder / schema.INDEX_FILE, {**meta, "embeddings": "s3://bucket/embeddings"})
    return folder


def test_a_hub_name_of_a_manifest_makes_no_request(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "index", tmp_path / "index")
    meta = schema.read_json(tmp_path / "index" / schema.INDEX_FILE, "", "")
    for name in ("somebody/something", "a\0b", "https://example.org/x", "/no/such/folder"):
        meta["export"][schema.ENCODER]["backbone"] = name
        schema.write_json(tmp_path / "index" / schema.INDEX_FILE, meta)
        with pytest.raises(ModelError, match="no longer on this machine"):
            search(world, index=tmp_path / "index", text="mug")


# --- what is refused ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "nothing to search for"),
        ({"item": "1", "text": "mug"}, "--item with --text or --image"),
        ({"history": ("1",), "item": "1"}, "--item with --history"),
        ({"text": "  "}, "--text without a word"),
    ],
)
def test_a_search_asks_for_one_thing(world: Path, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        search(world, **asked)


def test_unknown_items_and_bad_pictures_are_refused(world: Path, dataset: Dataset, tmp_path: Path) -> None:
    known = dataset.item_ids[0]
    for asked in ({"item": "nobody"}, {"history": (known, "nobody")}, {"item": "nobody", "against": "text"}):
        with pytest.raises(DataError, match="'nobody' is not in"):
            search(world, **asked)
    (tmp_path / "page.jpg").write_bytes(b"<html>404</html>")
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(ConfigError, match=r"--html .*photo.jpg is a file that holds something else"):
        search(world, item=known, html=tmp_path / "photo.jpg")
    assert (tmp_path / "photo.jpg").read_bytes() == b"\xff\xd8\xff"
    for picture in ("page.jpg", "none.jpg"):
        with pytest.raises(DataError, match=f"--image .*{picture}"):
            search(world, image=tmp_path / picture)


def test_vectors_of_titles_alone_have_no_pictures_to_compare(
    world: Path, drawn_dataset: Path, dataset: Dataset, tmp_path: Path
) -> None:
    titles = {"data": drawn_dataset, "backbone": str(world / "backbone"), "views": "text", "device": "cpu"}
    export_items.run(ExportConfig(**titles, out=tmp_path / "embeddings", dtype="float32"))  # type: ignore[arg-type]
    build_index(tmp_path / "embeddings", tmp_path / "index")
    Image.new("RGB", (60, 60)).save(tmp_path / "black.png")
    for more in ({}, {"text": "mug"}):
        with pytest.raises(ConfigError, match="made of text alone"):
            search(world, index=tmp_path / "index", image=tmp_path / "black.png", **more)
    with pytest.raises(ConfigError, match="--against image, but the export has no image vectors"):
        search(world, index=tmp_path / "index", text="mug", against="image")
    assert search(world, index=tmp_path / "index", text=dataset.titles[0])[0].title == dataset.titles[0]


def test_one_prompt_with_both_needs_both(world: Path, drawn_dataset: Path, dataset: Dataset, tmp_path: Path) -> None:
    backbone = str(world / "backbone")
    export_items.run(
        ExportConfig(
            data=drawn_dataset,
            backbone=backbone,
            out=tmp_path / "embeddings",
            strategy="prompt1",
            dtype="float32",
            device="cpu",
            max_pixels=56 * 56,
            vision_cache="off",
        )
    )
    build_index(tmp_path / "embeddings", tmp_path / "index")
    with pytest.raises(ConfigError, match="one prompt"):
        search(world, index=tmp_path / "index", text="mug")
    picture = Path(str(dataset.image_root)) / dataset.image_paths[0]
    found = search(world, index=tmp_path / "index", text=dataset.titles[0], image=picture, k=3)
    assert len(found) == 3


# --- the page -----------------------------------------------------------------------------------------------------
class _Page(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_the_page_holds_its_pictures_and_asks_for_nothing_else(world: Path, dataset: Dataset, tmp_path: Path) -> None:
    found = search(world, item=dataset.item_ids[0], html=tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    images = _Page(text).named("img")
    assert len(images) == 1 + len(found) and all(str(image["src"]).startswith("data:image/jpeg") for image in images)
    assert [image["alt"] for image in images[1:]] == [each.title for each in found]
    assert "http:" not in text and "https:" not in text and not _Page(text).named("script")


def test_titles_and_queries_are_text_in_the_page(world: Path, tmp_path: Path) -> None:
    evil = '<script>alert("x")</script>'
    search(world, text=evil, html=tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert evil not in text and "&lt;script&gt;" in text and not _Page(text).named("script")


def test_a_page_without_a_dataset_says_so(world: Path, drawn_dataset: Path, dataset: Dataset, tmp_path: Path) -> None:
    before = sha256_file(world / "index" / schema.INDEX_FILE)
    found = search(world, item=dataset.item_ids[0], html=tmp_path / "page.html", images=tmp_path / "nowhere")
    page = _Page((tmp_path / "page.html").read_text())
    assert not page.named("img") and len(page.named("div")) == 1 + len(found)
    assert sha256_file(world / "index" / schema.INDEX_FILE) == before
    for wrong in (tmp_path, tmp_path / "none" / "page.html"):
        with pytest.raises(ConfigError, match="--html"):
            search(world, item=dataset.item_ids[0], html=wrong)
    with pytest.raises(ArtifactError):
        search(world, item=dataset.item_ids[0], html=tmp_path / "page.html", data=tmp_path)


# --- the documents ------------------------------------------------------------------------------------------------
DOCS = (Path(__file__).parents[1] / "docs" / "search.md").read_text(encoding="utf-8")


def test_the_commands_of_the_docs_run(
    world: Path, drawn_dataset: Path, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(world / "embeddings", tmp_path / "embeddings")
    shutil.copytree(drawn_dataset, tmp_path / "data")
    Image.new("RGB", (60, 60), "red").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```sh\n(.*?)```", DOCS, re.DOTALL)
    commands = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    assert len(commands) == 10
    for words in commands:
        arguments = [word.replace("BACKBONE", str(world / "backbone")) for word in words]
        if words[1] in ("search", "finetune", "export-items"):
            arguments += ["--device", "cpu"]
        if words[1] == "finetune":
            arguments += ["--max-steps", "1", "--max-pixels", "3136", "--images", str(dataset.image_root)]
        if words[1] == "export-items":
            arguments += ["--images", str(dataset.image_root)]
        monkeypatch.setattr("sys.argv", arguments)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code, arguments
    assert (tmp_path / "found.html").is_file()
    (code,) = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, "docs/search.md", "exec"), names)
    assert names["vectors"].shape == (len(dataset.item_ids), 32)

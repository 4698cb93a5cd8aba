"""`vlm2rec finetune --method slim`: histories of items that a column of rationales tells."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ConfigError, DataError
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
from vlm2rec.embedder.encoders.item_features import ItemFeatures
from vlm2rec.pipelines import evaluate, export_items, finetune
from vlm2rec.pipelines.config import EvaluateConfig, ExportConfig, FinetuneConfig
from vlm2rec.pipelines.read_config import read_config

Tiny = Callable[[str], Path]


def settings(tiny: Tiny, data: Path, out: Path, **more: Any) -> FinetuneConfig:
    flags: dict[str, Any] = {"method": "slim", "data": data, "backbone": str(tiny("qwen2")), "out": out}
    flags |= {"learning_rate": 1e-3, "valid_users": 5, "probe_users": 0, "log_steps": 1, "max_steps": 3}
    return read_config(FinetuneConfig, flags={**flags, "device": "cpu", **more})


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, drawn_dataset: Path) -> Path:
    """The drawn dataset with a rationale for all items but two."""
    folder = tmp_path_factory.mktemp("told") / "data"
    shutil.copytree(drawn_dataset, folder)
    items = pq.read_table(folder / "items.parquet")
    texts = [None if row < 2 else f"For one who wants number {row}." for row in range(len(items))]
    pq.write_table(items.append_column("rationale", pa.array(texts)), folder / "items.parquet")
    return folder


def test_it_trains_exports_and_evaluates_on_rationales(
    tiny: Tiny, told: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(tiny, told, tmp_path / "a")
    assert (config.loss, config.views, config.item_text, config.max_title_tokens) == ("sft", "text", "rationale", 128)
    result = finetune.run(config)
    assert result is not None and "margin_text" in result.curves["train"][0]
    assert "2 items have nothing in rationale: their titles are used" in " ".join(capsys.readouterr().err.split())
    saved = json.loads((tmp_path / "a" / "vlm2rec.json").read_text())
    assert saved["training"]["loss"] == "slim, sft on rationale" and saved["encoder"]["item_text"] == "rationale"
    assert "0) RATIONALE" in (tmp_path / "a" / "README.md").read_text()
    encoder = ItemEncoder.load(str(tiny("qwen2")), tmp_path / "a", dtype="float32", device="cpu")
    items = ItemFeatures(Dataset(told), encoder)
    assert items.titles([1, 2]) == [Dataset(told).titles[1], "For one who wants number 2."]
    given: dict[str, Any] = {"data": told, "backbone": str(tiny("qwen2")), "adapter": tmp_path / "a"}
    assert export_items.run(ExportConfig(**given, out=tmp_path / "e", dtype="float32", device="cpu")) is not None
    found = evaluate.run(EvaluateConfig(**given, embeddings=tmp_path / "e", out=tmp_path / "m", dtype="float32"))
    assert found["users_from"] == "sequence", "it reads histories, as VLM2Rec does"
    assert finetune.run(config) is None, "it is complete"


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"loss": "vlm2rec"}, "--method slim with --loss vlm2rec"),
        ({"views": "both"}, "--method slim with --loss sft, --views both"),
        ({"item_text": "title"}, "--method vlm2rec --loss sft --views text"),
        ({"prompt_style": "sda"}, "--prompt-style sda with --method slim"),
        ({"alpha": 2.0}, "--alpha with --method slim, which has no such setting"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_words(
    tiny: Tiny, told: Path, tmp_path: Path, more: dict[str, Any], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        finetune.run(settings(tiny, told, tmp_path / "a", **more))


def test_a_catalogue_without_rationales_is_refused_by_name(tiny: Tiny, drawn_dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no column 'rationale'.*those with text are title, category, brand"):
        finetune.run(settings(tiny, drawn_dataset, tmp_path / "a"))
    assert not (tmp_path / "a").exists(), "nothing was begun"

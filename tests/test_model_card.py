"""The model card of an adapter says what it was made from, in the form the hub reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from vlm2rec.embedder.training.model_card import model_card


def card_of(
    backbone: str = "Qwen/Qwen2.5-VL-3B-Instruct",
    licence: str = "Qwen Research",
    made_of: dict[str, Any] | None = None,
    **encoder: Any,
) -> ModelCard:
    settings = {
        "backbone": backbone,
        "licence": licence,
        "backbone_settings": made_of or {"revision": "abc123"},
        "encoder": {
            "fusion": "external",
            "fusion_norm": "raw",
            "prompt_mode": "raw",
            "max_pixels": 50176,
            "max_title_tokens": 64,
            "views": "both",
            **encoder,
        },
        "training": {
            "method": "vlm2rec",
            "loss": "vlm2rec",
            "loss_settings": {"tau_wpcl": 0.05, "lam": 0.1},
            "steps": 120,
            "seed": 7,
        },
        "dataset": {"name": "Toys: and more", "samples": 500, "users": 400, "sha256": {"items.parquet": "ab12"}},
        "versions": {"vlm2rec": "0.1.0", "torch": "2.13.0", "peft": "0.21.2"},
    }
    return ModelCard(model_card(settings, [("N@20", 0.12347), ("H@10", 0.2)]))


def test_the_front_matter_is_what_the_hub_reads() -> None:
    data = card_of().data
    assert data.base_model == "Qwen/Qwen2.5-VL-3B-Instruct"
    assert (data.library_name, data.pipeline_tag) == ("peft", "feature-extraction")
    assert (data.license, data.license_name) == ("other", "Qwen Research")
    assert [(result.metric_name, result.metric_value) for result in data.eval_results] == [
        ("N@20", 0.1235),
        ("H@10", 0.2),
    ]
    assert data.eval_results[0].dataset_name == "Toys: and more (validation)"


def test_a_licence_with_an_identifier_stands_under_it() -> None:
    data = card_of(licence="Apache-2.0").data
    assert (data.license, data.license_name) == ("apache-2.0", None)


def test_a_local_backbone_is_named_without_the_path_to_it(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    assert card_of(backbone=str(tmp_path / "small")).data.base_model == "small"


@pytest.mark.parametrize(
    "said",
    [
        "revision `abc123`",
        "SHA-256 of the dataset's files: `items.parquet` ab12.",
        "Method vlm2rec, loss vlm2rec (tau_wpcl 0.05, lam 0.1)",
        "Licence.** The backbone's applies: Qwen Research",
        "500 samples of 400 users",
        "120 steps, seed 7",
        "- text: `Describe this item text sequence in one word, 0) TITLE, 1) TITLE`",
        "- image: `Describe this item image sequence in one word, 0) IMAGE, 1) IMAGE`",
        "at most 50176 pixels",
        "Titles up to 64 tokens",
        "| N@20 | 0.1235 |",
        "vlm2rec 0.1.0, torch 2.13.0, peft 0.21.2",
        "--backbone Qwen/Qwen2.5-VL-3B-Instruct --adapter THIS_FOLDER",
    ],
)
def test_the_card_says(said: str) -> None:
    assert said in " ".join(card_of().text.split("\n")).replace("  ", " ")


def test_the_card_of_a_hub_backbone_says_its_commit() -> None:
    made_with = {"made_with": {"backbone": "Qwen/Qwen2.5-VL-3B-Instruct", "commit": "66285546"}}
    assert "at revision `66285546`" in card_of(made_of=made_with).text


def test_the_prompts_are_those_of_the_views_and_the_fusion() -> None:
    assert "- text" not in card_of(views="image").text and "- image" in card_of(views="image").text
    internal = card_of(fusion="internal").text
    assert "- title and image: `Describe this item sequence in one word, 0) TITLE IMAGE, 1) TITLE IMAGE`" in internal

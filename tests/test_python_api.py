"""The Python API is as small as the command line: the examples of README and docs run as they stand there."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from drawn_lora import draw_lora
from embedding_folder import write_embeddings
from PIL import Image

from vlm2rec.embedder.adapters import lora
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder

README = Path(__file__).parents[1] / "README.md"
PAGE = Path(__file__).parents[1] / "docs" / "from-python.md"
ENCODE, SEARCH = range(2)


def blocks(page: Path, kind: str) -> list[str]:
    """The fenced blocks of a page that name a language."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)


def run(code: str, page: Path = PAGE) -> dict[str, Any]:
    """Run an example and return the names it leaves."""
    names: dict[str, Any] = {}
    exec(compile(code, str(page), "exec"), names)
    return names


def test_the_examples_have_ten_lines_or_so() -> None:
    lengths = [len([line for line in text.splitlines() if line]) for text in blocks(PAGE, "python")]
    assert len(lengths) == 2 and max(lengths) <= 10
    (example,) = blocks(README, "python")
    assert len([line for line in example.splitlines() if line]) <= 10


def test_the_example_of_readme_prints_what_stands_below_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In folders as `make demo` leaves them, of the printed products alone, with the order of their cosines."""
    (printed,) = blocks(README, "text")
    lines = {line.split(": ")[0]: line.split(": ")[1].split(", ") for line in printed.splitlines()}
    titles = list(dict.fromkeys(title for line in lines.values() for title in line))
    ids = ["P0302", *(f"P{number:04}" for number in range(1, len(titles)))]
    angles = {view: [line.index(title) if title in line else 9 for title in titles] for view, line in lines.items()}
    vectors = {view: np.stack([np.cos(np.array(a) / 9), np.sin(np.array(a) / 9)], 1) for view, a in angles.items()}
    demo = tmp_path / "runs" / "demo"
    write_embeddings(
        demo / "vlm2rec/seed-0/embeddings", ids, vectors["fused"], text=vectors["text"], image=vectors["image"]
    )
    (demo / "laboratory" / "data").mkdir(parents=True)
    pl.DataFrame({"item_id": ids, "title": titles}).write_parquet(demo / "laboratory" / "data" / "items.parquet")
    monkeypatch.chdir(tmp_path)
    run(blocks(README, "python")[0], README)
    assert capsys.readouterr().out == printed


def test_the_example_that_encodes_gives_the_vectors_of_the_adapter(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "backbone").symlink_to(tiny("qwen2_5_vl"))
    encoder = ItemEncoder.load(tmp_path / "backbone")
    wrapped = lora.add_lora(encoder.backbone, rank=4, alpha=8, dropout=0.0, seed=0)
    draw_lora(wrapped, "lora_B", 0.1, seed=0)
    titles, images = lora.canary_items()
    canary = lora.Canary(titles, images, encoder.encode_items(titles, images).fused)
    lora.save_adapter(wrapped, tmp_path / "adapter", {"encoder": encoder.settings.stored()}, canary, {}, "card")
    chair = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    chair.save(tmp_path / "chair.jpg")

    monkeypatch.chdir(tmp_path)
    items = run(blocks(PAGE, "python")[ENCODE])["items"]
    trained = encoder.encode_items(["Red wooden chair", "Small blue lamp"], [Image.open("chair.jpg"), None])
    untrained = ItemEncoder.load("backbone").encode_items(["Small blue lamp"], [None])
    assert capsys.readouterr().out.startswith("(2, 64) [nan ")
    assert lora.cosine(items.fused, trained.fused).min() > 0.999
    assert lora.cosine(items.fused[1:], untrained.fused).max() < 0.99
    np.testing.assert_array_equal(items.fused[1], items.text[1])


def test_the_example_that_searches_finds_what_the_history_points_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    vectors[3] = np.nan
    vectors[9] = 5 * (vectors[42] + vectors[7])
    write_embeddings(tmp_path / "embeddings", [str(number) for number in range(50)], vectors)
    monkeypatch.chdir(tmp_path)
    best = run(blocks(PAGE, "python")[SEARCH])["best"]
    assert best[0] == "9" and len(best) == 10 and "3" not in best


def test_importing_the_packages_loads_none_of_their_libraries() -> None:
    code = (
        "import sys, vlm2rec.embedder, vlm2rec.downstream\n"
        "assert not {'torch', 'transformers', 'pyarrow', 'numpy', 'PIL'} & set(sys.modules)\n"
        "from vlm2rec.downstream import EmbeddingTable\n"
        "assert 'pyarrow' in sys.modules and not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("package", ["embedder", "downstream"])
def test_a_name_that_is_not_there_is_an_attribute_error(package: str) -> None:
    import vlm2rec.downstream
    import vlm2rec.embedder

    module = {"embedder": vlm2rec.embedder, "downstream": vlm2rec.downstream}[package]
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        module.Nothing  # noqa: B018
    assert all(hasattr(module, name) for name in module.__all__)

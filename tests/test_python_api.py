"""The Python API is as small as the command line: the README's examples run as they stand there."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawn_lora import draw_lora
from embedding_folder import write_embeddings
from PIL import Image

from vlm2rec.embedder.adapters import lora
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder

README = Path(__file__).parents[1] / "README.md"
ENCODE, SEARCH = range(2)


def examples() -> list[str]:
    """The Python of the README's section `From Python`."""
    (section,) = re.findall(r"^## From Python$(.*?)^## ", README.read_text(encoding="utf-8"), re.M | re.S)
    return re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S)


def run(number: int) -> dict[str, Any]:
    """Run an example and return the names it leaves."""
    names: dict[str, Any] = {}
    exec(compile(examples()[number], str(README), "exec"), names)
    return names


def test_the_readme_has_two_examples_of_ten_lines_or_so() -> None:
    lengths = [len([line for line in text.splitlines() if line]) for text in examples()]
    assert len(lengths) == 2 and max(lengths) <= 10


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
    items = run(ENCODE)["items"]
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
    best = run(SEARCH)["best"]
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

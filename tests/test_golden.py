"""The whole line on a drawn catalogue gives what it gave before the house was rebuilt.

`golden/line.json` was made from commands of fac0f16 on the same drawn inputs: `python tests/test_golden.py FOLDER`
writes what it holds of a folder in which they ran. On a processor like the one it was made on, weights and vectors
are the same to the bit; on any other they agree to rounding.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file

EXPECTED = Path(__file__).parent / "golden" / "line.json"
CATALOGUE = {"products": 40, "users": 30, "seed": 0}
VIEWS = ("fused", "text", "image")
LINE = (
    "prepare --items catalogue/items.parquet --interactions catalogue/interactions.parquet --images catalogue/images"
    " --out data --core 2 --candidates 20 --candidate-seeds 0,1",
    "finetune --data data --backbone tiny --out adapter --max-steps 4 --learning-rate 1e-3 --checkpoint-steps 2"
    " --log-steps 1 --probe-users 8 --probe-steps 2 --gradient-steps 2 --max-pixels 3136 --reduction mean"
    " --valid-candidates stored",
    "export-items --data data --backbone tiny --adapter adapter --out emb --shard-size 16 --dtype float32",
    "verify emb",
    "evaluate --data data --embeddings emb --backbone tiny --adapter adapter --out task1 --dtype float32",
    "train-recommender --data data --embeddings emb --model SASRec --out sasrec --max-epochs 1 --eval-step 1",
    "build-index --embeddings emb --out index",
)
UNTIMED = ("seconds", "created", "git_commit", "versions")


def digest(parts: Iterable[bytes]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()


def rows_of(path: Path) -> str:
    """The rows of a Parquet file, whatever wrote it: floats to the bit."""
    table = pq.read_table(path)
    columns = sorted(table.column_names)
    return digest(repr((name, table[name].to_pylist())).encode() for name in columns)


def machine() -> str:
    """What decides the order of sums in a matrix product."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    model = next((line for line in lines if line.startswith("model name")), platform.processor())
    facts = (model, torch.__version__, np.__version__, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads())
    return digest(str(fact).encode() for fact in facts)[:16]


def numbers(tensors: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
    """A few numbers of each tensor: its norm, its sum, and one in the middle."""
    wide = {name: tensor.astype(np.float64) for name, tensor in sorted(tensors.items())}
    return {name: [float(np.linalg.norm(t)), float(t.sum()), float(t.ravel()[t.size // 2])] for name, t in wide.items()}


def plain(tree: Any) -> Any:
    """A JSON tree without times, versions and paths."""
    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items() if not any(word in key for word in UNTIMED)}
    if isinstance(tree, list):
        return [plain(value) for value in tree]
    return Path(tree).name if isinstance(tree, str) and tree.startswith("/") else tree


def said_of(folder: Path) -> dict[str, Any]:
    """What is held against the golden run: numbers to rounding, `exact` to the bit on the same machine."""

    def read(*path: str) -> Any:
        return plain(json.loads(folder.joinpath(*path).read_text()))

    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    table = pq.read_table([folder / "emb" / f"part-{n:05}.parquet" for n in range(3)])
    vectors = {view: np.stack(table[view].to_numpy()) for view in VIEWS}
    manifest = read("emb", "_manifest.json")
    settings, of_weights = manifest["settings"], ("backbone_hash", "processor_hash", "adapter")
    elsewhere = ("images", *of_weights)  # they hold file times, and bits of this processor
    task1, task2 = read("task1", "metrics.json"), read("sasrec", "metrics.json")
    return {
        "machine": machine(),
        "dataset": {name: rows_of(folder / "data" / f"{name}.parquet") for name in ("items", "sequences", "negatives")},
        "counts": read("data", "dataset.json")["counts"],
        "export": {
            "ids": digest(item.encode() for item in table["item_id"].to_pylist()),
            "columns": table.column_names,
            "status": sorted(set(table["status"].to_pylist())),
            "settings": {key: value for key, value in settings.items() if key not in elsewhere},
            "keys": sorted(json.loads((folder / "emb" / "_manifest.json").read_text())),
        },
        "adapter_keys": sorted(json.loads((folder / "adapter" / "vlm2rec.json").read_text())),
        "curves": read("adapter", "curves.json"),
        "task1": {key: task1[key] for key in ("users", "items", "candidates", "candidates_std", "full", "geometry")},
        "task2": {key: task2[key] for key in ("users", "candidates", "full", "popularity", "curve")},
        "index": {key: value for key, value in read("index", "index.json").items() if "recall" in key},
        "adapter": numbers(adapter),
        "vectors": numbers(vectors),
        "exact": {
            **{name: settings[name] for name in of_weights},
            **{view: digest([vectors[view].tobytes()]) for view in VIEWS},
            "task1 users": rows_of(folder / "task1" / "users.parquet"),
            "task2 users": rows_of(folder / "sasrec" / "users.parquet"),
        },
    }


def close(found: Any, expected: Any, at: str = "") -> None:
    """Hold two trees against each other: numbers to 1e-3 of their size, everything else exactly."""
    if isinstance(expected, dict):
        assert sorted(found) == sorted(expected), at
        for key, value in expected.items():
            close(found[key], value, f"{at}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), at
        for place, (a, b) in enumerate(zip(found, expected, strict=True)):
            close(a, b, f"{at}[{place}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4), at
    else:
        assert found == expected, at


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[[str], Path]) -> dict[str, Any]:
    from vlm2rec.pipelines import cli
    from vlm2rec.pipelines.synthetic.drawn_catalogue import draw_catalogue

    folder = tmp_path_factory.mktemp("golden")
    draw_catalogue(folder / "catalogue", **CATALOGUE)  # type: ignore[arg-type]
    (folder / "tiny").symlink_to(tiny("qwen2_5_vl"))
    before = torch.get_float32_matmul_precision()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(torch.cpu, "get_capabilities", dict, raising=False)  # float32 by MKL, as in the golden run
        torch.set_float32_matmul_precision("highest")
        for call in LINE:
            cli.app(call.split(), standalone_mode=False)
    torch.set_float32_matmul_precision(before)
    return said_of(folder)


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return dict(json.loads(EXPECTED.read_text()))


@pytest.mark.parametrize(
    "part", ["dataset", "counts", "export", "adapter_keys", "adapter", "curves", "vectors", "task1", "task2", "index"]
)
def test_the_line_gives_what_it_gave(part: str, found: dict[str, Any], expected: dict[str, Any]) -> None:
    close(found[part], expected[part], part)


def test_on_the_same_processor_it_is_the_same_to_the_bit(found: dict[str, Any], expected: dict[str, Any]) -> None:
    if found["machine"] != expected["machine"]:
        pytest.skip("another processor, thread count or library: sums come in another order")
    assert found["exact"] == expected["exact"]


def test_the_golden_run_is_of_this_catalogue(tmp_path: Path, expected: dict[str, Any]) -> None:
    from vlm2rec.pipelines.synthetic.drawn_catalogue import draw_catalogue

    draw_catalogue(tmp_path, **CATALOGUE)  # type: ignore[arg-type]
    assert pl.read_parquet(tmp_path / "items.parquet").height == CATALOGUE["products"] == expected["counts"][0]["items"]


if __name__ == "__main__":
    print(json.dumps(said_of(Path(sys.argv[1])), indent=1))

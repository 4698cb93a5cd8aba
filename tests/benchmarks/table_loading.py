"""A table of item vectors ready for a recommender: our Parquet folder beside RecBole's own text file.

python tests/benchmarks/table_loading.py [--rows 10000] [--dim 2048] [--large 100000]

RecBole reads pretrained vectors from a text file (`item_id:token  item_emb:float_seq`) into its item features, and its
sequence models then take them from `get_preload_weight`. Ours are read, brought into the order of RecBole's ids and
standardised. The text file takes 20 kB a row, so the two are compared at `--rows`, and ours is timed at `--large` too.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from embedding_folder import write_embeddings

from vlm2rec.downstream.recbole import compat
from vlm2rec.downstream.recbole.plugin import EmbeddingStart, aligned_vectors


def as_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round as an export on a GPU does, (n, d) float32."""
    return torch.from_numpy(values).bfloat16().float().numpy()


def write_text_files(folder: Path, vectors: np.ndarray) -> None:
    """Write a RecBole dataset whose items have vectors in a text file."""
    folder.mkdir(parents=True)
    with (folder / "text.itememb").open("w") as file:
        file.write("iid:token\titem_emb:float_seq\n")
        for number, vector in enumerate(vectors):
            file.write(f"i{number}\t{' '.join(f'{value:.7g}' for value in vector)}\n")
    with (folder / "text.inter").open("w") as file:
        file.write("user_id:token\titem_id:token\ttimestamp:float\n")
        for number in range(len(vectors)):
            file.write(f"u{number // 10}\ti{number}\t{number}\n")


@dataclass(frozen=True)
class Took:
    """Seconds until vectors are ready."""

    clock: float
    cpu: float

    @classmethod
    def by(cls, read: Callable[[], np.ndarray]) -> tuple[Took, np.ndarray]:
        """Time a reader."""
        clock, cpu = time.perf_counter(), time.process_time()
        vectors = read()
        return cls(time.perf_counter() - clock, time.process_time() - cpu), vectors

    def __str__(self) -> str:
        """Show both."""
        return f"{self.clock:.2f} s ({self.cpu:.2f} CPU-s)"

    def against(self, slow: Took, share: float = 1.0) -> str:
        """Return how many times as long `slow` took, for `share` times the rows."""
        return f"{slow.clock * share / self.clock:.0f} x ({slow.cpu * share / self.cpu:.0f} x in CPU-seconds)"


def theirs(folder: Path) -> tuple[Took, np.ndarray]:
    """Return the time until RecBole's vectors are ready, and the vectors by RecBole's item number."""
    from recbole.config import Config
    from recbole.data import create_dataset

    settings: dict[str, Any] = {
        "data_path": str(folder.parent),
        "dataset": folder.name,
        "additional_feat_suffix": ["itememb"],
        "load_col": {"inter": ["user_id", "item_id", "timestamp"], "itememb": ["iid", "item_emb"]},
        "alias_of_item_id": ["iid"],
        "preload_weight": {"iid": "item_emb"},
        "loss_type": "CE",
        "train_neg_sample_args": None,
    }
    config = Config(model="SASRec", dataset=folder.name, config_dict=settings)
    return Took.by(lambda: create_dataset(config).get_preload_weight("iid"))


def ours(folder: Path, tokens: list[str]) -> tuple[Took, np.ndarray]:
    """Return the time until our vectors are ready, and the vectors by RecBole's item number."""
    start = EmbeddingStart(folder=folder, column="fused")
    return Took.by(lambda: aligned_vectors(tokens, start, 0)[0].numpy())


def main() -> None:
    """Time both and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--large", type=int, default=100_000)
    chosen = parser.parse_args()
    compat.require_recbole()
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(temporary)
        with compat.cured(folder):
            vectors = as_bfloat16(random.normal(size=(chosen.rows, chosen.dim)))
            tokens = [f"i{number}" for number in range(chosen.rows)]
            write_text_files(folder / "text", vectors)
            write_embeddings(folder / "embeddings", tokens, vectors)
            slow, text = theirs(folder / "text")
            fast, table = ours(folder / "embeddings", tokens)
        known = text[np.abs(text).sum(1) > 0]
        print(f"{chosen.rows:,} × {chosen.dim}: text file {slow}, Parquet folder {fast}: {fast.against(slow)}")
        print(f"  vectors found: {len(known):,} and {int((np.abs(table[1:]).sum(1) > 0).sum()):,} of {chosen.rows:,}")
        del text, table, known
        tokens = [f"i{number}" for number in range(chosen.large)]
        write_embeddings(folder / "large", tokens, as_bfloat16(random.normal(size=(chosen.large, chosen.dim))))
        fast, _ = ours(folder / "large", tokens)
        share = chosen.large / chosen.rows
        print(
            f"{chosen.large:,} × {chosen.dim}: Parquet folder {fast}; the text file would take {share:g} times as long"
        )
        print(f"  as it took for {chosen.rows:,}: {fast.against(slow, share)}")


if __name__ == "__main__":
    main()

"""Vectors of titles by TF-IDF and a singular value decomposition: for `import-vectors`, and rows of a study.

python tests/benchmarks/title_vectors.py --data DATA [--dim 64] [--out titles.parquet]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import polars as pl
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer


def main() -> None:
    """Write a table of item ids and vectors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="dataset folder; without one, a few titles show that it works")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("titles.parquet"))
    chosen = parser.parse_args()
    if chosen.data is None:
        ids, titles = ["1", "2", "3"], ["red wooden chair", "blue wooden chair", "blue lamp"]
    else:
        items = pl.read_parquet(chosen.data / "items.parquet")
        ids, titles = items["item_id"].to_list(), items["title"].to_list()
    counts = TfidfVectorizer().fit_transform(titles)
    dim = min(chosen.dim, counts.shape[1] - 1)
    vectors = TruncatedSVD(dim, random_state=0).fit_transform(counts).astype(np.float32)
    print(f"{len(ids)} titles, {counts.shape[1]} words, vectors of length {dim}")
    if chosen.data is not None:
        columns = {"item_id": pl.String, "vector": pl.List(pl.Float32)}
        pl.DataFrame({"item_id": ids, "vector": vectors.tolist()}, schema=columns).write_parquet(chosen.out)


if __name__ == "__main__":
    main()

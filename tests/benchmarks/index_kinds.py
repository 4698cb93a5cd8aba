"""Index kinds side by side on drawn, clustered vectors: recall, query time, size, build time, and ratios to flat.

python tests/benchmarks/index_kinds.py [--rows 20000] [--dim 256] [--kinds flat hnsw ivf ...]

The last column holds the estimate printed before a build over the CPU time that build and check took together.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from embedding_folder import write_embeddings

from vlm2rec.downstream.index.index import build_index
from vlm2rec.downstream.index.plan import plan_index

KINDS = ("flat", "SQ8", "hnsw", "HNSW32", "ivf", "IVF256,Flat", "IVF256,SQ8", "PCA64,L2norm,Flat")


def draw(rows: int, dim: int, seed: int) -> np.ndarray:
    """Draw vectors around many centres, with a common offset such as the vectors of a language model have."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(max(1, rows // 50), dim)).astype(np.float32)
    offset = 2 * random.normal(size=dim).astype(np.float32)
    noise = 0.7 * random.normal(size=(rows, dim)).astype(np.float32)
    return centres[random.integers(0, len(centres), rows)] + noise + offset


def main() -> None:
    """Build every kind once and print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    threads = faiss.omp_get_max_threads()
    print(f"{chosen.rows:,} vectors of length {chosen.dim}, {threads} threads, faiss {faiss.__version__}")
    names = ("recall@10", "ms batch", "ms one", "x", "MB", "x", "build s", "check s", "est/cpu")
    print(f"{'kind':<40}" + "".join(f"{name:>10}" for name in names))
    with tempfile.TemporaryDirectory() as folder:
        embeddings = Path(folder) / "embeddings"
        vectors = draw(chosen.rows, chosen.dim, chosen.seed)
        write_embeddings(embeddings, [str(row) for row in range(chosen.rows)], vectors)
        flat = build_index(embeddings, Path(folder) / "index", kind="flat", seed=chosen.seed)
        for kind in chosen.kinds:
            plan = plan_index(embeddings, kind=kind)
            begun = time.process_time()
            meta = build_index(embeddings, Path(folder) / "index", kind=kind, seed=chosen.seed, plan=plan)
            spent = (time.process_time() - begun) / threads
            effort = "".join(f" {name}={value}" for name, value in meta["effort"].items())
            values = (
                f"{meta['recall@10']:.4f}",
                f"{meta['search_ms']:.3f}",
                f"{meta['search_ms_single']:.3f}",
                f"{flat['search_ms_single'] / meta['search_ms_single']:.1f}",
                f"{meta['bytes'] / 1e6:.1f}",
                f"{flat['bytes'] / meta['bytes']:.1f}",
                f"{meta['build_seconds']:.2f}",
                f"{meta['check_seconds']:.2f}",
                f"{plan.seconds / spent:.2f}",
            )
            print(f"{meta['factory'] + effort:<40}" + "".join(f"{value:>10}" for value in values))


if __name__ == "__main__":
    main()

"""Principal components of a table of vectors, in NumPy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vlm2rec.embedder.contract.errors import ConfigError

_ROWS_AT_ONCE = 16_384


@dataclass(frozen=True)
class PrincipalComponents:
    """The K directions in which centred vectors vary most."""

    directions: np.ndarray  # (K, d) float64, orthonormal rows, the largest variance first

    def project(self, vectors: np.ndarray) -> tuple[np.ndarray, float]:
        """Centre vectors on their own mean and project them.

        Projection is linear: if fused = text + image, that also holds for the projections on the same directions.

        Args:
            vectors: (N, d), finite.

        Returns:
            (N, K) float32, and the share of the vectors' variance that it keeps, from 0 to 1.
        """
        mean = vectors.mean(0, dtype=np.float64)
        reduced = np.empty((len(vectors), len(self.directions)), np.float32)
        total = kept = 0.0
        for start in range(0, len(vectors), _ROWS_AT_ONCE):
            centred = vectors[start : start + _ROWS_AT_ONCE] - mean
            block = centred @ self.directions.T  # (n, K)
            reduced[start : start + len(block)] = block
            total += float((centred**2).sum())
            kept += float((block**2).sum())
        return reduced, kept / total if total else 0.0


def principal_components(vectors: np.ndarray, count: int) -> PrincipalComponents:
    """Return the first `count` principal components of (N, d) finite vectors.

    They come from the SVD of the centred matrix, in float64. The largest entry of each direction is made positive, so
    the same vectors give the same signs on every machine.

    Raises:
        ConfigError: the vectors have fewer than `count` directions.
    """
    rows, dim = vectors.shape
    if count > min(rows - 1, dim):
        raise ConfigError(
            f"{count} principal components of {rows} vectors of {dim} dimensions",
            f"at most {max(0, min(rows - 1, dim))}: centred vectors have no more directions",
            "ask for fewer components",
        )
    _, lengths, directions = np.linalg.svd(_triangle(vectors), full_matrices=False)
    # the variance that float32 rounding alone gives to equal vectors
    rounding = np.finfo(np.float32).eps * float(np.linalg.norm(vectors.astype(np.float32, copy=False)))
    varying = int((lengths > rounding).sum())
    if count > varying:
        raise ConfigError(
            f"{count} principal components of vectors that vary in {varying} directions only",
            f"at most {varying}",
            "ask for fewer components",
        )
    directions = directions[:count]
    largest = directions[np.arange(count), np.abs(directions).argmax(1)]
    return PrincipalComponents(directions * np.sign(largest)[:, None])


def _triangle(vectors: np.ndarray) -> np.ndarray:
    """Return R of the QR decomposition of the centred vectors: it has the same singular values and right vectors.

    It is computed block by block, so memory holds one block and (d, d), whatever the number of rows.
    """
    mean = vectors.mean(0, dtype=np.float64)
    triangle = np.empty((0, vectors.shape[1]))
    for start in range(0, len(vectors), _ROWS_AT_ONCE):
        block = vectors[start : start + _ROWS_AT_ONCE] - mean
        triangle = np.asarray(np.linalg.qr(np.concatenate([triangle, block]), mode="r"))
    return triangle

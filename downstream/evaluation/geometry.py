"""Alignment, uniformity, separability (Eqs. 4-5 of the VLM2Rec paper) and rank of vectors. NumPy only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from vlm2rec.downstream.table import read_batches
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import DataError
from vlm2rec.embedder.contract.storage import Location


def geometry(users: np.ndarray, positives: np.ndarray, negatives: np.ndarray, eps: float = 1e-8) -> dict[str, float]:
    """Return A_pos, A_neg, U and S of one view; vectors are L2-normalised first, arithmetic is float64.

        A_pos = E ‖s - i+‖²              pull of the positives; smaller is tighter
        A_neg = E ‖s - i-‖²              push of the negatives; larger is wider
        U     = log E exp(-2 ‖s - i‖²)   uniformity; lower covers the sphere better, 0 is a single point
        S     = A_neg / (A_pos + ε)      separability; above 1 the positives are nearer than the negatives

    Squared distances lie between 0 and 4. A zero vector stays zero, at squared distance 1 from every other.

    P_u of Eq. 4, from which (s, i) is drawn uniformly, is here the set of every user with each of their negatives: the
    stored candidates are uniform draws from the catalogue without the few items of the user.

    Args:
        users: user (sequence) vectors s, (U, d).
        positives: vectors of the users' held-out items i+, (U, d).
        negatives: vectors of their negatives i-, (U, N, d), N at least 1.
        eps: ε of Eq. 5.

    Raises:
        DataError: the shapes do not fit, there is no user or no negative, or a vector is not finite.
    """
    users, positives, negatives = np.asarray(users), np.asarray(positives), np.asarray(negatives)
    if users.ndim != 2 or positives.shape != users.shape or negatives.shape[::2] != users.shape or negatives.ndim != 3:
        raise DataError(
            f"users are {users.shape}, positives {positives.shape}, negatives {negatives.shape}",
            "(U, d), (U, d) and (U, N, d)",
        )
    return _distances(users, negatives.shape[1], lambda part: (positives[part], negatives[part])).geometry(eps)


class Distances(NamedTuple):
    """Squared distances of users on the unit sphere; A_pos and A_neg are their means."""

    positive: np.ndarray  # (U,) to the held-out item
    negative: np.ndarray  # (U, N) to each negative

    def geometry(self, eps: float = 1e-8) -> dict[str, float]:
        """Return what `geometry` returns."""
        pull, push = float(self.positive.mean()), float(self.negative.mean())
        return {"A_pos": pull, "A_neg": push, "U": _log_mean_exp(-2 * self.negative), "S": push / (pull + eps)}

    def of_users(self) -> dict[str, np.ndarray]:
        """Return `A_pos` and `A_neg` of each user, (U,) each: resampled users give S its interval."""
        return {"A_pos": self.positive, "A_neg": self.negative.mean(axis=1)}


def geometry_from_rows(
    users: np.ndarray, items: np.ndarray, positives: np.ndarray, negatives: np.ndarray, eps: float = 1e-8
) -> dict[str, float]:
    """Return `geometry(users, items[positives], items[negatives])` without holding the (U, N, d) negatives.

    The arguments are those of `distances_from_rows`, and ε of Eq. 5.
    """
    return distances_from_rows(users, items, positives, negatives).geometry(eps)


def distances_from_rows(
    users: np.ndarray, items: np.ndarray, positives: np.ndarray, negatives: np.ndarray
) -> Distances:
    """Return the squared distances of every user to the positive and to each negative.

    Args:
        users: user vectors, (U, d).
        items: item vectors, (I, d).
        positives: the row in `items` of each user's held-out item, (U,).
        negatives: the rows of their negatives, (U, N).

    Raises:
        DataError: as in `geometry`.
    """
    users, items, positives, negatives = (np.asarray(x) for x in (users, items, positives, negatives))
    fits = users.ndim == items.ndim == negatives.ndim == 2 and users.shape[1] == items.shape[1]
    if not fits or positives.shape != users.shape[:1] or len(negatives) != len(users):
        raise DataError(
            f"users are {users.shape}, items {items.shape}, rows {positives.shape} and {negatives.shape}",
            "(U, d), (I, d), (U,) and (U, N)",
        )
    return _distances(users, negatives.shape[1], lambda part: (items[positives[part]], items[negatives[part]]))


def dispersion(users: np.ndarray, items: np.ndarray, most: int = 2048) -> dict[str, float]:
    """Return how widely users and items spread each for themselves, and how far their means lie apart.

        U_users = log E exp(-2 ‖s - s'‖²)     over pairs of different users
        U_items = log E exp(-2 ‖i - i'‖²)     over pairs of different items
        offset  = ‖E s - E i‖²                squared distance of the mean user from the mean item

    U of `geometry` is over pairs of a user and an item, as Eq. 4 says. The paper's printed U does not follow from it:
    these are the other pairs that it may have been measured on. The offset is the part of A_neg that comes from users
    and items lying in two cones: E ‖s - i‖² = spread of the users + spread of the items + offset.

    Vectors are L2-normalised first; arithmetic is float64.

    Args:
        users: user (sequence) vectors, (U, d).
        items: item vectors, (I, d).
        most: of more users or items, this many at even distances are taken for U_users and U_items.

    Raises:
        DataError: the shapes do not fit, or a vector is not finite.
    """
    users, items = np.asarray(users), np.asarray(items)
    if users.ndim != 2 or items.ndim != 2 or users.shape[1] != items.shape[1] or not len(users) or not len(items):
        raise DataError(f"users are {users.shape}, items {items.shape}", "(U, d) and (I, d), at least one of both")
    offset = _mean_of_units(users) - _mean_of_units(items)
    if not np.isfinite(offset).all():
        raise DataError("a vector is not finite", "finite vectors", "leave out items without a vector")
    return {
        "U_users": _uniformity(users, most),
        "U_items": _uniformity(items, most),
        "offset": float(offset @ offset),
    }


def effective_rank(vectors: np.ndarray) -> float:
    """Return how many directions vectors vary in: exp of the entropy of their principal components' shares of variance.

        p_k = λ_k / Σ λ,   rank = exp(-Σ p_k log p_k)      λ: eigenvalues of the covariance of the unit vectors

    This is the effective rank of Roy and Vetterli (EUSIPCO 2007) of the covariance matrix. Vectors are L2-normalised
    and centred first, so that their common direction does not count. The rank says how evenly the vectors
    spread over directions; U of `geometry` says how widely. It is between 1 (all on a line) and min(n - 1, d), and 0
    if all vectors are the same but for rounding.

    Args:
        vectors: n vectors, (n, d).

    Raises:
        DataError: `vectors` is not (n, d), is empty, or holds a value that is not finite.
    """
    vectors = np.asarray(vectors, np.float64)
    if vectors.ndim != 2 or not vectors.size or not np.isfinite(vectors).all():
        raise DataError(f"vectors have shape {vectors.shape}, or one is not finite", "(n, d) finite vectors")
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = vectors / np.where(length > 0, length, 1)
    variance = np.linalg.svd(rows - rows.mean(axis=0), compute_uv=False) ** 2
    if variance.sum() <= _ROUNDING**2 * len(rows):
        return 0.0
    share = variance / variance.sum()
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum()))


def first_vectors(folder: Location, sample: int = 512) -> dict[str, np.ndarray]:
    """Return, per view of a finished folder of items or users, its first `sample` vectors, (n, d) float32.

    Raises:
        ArtifactError: no manifest, or a shard is damaged.
    """
    manifest = schema.read_manifest(folder, table=None)
    return {view: _first_of(folder, view, sample, schema.table_of(manifest)) for view in manifest["views"]}


def effective_ranks(vectors: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return the effective rank of each view's vectors, (n, d); views with fewer than 16 vectors are left out."""
    return {view: effective_rank(own) for view, own in vectors.items() if len(own) >= 16}


def median_lengths(vectors: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return the median ‖·‖ of each view's vectors, (n, d); views without any are left out."""
    return {view: float(np.median(np.linalg.norm(own, axis=1))) for view, own in vectors.items() if len(own)}


def _first_of(folder: Location, view: str, count: int, table: str) -> np.ndarray:
    blocks: list[np.ndarray] = []
    for _, vectors, present in read_batches(folder, view, count, table):
        blocks.append(vectors[present])
        if sum(map(len, blocks)) >= count:
            break
    return np.concatenate(blocks)[:count] if blocks else np.empty((0, 0), np.float32)


_BLOCK = 2**22  # float64 numbers of a gathered block: 32 MB
_ROUNDING = 1e-3  # bfloat16 alone moves unit vectors this far


def _distances(users: np.ndarray, width: int, items_of: Callable[[slice], tuple[np.ndarray, np.ndarray]]) -> Distances:
    """Go through the users in blocks; `items_of` returns a block's positives (n, d) and negatives (n, width, d)."""
    if len(users) == 0 or width == 0:
        raise DataError(f"{len(users)} users with {width} negatives each", "at least one of both")
    positive = np.empty(len(users))
    negative = np.empty((len(users), width))
    block = max(1, _BLOCK // max(1, width * users.shape[1]))
    for start in range(0, len(users), block):
        part = slice(start, start + block)
        near, far = items_of(part)
        positive[part] = _squared_distance(users[part], near)
        negative[part] = _squared_distance(users[part, None], far)
    if not (np.isfinite(positive).all() and np.isfinite(negative).all()):
        raise DataError("a vector is not finite", "finite vectors", "leave out items without a vector")
    return Distances(positive, negative)


def _uniformity(vectors: np.ndarray, most: int) -> float:
    """Return U over all pairs of different vectors, or over pairs of `most` of them; 0 for a single one."""
    rows = _unit(vectors[np.linspace(0, len(vectors) - 1, min(most, len(vectors))).round().astype(np.int64)])
    if len(rows) < 2:
        return 0.0
    squares = _dot(rows, rows)
    total = 0.0
    block = max(1, _BLOCK // len(rows))
    for start in range(0, len(rows), block):
        part = rows[start : start + block]
        distances = np.maximum(_dot(part, part)[:, None] + squares[None] - 2 * part @ rows.T, 0.0)
        near = np.exp(-2 * distances)
        near[np.arange(len(part)), start + np.arange(len(part))] = 0.0  # a vector is no pair with itself
        total += float(near.sum())
    return float(np.log(total / (len(rows) * (len(rows) - 1))))


def _mean_of_units(vectors: np.ndarray) -> np.ndarray:
    block = max(1, _BLOCK // vectors.shape[1])
    total = sum(_unit(vectors[start : start + block]).sum(axis=0) for start in range(0, len(vectors), block))
    return np.asarray(total / len(vectors))


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Return float64 unit vectors; a zero vector stays zero."""
    vectors = vectors.astype(np.float64)
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(length > 0, length, 1))


def _squared_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return ‖a/‖a‖ - b/‖b‖‖² over the last axis, with 0/‖0‖ = 0."""
    # in float64 the cancellation of 2 - 2·cos leaves 1e-16, far below any collapsed space of float32 vectors
    a, b = a.astype(np.float64), b.astype(np.float64)
    squares = _dot(a, a), _dot(b, b)
    length = np.sqrt(squares[0]) * np.sqrt(squares[1])
    cosine = _dot(a, b) / np.where(length > 0, length, 1)
    return np.maximum(np.add(squares[0] > 0, squares[1] > 0, dtype=np.float64) - 2 * cosine, 0.0)


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("...d,...d->...", a, b)


def _log_mean_exp(values: np.ndarray) -> float:
    top = values.max()
    return float(top + np.log(np.mean(np.exp(values - top))))

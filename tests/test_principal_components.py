"""Principal components: the textbook answer, the same signs everywhere, and no more of them than there are."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.decomposition import PCA

from vlm2rec.downstream import principal_components as module
from vlm2rec.downstream.principal_components import principal_components
from vlm2rec.embedder.contract.errors import ConfigError


def stretched(rows: int = 60, dim: int = 9, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    drawn = generator.normal(size=(rows, dim)) * np.arange(1, dim + 1) + 7.0
    return (drawn @ np.linalg.qr(generator.normal(size=(dim, dim)))[0]).astype(np.float32)


def test_a_line_in_the_plane_has_the_components_one_works_out_by_hand() -> None:
    points = np.array([[1, 1], [2, 2], [3, 3], [2, 2]], np.float32)
    reduced, kept = principal_components(points, 1).project(points)
    np.testing.assert_allclose(reduced[:, 0], [-(2**0.5), 0, 2**0.5, 0], atol=1e-6)
    assert kept == pytest.approx(1.0)


@pytest.mark.parametrize("rows", [60, 6])
def test_components_are_scikit_learns_up_to_the_sign(rows: int) -> None:
    vectors = stretched(rows)
    theirs = PCA(3, svd_solver="full").fit(vectors.astype(np.float64))
    ours = principal_components(vectors, 3)
    reduced, kept = ours.project(vectors)
    np.testing.assert_allclose(np.abs(ours.directions), np.abs(theirs.components_), atol=1e-6)
    np.testing.assert_allclose(np.abs(reduced), np.abs(theirs.transform(vectors)), atol=1e-4)
    assert kept == pytest.approx(theirs.explained_variance_ratio_.sum(), abs=1e-6)


def test_the_sign_is_fixed_by_the_largest_entry() -> None:
    directions = principal_components(stretched(), 4).directions
    assert (directions[np.arange(4), np.abs(directions).argmax(1)] > 0).all()
    np.testing.assert_allclose(principal_components(-stretched(), 4).directions, directions, atol=1e-6)


def test_blocks_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = principal_components(stretched(), 5).project(stretched())
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 7)
    blocks = principal_components(stretched(), 5).project(stretched())
    np.testing.assert_allclose(blocks[0], whole[0], atol=1e-5)
    assert blocks[1] == pytest.approx(whole[1])


def test_text_plus_image_is_still_fused_after_the_projection() -> None:
    text, image = stretched(seed=1), stretched(seed=2)
    components = principal_components(text + image, 4)
    fused, parts = components.project(text + image)[0], [components.project(view)[0] for view in (text, image)]
    np.testing.assert_allclose(fused, parts[0] + parts[1], atol=1e-4)


@pytest.mark.parametrize(
    ("vectors", "count", "message"),
    [
        (stretched(60, 9), 10, "at most 9"),
        (stretched(6, 9), 6, "at most 5"),
        (np.outer(np.arange(6), [1.0, 2.0, 3.0]).astype(np.float32), 2, "vary in 1 directions only"),
        (np.full((6, 3), 0.1, np.float32), 1, "vary in 0 directions only"),
    ],
)
def test_more_components_than_there_are_is_an_error(vectors: np.ndarray, count: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        principal_components(vectors, count)

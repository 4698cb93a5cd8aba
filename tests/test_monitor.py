"""The rules that call a view collapsed, on probe rows written by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from vlm2rec.embedder.training.monitor import Collapse, Probe, collapses


def rows(step: int = 10, **columns: Sequence[float]) -> list[dict[str, float]]:
    """Return probe rows `step` training steps apart from their columns."""
    count = len(next(iter(columns.values())))
    return [{"step": step * place, **{key: values[place] for key, values in columns.items()}} for place in range(count)]


def noticed(found: list[Collapse]) -> list[tuple[int, str, str, int | None]]:
    return [(collapse.step, collapse.view, collapse.rule, collapse.until) for collapse in found]


def test_the_weaker_side_is_called_behind_after_three_probes_at_or_below_its_start_while_the_other_rises() -> None:
    found = collapses(rows(S_text=[1.1, 1.2, 1.2, 1.3, 1.4], S_image=[1.05, 1.05, 1.04, 1.03, 1.02]))
    assert noticed(found) == [(30, "image", "behind", None)]
    for number in ("1.030", "1.050", "1.100", "1.300", "3 probes", "step 0"):
        assert number in found[0].message


@pytest.mark.parametrize(
    "image", [[1.05, 1.05, 1.04, 1.06, 1.02], [1.05, 1.06, 1.07, 1.08, 1.09], [1.05, 1.04, 1.04, 1.06, 1.04]]
)
def test_a_dip_shorter_than_three_probes_is_noise(image: list[float]) -> None:
    assert collapses(rows(S_text=[1.1, 1.2, 1.2, 1.3, 1.4], S_image=image)) == []


def test_when_the_other_side_has_not_gained_two_percent_nobody_is_behind() -> None:
    assert collapses(rows(S_text=[1.0, 1.02, 1.019, 1.01, 1.02], S_image=[1.05] + [1.0] * 4)) == []
    assert collapses(rows(S_text=[1.0] + [1.021] * 3, S_image=[1.05] + [1.0] * 3)) != []


def test_text_can_be_the_side_that_falls_behind() -> None:
    found = collapses(rows(S_image=[1.1, 1.2, 1.2, 1.3], S_text=[1.05, 1.0, 1.0, 1.0]))
    assert noticed(found) == [(30, "text", "behind", None)]


def test_a_collapse_that_ends_says_when_and_a_second_one_is_told_again() -> None:
    image = [1.05, 1.0, 1.0, 1.0, 1.2, 1.0, 1.0, 1.0, 1.0]
    found = collapses(rows(S_text=[1.0] + [1.2] * 8, S_image=image))
    assert noticed(found) == [(30, "image", "behind", 40), (70, "image", "behind", None)]


def test_a_rank_below_half_its_start_is_flat_and_a_spread_below_a_quarter_is_narrow() -> None:
    found = collapses(
        rows(
            S_text=[1.0] * 5,
            rank_text=[30, 14.9, 14.0, 13.0, 16.0],
            A_neg_text=[1.2, 0.31, 0.29, 0.2, 0.1],
        )
    )
    assert noticed(found) == [(30, "text", "flat", 40), (40, "text", "narrow", None)]
    assert "13.0, 30.0 at step 0, below 50%" in found[0].message
    assert "0.1, 1.2 at step 0, below 25%" in found[1].message


def test_a_point_is_narrow_although_its_ratio_looks_well() -> None:
    # as measured with far too large a λ: every vector the same, S above 1
    found = collapses(rows(S_image=[1.15, 1.2, 1.15, 1.14], A_neg_image=[1.2, 0.01, 0.002, 0.001]))
    assert noticed(found) == [(30, "image", "narrow", None)]


def test_nobody_is_behind_in_a_space_that_is_a_point() -> None:
    ratios = {"S_text": [1.0, 0.9, 0.9, 0.9], "S_image": [1.0, 1.1, 1.1, 1.1]}
    assert noticed(collapses(rows(**ratios, A_neg_image=[1.2] * 4))) == [(30, "text", "behind", None)]
    assert noticed(collapses(rows(**ratios, A_neg_image=[1.2, 0.1, 0.1, 0.1]))) == [(30, "image", "narrow", None)]


def test_fused_is_judged_only_where_there_is_nothing_else() -> None:
    flat = [30.0, 5.0, 5.0, 5.0]
    alone = collapses(rows(S_fused=[1.0] * 4, rank_fused=flat))
    assert noticed(alone) == [(30, "fused", "flat", None)]
    assert collapses(rows(S_fused=[1.0] * 4, rank_fused=flat, S_text=[1.0] * 4, rank_text=[9.0] * 4)) == []


def test_a_row_without_a_view_breaks_the_stretch_and_no_rows_are_fine() -> None:
    probes = rows(S_text=[1.0] * 6, rank_text=[30, 5, 5, 5, 5, 5])
    del probes[3]["rank_text"]
    assert collapses(probes) == []
    assert collapses([]) == []


def test_a_probe_comes_twenty_times_a_run_and_not_more_often_than_every_ten_steps() -> None:
    assert [Probe(8, dict).interval(total) for total in (5, 200, 400, 8400)] == [10, 10, 20, 420]
    assert Probe(8, dict, steps=3).interval(8400) == 3

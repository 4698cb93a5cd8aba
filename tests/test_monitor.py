"""The rules that call a view collapsed, on probe rows written by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from vlm2rec.embedder.training.monitor import Collapse, Probe, by_step, collapses, starved


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
    flat = [30.0, 9.0, 9.0, 9.0]
    alone = collapses(rows(S_fused=[1.0] * 4, rank_fused=flat))
    assert noticed(alone) == [(30, "fused", "flat", None)]
    assert collapses(rows(S_fused=[1.0] * 4, rank_fused=flat, S_text=[1.0] * 4, rank_text=[9.0] * 4)) == []


def test_a_row_without_a_view_breaks_the_stretch_and_no_rows_are_fine() -> None:
    probes = rows(S_text=[1.0] * 6, rank_text=[30, 9, 9, 9, 9, 9])
    del probes[3]["rank_text"]
    assert collapses(probes) == []
    assert collapses([]) == []


def test_a_probe_comes_twenty_times_a_run_and_not_more_often_than_every_ten_steps() -> None:
    assert [Probe(8, dict).interval(total) for total in (5, 200, 400, 8400)] == [10, 10, 20, 420]
    assert Probe(8, dict, steps=3).interval(8400) == 3


# --- at once, and from the training curve -----------------------------------------------------------------------------
def test_a_steep_fall_of_the_rank_is_told_at_the_first_look() -> None:
    # text-driven training of a pretrained language model: the rank fell from 19 to 2.2 within three looks
    found = collapses(rows(30, S_text=[1.05, 1.5, 1.77], rank_text=[19.0, 4.0, 2.2]))
    assert noticed(found) == [(30, "text", "flat", None)]
    assert "4.0, 19.0 at step 0, below 25% of it" in found[0].message and "probes" not in found[0].message


def test_a_steep_fall_that_goes_on_is_told_once_and_says_when_it_ended() -> None:
    found = collapses(rows(rank_text=[20, 4, 4, 4, 4, 15, 9, 9, 9], S_text=[1.0] * 9))
    assert noticed(found) == [(10, "text", "flat", 50), (80, "text", "flat", None)]


def test_a_margin_that_stands_still_while_the_other_grows_is_starved() -> None:
    # the margins of the same training, every ten steps
    found = starved(rows(margin_text=[0.007, 0.05, 0.09, 0.12, 0.15, 0.172], margin_image=[-0.002] * 6))
    assert noticed(found) == [(40, "image", "starved", None)]
    for number in ("0.007", "0.150", "-0.002", "step 0"):
        assert number in found[0].message


@pytest.mark.parametrize(
    ("text", "image"),
    [
        ([0.01, 0.05, 0.10, 0.15, 0.20], [0.00, 0.02, 0.04, 0.06, 0.08]),  # both learn, one more slowly
        ([0.01, 0.02, 0.03, 0.04, 0.05], [0.00, 0.00, 0.00, 0.00, 0.00]),  # nobody has gained much yet
        ([0.01, 0.10, 0.02, 0.10, 0.02], [0.00, 0.00, 0.00, 0.00, 0.00]),  # comes and goes
    ],
)
def test_margins_that_grow_together_or_hardly_are_fine(text: list[float], image: list[float]) -> None:
    assert starved(rows(margin_text=text, margin_image=image)) == []


def test_text_can_be_starved_and_can_recover() -> None:
    text = [0.0, 0.0, 0.0, 0.0, 0.0, 0.06]
    found = starved(rows(margin_image=[0.0, 0.1, 0.1, 0.1, 0.1, 0.1], margin_text=text))
    assert noticed(found) == [(30, "text", "starved", 50)]


def test_a_curve_without_two_margins_starves_nobody() -> None:
    assert starved(rows(loss=[2.0, 1.0, 0.5, 0.2, 0.1])) == [] and starved([]) == []
    mixed = [*rows(loss=[2.0]), *rows(margin_text=[0.0, 0.1, 0.1, 0.1], margin_image=[0.0] * 4)]
    assert noticed(starved(mixed)) == [(30, "image", "starved", None)]


def test_reports_of_probes_and_of_the_curve_stand_in_one_order() -> None:
    early, late = Collapse(10, "text", "flat", ""), Collapse(40, "image", "starved", "")
    assert by_step([late], [early]) == [early, late]

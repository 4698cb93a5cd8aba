"""Gates and verdicts over constructed studies: they hold, fail, stay open or are not testable, as the numbers say."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from study_tables import changed, write_study

from vlm2rec.downstream.evaluation.statistics import bootstrap_p, paired_t_test, resampled_means
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError
from vlm2rec.pipelines.config import ReportConfig
from vlm2rec.pipelines.experiments import results as collected
from vlm2rec.pipelines.report import run
from vlm2rec.pipelines.reporting import figures, page
from vlm2rec.pipelines.reporting.gates import FAILED, PASSED, UNMEASURED, Gate
from vlm2rec.pipelines.reporting.tables import Results
from vlm2rec.pipelines.reporting.verdicts import (
    CURE,
    FAILS,
    HOLDS,
    OPEN,
    PARADOX,
    UNTESTABLE,
    Claim,
    Verdicts,
    rise_and_fall,
    verdicts,
)

USERS, SEEDS = 300, (0, 1, 2)
ROLES = {
    "Untrained": "vanilla",
    "Plain": "sft",
    "Steady": "constant_w",
    "Words": "text_only",
    "Pictures": "image_only",
    "Ours": None,
}
# N@20 by pair, S by view; the weak view is the image
SHOWS_BOTH: dict[str, dict[str, float]] = {
    "Untrained": {"f2f": 0.12, "t2f": 0.12, "v2f": 0.10, "t2t": 0.13, "v2v": 0.08, "S text": 1.05, "S image": 1.010},
    "Plain": {"f2f": 0.20, "t2f": 0.23, "v2f": 0.07, "t2t": 0.23, "v2v": 0.08, "S text": 1.70, "S image": 1.000},
    "Steady": {"f2f": 0.21, "t2f": 0.23, "v2f": 0.08, "t2t": 0.23, "v2v": 0.08, "S text": 1.60, "S image": 1.001},
    "Ours": {"f2f": 0.30, "t2f": 0.25, "v2f": 0.20, "t2t": 0.25, "v2v": 0.18, "S text": 1.50, "S image": 1.080},
    "Words": {"f2f": 0.23, "t2t": 0.23, "S text": 1.8, "S fused": 1.8},
    "Pictures": {"f2f": 0.15, "v2v": 0.15, "S image": 1.2, "S fused": 1.2},
}
PROBE = {
    "column": "looks",
    "labels": 9,
    "held_out": 500,
    "accuracy": 0.61,
    "commonest": 0.14,
    "gain": 0.47,
    "low": 0.42,
    "high": 0.51,
}
_SWAP = {"t2f": "v2f", "v2f": "t2f", "t2t": "v2v", "v2v": "t2t", "S text": "S image", "S image": "S text"}


@dataclass(frozen=True)
class World:
    """What a study found, before noise."""

    levels: Mapping[str, Mapping[str, float]] = field(default_factory=lambda: SHOWS_BOTH)
    roles: Mapping[str, str | None] = field(default_factory=lambda: ROLES)
    loss: float = 0.2  # of the single strong view
    looks: Mapping[str, Any] | None = field(default_factory=lambda: PROBE)
    cosine: tuple[float, float, float] = (0.1, 0.4, 0.15)  # with the weak view's gradient: first, peak, last
    seeds: tuple[int, ...] = SEEDS
    swapped: bool = False  # text is the weak view
    fixed_batch: bool = True

    def but(self, method: str, **values: float) -> World:
        """This world with other numbers of a method; `S_image` stands for `S image`."""
        changes = {key.replace("_", " "): value for key, value in values.items()}
        return replace(self, levels={**self.levels, method: {**self.levels[method], **changes}})

    def study(self) -> Results:
        """The tables of such a study."""
        swap = _SWAP if self.swapped else {}
        names = {"Words": "Pictures", "Pictures": "Words"} if self.swapped else {}
        levels = {
            names.get(method, method): {swap.get(key, key): value for key, value in values.items()}
            for method, values in self.levels.items()
        }
        rows = {
            "results": _result_rows(levels, self.seeds),
            "geometry": _geometry_rows(levels, self.seeds),
            "curves": self._curves(),
            "methods": (
                {"name": name, "slug": name, "source": "finetune", "analyses": ["main"], "role": self.roles[name]}
                for name in levels
            ),
        }
        frames = {name: collected._frame(name, rows.get(name, ())) for name in collected._TABLES if name != "views"}
        views = pl.concat(
            _views(method, values, self.seeds, number) for number, (method, values) in enumerate(levels.items())
        )
        facts = {"dataset": "Drawn", "reference": "Ours", "looks": self.looks}
        return Results(Path("study"), frames | {"views": views}, facts)

    def _curves(self) -> Iterator[dict[str, Any]]:
        strong, weak = ("image", "text") if self.swapped else ("text", "image")
        alone = "Pictures" if self.swapped else "Words"
        random = np.random.default_rng(5)
        for seed in self.seeds:
            for step in range(10, 301, 10):
                key = {"seed": seed, "step": step}
                value = self.loss + 2 * np.exp(-step / 40)
                yield key | {"method": alone, "kind": "train", "name": "loss", "value": value}
                cosine = np.interp(step, (10, 150, 300), self.cosine) + 0.01 * random.standard_normal()
                values = {f"cos_total_{weak}": cosine, f"cos_total_{strong}": 0.8}
                values |= {schema.FIXED_BATCH if self.fixed_batch else "batch_users": 8.0}
                for name, found in values.items():
                    yield key | {"method": "Plain", "kind": "gradients", "name": name, "value": found}


def _result_rows(levels: Mapping[str, Mapping[str, float]], seeds: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    for method, values in levels.items():
        for seed in seeds:
            for pair in (key for key in values if not key.startswith("S ")):
                key = {"method": method, "seed": seed, "dataset": "Drawn", "task": 1, "protocol": "candidates"}
                yield key | {"view": pair, "user_group": "all", "metric": "N@20", "value": values[pair], "users": USERS}


def _geometry_rows(levels: Mapping[str, Mapping[str, float]], seeds: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    for method, values in levels.items():
        for seed in seeds:
            for name in (key for key in values if key.startswith("S ")):
                numbers = {"A_pos": 0.5, "A_neg": 0.5 * values[name], "U": -1.0, "S": values[name]}
                yield {"method": method, "seed": seed, "dataset": "Drawn", "view": name.removeprefix("S "), **numbers}


def _views(method: str, values: Mapping[str, float], seeds: tuple[int, ...], number: int) -> pl.DataFrame:
    """Users differ much, and methods on the same user little, as in a real study."""
    users = np.random.default_rng(0)
    base = {name: users.standard_normal(USERS) for name in ("rank", "near")}
    frames = []
    for seed in seeds:
        noise = np.random.default_rng([seed, number])
        columns: dict[str, np.ndarray] = {}
        for name, level in values.items():
            own = noise.standard_normal(USERS)
            if name.startswith("S "):
                view = name.removeprefix("S ")
                columns[f"A_pos_{view}"] = 0.5 + 0.1 * base["near"]
                columns[f"A_neg_{view}"] = level * columns[f"A_pos_{view}"] + 0.004 * (own - own.mean())
            else:
                columns[name] = level + 0.1 * (base["rank"] - base["rank"].mean()) + 0.1 * (own - own.mean())
        frame = pl.DataFrame({"user_id": [f"u{user:04}" for user in range(USERS)], **columns})
        frame = frame.with_columns(method=pl.lit(method), seed=pl.lit(seed, pl.Int32))
        wanted = collected._TABLES["views"]
        frame = frame.with_columns(pl.lit(None, kind).alias(n) for n, kind in wanted.items() if n not in frame.columns)
        frames.append(frame.select(list(wanted)))
    return pl.concat(frames)


def gate(found: Verdicts, key: str) -> Gate:
    return next(each for each in found.gates if each.key == key)


def parts(found: Verdicts, family: str) -> dict[str, Claim]:
    return {claim.key: claim for claim in found.of(family)[1:]}


def sums(found: Verdicts) -> tuple[str, str]:
    return found.of(PARADOX)[0].verdict, found.of(CURE)[0].verdict


BOTH = World()


# --- whole studies ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("swapped", [False, True])
def test_a_study_that_shows_the_paradox_and_the_cure(swapped: bool) -> None:
    found = verdicts(replace(BOTH, swapped=swapped).study())
    assert found.views is not None
    assert (found.views.weak, found.views.strong) == (("text", "image") if swapped else ("image", "text"))
    # the probe of the images is about the image as the weak view
    keys = ["imbalance", "narrow", *([] if swapped else ["looks"]), "learnable", "shortcut"]
    assert [each.key for each in found.gates] == keys
    assert {each.status for each in found.gates} == {PASSED}
    assert sums(found) == (HOLDS, HOLDS)
    w2w = "t2t" if swapped else "v2v"
    assert set(parts(found, PARADOX)) == {"weak_separates", "weak_to_fused", "strong_above_fused", "gradients"}
    assert set(parts(found, CURE)) == {
        *("f2f_above_sft", f"{w2w}_above_sft", "f2f_above_constant_w", f"{w2w}_above_constant_w"),
        *("f2f_above_t2t", "f2f_above_v2v", "weak_separates"),
    }
    for claim in found.claims:
        if claim.measured:
            assert claim.measured.users == USERS and claim.measured.seeds == len(SEEDS)


def test_a_study_that_shows_neither() -> None:
    world = BOTH.but("Plain", f2f=0.26, t2f=0.2, v2f=0.2, v2v=0.2, S_image=1.1)
    world = world.but("Ours", f2f=0.22, t2f=0.2, v2f=0.15, v2v=0.1, S_image=1.005, t2t=0.28)
    found = verdicts(replace(world, cosine=(0.4, 0.25, 0.1)).study())
    assert {each.status for each in found.gates} == {PASSED}
    assert sums(found) == (FAILS, FAILS)
    assert {claim.verdict for claim in parts(found, PARADOX).values()} == {FAILS}
    cure = {key: claim.verdict for key, claim in parts(found, CURE).items()}
    assert cure.pop("f2f_above_constant_w") in (OPEN, HOLDS)
    assert cure.pop("v2v_above_constant_w") in (OPEN, HOLDS) and cure.pop("f2f_above_v2v") == HOLDS
    assert set(cure.values()) == {FAILS}


@pytest.mark.parametrize(
    ("world", "key", "status"),
    [
        (BOTH.but("Untrained", S_image=1.06, S_text=1.2), "narrow", FAILED),
        (BOTH.but("Untrained", S_image=0.97), "narrow", FAILED),
        (BOTH.but("Untrained", S_image=1.0200, S_text=1.0201), "imbalance", FAILED),
        (replace(BOTH, looks={**PROBE, "low": -0.01}), "looks", FAILED),
        (replace(BOTH, looks=None), "looks", UNMEASURED),
        (replace(BOTH, looks={"column": "looks", "reason": "one label"}), "looks", UNMEASURED),
        (BOTH.but("Pictures", v2v=0.08), "learnable", FAILED),
        (BOTH.but("Pictures", v2v=0.02), "learnable", FAILED),
        (replace(BOTH, roles={**ROLES, "Pictures": None}), "learnable", UNMEASURED),
        (replace(BOTH, loss=0.9), "shortcut", FAILED),
        (replace(BOTH, roles={**ROLES, "Words": None}), "shortcut", UNMEASURED),
    ],
)
def test_a_gate_that_is_not_passed_leaves_nothing_to_test(world: World, key: str, status: str) -> None:
    found = verdicts(world.study())
    assert gate(found, key).status == status
    assert all(each.status == PASSED for each in found.gates if each.key != key)
    assert sums(found) == (UNTESTABLE, UNTESTABLE)
    for family in (PARADOX, CURE):
        assert gate(found, key).text in found.of(family)[0].found
        for claim in parts(found, family).values():
            assert claim.verdict == UNTESTABLE
            assert claim.key == "gradients" or "users" in claim.found, "the numbers are shown all the same"


def test_without_the_untrained_backbone_nothing_is_testable() -> None:
    study = replace(BOTH, roles={**ROLES, "Untrained": None}).study()
    found = verdicts(study)
    assert found.views is None and [each.status for each in found.gates] == [UNMEASURED]
    assert sums(found) == (UNTESTABLE, UNTESTABLE)


def test_a_study_of_other_methods_has_neither_gates_nor_verdicts() -> None:
    found = verdicts(replace(BOTH, levels={name: SHOWS_BOTH[name] for name in ("Steady", "Ours")}).study())
    assert found.gates == found.of(PARADOX) == found.of(CURE) == []


def test_without_gates_the_control_by_shuffled_images_stays() -> None:
    levels = {"Ours": SHOWS_BOTH["Ours"], "Dealt": {**SHOWS_BOTH["Ours"], "f2f": 0.2}}
    found = verdicts(replace(BOTH, levels=levels, roles={"Ours": None, "Dealt": "shuffled"}).study())
    assert found.gates == []
    assert next(claim for claim in found.claims if claim.key == "f2f_above_shuffled").verdict == HOLDS


# --- single parts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world", "family", "key", "verdict"),
    [
        (BOTH.but("Plain", S_image=1.05), PARADOX, "weak_separates", FAILS),
        (BOTH.but("Plain", S_image=1.0101), PARADOX, "weak_separates", OPEN),
        (BOTH.but("Plain", v2f=0.2), PARADOX, "weak_to_fused", FAILS),
        (BOTH.but("Plain", v2f=0.1005), PARADOX, "weak_to_fused", OPEN),
        (BOTH.but("Plain", t2f=0.1), PARADOX, "strong_above_fused", FAILS),
        (BOTH.but("Plain", t2f=0.2005), PARADOX, "strong_above_fused", OPEN),
        (replace(BOTH, cosine=(0.1, 0.2, 0.4)), PARADOX, "gradients", FAILS),  # it only rises
        (replace(BOTH, cosine=(0.4, 0.3, 0.1)), PARADOX, "gradients", FAILS),  # it only falls
        (replace(BOTH, cosine=(0.4, 0.1, 0.4)), PARADOX, "gradients", FAILS),  # a valley
        (BOTH.but("Plain", f2f=0.35), CURE, "f2f_above_sft", FAILS),
        (BOTH.but("Plain", f2f=0.2995), CURE, "f2f_above_sft", OPEN),
        (BOTH.but("Steady", f2f=0.35), CURE, "f2f_above_constant_w", FAILS),
        (BOTH.but("Steady", v2v=0.1795), CURE, "v2v_above_constant_w", OPEN),
        (BOTH.but("Ours", t2t=0.33), CURE, "f2f_above_t2t", FAILS),
        (BOTH.but("Ours", S_image=0.99), CURE, "weak_separates", FAILS),
    ],
)
def test_one_part_decides(world: World, family: str, key: str, verdict: str) -> None:
    found = verdicts(world.study())
    assert {each.status for each in found.gates} == {PASSED}
    assert parts(found, family)[key].verdict == verdict
    assert {claim.verdict for name, claim in parts(found, family).items() if name != key} == {HOLDS}
    assert found.of(family)[0].verdict == verdict
    assert parts(found, family)[key].text in found.of(family)[0].found


def test_the_cure_is_not_testable_without_its_rival_and_a_tuned_temperature_counts_if_it_is_there() -> None:
    found = verdicts(replace(BOTH, roles={**ROLES, "Steady": None}).study())
    assert sums(found) == (HOLDS, UNTESTABLE)
    assert "constant_w" in parts(found, CURE)["f2f_above_constant_w"].found
    levels = {**SHOWS_BOTH, "Tuned": {**SHOWS_BOTH["Plain"], "f2f": 0.34}}
    found = verdicts(replace(BOTH, levels=levels, roles={**ROLES, "Tuned": "sft_best_tau"}).study())
    assert sums(found) == (HOLDS, FAILS)
    assert parts(found, CURE)["f2f_above_sft_best_tau"].verdict == FAILS
    assert parts(found, CURE)["v2v_above_sft_best_tau"].verdict == HOLDS


@pytest.mark.parametrize(("level", "verdict"), [(0.2, HOLDS), (0.3, OPEN), (0.4, FAILS)])
def test_shuffled_images_are_a_control_of_their_own(level: float, verdict: str) -> None:
    levels = {**SHOWS_BOTH, "Dealt": {**SHOWS_BOTH["Ours"], "f2f": level}}
    found = verdicts(replace(BOTH, levels=levels, roles={**ROLES, "Dealt": "shuffled"}).study())
    assert sums(found) == (HOLDS, HOLDS)
    assert next(claim for claim in found.claims if claim.key == "f2f_above_shuffled").verdict == verdict


def test_gradients_of_the_batch_of_each_step_do_not_count() -> None:
    found = verdicts(replace(BOTH, fixed_batch=False).study())
    claim = parts(found, PARADOX)["gradients"]
    assert claim.verdict == UNTESTABLE and "0 comparisons of gradients on a fixed batch" in claim.found
    assert sums(found) == (UNTESTABLE, HOLDS)


def test_one_seed_is_enough_for_intervals_over_users() -> None:
    found = verdicts(replace(BOTH, seeds=(0,)).study())
    assert sums(found) == (HOLDS, HOLDS)
    assert all("1 seed" in claim.found for claim in parts(found, CURE).values())


def test_methods_without_roles_are_known_by_their_names() -> None:
    study = BOTH.study()
    papers = {"Untrained": "VLM vanilla (ext.)", "Plain": "VLM SFT (ext.)", "Words": "LLM SFT"}
    names = {"Pictures": "Image only SFT", "Steady": "SFT with constant w"}
    methods = study.frames["methods"].drop("role")
    methods = methods.with_columns(paper=pl.col("name").replace_strict(papers, default=None))
    frames = {
        name: table.with_columns(pl.col("method").replace(names)) if "method" in table.columns else table
        for name, table in study.frames.items()
    }
    frames["methods"] = methods.with_columns(pl.col("name").replace(names))
    assert sums(verdicts(Results(study.out, frames, study.facts))) == (HOLDS, HOLDS)


def test_a_study_of_an_earlier_version_says_what_it_lacks() -> None:
    study = BOTH.study()
    study.frames["views"] = study.frames["views"].clear()
    found = verdicts(study)
    assert gate(found, "imbalance").status == UNMEASURED and "earlier version" in gate(found, "imbalance").found
    assert gate(found, "narrow").status == PASSED and sums(found) == (UNTESTABLE, UNTESTABLE)


def test_other_users_of_one_method_are_refused() -> None:
    study = BOTH.study()
    other = pl.when(pl.col("method") == "Ours").then(pl.lit("x") + pl.col("user_id")).otherwise(pl.col("user_id"))
    study.frames["views"] = study.frames["views"].with_columns(user_id=other)
    with pytest.raises(ArtifactError, match="different users"):
        verdicts(study)


# --- statistics ---------------------------------------------------------------------------------------------


def test_holm_covers_all_parts_of_the_cure() -> None:
    # of seven tests, the smallest p is multiplied by 7, the next by 6, ...
    study = BOTH.but("Plain", f2f=0.2925, v2v=0.1715).but("Ours", t2t=0.2935).study()
    claims = [claim for claim in parts(verdicts(study), CURE).values() if claim.measured]
    assert len(claims) == 7
    ps = [claim.measured.p for claim in claims if claim.measured]
    order = np.argsort(ps, kind="stable")
    by_hand, top = np.empty(7), 0.0
    for place, which in enumerate(order):
        top = max(top, min(1.0, ps[which] * (7 - place)))
        by_hand[which] = top
    assert [claim.p_holm for claim in claims] == pytest.approx(by_hand.tolist())
    assert len(set(ps)) > 2
    between = [c for c in claims if c.measured and c.measured.low > 0 and c.p_holm and c.p_holm > 0.05]
    assert all(claim.verdict == OPEN for claim in between)


def test_an_interval_that_excludes_zero_is_not_enough_for_one_part_of_many() -> None:
    opened = 0
    for lead in np.arange(0.008, 0.012, 0.0005):  # over two rivals; about two standard errors
        world = BOTH.but("Plain", f2f=0.30 - lead).but("Steady", f2f=0.30 - lead)
        claims = parts(verdicts(world.study()), CURE)
        for claim in (claims["f2f_above_sft"], claims["f2f_above_constant_w"]):
            assert claim.measured is not None and claim.p_holm is not None
            assert (claim.verdict == HOLDS) == (claim.measured.low > 0 and claim.p_holm <= 0.05)
            opened += claim.measured.low > 0 and claim.p_holm > 0.05
    assert opened, "some interval is above 0 where Holm's p is above .05"


def test_resampled_means_share_their_users_and_agree_with_the_normal_interval() -> None:
    random = np.random.default_rng(3)
    columns = random.standard_normal((500, 2))
    columns = np.column_stack([columns, columns[:, 0] - columns[:, 1]])
    means = resampled_means(columns, 4000, seed=1)
    assert means.shape == (4000, 3) and np.allclose(means[:, 0] - means[:, 1], means[:, 2])
    low, high = np.quantile(means[:, 2], [0.025, 0.975])
    error = columns[:, 2].std(ddof=1) / np.sqrt(500)
    assert (low, high) == pytest.approx(
        (columns[:, 2].mean() - 1.96 * error, columns[:, 2].mean() + 1.96 * error), abs=0.01
    )
    shifted = columns[:, 2] - columns[:, 2].mean() + 2 * error
    p = bootstrap_p(resampled_means(shifted[:, None], 10_000)[:, 0])
    assert p == pytest.approx(paired_t_test(shifted, np.zeros(500)).p, abs=0.012)
    assert bootstrap_p(np.zeros(99)) == 1.0 and bootstrap_p(np.ones(99)) == pytest.approx(0.02)


@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
def test_noise_has_no_peak(seeds: int) -> None:
    # the highest window of noise is above its neighbours by choice: such curves must rarely hold
    random = np.random.default_rng(seeds)
    held = 0
    for _ in range(200):
        found = rise_and_fall(random.standard_normal((seeds, 40)))
        assert found is not None
        held += found.rise[1] > 0 and found.fall[1] > 0
    assert held <= 10


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_hill_has_a_peak_and_a_slope_has_none(seeds: int) -> None:
    steps, random = np.linspace(0, 1, 40), np.random.default_rng(0)
    hill, slope = np.sin(np.pi * steps), steps
    noise = 0.05 * random.standard_normal((seeds, 40))
    found, other = rise_and_fall(hill + noise), rise_and_fall(slope + noise)
    assert found is not None and found.rise[1] > 0.3 and found.fall[1] > 0.3
    assert other is not None and other.rise[1] > 0 and other.fall[2] < 0
    assert rise_and_fall(np.zeros((1, 19))) is None is rise_and_fall(np.zeros((3, 9)))


# --- page, file and figure ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("undrawn")
def test_the_page_shows_gates_before_verdicts_and_a_file_has_them_for_programs(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    rows = BOTH.study().frames["views"]
    names = {"Untrained": "Vanilla", "Plain": "SFT", "Ours": "VLM2Rec"}
    rows = rows.filter(pl.col("method").is_in(list(names))).with_columns(pl.col("method").replace(names))
    folder = changed(study, tmp_path / "changed", views=rows)
    text = run(ReportConfig(study=folder)).read_text(encoding="utf-8")
    places = [text.index(part) for part in ('id="gates"', "The paradox: SFT", "The cure: VLM2Rec", "Other claims")]
    assert places == sorted(places)
    assert "no method has the role image_only" in text
    found = json.loads((folder / page.VERDICTS_FILE).read_text())
    assert found["weak view"] == "image" and found["claims"][0]["verdict"] == UNTESTABLE
    assert {each["key"]: each["status"] for each in found["gates"]}["looks"] == UNMEASURED
    part = next(claim for claim in found["claims"] if claim["key"] == "f2f_above_sft")
    assert part["measured"]["users"] == USERS and part["measured"]["low"] < part["measured"]["difference"]
    assert not (folder / "figures" / "verdicts.svg").exists(), "nothing is testable"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / page.VERDICTS_FILE).write_text("{}")
    with pytest.raises(ConfigError, match=r"verdicts\.json exists"):
        run(ReportConfig(study=folder, out=tmp_path / "mine" / "report.html"))


@pytest.mark.usefixtures("undrawn")
def test_the_page_of_other_methods_does_not_speak_of_the_paradox(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = write_study(tmp_path)
    assert "paradox" in run(ReportConfig(study=study)).read_text(encoding="utf-8")
    results = pl.read_parquet(study / "results.parquet")
    others = results.filter(~pl.col("method").is_in(["SFT", "Vanilla"]))
    assert 0 < others.height < results.height
    drawn = run(ReportConfig(study=changed(study, tmp_path / "changed", results=others)))
    text = drawn.read_text(encoding="utf-8")
    assert "paradox" not in text and 'id="gates"' not in text and "Task 2" in text
    capsys.readouterr()
    page.print_verdicts(drawn)
    assert "gate" not in capsys.readouterr().out


def test_the_figure_has_a_row_for_each_difference_and_is_left_out_without_any() -> None:
    study = BOTH.study()
    drawn = figures.intervals(study)
    assert drawn is not None and drawn.name == "verdicts" and "difference, N@20" in drawn.picture.svg
    assert figures.intervals(replace(BOTH, loss=0.9).study()) is None, "a gate is closed"
    study.frames["views"] = study.frames["views"].clear()
    assert figures.intervals(study) is None

"""`study --select valid`: trials, the choice among them, and that nothing of the test decides it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml
from study_world import SMALL, Tiny, blank_figures, marks, settings

from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError, DataError, ModelError
from vlm2rec.pipelines import finetune, study
from vlm2rec.pipelines.catalogue.negatives import (
    VALIDATION_SEED,
    Sequences,
    draw_candidates,
    draw_validation_candidates,
)
from vlm2rec.pipelines.config import StudyConfig
from vlm2rec.pipelines.experiments import schedule, selection
from vlm2rec.pipelines.experiments.methods import Target, read_study
from vlm2rec.pipelines.experiments.selection import Search

# --- candidates of validation -------------------------------------------------------------------------------


def drawn_users(count: int, items: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Return training sequences, with repeats, and validation items; the last item of the catalogue is in neither."""
    draw = np.random.default_rng(0)
    train = [draw.integers(0, items - 1, size=draw.integers(1, 9)).astype(np.int32) for _ in range(count)]
    return train, draw.integers(0, items - 1, size=count).astype(np.int32)


def test_candidates_of_validation_are_new_to_the_user_and_the_same_whoever_else_is_ranked() -> None:
    train, targets = drawn_users(200, 60)
    known = {int(item) for items in train for item in items} | set(targets.tolist())
    everyone = draw_validation_candidates(train, targets, np.arange(200), 30)
    assert everyone.shape == (200, 30)
    for user, row in enumerate(everyone.tolist()):
        assert len(set(row)) == 30 and set(row) <= known - {*train[user].tolist(), int(targets[user])}
    some = np.array([3, 17, 180])
    assert np.array_equal(draw_validation_candidates(train, targets, some, 30), everyone[some])


def test_candidates_of_validation_are_of_no_stored_set() -> None:
    train, targets = drawn_users(50, 60)
    own = draw_validation_candidates(train, targets, np.arange(50), 20)
    lengths = np.array([len(items) + 1 for items in train])
    items = np.concatenate([np.append(items, target) for items, target in zip(train, targets, strict=True)])
    sequences = Sequences(items.astype(np.int32), np.concatenate([[0], np.cumsum(lengths)]))
    for seed in range(20):
        assert not np.array_equal(np.sort(own), np.sort(draw_candidates(sequences, range(50), 59, 20, seed)))
    assert np.iinfo(np.int32).max < VALIDATION_SEED  # the type of the stored seeds


def test_a_user_with_few_untouched_items_has_fewer_candidates_and_one_with_none_is_an_error() -> None:
    train = [np.array([0, 1, 2, 2]), np.array([0])]
    targets = np.array([3, 4])
    assert draw_validation_candidates(train, targets, np.arange(2), 3).shape == (2, 1)
    assert draw_validation_candidates(train, targets, np.array([1]), 3).shape == (1, 3)
    with pytest.raises(DataError, match="interacted with every one of the 2 items"):
        draw_validation_candidates([np.array([0])], np.array([1]), np.arange(1), 3)


# --- what is tried ------------------------------------------------------------------------------------------

HOME = Target("home", Path("/data/home"))


def searches(tmp_path: Path, flags: dict[str, Any] | None = None, **keys: Any) -> dict[str, Search]:
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(keys))
    found = read_study(StudyConfig(out=tmp_path / "out", config=file, select="valid", **(flags or {})))
    return {each.method.name: each for each in selection.plan_searches(found, Path("out"), HOME, "BB", "cpu")}


def tried(search: Search) -> list[dict[str, Any]]:
    return [trial.settings for trial in search.trials]


def test_every_method_of_the_default_study_that_trains_has_as_many_trials_as_any_other(tmp_path: Path) -> None:
    found = searches(tmp_path)
    assert {"SFT (internal)", "SFT (external)", "Text only SFT", "Image only SFT", "SDA", "VLM2Rec"} == set(found)
    assert {len(search.trials) for search in found.values()} == {4}
    assert tried(found["SFT (external)"]) == [{"tau_wpcl": tau} for tau in (0.05, 0.1, 0.5, 1.0)]
    assert found["VLM2Rec"].grid.keys() == {"tau_wpcl", "tau_crtr", "lam", "alpha"}
    assert found["SDA"].grid.keys() == {"tau_cmsa"}  # it has no tau_wpcl


def test_trials_are_drawn_from_the_grid_by_the_seed_and_none_twice(tmp_path: Path) -> None:
    drawn = {seed: tried(searches(tmp_path, search={"seed": seed, "trials": 4})["VLM2Rec"]) for seed in (0, 1)}
    again = searches(tmp_path, search={"seed": 0, "trials": 3})["VLM2Rec"]
    assert drawn[0] != drawn[1]
    assert tried(again) == drawn[0][:3]
    for trials in drawn.values():
        assert len({tuple(each.items()) for each in trials}) == 4
        for each in trials:
            assert all(value in again.grid[name] for name, value in each.items())


def test_a_trial_is_the_methods_training_with_other_settings_in_a_folder_of_its_own(tmp_path: Path) -> None:
    found = searches(tmp_path, search={"seed": 7})["SFT (external)"]
    steps = [trial.step for trial in found.trials]
    assert [str(step.folder) for step in steps] == [f"out/sft-external/trial-{n}/adapter" for n in (1, 2, 3, 4)]
    assert {(step.config.loss, step.config.seed, step.config.gradient_steps) for step in steps} == {("sft", 7, 0)}
    assert [step.config.tau_wpcl for step in steps] == [0.05, 0.1, 0.5, 1.0]


def test_trials_of_a_method_with_shuffled_images_see_them_shuffled(tmp_path: Path) -> None:
    method = {"name": "blind", "source": "finetune", "analyses": ["arms"], "shuffle_images": True}
    found = searches(tmp_path, {"analyses": ("arms",)}, more_methods=[method])
    assert {trial.step.config.data for trial in found["blind"].trials} == {Path("out/shuffled-images")}
    assert {trial.step.config.data for trial in found["VLM2Rec"].trials} == {HOME.data}


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ({"analyses": ("few-shot",)}, {"VLM2Rec", "SFT (external)"}),
        ({"analyses": ("sensitivity",)}, {"VLM2Rec"}),
        (
            {"analyses": ("arms",)},
            {"SFT (external)", "Text only SFT", "Image only SFT", "SFT with constant w", "VLM2Rec by means", "VLM2Rec"},
        ),
        ({"analyses": ("cross-domain",)}, {"VLM2Rec", "SFT (external)", "Text only SFT"}),
    ],
)
def test_only_methods_that_run_or_are_followed_have_trials(
    tmp_path: Path, flags: dict[str, Any], names: set[str]
) -> None:
    assert set(searches(tmp_path, flags)) == names


def test_an_ablation_and_the_methods_of_a_grid_take_what_was_chosen_except_for_what_they_vary(tmp_path: Path) -> None:
    config = StudyConfig(out=tmp_path, select="valid")
    best = {"tau_wpcl": 0.5, "lam": 0.1, "tau_crtr": 0.01, "alpha": 10.0}
    found = read_study(config, chosen={"VLM2Rec": best})
    assert best.items() <= found.method("VLM2Rec").finetune.items()
    assert found.method("VLM2Rec w/o CRTR").finetune == best | {"crtr": False}
    assert best.items() <= found.method("VLM2Rec (K=128)").finetune.items()
    taus = {m.finetune["tau_wpcl"] for m in found.methods if m.varies == "tau_wpcl"}
    assert taus == {0.05, 0.1, 1.0}  # .5 is the method itself now
    assert found.method("VLM2Rec (tau_wpcl=1.0)").finetune.items() >= (best | {"tau_wpcl": 1.0}).items()
    assert "tau_wpcl" not in found.method("SFT (external)").finetune
    assert selection.source_of_settings(found, found.method("VLM2Rec (K=128)")).name == "VLM2Rec"
    assert selection.source_of_settings(found, found.method("VLM2Rec w/o CRTR")).name == "VLM2Rec"


OWN = {"name": "mine", "source": "finetune"}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"search": {"trials": 5}},
            r"5 trials .*fewer.*SFT \(internal\) 4 \(tau_wpcl 0\.05, 0\.1, 0\.5, 1\.0\), ",
        ),
        ({"search": {"grid": {}}}, r"4 trials .* Text only SFT 1 \(no setting\)"),
        ({"search": {"trials": 0}}, "trials = 0"),
        ({"search": {"trails": 3}}, "did you mean 'trials'"),
        ({"more_methods": [{**OWN, "search": {"tau": [1, 2, 3, 4]}}]}, "'tau' in the search of method 'mine'"),
        ({"more_methods": [{**OWN, "search": {"learning_rat": [1]}}]}, "did you mean 'learning_rate'"),
        ({"more_methods": [{**OWN, "search": {"valid_users": [5, 9]}}]}, "'valid_users' in the search"),
        ({"more_methods": [{**OWN, "search": {"seed": [1, 2]}}]}, "'seed' in the search"),
        ({"more_methods": [{**OWN, "search": {"lam": 0.1}}]}, "a list of values"),
        ({"more_methods": [{**OWN, "search": {"lam": []}}]}, "a list of values"),
        ({"more_methods": [{**OWN, "search": {"lam": [0.1, 0.1]}}]}, "each value once"),
        ({"more_methods": [{**OWN, "search": {"lam": ["much"]}}]}, "lam = 'much'"),
        ({"more_methods": [{**OWN, "search": {"experts": [2, 4]}}]}, "--experts with --method vlm2rec"),
        ({"more_methods": [{"name": "v", "source": "backbone", "search": {"lam": [1]}}]}, "trains nothing"),
        ({"more_methods": [{**OWN, "tuned_like": "VLM2Rek"}]}, "no method is called 'VLM2Rek'"),
        ({"more_methods": [{**OWN, "tuned_like": "ID"}]}, "is tuned_like 'ID'"),
        ({"more_methods": [{**OWN, "tuned_like": "VLM2Rec w/o CRTR"}]}, "is tuned_like 'VLM2Rec w/o CRTR'"),
        ({"more_methods": [{**OWN, "tuned_like": "SDA"}]}, "is tuned_like 'SDA'"),
        ({"more_methods": [{**OWN, "tuned_like": "VLM2Rec", "search": {"lam": [1]}}]}, "no `search` beside it"),
        ({"finetune": {"valid_candidates": "stored"}}, "the test would rank among the items that the choice"),
    ],
)
def test_a_mistake_in_the_search_is_named_before_anything_runs(
    tmp_path: Path, keys: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        searches(tmp_path, **keys)


# --- a study that selects -----------------------------------------------------------------------------------

SELECT: dict[str, Any] = {
    "methods": [
        {"name": "vanilla", "source": "backbone", "paper": "VLM vanilla (ext.)"},
        {"name": "SFT", "source": "finetune", "finetune": {"loss": "sft"}, "paper": "VLM SFT (ext.)"},
        {"name": "w/o CRTR", "source": "finetune", "analyses": ["ablation"], "finetune": {"crtr": False}}
        | {"tuned_like": "VLM2Rec"},
        {"name": "VLM2Rec", "source": "finetune", "search": {"lam": [0.1, 1.0]}, "paper": "VLM2Rec"},
    ],
    "grids": [{"analysis": "sensitivity", "of": "VLM2Rec", "varies": "lam", "values": [0.1, 1.0]}],
    "search": {"trials": 2, "seed": 3, "grid": {"tau_wpcl": [0.05, 1.0]}},
    "analyses": ["main", "ablation", "sensitivity"],
    "plan": {
        "main": {"seeds": [0, 1], "tasks": [1], "models": []},
        "ablation": {"seeds": [0], "tasks": [1], "models": []},
        "sensitivity": {"seeds": [0], "tasks": [1], "models": []},
    },
}
TRIALS = [f"{name}/trial-{number}" for name in ("sft", "vlm2rec") for number in (1, 2)]


def select(tiny: Tiny, data: Path, folder: Path, flags: dict[str, Any] | None = None, **keys: Any) -> StudyConfig:
    return settings(tiny, data, folder, {"select": "valid", **(flags or {})}, **(SELECT | keys))


def copy_of(dataset: Path, folder: Path) -> Path:
    """Return a copy of a dataset that may be changed; the images stay where they are."""
    (folder / "catalogue").symlink_to(dataset.parent / "catalogue")
    return Path(shutil.copytree(dataset, folder / "data", symlinks=True))


def choice(out: Path) -> dict[str, Any]:
    """Return what was chosen, without the marks of the single runs."""
    found = json.loads((out / selection.SELECTION_FILE).read_text())["methods"]
    return {name: {key: value for key, value in entry.items() if key != "runs"} for name, entry in found.items()}


@pytest.fixture(scope="module")
def untouched_until_chosen() -> list[str]:
    """Filled by `finished`: what was read of the test, after the choice."""
    return []


@pytest.fixture(scope="module")
def finished(
    tiny: Tiny, drawn_dataset: Path, tmp_path_factory: pytest.TempPathFactory, untouched_until_chosen: list[str]
) -> Path:
    """A finished study, whose dataset has no candidates of the test, and no test items, until the choice is written."""
    folder = tmp_path_factory.mktemp("selected")
    data = copy_of(drawn_dataset, folder)
    negatives, hidden = data / schema.NEGATIVES_FILE, folder / "hidden"
    negatives.rename(hidden)
    histories, stored, write = Dataset.histories, Dataset.negatives, selection._write

    def watched_histories(self: Dataset, split: Any) -> Any:
        if split == "test":
            assert not hidden.exists(), "a test item was read before the choice"
            untouched_until_chosen.append("test items")
        return histories(self, split)

    def watched_negatives(self: Dataset, seed: int) -> Any:
        assert not hidden.exists(), "candidates of the test were read before the choice"
        untouched_until_chosen.append("test candidates")
        return stored(self, seed)

    def watched_write(out: Path, methods: Any) -> None:
        assert set(methods) == {"SFT", "VLM2Rec"} and not list(out.rglob(schema.METRICS_FILE))
        assert {str(path.parent.parent.relative_to(out)) for path in out.rglob(schema.ADAPTER_FILE)} == set(TRIALS)
        write(out, methods)
        hidden.rename(negatives)

    with blank_figures(), pytest.MonkeyPatch.context() as patched:
        patched.setattr(Dataset, "histories", watched_histories)
        patched.setattr(Dataset, "negatives", watched_negatives)
        patched.setattr(selection, "_write", watched_write)
        study.run(select(tiny, data, folder))
    return folder


def test_the_test_is_not_read_before_the_choice_is_written(finished: Path, untouched_until_chosen: list[str]) -> None:
    # the assertions are in the fixture: there was no file of candidates, and asking for a test item was an error
    assert {"test items", "test candidates"} == set(untouched_until_chosen)
    assert (finished / "study" / selection.SELECTION_FILE).is_file()


@pytest.mark.usefixtures("undrawn")
def test_other_test_items_and_other_candidates_change_no_score_and_no_choice(
    tiny: Tiny, drawn_dataset: Path, finished: Path, tmp_path: Path
) -> None:
    data = copy_of(drawn_dataset, tmp_path)
    sequences = pl.read_parquet(data / schema.SEQUENCES_FILE)
    moved = sequences.with_columns(pl.col(schema.TEST).reverse())
    negatives = pl.read_parquet(data / schema.NEGATIVES_FILE)
    others = negatives.with_columns(pl.col(schema.NEGATIVES).reverse())
    assert (moved[schema.TEST] != sequences[schema.TEST]).mean() > 0.9
    assert (others[schema.NEGATIVES] != negatives[schema.NEGATIVES]).mean() > 0.9
    moved.write_parquet(data / schema.SEQUENCES_FILE)
    others.write_parquet(data / schema.NEGATIVES_FILE)
    config = select(tiny, data, tmp_path, {"seeds": (0,), "analyses": ("main",)})
    study.run(config)
    ours, theirs = choice(config.out), choice(finished / "study")
    assert ours == theirs
    for name in TRIALS:  # to the bit
        ours, theirs = (out / name / "adapter/adapter_model.safetensors" for out in (config.out, finished / "study"))
        assert ours.read_bytes() == theirs.read_bytes()
    one, other = (
        pl.read_parquet(out / "results.parquet").filter((pl.col("method") == "SFT") & (pl.col("seed") == 0))
        for out in (config.out, finished / "study")
    )
    assert one["metric"].to_list() == other["metric"].to_list()
    assert one["value"].to_list() != other["value"].to_list()


def test_the_best_trial_on_validation_is_chosen_and_all_seeds_run_with_it(finished: Path) -> None:
    out = finished / "study"
    for name, entry in choice(out).items():
        folder = out / ("sft" if name == "SFT" else "vlm2rec")
        scores = []
        for trial in entry["trials"]:
            adapter = folder / f"trial-{trial['trial']}" / "adapter"
            config = json.loads((adapter / "vlm2rec.json").read_text())["config"]
            assert trial["settings"].items() <= config.items() and config["valid_candidates"] == "own"
            curve = json.loads((adapter / "curves.json").read_text())["valid"]
            scores.append(max(row["N@20"] for row in curve if row["step"] > 0))
            assert trial["N@20"] == scores[-1]
        best = entry["trials"][int(np.argmax(scores))]
        assert (entry["chosen"], entry["settings"]) == (best["trial"], best["settings"])
        for seed in (0, 1):
            config = json.loads((folder / f"seed-{seed}" / "adapter" / "vlm2rec.json").read_text())["config"]
            assert entry["settings"].items() <= config.items() and config["seed"] == seed
    best = choice(out)["VLM2Rec"]["settings"]
    without = json.loads((out / "without-crtr/seed-0/adapter/vlm2rec.json").read_text())["config"]
    assert best.items() <= without.items() and without["crtr"] is False
    varied = [path.parent.parent.parent for path in out.glob("vlm2rec-lambda*/seed-0/adapter/vlm2rec.json")]
    assert [path.name for path in varied] == [f"vlm2rec-lambda-{1.1 - best['lam']:.1f}"]


def test_the_report_prints_grid_trials_and_choice_and_says_that_only_validation_was_used(finished: Path) -> None:
    out = finished / "study"
    trials = pl.read_parquet(out / "trials.parquet")
    assert dict(trials.group_by("method").len().iter_rows()) == {"SFT": 2, "VLM2Rec": 2}
    assert trials.filter("chosen")["method"].to_list() == ["SFT", "VLM2Rec"]
    assert set(trials["seed"]) == {3} and (trials["seconds"] > 0).all()
    words = re.sub(r"<[^>]*>", " ", (out / "report.html").read_text(encoding="utf-8"))
    words = re.sub(r"\s+", " ", words)
    assert "same number of trials: 2" in words and "The choice used validation only" in words
    assert "tau_wpcl 0.05, 1.0; lam 0.1, 1.0" in words and "2 of 4" in words and "2 of 2" in words
    assert "w/o CRTR takes the settings of VLM2Rec" in words
    for row in trials.iter_rows(named=True):
        text = ", ".join(f"{name} {value}" for name, value in json.loads(row["settings"]).items())
        score = f"{row['score']:.4f}"[1:]
        mark = " chosen" if row["chosen"] else ""
        assert re.search(
            rf"{row['method']}, trial {row['trial']} {re.escape(text)} \d+ {re.escape(score)}{mark}", words
        )
    assert "finetune (trials)" in words


@pytest.mark.usefixtures("undrawn")
def test_a_study_from_before_there_were_trials_is_drawn(finished: Path, tmp_path: Path) -> None:
    for path in (finished / "study").glob("*.parquet"):
        if path.name != "trials.parquet":
            shutil.copy(path, tmp_path)
    methods = pl.read_parquet(tmp_path / "methods.parquet")
    methods.drop("role").write_parquet(tmp_path / "methods.parquet")  # there were no roles either
    about = pl.read_parquet(tmp_path / "about.parquet")
    about.filter(pl.col("key") != "search").write_parquet(tmp_path / "about.parquet")
    drawn = study.run(StudyConfig(out=tmp_path, report_only=True)).read_text(encoding="utf-8")
    assert "How the settings were chosen" not in drawn and "none: the settings as the study gives them" in drawn


# --- going on -----------------------------------------------------------------------------------------------


def again(finished: Path, tmp_path: Path) -> Path:
    """Return a copy of a study that may be changed."""
    return shutil.copytree(finished, tmp_path / "copy", symlinks=True)


@pytest.mark.usefixtures("undrawn")
def test_the_same_command_again_runs_nothing_and_chooses_nothing_else(
    tiny: Tiny, finished: Path, tmp_path: Path
) -> None:
    folder = again(finished, tmp_path)
    before, written = marks(folder / "study"), (folder / "study" / selection.SELECTION_FILE).read_bytes()
    report = (folder / "study" / "report.html").read_bytes()
    (folder / "study" / selection.SELECTION_FILE).unlink()  # it is written anew from the trials
    study.run(select(tiny, finished / "data", folder))
    assert marks(folder / "study") == before
    assert (folder / "study" / selection.SELECTION_FILE).read_bytes() == written
    assert (folder / "study" / "report.html").read_bytes() == report


@pytest.mark.parametrize(
    ("search", "words"),
    [
        ({"trials": 1}, r"settings of SFT were chosen by another search: it had 2 trials and has now 1.*--redo"),
        ({"grid": {"tau_wpcl": [0.05, 0.5]}}, r"the grid was tau_wpcl 0\.05, 1\.0 and is now tau_wpcl 0\.05, 0\.5"),
        ({"seed": 4}, "its seed was 3 and is now 4"),
    ],
)
def test_another_search_is_refused_in_words(
    tiny: Tiny, finished: Path, tmp_path: Path, search: dict[str, Any], words: str
) -> None:
    folder = again(finished, tmp_path)
    before = marks(folder / "study")
    with pytest.raises(ConfigError, match=words):
        study.run(select(tiny, finished / "data", folder, search=SELECT["search"] | search))
    assert marks(folder / "study") == before


@pytest.mark.usefixtures("undrawn")
def test_another_search_is_made_again_on_request(tiny: Tiny, finished: Path, tmp_path: Path) -> None:
    folder = again(finished, tmp_path)
    out, before = folder / "study", marks(folder / "study")
    chosen = choice(out)
    keys = {"search": SELECT["search"] | {"grid": {"tau_wpcl": [0.07, 1.5]}}}
    flags = {"redo": True, "analyses": ("main",), "methods": ("SFT", "vanilla")}
    study.run(select(tiny, finished / "data", folder, flags, **keys))
    changed = {name for name, mark in marks(out).items() if mark != before[name]}
    steps = [f"seed-{seed}/{step}" for seed in (0, 1) for step in ("adapter", "embeddings", "evaluate")]
    assert changed == {f"sft/{step}" for step in ("trial-1/adapter", "trial-2/adapter", *steps)}
    assert choice(out)["SFT"]["settings"] != chosen["SFT"]["settings"]
    assert not (out / "vlm2rec" / "trial-1" / "adapter").exists()  # its search is another one too, and it waits for it


def test_a_changed_setting_of_a_method_names_its_trial(tiny: Tiny, finished: Path, tmp_path: Path) -> None:
    folder = again(finished, tmp_path)
    keys = {"finetune": SMALL["finetune"] | {"max_steps": 3}}
    with pytest.raises(ConfigError, match=r"SFT, trial 1, adapter: max_steps was 2 and is now 3.*--redo"):
        study.run(select(tiny, finished / "data", folder, **keys))


def test_a_damaged_choice_is_refused(tiny: Tiny, finished: Path, tmp_path: Path) -> None:
    folder = again(finished, tmp_path)
    path = folder / "study" / selection.SELECTION_FILE
    path.write_text(path.read_text().replace('"chosen": 1', '"chosen": 3').replace('"chosen": 2', '"chosen": 1'))
    with pytest.raises(ArtifactError, match=r"selection\.json does not have the content.*remove it and run") as refused:
        study.run(select(tiny, finished / "data", folder))
    assert refused.value.exit_code == 5


@pytest.mark.usefixtures("undrawn")
def test_a_trial_that_is_gone_is_trained_again_and_the_choice_stays(tiny: Tiny, finished: Path, tmp_path: Path) -> None:
    folder = again(finished, tmp_path)
    out, before = folder / "study", marks(folder / "study")
    shutil.rmtree(out / "vlm2rec" / "trial-2" / "adapter")
    study.run(select(tiny, finished / "data", folder))
    assert {name for name, mark in marks(out).items() if mark != before[name]} == {"vlm2rec/trial-2/adapter"}
    assert choice(out) == choice(finished / "study")


@pytest.mark.usefixtures("undrawn")
def test_a_trial_that_fails_leaves_out_what_waits_for_its_choice_and_nothing_else(
    tiny: Tiny, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = finetune.run

    def fails(config: Any) -> Any:
        if "vlm2rec/trial-2" in str(config.out):
            raise ModelError("the loss of step 1 is nan", "a finite loss", "lower --learning-rate")
        return train(config)

    folder = again(finished, tmp_path)
    config = select(tiny, finished / "data", folder, {"seeds": (0,), "analyses": ("main", "ablation")})
    for name in ("vlm2rec/trial-2", "vlm2rec/seed-0", "vlm2rec/seed-1", "without-crtr"):
        shutil.rmtree(config.out / name)
    (config.out / selection.SELECTION_FILE).unlink()
    with monkeypatch.context() as broken:
        broken.setattr(finetune, "run", fails)
        with pytest.raises(ModelError, match="loss of step 1"):
            study.run(config)
    assert set(choice(config.out)) == {"SFT"}
    assert set(pl.read_parquet(config.out / "results.parquet")["method"]) == {"vanilla", "SFT"}
    study.run(config)
    assert choice(config.out) == choice(finished / "study")
    assert {"VLM2Rec", "w/o CRTR"} <= set(pl.read_parquet(config.out / "results.parquet")["method"])


def test_of_equal_scores_the_first_trial_is_chosen(
    tiny: Tiny, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = again(finished, tmp_path)
    config = select(tiny, finished / "data", folder)
    (config.out / selection.SELECTION_FILE).unlink()
    for scores, expected in (((0.2, 0.2), 1), ((0.1, 0.2), 2), ((0.3, 0.2), 1)):
        monkeypatch.setattr(selection, "_score", lambda trial, scores=scores: (2, scores[trial.number - 1]))
        (config.out / selection.SELECTION_FILE).unlink(missing_ok=True)
        selection.choose(config.out, schedule.plan_schedule(config).searches)
        assert {entry["chosen"] for entry in choice(config.out).values()} == {expected}


def test_a_plan_shows_the_trials_and_writes_nothing(
    tiny: Tiny, drawn_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = select(tiny, drawn_dataset, tmp_path, {"plan_only": True})
    study.run(config)
    printed = capsys.readouterr().err
    assert "finetune (trial)" in printed and "2 trials of each method with seed 3" in printed
    assert re.search(r"SFT +1 +2 +tau_wpcl 0\.05\b", printed) and re.search(r"VLM2Rec +2 +4 +tau_wpcl", printed)
    assert "24 steps, 0 already done" in printed
    assert not config.out.exists()


def test_picked_methods_have_the_trials_of_the_method_that_they_follow(
    tiny: Tiny, drawn_dataset: Path, tmp_path: Path
) -> None:
    config = select(tiny, drawn_dataset, tmp_path)
    planned = schedule.plan_schedule(config)
    runs = [run for run in planned.runs if run.method.name == "w/o CRTR"]
    assert {run.method.name for run in planned.trials_for(runs)} == {"VLM2Rec"}
    assert planned.undecided == {"SFT", "VLM2Rec", "w/o CRTR", "VLM2Rec (lambda=1.0)"}


def test_a_column_of_looks_is_probed_with_select_too(tiny: Tiny, drawn_dataset: Path, tmp_path: Path) -> None:
    data = copy_of(drawn_dataset, tmp_path)
    items = pl.read_parquet(data / schema.ITEMS_FILE)
    items.with_columns(looks=pl.lit("red")).write_parquet(data / schema.ITEMS_FILE)
    for chosen in ("none", "valid"):
        config = select(tiny, data, tmp_path, {"select": chosen})
        assert schedule.plan_schedule(config).study.looks == "looks", chosen

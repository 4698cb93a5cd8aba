"""`vlm2rec init` and `vlm2rec run`: one file for the whole line, done stage by stage, going on where it stopped."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError
from vlm2rec.pipelines import build_index, cli, config, evaluate, export_items, finetune, init, prepare, run
from vlm2rec.pipelines.config import InitConfig, RunConfig
from vlm2rec.pipelines.synthetic.drawn_catalogue import draw_catalogue

SMALL: dict[str, dict[str, Any]] = {
    "prepare": {"core": 2, "candidates": 10, "candidate_seeds": [0]},
    "finetune": {
        **{"max_steps": 2, "batch_size": 4, "checkpoint_steps": 1, "valid_users": 4, "probe_users": 0},
        **{"vision_cache": "off", "device": "cpu"},
    },
    "export-items": {"vision_cache": "off", "device": "cpu"},
    "evaluate": {"users_from": "mean", "backbone": None, "adapter": None, "device": "cpu"},
    "train-recommender": {"model": "VBPR", "max_epochs": 1, "device": "cpu"},
    "build-index": {"sample": 10},
}


def states(returned: dict[str, Any]) -> list[str]:
    return [each["state"].partition(",")[0].partition(":")[0] for each in returned["stages"]]


def change(file: Path, stage: str, **changes: Any) -> None:
    """Change settings of a stage in a file."""
    stages = yaml.safe_load(file.read_text())
    stages[stage] |= changes
    file.write_text(yaml.safe_dump(stages, sort_keys=False))


@pytest.fixture(scope="module")
def done(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """A folder with a catalogue, its file, and the whole line done; what that returned and said."""
    folder = tmp_path_factory.mktemp("line")
    draw_catalogue(folder, products=30, users=24, seed=0)
    file = folder / "vlm2rec.yaml"
    inputs = {"items": folder / "items.parquet", "interactions": folder / "interactions.parquet"}
    init.run(InitConfig(**inputs, images=folder / "images", backbone=str(tiny("qwen2_5_vl")), out=file))
    written = file.read_text()
    for stage, settings in SMALL.items():
        change(file, stage, **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        returned = run.run(RunConfig(config=Path("vlm2rec.yaml")))
    return folder, returned, written


@pytest.fixture
def line(
    done: tuple[Path, dict[str, Any], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, RunConfig]:
    """A copy of the finished line, with the times of its files, as the working directory."""
    folder = tmp_path / "line"
    shutil.copytree(done[0], folder)
    text = (folder / "vlm2rec.yaml").read_text().replace(str(done[0]), str(folder))
    (folder / "vlm2rec.yaml").write_text(text)
    record = folder / "vlm2rec.run.json"
    record.write_text(record.read_text().replace(str(done[0]), str(folder)))
    monkeypatch.chdir(folder)
    return folder, RunConfig(config=Path("vlm2rec.yaml"))


# --- init -------------------------------------------------------------------------------------------------------
def test_the_file_has_every_setting_that_one_needs_first_with_its_help_text(tmp_path: Path) -> None:
    init.run(InitConfig(out=tmp_path / "vlm2rec.yaml"))
    text = (tmp_path / "vlm2rec.yaml").read_text()
    words = " ".join(text.replace("\n  #", "").split())
    sections = dict(re.findall(r"^([\w-]+):\n(.*?)(?=^\S|\Z)", text, re.M | re.S))
    assert list(sections) == list(run.STAGES)
    for stage, (cls, _) in run.STAGES.items():
        first = [name for name, group in config.groups_of(cls).items() if group == config.FIRST]
        keys = re.findall(r"^  (?:# )?(\w+):(?: |$)", sections[stage], re.M)
        assert set(first) <= set(keys), stage
        for field in dataclasses.fields(cls):
            if field.name in first:
                assert " ".join(field.metadata["help"].split()) in words


def test_the_flags_fill_the_file_in(done: tuple[Path, dict[str, Any], str], tiny: Callable[[str], Path]) -> None:
    folder, _, written = done
    read = yaml.safe_load(written)
    assert read["prepare"] == {
        **{name: str(folder / f"{name}.parquet") for name in ("items", "interactions")},
        **{"images": str(folder / "images"), "out": "data"},
    }
    for stage in ("finetune", "export-items", "evaluate"):
        assert read[stage]["backbone"] == str(tiny("qwen2_5_vl")) and read[stage]["data"] == "data"
    assert "prompt_style" not in read["finetune"]
    assert read["train-recommender"]["embeddings"] == read["build-index"]["embeddings"] == "embeddings"


def test_without_pictures_the_file_is_for_titles(tmp_path: Path) -> None:
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).touch()
    file = tmp_path / "x.yaml"
    init.run(InitConfig(items=tmp_path / "a.csv", interactions=tmp_path / "b.csv", out=file))
    stages = {stage.name: stage.config for stage in run.read_stages(file)}
    assert stages["prepare"].images is None
    assert (stages["finetune"].views, stages["finetune"].loss) == ("text", "sft")


@pytest.mark.parametrize("name", ["a: b", "'quoted'", "#hash", "ünïcode é", "yes", "12", "- dash", "x" * 200])
def test_any_path_comes_back_as_it_was_given(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).touch()
    init.run(InitConfig(items=Path(name), interactions=Path(name), backbone=name, out=Path("v.yaml")))
    read = {stage.name: stage.config for stage in run.read_stages(Path("v.yaml"))}
    assert read["prepare"].items == Path(name) and read["evaluate"].backbone == name


def test_the_summary_names_only_what_is_not_there_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("items.parquet").touch()
    init.run(InitConfig())
    said = " ".join(capsys.readouterr().err.split())
    assert "to fill in interactions (interactions.parquet), images (images)" in said


def test_init_writes_over_nothing_and_names_no_file_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("mine")
    with pytest.raises(ConfigError, match="exists"):
        init.run(InitConfig(out=tmp_path / "mine.yaml"))
    assert (tmp_path / "mine.yaml").read_text() == "mine"
    with pytest.raises(ConfigError, match=r"--items .*nope\.csv does not exist"):
        init.run(InitConfig(items=tmp_path / "nope.csv", out=tmp_path / "new.yaml"))
    assert not (tmp_path / "new.yaml").exists()


# --- the whole line -----------------------------------------------------------------------------------------------
def test_all_stages_are_done_with_paths_and_times(done: tuple[Path, dict[str, Any], str]) -> None:
    folder, returned, _ = done
    assert states(returned) == ["done"] * 6
    for each, (_, last) in zip(returned["stages"], run.STAGES.values(), strict=True):
        assert (folder / each["out"] / last).is_file() and each["seconds"] > 0


def test_a_finished_line_runs_nothing_again(
    line: tuple[Path, RunConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "module_of", lambda name: pytest.fail(f"{name} runs"))
    returned = run.run(line[1])
    assert states(returned) == ["was done"] * 6
    said = capsys.readouterr().err
    for stage in returned["stages"]:
        assert re.search(rf"^{stage['stage']} +was done  \d:\d\d:\d\d  {stage['out']}", said, re.M)


@pytest.mark.parametrize("stage", ["prepare", "export-items", "train-recommender"])
def test_killed_between_or_in_a_stage_the_same_command_goes_on(
    stage: str, line: tuple[Path, RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, config = line
    names = list(run.STAGES)
    record = json.loads((folder / "vlm2rec.run.json").read_text())
    behind = names[names.index(stage) :]
    for name in behind:
        shutil.rmtree(folder / record["stages"].pop(name)["settings"]["out"])
    (folder / "vlm2rec.run.json").write_text(json.dumps(record))
    real = run.module_of

    class Killed:
        @staticmethod
        def run(config: Any) -> None:
            raise KeyboardInterrupt

    if stage == "prepare":  # with prepare's folder gone, the adapter's stays unmade too
        with monkeypatch.context() as patch:
            patch.setattr(run, "module_of", lambda name: Killed if name == "export-items" else real(name))
            with pytest.raises(KeyboardInterrupt):
                run.run(config)
        behind = names[2:]
    monkeypatch.setattr(run, "module_of", lambda name: real(name) if name in behind else pytest.fail(name))
    assert states(run.run(config)) == ["was done"] * (6 - len(behind)) + ["done"] * len(behind)


def test_a_failed_stage_stops_the_line_with_its_code_and_is_taken_up_again(
    line: tuple[Path, RunConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, config = line
    change(folder / "vlm2rec.yaml", "evaluate", embeddings="nowhere", out="task1b")
    monkeypatch.setattr(sys, "argv", ["vlm2rec", "run"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == ArtifactError.exit_code
    assert re.search(r"^evaluate +failed, exit code 5", said, re.M)
    assert re.search(r"^build-index +not reached", said, re.M)
    assert said.splitlines()[-1].startswith("vlm2rec: nowhere")
    change(folder / "vlm2rec.yaml", "evaluate", embeddings="embeddings")
    assert states(run.run(config)) == ["was done"] * 3 + ["done"] + ["was done"] * 2


# --- what has changed -------------------------------------------------------------------------------------------
def test_changed_settings_and_inputs_are_noticed(line: tuple[Path, RunConfig]) -> None:
    folder, config = line
    change(folder / "vlm2rec.yaml", "build-index", kind="flat")
    assert states(run.run(config)) == ["was done"] * 5 + ["done"]
    draw_catalogue(folder / "other", products=36, users=24, seed=1)
    (folder / "other" / "interactions.parquet").replace(folder / "interactions.parquet")
    assert states(run.run(config)) == ["done", "kept", "done", "done", "done", "was done"]
    (folder / "other" / "items.parquet").replace(folder / "items.parquet")
    with pytest.raises(ArtifactError, match="embeddings"):  # of other items: the export refuses in its own words
        run.run(config)


def test_an_output_that_the_command_itself_has_replaced_is_made_again(line: tuple[Path, RunConfig]) -> None:
    folder, config = line
    stage = next(each for each in run.read_stages(config.config) if each.name == "build-index")
    build_index.run(dataclasses.replace(stage.config, kind="flat", sample=3))
    assert states(run.run(config)) == ["was done"] * 5 + ["done"]
    assert schema.read_json(folder / "index" / schema.INDEX_FILE, "", "")["recall_sample"] == 10


def test_an_adapter_of_earlier_data_is_kept_and_told(
    line: tuple[Path, RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, config = line
    change(folder / "vlm2rec.yaml", "prepare", candidates=8)
    before = (folder / "adapter" / schema.ADAPTER_FILE).read_bytes()
    returned = run.run(config)
    assert states(returned)[:2] == ["done", "kept"] and states(returned)[3] == "done"
    assert (folder / "adapter" / schema.ADAPTER_FILE).read_bytes() == before
    assert "adapter was trained on what data held before" in capsys.readouterr().err


def test_an_unfinished_training_does_not_go_on_with_other_data(line: tuple[Path, RunConfig]) -> None:
    folder, config = line
    shutil.rmtree(folder / "adapter")
    (folder / "adapter" / "checkpoints").mkdir(parents=True)
    record = json.loads((folder / "vlm2rec.run.json").read_text())
    record["stages"]["finetune"] |= {"finished": None}
    (folder / "vlm2rec.run.json").write_text(json.dumps(record))
    change(folder / "vlm2rec.yaml", "prepare", candidates=8)
    with pytest.raises(ConfigError, match="was begun, and data has changed since"):
        run.run(config)


def test_folders_of_the_commands_themselves_are_taken_over(
    done: tuple[Path, dict[str, Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a record, finetune and export-items tell by themselves that they are complete; the others run again."""
    folder = done[0]
    monkeypatch.chdir(folder)
    (folder / "vlm2rec.run.json").rename(folder / "aside.json")
    manifest = (folder / "embeddings" / schema.MANIFEST_FILE).read_bytes()
    assert states(run.run(RunConfig())) == ["done", "was done", "done", "done", "done", "done"]
    assert (folder / "embeddings" / schema.MANIFEST_FILE).read_bytes() == manifest
    (folder / "aside.json").replace(folder / "vlm2rec.run.json")


def test_from_and_only_choose_stages(line: tuple[Path, RunConfig]) -> None:
    config = line[1]
    one = run.run(RunConfig(config=config.config, only="build-index"))
    assert states(one) == ["not asked for"] * 5 + ["done"]
    rest = run.run(RunConfig(config=config.config, from_stage="train-recommender"))
    assert states(rest) == ["not asked for"] * 4 + ["done"] * 2
    assert states(run.run(config)) == ["was done"] * 6


# --- mistakes -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("", {}, "names no stage"),
        ("finetun: {}\n", {}, "unknown stage 'finetun' in .* \\(did you mean 'finetune'"),
        ("export_items: {}\n", {}, "did you mean 'export-items'"),
        ("make-backbone: {}\n", {}, "unknown stage 'make-backbone'"),
        ("prepare:\n  item: x\n", {}, "unknown setting 'item' in prepare of .*did you mean 'items'"),
        (
            "prepare:\n  item: x\n",
            {},
            r"similar are items, [a-z_]+, [a-z_]+, and `vlm2rec prepare --help` lists all",
        ),
        ("build-index:\n  embedings: x\n", {}, "did you mean 'embeddings'"),
        ("prepare:\n  items: x\n", {}, "prepare of .*: --interactions is missing.*write `interactions"),
        ("prepare: data\n", {}, "prepare in .* holds a str"),
        ("build-index: {embeddings: e, out: i, sample: no}\n", {}, "build-index of .*: setting sample"),
        ("build-index: {embeddings: e, out: i}\n", {"from_stage": "build"}, "--from \\(did you mean 'build-index'"),
        ("build-index: {embeddings: e, out: i}\n", {"only": "prepare"}, "--only prepare, which .* does not have"),
        ("build-index: {embeddings: e, out: i}\n", {"only": "prepare", "from_stage": "prepare"}, "together"),
        (None, {}, "there is no file .*vlm2rec init"),
    ],
)
def test_a_mistake_is_told_before_any_stage_runs(
    text: str | None, flags: dict[str, str], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "vlm2rec.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        run.run(RunConfig(config=file, **flags))
    assert [path.name for path in tmp_path.iterdir() if path != file] == []


def test_a_stage_that_leaves_work_undone_is_not_taken_for_done(line: tuple[Path, RunConfig]) -> None:
    folder, config = line
    change(folder / "vlm2rec.yaml", "export-items", out="other", dry_run=True)
    with pytest.raises(ArtifactError, match="export-items has ended, and other is not complete"):
        run.run(config)


def test_a_launcher_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="started by a launcher"):
        run.run(RunConfig(config=tmp_path / "vlm2rec.yaml"))


def test_every_stage_is_the_command_with_its_settings() -> None:
    modules = {"prepare": prepare, "finetune": finetune, "export-items": export_items, "evaluate": evaluate}
    for name, module in modules.items():
        assert run.STAGES[name][0].__name__ in vars(module)

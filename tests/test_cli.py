"""The command line: help that costs nothing, settings in their order, mistakes in one paragraph."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import shlex
import subprocess
import sys
import types
import typing
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from sources import parsed

from vlm2rec.embedder.contract import errors
from vlm2rec.embedder.contract.errors import ConfigError
from vlm2rec.pipelines import cli, config, read_config
from vlm2rec.pipelines.what_now import what_now

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "demo": config.DemoConfig,
    "init": config.InitConfig,
    "run": config.RunConfig,
    "prepare": config.PrepareConfig,
    "make-backbone": config.MakeBackboneConfig,
    "finetune": config.FinetuneConfig,
    "export-items": config.ExportConfig,
    "export-users": config.ExportUsersConfig,
    "import-adapter": config.ImportAdapterConfig,
    "import-vectors": config.ImportVectorsConfig,
    "shorten": config.ShortenConfig,
    "verify": config.VerifyConfig,
    "failures": config.FailuresConfig,
    "evaluate": config.EvaluateConfig,
    "probe-images": config.ProbeImagesConfig,
    "train-recommender": config.TrainRecommenderConfig,
    "recommend": config.RecommendConfig,
    "export-recommender": config.ExportRecommenderConfig,
    "build-index": config.BuildIndexConfig,
    "semantic-ids": config.SemanticIdsConfig,
    "search": config.SearchConfig,
    "convert": config.ConvertConfig,
    "study": config.StudyConfig,
    "report": config.ReportConfig,
    "doctor": None,
}
POSITIONAL = {
    ("shorten", "embeddings"),
    ("verify", "embeddings"),
    ("failures", "embeddings"),
    ("convert", "embeddings"),
    ("report", "study"),
}
WITH_CONFIG = {name: cls for name, cls in COMMANDS.items() if cls is not None}
# what commands work with; none of it may be loaded to print a help text
HEAVY = {
    "torch",
    "transformers",
    "polars",
    "pyarrow",
    "faiss",
    "numpy",
    "yaml",
    "PIL",
    "matplotlib",
    "recbole",
}
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def vlm2rec(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`vlm2rec("search", "--k", "3")` runs the command line in this process: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vlm2rec", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The configs that stages were called with; no stage runs."""
    configs: list[Any] = []
    stage = types.SimpleNamespace(run=configs.append, search=configs.append)
    monkeypatch.setattr(cli, "module_of", lambda module: stage)
    return configs


# --- help -------------------------------------------------------------------------------------------------------
def test_help_names_every_command(vlm2rec: Run) -> None:
    code, out, _ = vlm2rec("--help")
    assert code == 0
    listed = {line.split()[1] for line in out.splitlines() if line.startswith("│ ") and len(line.split()) > 2}
    assert set(COMMANDS) <= listed
    command: Any = typer.main.get_command(cli.app)
    assert set(COMMANDS) == set(command.commands)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_of_every_command_has_a_help_text(name: str) -> None:
    command: Any = typer.main.get_command(cli.app)
    parameters = command.commands[name].params
    cls = COMMANDS[name]
    fields = {field.name for field in dataclasses.fields(cls)} if cls else set()
    assert fields <= {parameter.name for parameter in parameters}
    assert [parameter.name for parameter in parameters if not (parameter.help or "").strip()] == []
    assert (command.commands[name].help or "").strip()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command_shows_its_flags(name: str, vlm2rec: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = vlm2rec(name, "--help")
    assert code == 0
    cls = COMMANDS[name]
    for field in dataclasses.fields(cls) if cls else ():
        positional = (name, field.name) in POSITIONAL
        flag = field.name if positional else "--" + field.name.replace("_", "-")
        assert flag.lower() in out.lower()


@pytest.mark.parametrize("name", WITH_CONFIG)
def test_long_help_is_in_groups_with_what_one_needs_first_on_top(name: str) -> None:
    groups = config.groups_of(WITH_CONFIG[name])
    required = {f.name for f in dataclasses.fields(WITH_CONFIG[name]) if f.default is dataclasses.MISSING}
    assert {groups[one] for one in required} <= {config.FIRST}
    most = 12 if len(groups) > 30 else 15
    assert sum(group == config.FIRST for group in groups.values()) <= most
    command: Any = typer.main.get_command(cli.app)
    for parameter in command.commands[name].params:
        assert getattr(parameter, "rich_help_panel", None) == (groups.get(parameter.name, "") or None), parameter.name


def test_a_group_holds_the_settings_below_the_one_that_begins_it() -> None:
    @dataclasses.dataclass(frozen=True)
    class Some:
        a: int = config.setting("A.", 0)
        b: int = config.setting("B.", 0, group="Loss")
        c: int = config.setting("C.", 0)
        d: int = config.setting("D.", 0, group=config.FIRST)

    assert config.groups_of(Some) == {"a": "", "b": "Loss", "c": "Loss", "d": ""}


def test_the_commands_stand_in_groups_on_the_first_help_page(vlm2rec: Run) -> None:
    _, out, _ = vlm2rec("--help")
    titles = [line.split("─ ")[1].split(" ─")[0] for line in out.splitlines() if line.startswith("╭")]
    assert titles == ["Options", cli.TRY, cli.VECTORS, cli.USE, cli.STUDY]


def test_version_is_that_of_the_package(vlm2rec: Run) -> None:
    assert vlm2rec("--version") == (0, f"vlm2rec {metadata.version('vlm2rec')}\n", "")


@pytest.mark.parametrize(
    ("typed", "completed"), [("vlm2rec fine", "finetune"), ("vlm2rec finetune --reduction m", "mean")]
)
def test_the_shell_completes_commands_and_values(
    typed: str, completed: str, vlm2rec: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_VLM2REC_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
    assert vlm2rec()[:2] == (0, f"{completed}\n")


@pytest.mark.parametrize("flag", [(), ("--run",)])
def test_report_takes_its_folder_with_and_without_a_flag(flag: tuple[str, ...], vlm2rec: Run, tmp_path: Path) -> None:
    code, out, err = vlm2rec("report", *flag, str(tmp_path))
    assert (code, out) == (5, "")
    assert f"{tmp_path} is not a study folder" in err


@pytest.mark.parametrize("arguments", [["--help"], ["finetune", "--help"], ["search", "--help"], ["nonsense"]])
def test_help_loads_no_library_that_commands_work_with(arguments: list[str]) -> None:
    code = (
        f"import json, sys\nsys.argv = ['vlm2rec', *{arguments!r}]\n"
        "from vlm2rec.pipelines import cli\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "print('\\n' + json.dumps([name for name in sys.modules if '.' not in name]))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # typer itself takes pydantic to describe a command's flags; the list of commands does without
    heavy = HEAVY | {"pydantic"} if arguments == ["--help"] else HEAVY
    assert set(json.loads(ran.stdout.splitlines()[-1])) & heavy == set()


def test_every_command_has_a_module_with_the_function_it_calls() -> None:
    called: dict[str, tuple[str, str]] = {}
    for function in parsed(Path(cli.__file__)).body:
        for node in ast.walk(function) if isinstance(function, ast.FunctionDef) else ():
            match node:
                case ast.Call(
                    func=ast.Attribute(
                        attr=entry,
                        value=ast.Call(func=ast.Name(id="module_of"), args=[ast.Constant(value=str(module))]),
                    )
                ):
                    called[function.name.replace("_", "-")] = (module, entry)
    assert set(called) == set(COMMANDS)
    for name, (module, entry) in called.items():
        path = ROOT / "pipelines" / f"{module}.py"
        assert path.is_file(), f"{name} calls pipelines/{module}.py, which does not exist"
        defined = {node.name for node in parsed(path).body if isinstance(node, ast.FunctionDef)}
        assert entry in defined, f"{name} calls {module}.{entry}"


# --- settings ---------------------------------------------------------------------------------------------------
REQUIRED = {
    **{"out": "somewhere", "data": "data", "embeddings": "emb", "backbone": "model", "items": "i", "images": "d"},
    "column": "looks",
}


def required_values(cls: type) -> dict[str, Any]:
    values = {
        **REQUIRED,
        "interactions": "x",
        "index": "idx",
        "item": "1",
        "run": "run",
        "file": "v.npy",
        "to": "npy",
        "encoder": "clip",
        "adapter": "lora",
        "histories": "h.parquet",
        "recommender": "run",
    }
    return {f.name: values[f.name] for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}


@pytest.mark.parametrize("cls", WITH_CONFIG.values(), ids=WITH_CONFIG)
def test_the_defaults_pass_their_own_checks_and_come_out_unchanged(cls: type) -> None:
    read = read_config.read_config(cls, None, (), required_values(cls))
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING:
            assert getattr(read, field.name) == field.default
    with pytest.raises(dataclasses.FrozenInstanceError):
        read.out = "elsewhere"


@pytest.mark.parametrize(
    ("file", "override", "flag", "expected"),
    [
        (None, None, None, 10),
        ("4", None, None, 4),
        (None, "5", None, 5),
        (None, None, "6", 6),
        ("4", "5", None, 5),
        ("4", None, "6", 6),
        (None, "5", "6", 6),
        ("4", "5", "6", 6),
    ],
)
def test_a_flag_wins_over_set_and_set_over_the_file_and_the_file_over_the_default(
    file: str | None,
    override: str | None,
    flag: str | None,
    expected: int,
    tmp_path: Path,
    vlm2rec: Run,
    received: list[Any],
) -> None:
    arguments: list[object] = ["search", "--index", "idx", "--item", "1"]
    if file:
        (tmp_path / "settings.yaml").write_text(f"k: {file}\n")
        arguments += ["--config", tmp_path / "settings.yaml"]
    if override:
        arguments += ["--set", f"k={override}"]
    if flag:
        arguments += ["--k", flag]
    assert vlm2rec(*arguments)[0] == 0
    assert received == [config.SearchConfig(index=Path("idx"), item="1", k=expected)]


def test_required_settings_may_come_from_the_file(tmp_path: Path, vlm2rec: Run, received: list[Any]) -> None:
    (tmp_path / "settings.yaml").write_text("index: idx\nitem: B0001\n")
    assert vlm2rec("search", "--config", tmp_path / "settings.yaml")[0] == 0
    assert received == [config.SearchConfig(index=Path("idx"), item="B0001")]


def test_lists_and_switches_are_read_from_flags(vlm2rec: Run, received: list[Any]) -> None:
    where = ("--items", "i", "--interactions", "x", "--images", "d", "--out", "o")
    assert vlm2rec("prepare", *where, "--candidate-seeds", "3,1, 2")[0] == 0
    assert received[-1].candidate_seeds == (3, 1, 2)
    assert (
        vlm2rec("finetune", "--data", "d", "--backbone", "b", "--out", "o", "--no-crtr", "--set", "resume=no")[0] == 0
    )
    assert (received[-1].crtr, received[-1].resume, received[-1].penalty) == (False, False, True)


def test_the_recbole_yaml_is_handed_on_unread(tmp_path: Path, vlm2rec: Run, received: list[Any]) -> None:
    path = tmp_path / "recbole.yaml"
    path.write_text("learning_rate: 0.5\nsome_recbole_key: 1\n")
    assert vlm2rec("train-recommender", "--out", "rec", "--config", path)[0] == 0
    assert received[-1].config == path
    assert received[-1].learning_rate == 1e-3


FIELDS = sorted(
    {(cls.__name__, field.name) for cls in WITH_CONFIG.values() for field in dataclasses.fields(typing.cast(Any, cls))}
)


@given(st.sampled_from(FIELDS), st.integers(0, 30), st.sampled_from("abcdefghijklmnopqrstuvwxyz_"))
def test_a_setting_with_one_wrong_letter_is_answered_with_a_setting_of_that_command(
    field: tuple[str, str], place: int, letter: str
) -> None:
    cls = getattr(config, field[0])
    known = [item.name for item in dataclasses.fields(cls)]
    wrong = field[1][: place % len(field[1])] + letter + field[1][place % len(field[1]) + 1 :]
    if wrong in known or len(wrong) < 4:
        return
    with pytest.raises(ConfigError) as caught:
        read_config.read_config(cls, None, [f"{wrong}=1"], required_values(cls))
    assert f"unknown setting {wrong!r} in --set (did you mean '" in str(caught.value)
    assert any(f"did you mean {name!r}" in str(caught.value) for name in known)


# --- what a command shows ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", COMMANDS)
def test_the_next_command_exists_with_its_flags_and_names_real_paths(name: str) -> None:
    cls = COMMANDS[name]
    more = {"data": "data", "embeddings": "emb"} if name == "train-recommender" else {}
    given = None if cls is None else read_config.read_config(cls, None, (), required_values(cls) | more)
    stages = [{"stage": "build-index", "state": "done", "out": "idx"}]
    returned: Any = {"stages": stages} if name == "run" else Path("page.html") if name == "report" else {}
    told = what_now(name, given, returned)
    if name in ("failures", "convert"):
        assert told is None
        return
    assert told is not None
    if told.startswith("open "):
        return
    program, following, *words = shlex.split(told)
    command: Any = typer.main.get_command(cli.app).commands[following]  # type: ignore[attr-defined]
    flags = {flag for parameter in command.params for flag in parameter.opts}
    assert program == "vlm2rec" and {word for word in words if word.startswith("--")} <= flags
    paths = [str(getattr(given, field)) for field in ("out", "data", "embeddings", "index") if hasattr(given, field)]
    if name not in ("doctor", "init", "run", "make-backbone", "import-adapter"):
        assert any(path in told for path in paths)


def test_a_path_with_spaces_is_quoted_in_the_next_command() -> None:
    given = config.BuildIndexConfig(embeddings=Path("e"), out=Path("my index; rm"))
    assert what_now("build-index", given, {}) == "vlm2rec search --index 'my index; rm' --item ITEM"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_can_be_quiet_and_answer_in_json(
    name: str, vlm2rec: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = types.SimpleNamespace(**dict.fromkeys(("run", "search", "failures"), lambda *config: {"rows": 3}))
    monkeypatch.setattr(cli, "module_of", lambda module: stage)
    cls = COMMANDS[name]
    values = {} if cls is None else required_values(cls)
    given: list[str] = []
    for key, value in values.items():
        given += [value] if (name, key) in POSITIONAL else [f"--{key.replace('_', '-')}", value]
    code, out, err = vlm2rec(name, *given, "--quiet", "--json")
    told = json.loads(out)
    assert (code, err, told["command"], told["ok"], told["result"]) == (0, "", name, True, {"rows": 3})
    assert vlm2rec(name, *given, "--quiet") == (0, "", "")


def test_lists_are_given_by_commas_or_by_the_flag_again(vlm2rec: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[config.StudyConfig] = []
    stage = types.SimpleNamespace(run=lambda given: read.append(given) or {})
    monkeypatch.setattr(cli, "module_of", lambda module: stage)
    assert (
        vlm2rec("study", "--out", "s", "--demo", "--seeds", "0,2", "--methods", "ID", "--methods", "VLM2Rec, SFT,")[0]
        == 0
    )
    assert (read[0].seeds, [name.strip() for name in read[0].methods]) == ((0, 2), ["ID", "VLM2Rec", "SFT"])


def test_an_error_in_json_has_the_code_of_the_process(vlm2rec: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    stage_that_raises(monkeypatch, errors.ArtifactError("damaged", "whole", "again"))
    code, out, err = vlm2rec(*SEARCH, "--json", "--quiet")
    assert (code, json.loads(out)["exit_code"]) == (5, 5)
    assert err == "vlm2rec: damaged. Expected: whole. To fix it: again.\n"
    code, out, err = vlm2rec("search", "--json")  # settings are read before the command begins
    assert (code, json.loads(out)["error"]["found"]) == (2, "--index is missing")


# --- mistakes ---------------------------------------------------------------------------------------------------
SEARCH = ("search", "--index", "idx", "--item", "1")
FINETUNE = ("finetune", "--data", "d", "--backbone", "b", "--out", "o")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("search", "--item", "1"), "--index is missing"),
        ((*SEARCH, "--set", "kk=3"), "did you mean 'k'"),
        ((*SEARCH, "--set", "k"), "has no '='"),
        ((*SEARCH, "--set", "k=many"), "setting k = 'many' is not usable"),
        ((*SEARCH, "--k", "0"), "setting k = 0 is not usable"),
        (("search", "--index", "x", "--text", "\udcff"), "setting text = '\\udcff' is not UTF-8"),
        (("search", "--index", "x", "--history", "7,\udcff"), "setting history = '\\udcff' is not UTF-8"),
        ((*SEARCH, "--config", "/does/not/exist.yaml"), "does not exist"),
        ((*FINETUNE, "--set", "loss=sgd"), "one of vlm2rec, sft"),
        ((*FINETUNE, "--lora-dropout", "1.5"), "setting lora_dropout = 1.5"),
        ((*FINETUNE, "--tau-wpcl", "0"), "setting tau_wpcl = 0.0"),
        ((*FINETUNE, "--tau-wpcl", "-1"), "setting tau_wpcl = -1.0"),
        (
            (
                "prepare",
                "--candidate-seeds",
                "1,x",
                "--items",
                "i",
                "--interactions",
                "x",
                "--images",
                "d",
                "--out",
                "o",
            ),
            "candidate_seeds",
        ),
    ],
)
def test_a_wrong_setting_is_one_paragraph_and_exit_code_2(
    arguments: tuple[str, ...], message: str, vlm2rec: Run, received: list[Any]
) -> None:
    code, out, err = vlm2rec(*arguments)
    assert (code, out, received) == (2, "", [])
    assert message in err
    assert err.startswith("vlm2rec: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("nope",),
        ("search", "--kk", "3"),
        ("search", "--k", "three"),
        ("export-items", "--dtype", "float64"),
        ("verify", "a", "b"),
    ],
)
def test_a_word_the_command_line_does_not_know_is_exit_code_2_without_a_traceback(
    arguments: tuple[str, ...], vlm2rec: Run, received: list[Any]
) -> None:
    code, out, err = vlm2rec(*arguments)
    assert (code, out, received) == (2, "", [])
    assert "Error" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("kk: 3\n", "did you mean 'k'"),
        ("- 1\n", "holds a list"),
        ("k: [\n", "is not YAML"),
        ("k: \xe9\n", "is not YAML"),
    ],
)
def test_a_wrong_settings_file_is_named(
    content: str, message: str, tmp_path: Path, vlm2rec: Run, received: list[Any]
) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(content, encoding="latin-1")
    code, _, err = vlm2rec(*SEARCH, "--config", path)
    assert (code, received) == (2, [])
    assert message in err
    assert str(path) in err
    assert "Traceback" not in err


def test_an_empty_settings_file_changes_nothing(tmp_path: Path, vlm2rec: Run, received: list[Any]) -> None:
    (tmp_path / "settings.yaml").write_text("# nothing yet\n")
    assert vlm2rec(*SEARCH, "--config", tmp_path / "settings.yaml")[0] == 0
    assert received[-1].k == 10


# --- commands that had another name -----------------------------------------------------------------------------
@pytest.mark.parametrize("flags", [(), ("--help",), ("--data", "d", "--no-such-flag", "1")])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("encode-frozen", "export-items --encoder FOLDER"),
        ("encode-prompted", "export-items --strategy question"),
        ("import-embeddings", "import-vectors"),
    ],
)
def test_an_old_name_is_answered_with_the_new_one(old: str, new: str, flags: tuple[str, ...], vlm2rec: Run) -> None:
    assert vlm2rec(old, *flags) == (2, "", f"vlm2rec: {old} is now `{new}`\n")


def test_old_names_are_not_in_the_help(vlm2rec: Run) -> None:
    _, out, _ = vlm2rec("--help")
    assert set(cli.RENAMED) == {"encode-frozen", "encode-prompted", "import-embeddings"}
    assert not [name for name in cli.RENAMED if name in out]


# --- exit codes -------------------------------------------------------------------------------------------------
def stage_that_raises(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run(_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "module_of", lambda module: types.SimpleNamespace(search=run))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigError, 2),
        (errors.DataError, 3),
        (errors.ModelError, 4),
        (errors.ArtifactError, 5),
        (errors.FailureLimitError, 6),
        (errors.MissingDependencyError, 7),
    ],
)
def test_each_kind_of_error_has_its_documented_exit_code(
    error: type[errors.Vlm2RecError], code: int, vlm2rec: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage_that_raises(monkeypatch, error("this was found", "that was expected", "do something"))
    assert vlm2rec(*SEARCH) == (
        code,
        "",
        "vlm2rec: this was found. Expected: that was expected. To fix it: do something.\n",
    )
    assert f"{code} " in cli.app.info.epilog
    assert f"{code} " in str(cli.__doc__)


def test_a_bug_is_called_a_bug(vlm2rec: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLM2REC_TRACEBACK", raising=False)
    stage_that_raises(monkeypatch, KeyError("vectors"))
    code, out, err = vlm2rec(*SEARCH)
    assert (code, out) == (1, "")
    assert "unexpected KeyError: 'vectors'" in err
    assert "VLM2REC_TRACEBACK=1" in err
    assert "Traceback (" not in err


def test_a_bug_shows_its_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM2REC_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["vlm2rec", *SEARCH])
    stage_that_raises(monkeypatch, KeyError("vectors"))
    with pytest.raises(KeyError):
        cli.main()


def test_ctrl_c_says_how_to_go_on(vlm2rec: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    stage_that_raises(monkeypatch, KeyboardInterrupt())
    code, out, err = vlm2rec(*SEARCH)
    assert (code, out) == (130, "")
    assert "run the same command again" in err


def test_a_broken_pipe_to_a_worker_is_not_taken_for_success(vlm2rec: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    stage_that_raises(monkeypatch, BrokenPipeError(32, "Broken pipe"))
    code, _, err = vlm2rec(*SEARCH)
    assert code == 1
    assert "a worker process has ended" in err


@pytest.mark.parametrize("arguments", [["--help"], ["doctor"]])
def test_a_reader_that_went_away_is_not_an_error(arguments: list[str], tmp_path: Path) -> None:
    code = (
        "import sys, types\n"
        "from vlm2rec.pipelines import cli\n"
        "cli.module_of = lambda module: types.SimpleNamespace(run=lambda: print('a result'))\n"
        f"sys.argv = ['vlm2rec', *{arguments!r}]\n"
        "cli.main()\n"
    )
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ran = subprocess.run(
            [sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(writer)
    assert ran.stderr == ""
    if arguments == ["doctor"]:
        assert ran.returncode == 0

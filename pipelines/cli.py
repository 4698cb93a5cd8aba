"""The command line. Every flag is a field of the command's config in `config.py`. Heavy imports wait for the call.

Results go to stdout, everything else to stderr. Exit codes:
0 done · 1 a bug · 2 a setting · 3 input data · 4 backbone or adapter · 5 a damaged or unfit folder ·
6 too many failed items · 7 a missing library · 130 / 143 interrupted.
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import os
import select
import signal
import sys
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from vlm2rec.embedder.contract.errors import Vlm2RecError
from vlm2rec.embedder.contract.printable import printable, without_keys
from vlm2rec.embedder.contract.publish import disk_is_full, full_disk
from vlm2rec.embedder.contract.storage import Location
from vlm2rec.pipelines import config as settings
from vlm2rec.pipelines import read_config
from vlm2rec.pipelines.commands import module_of

app = typer.Typer(
    name="vlm2rec",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Item embeddings for recommenders from a vision-language model fine-tuned on user histories.",
    epilog="Exit codes: 0 done, 1 a bug, 2 a setting, 3 input data, 4 backbone or adapter, 5 a damaged or unfit"
    " folder, 6 too many failed items, 7 a missing library, 130/143 interrupted.",
)

# the groups of the commands on the first help page
TRY = "Try it"
VECTORS = "From a catalogue to vectors"
USE = "Use the vectors"
STUDY = "Compare methods"

RENAMED = {
    "encode-frozen": "export-items --encoder FOLDER",
    "encode-prompted": "export-items --strategy question",
    "import-embeddings": "import-vectors",
}
"""Commands that had another name before."""


def _part(hint: Any) -> Any:
    """Return the type of a field's value without None and without its bounds."""
    part = next(part for part in read_config._union_parts(hint) if part is not type(None))
    return typing.get_args(part)[0] if typing.get_origin(part) is Annotated else part


def _flag_type(hint: Any) -> Any:
    """Return the type of the command-line flag for a config field: its own, without None, bounds and tuples."""
    part = _part(hint)
    if typing.get_origin(part) is tuple:
        return list[str]  # "0,1,2", or the flag several times
    return str if part == Location else part  # "s3://bucket/folder", whose slashes a Path would lose


def _default_text(value: Any) -> str | None:
    if value is None or value is dataclasses.MISSING:
        return None
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or None
    return str(value)


SHOWN: list[tuple[str, Any, Any]] = [
    (
        "quiet",
        bool,
        typer.Option("--quiet", help="Print only errors and the final summary.", show_default=False),
    ),
    (
        "as_json",
        bool,
        typer.Option(
            "--json", help="Print the summary as one JSON object on stdout, all else on stderr.", show_default=False
        ),
    ),
]
"""What every command shows; `console.told_by` says what these mean."""


def _tell(name: str, read: Callable[[], Any], stage: Callable[[Any], Any], quiet: bool, as_json: bool) -> None:
    """Run a command; what it says is shown as its flags want it, and a line at the end says what comes next."""
    from vlm2rec.pipelines.console import told_by
    from vlm2rec.pipelines.what_now import what_now

    with told_by(name, quiet=quiet, as_json=as_json) as end:
        config = read()
        returned = stage(config)
        sys.stdout.flush()
        end(returned, what_now(name, config, returned))


def command(
    cls: type, positional: str | None = None, own_config_key: bool = False, panel: str = USE
) -> Callable[[Callable[[Any], Any]], Any]:
    """Register a function of one config as a command whose flags are the config's fields.

    Args:
        cls: The config dataclass.
        positional: Field that takes its value without a flag.
        own_config_key: `--config` is a field of the dataclass (a RecBole YAML), not a file of our settings.
        panel: The group of the command on the first help page.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    groups = settings.groups_of(cls)
    parameters = []
    for item in dataclasses.fields(cls):
        kind: Any = _flag_type(hints[item.name])
        required = item.default is dataclasses.MISSING
        default = _default_text(item.default)
        address = " Also s3://bucket/folder." if kind is str and _part(hints[item.name]) == Location else ""
        text = (
            item.metadata["help"] + address + (" Required." if required else f" Default: {default}." if default else "")
        )
        if item.name == positional:
            option: Any = typer.Argument(help=text, show_default=False)
        else:
            name = "--" + item.name.replace("_", "-")
            name = f"{name}/--no-{name[2:]}" if kind is bool else name
            choices = item.metadata["choices"]
            metavar = f"<{'|'.join(choices)}>" if choices else "<value,...>" if kind == list[str] else None
            also = [f"--{item.metadata['also']}"] if item.metadata["also"] else []
            group = groups[item.name] or None
            option = typer.Option(name, *also, help=text, show_default=False, metavar=metavar, rich_help_panel=group)
        parameters.append(
            inspect.Parameter(
                item.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[kind | None, option],
            )
        )
    extra: list[tuple[str, Any, Any]] = [
        *SHOWN,
        (
            "overrides",
            list[str] | None,
            typer.Option("--set", help="key=value; may be given several times.", show_default=False),
        ),
    ]
    if not own_config_key:
        extra.append(
            (
                "config_file",
                Path | None,
                typer.Option("--config", help="YAML file of these settings.", show_default=False),
            )
        )
    for name, hint, option in extra:
        unset = False if hint is bool else None
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=unset, annotation=Annotated[hint, option])
        )

    def register(stage: Callable[[Any], Any]) -> Callable[..., None]:
        name = stage.__name__.replace("_", "-")

        def run(**flags: Any) -> None:
            quiet, as_json = flags.pop("quiet"), flags.pop("as_json")
            file = flags.pop("config_file", None)
            overrides = flags.pop("overrides", None) or ()
            for item in dataclasses.fields(cls):
                if isinstance(item.default, tuple) and flags.get(item.name) is not None:
                    flags[item.name] = [part for text in flags[item.name] for part in text.split(",") if part.strip()]
            with _own_endings():
                _tell(name, lambda: read_config.read_config(cls, file, overrides, flags), stage, quiet, as_json)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__doc__ = stage.__doc__
        app.command(name=name, rich_help_panel=panel)(run)
        return run

    return register


@contextmanager
def _own_endings() -> Iterator[None]:
    # typer would handle both itself: an interrupt without a message, a closed stdout (`| head`) as a failure
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("vlm2rec: interrupted; run the same command again to continue.", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError as error:
        if not _reader_gone():
            raise RuntimeError("a worker process has ended") from error  # the broken pipe was not stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None


def _reader_gone() -> bool:
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
    except (AttributeError, OSError, ValueError):
        return False
    return any(state & select.POLLERR for _, state in poll.poll(0))


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"vlm2rec {version('vlm2rec')}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


@command(settings.DemoConfig, panel=TRY)
def demo(config: settings.DemoConfig) -> Any:
    """Run every stage on a drawn catalogue: a page of neighbours within a minute or so, all results a little later."""
    return module_of("demo").run(config)


@command(settings.InitConfig, panel=VECTORS)
def init(config: settings.InitConfig) -> Any:
    """Write vlm2rec.yaml, with comments: the settings of the whole pipeline, for `vlm2rec run`."""
    return module_of("init").run(config)


@command(settings.RunConfig, panel=VECTORS, own_config_key=True)
def run(config: settings.RunConfig) -> Any:
    """Run the stages of vlm2rec.yaml one after the other; what is done is skipped, so the same command continues."""
    return module_of("run").run(config)


@command(settings.PrepareConfig, panel=VECTORS)
def prepare(config: settings.PrepareConfig) -> Any:
    """Turn items, interactions and images into a dataset folder."""
    return module_of("prepare").run(config)


@command(settings.MakeBackboneConfig, panel=TRY)
def make_backbone(config: settings.MakeBackboneConfig) -> Any:
    """Build and briefly train a small local Qwen2.5-VL, for trying things out."""
    return module_of("make_backbone").run(config)


@command(settings.FinetuneConfig, panel=VECTORS)
def finetune(config: settings.FinetuneConfig) -> Any:
    """Fine-tune an adapter on user histories (VLM2Rec or plain SFT), or on items (SDA).

    On N GPUs: torchrun --no-python --nproc-per-node N vlm2rec finetune ...
    """
    return module_of("finetune").run(config)


@command(settings.ExportConfig, panel=VECTORS)
def export_items(config: settings.ExportConfig) -> Any:
    """Encode every item once: fused, text and image vectors in Parquet.

    The encoder is a fine-tuned or plain backbone, a backbone with other prompts (--strategy), or a frozen --encoder.
    """
    return module_of("export_items").run(config)


@command(settings.ExportUsersConfig, panel=VECTORS)
def export_users(config: settings.ExportUsersConfig) -> Any:
    """Make a vector from every user's history, for users and items that were never trained on too."""
    return module_of("export_users").run(config)


@command(settings.ImportAdapterConfig, panel=VECTORS)
def import_adapter(config: settings.ImportAdapterConfig) -> Any:
    """Turn another program's LoRA adapter (PEFT, VLM2Vec, LLaMA-Factory) into an adapter folder of vlm2rec."""
    return module_of("import_adapter").run(config)


@command(settings.ImportVectorsConfig, panel=VECTORS)
def import_vectors(config: settings.ImportVectorsConfig) -> Any:
    """Turn your own vectors (Parquet, CSV, npy) into an embeddings folder."""
    return module_of("import_vectors").run(config)


@command(settings.ShortenConfig, panel=VECTORS, positional="embeddings")
def shorten(config: settings.ShortenConfig) -> Any:
    """Copy an embeddings folder with fewer dimensions (--dim) or a smaller number format (--precision)."""
    return module_of("shorten").run(config)


@command(settings.VerifyConfig, panel=VECTORS, positional="embeddings")
def verify(config: settings.VerifyConfig) -> Any:
    """Check an embeddings folder against its manifest."""
    return module_of("verify").run(config)


@command(settings.FailuresConfig, panel=VECTORS, positional="embeddings")
def failures(config: settings.FailuresConfig) -> Any:
    """List the items that failed, and why, as CSV on stdout."""
    return module_of("verify").failures(config)


@command(settings.EvaluateConfig, panel=VECTORS)
def evaluate(config: settings.EvaluateConfig) -> Any:
    """Task 1: rank items by similarity to the user's vector."""
    return module_of("evaluate").run(config)


@command(settings.TrainRecommenderConfig, own_config_key=True)
def train_recommender(config: settings.TrainRecommenderConfig) -> Any:
    """Task 2: train SASRec, GRU4Rec or BERT4Rec (RecBole), VBPR, FREEDOM, LATTICE or SLMRec, from embeddings or ids."""
    return module_of("train_recommender").run(config)


@command(settings.RecommendConfig)
def recommend(config: settings.RecommendConfig) -> Any:
    """Write the first k items of every user: by vectors, by an index, or by a trained recommender."""
    return module_of("recommend").run(config)


@command(settings.ExportRecommenderConfig)
def export_recommender(config: settings.ExportRecommenderConfig) -> Any:
    """Write the item table of a trained recommender as an embeddings folder."""
    return module_of("export_recommender").run(config)


@command(settings.BuildIndexConfig)
def build_index(config: settings.BuildIndexConfig) -> Any:
    """Build a FAISS index over one view and measure its recall."""
    return module_of("build_index").run(config)


@command(settings.SearchConfig)
def search(config: settings.SearchConfig) -> Any:
    """Print the nearest neighbours of an item."""
    return module_of("build_index").search(config)


@command(settings.SemanticIdsConfig)
def semantic_ids(config: settings.SemanticIdsConfig) -> Any:
    """Give every item a semantic id: a few small integers, which generative recommenders such as TIGER predict."""
    return module_of("semantic_ids").run(config)


@command(settings.ConvertConfig, positional="embeddings")
def convert(config: settings.ConvertConfig) -> Any:
    """Write vectors (or the model) for another tool: MMRec, cornac, RecBole, npy, Lance, sentence-transformers."""
    return module_of("convert").run(config)


@command(settings.ProbeImagesConfig, panel=STUDY)
def probe_images(config: settings.ProbeImagesConfig) -> Any:
    """Measure whether a linear classifier can predict a column of the items from the images."""
    return module_of("probe_images").run(config)


@command(settings.StudyConfig, panel=STUDY, own_config_key=True)
def study(config: settings.StudyConfig) -> Any:
    """Run many methods with several seeds, and draw the tables and figures of the paper from the results."""
    return module_of("study").run(config)


@command(settings.ReportConfig, panel=STUDY, positional="study")
def report(config: settings.ReportConfig) -> Any:
    """Draw the page of a study or a demo again, only from its Parquet files."""
    return module_of("report").run(config)


@app.command(rich_help_panel=TRY)
def doctor(
    quiet: Annotated[bool, SHOWN[0][2]] = False,
    as_json: Annotated[bool, SHOWN[1][2]] = False,
) -> None:
    """Check Python, libraries, device and disk, and export a few generated items."""
    with _own_endings():
        _tell("doctor", lambda: None, lambda _: module_of("doctor").run(), quiet, as_json)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main() -> None:
    """Run the command line; turn every error into one paragraph and a documented exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a title that the terminal's encoding lacks is shown as \u00fc
            stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, _terminate)
    if (old := sys.argv[1] if len(sys.argv) > 1 else "") in RENAMED:
        print(f"vlm2rec: {old} is now `{RENAMED[old]}`", file=sys.stderr)
        raise SystemExit(2)
    try:
        app(prog_name=app.info.name)
    except Vlm2RecError as error:
        _end(error)
    except Exception as error:
        if os.environ.get("VLM2REC_TRACEBACK"):
            raise
        if disk_is_full(error):
            _end(full_disk(_file_of(error), error))
        _complain(
            f"unexpected {type(error).__name__}: {error}. This is a bug: please report it, with the output of the same"
            " command under VLM2REC_TRACEBACK=1."
        )
        raise SystemExit(1) from None


def _end(error: Vlm2RecError) -> NoReturn:
    _complain(str(error))
    raise SystemExit(error.exit_code) from None


def _complain(text: str) -> None:
    """Print a message in which nothing from outside acts on the terminal, and no address shows its keys."""
    print(without_keys(printable(f"vlm2rec: {text}")), file=sys.stderr)


def _file_of(error: Exception) -> Path | None:
    name = getattr(error, "filename", None)
    return Path(os.fsdecode(name)) if isinstance(name, str | bytes) else None

"""`vlm2rec report`: draws the page of a study or a demo again, only from its Parquet files."""

from __future__ import annotations

from pathlib import Path

from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError
from vlm2rec.pipelines.config import ReportConfig
from vlm2rec.pipelines.console import summary
from vlm2rec.pipelines.experiments.results import RESULTS_FILE
from vlm2rec.pipelines.reporting import page


def run(config: ReportConfig) -> Path:
    """Write the page of a study folder, and its figures to `figures/` beside the page; return the page's path.

    Raises:
        ArtifactError: the folder is not a study folder, or its tables are incomplete.
        ConfigError: no folder is given, or `out` is a folder.
    """
    folder = _folder(config)
    if config.out is not None and config.out.is_dir():
        fix = f"give --out {config.out / page.PAGE_FILE}"
        raise ConfigError(f"--out {config.out} is a folder", "the name of an HTML file", fix)
    if not (folder / RESULTS_FILE).is_file():
        raise ArtifactError(
            f"{folder} is not a study folder: it has no {RESULTS_FILE}"
            if folder.is_dir()
            else f"{folder} is not a folder",
            "a folder that `vlm2rec study` or `vlm2rec demo` wrote",
            "give such a folder, or run one of these commands first",
        )
    out = page.run(folder, config.out)
    page.print_verdicts(out)
    summary("Report", {"page": f"{out}  {out.stat().st_size / 1e6:.1f} MB", "figures": out.parent / page.FIGURES})
    return out


def _folder(config: ReportConfig) -> Path:
    named = {folder for folder in (config.study, config.run) if folder is not None}
    if len(named) != 1:
        raise ConfigError(
            "no folder is given" if not named else f"{config.study} and --run {config.run} are two folders",
            "one folder of a study or a demo",
            "run `vlm2rec report FOLDER`",
        )
    return named.pop()

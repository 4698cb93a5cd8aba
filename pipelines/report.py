"""`vlm2rec report`: the page of a study or a demo, drawn again from its Parquet files alone."""

from __future__ import annotations

from pathlib import Path

from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError
from vlm2rec.pipelines.config import ReportConfig
from vlm2rec.pipelines.console import summary
from vlm2rec.pipelines.experiments.results import RESULTS_FILE
from vlm2rec.pipelines.reporting import page


def run(config: ReportConfig) -> Path:
    """Write the page of a study folder, and its figures in `figures/` beside it; return its path.

    Raises:
        ArtifactError: the folder is no study's, or its tables are incomplete.
        ConfigError: no folder is named, or the page cannot be written where it was asked for.
    """
    folder = _folder(config)
    if config.out is not None and config.out.is_dir():
        fix = f"give --out {config.out / page.PAGE_FILE}"
        raise ConfigError(f"--out {config.out} is a folder", "the name of an HTML file", fix)
    if not (folder / RESULTS_FILE).is_file():
        raise ArtifactError(
            f"{folder} is no study: it holds no {RESULTS_FILE}" if folder.is_dir() else f"{folder} is not a folder",
            "a folder that `vlm2rec study` or `vlm2rec demo` has written",
            "name such a folder, or run one of them first; a study draws its page after the first round of runs",
        )
    out = page.run(folder, config.out)
    summary("Report", {"page": f"{out}  {out.stat().st_size / 1e6:.1f} MB", "figures": out.parent / page.FIGURES})
    return out


def _folder(config: ReportConfig) -> Path:
    named = {folder for folder in (config.study, config.run) if folder is not None}
    if len(named) != 1:
        raise ConfigError(
            "no folder is named" if not named else f"{config.study} and --run {config.run} are two folders",
            "one folder of a study or a demo",
            "say `vlm2rec report FOLDER`",
        )
    return named.pop()

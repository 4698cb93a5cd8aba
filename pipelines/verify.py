"""`vlm2rec verify`: is an embeddings folder what its manifest says?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vlm2rec.embedder import schema
from vlm2rec.embedder.errors import ArtifactError
from vlm2rec.embedder.verify import effective_ranks, verify
from vlm2rec.pipelines import console
from vlm2rec.pipelines.config import VerifyConfig

SHOWN = 5


def run(config: VerifyConfig) -> None:
    """Check every file of an embeddings folder; vectors that hardly differ from each other are only a warning.

    Raises:
        ArtifactError: the folder is unfinished, or something in it is wrong.
    """
    folder = config.embeddings
    if isinstance(folder, Path) and not folder.is_dir():
        raise ArtifactError(f"{folder} is not a folder", "an embeddings folder", "check the path")
    problems = verify(folder)
    if problems:
        for problem in problems:
            console.log.print(f"{problem}", style="red", markup=False)
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ArtifactError(
            f"{folder} has {len(problems)} problems: {'; '.join(map(str, problems[:SHOWN]))}{more}",
            "the files as export-items wrote them",
            "run the command that wrote it (`vlm2rec export-items`, for one) again: it writes damaged shards"
            " anew; remove files that do not belong there",
        )
    manifest = schema.read_manifest(folder)
    ranks = effective_ranks(folder)
    console.summary(
        f"{folder}: no problem",
        {
            "items": f"{manifest['num_items']:,} in {len(manifest['shards'])} shards",
            **{status: f"{count:,}" for status, count in manifest["counts"].items() if count},
            "vectors": f"{', '.join(manifest['views'])}: {manifest['dtype']}[{manifest['dim']}]",
            **{f"effective rank, {view}": f"{rank:.1f}" for view, rank in ranks.items()},
        },
    )
    warn_of_collapse(ranks)


def warn_of_collapse(ranks: Mapping[str, float]) -> None:
    """Say which views, of those with these effective ranks, hold vectors that hardly differ."""
    for view, rank in ranks.items():
        if rank < 2:
            console.log.print(
                f"warning: the {view} vectors hardly differ from item to item (effective rank {rank:.1f}):"
                " the model may have collapsed",
                style="yellow",
                markup=False,
            )

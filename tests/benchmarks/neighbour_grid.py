"""The picture of README: for a few items of a study or a demo, what is nearest by text, by image and by both.

python tests/benchmarks/neighbour_grid.py STUDY OUT.jpg [--queries P0001 P0002] [--method VLM2Rec]

It reads the tables that the study left: titles, thumbnails and neighbours. It also prints how often neighbours share an
attribute, by view.
"""

from __future__ import annotations

import argparse
import io
import textwrap
from pathlib import Path

import matplotlib as mpl
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from vlm2rec.pipelines.reporting.style import INK, MUTED, STYLE

VIEWS = {"text": "by text", "image": "by image", "fused": "by both"}
NEAREST = 3


def read(study: Path, method: str) -> tuple[pl.DataFrame, dict[str, tuple[str, bytes]]]:
    """Return the neighbours of one method, and title and thumbnail of every item that is shown."""
    found = pl.read_parquet(study / "neighbours.parquet").filter(pl.col("method") == method)
    pictures = pl.read_parquet(study / "pictures.parquet")
    return found, {item: (title, picture) for item, title, picture in pictures.iter_rows()}


def draw(found: pl.DataFrame, pictures: dict[str, tuple[str, bytes]], queries: list[str]) -> Figure:
    """Draw a block for each query, side by side: the query, and a row of its neighbours for each view."""
    columns = 1 + NEAREST
    figure = Figure(figsize=(1.35 * columns * len(queries), 1.55 * len(VIEWS)), facecolor="white")
    axes = figure.subplots(len(VIEWS), columns * len(queries))
    for axis in axes.flat:
        axis.set_axis_off()
    for number, query in enumerate(queries):
        block = axes[:, number * columns : (number + 1) * columns]
        _show(block[1, 0], *pictures[query])
        for row, (view, words) in zip(block, VIEWS.items(), strict=True):
            near = found.filter(pl.col("query") == query, pl.col("view") == view).unique("rank").sort("rank")
            for axis, item in zip(row[1:], near["item_id"].to_list()[:NEAREST], strict=True):
                _show(axis, *pictures[item])
            row[1].annotate(
                words, (-0.06, 0.5), xycoords="axes fraction", rotation=90, va="center", ha="right", color=MUTED
            )
    return figure


def _show(axis: Axes, title: str, picture: bytes) -> None:
    axis.imshow(Image.open(io.BytesIO(picture)))
    axis.set_title("\n".join(textwrap.wrap(title, 20)[:2]), fontsize=7, loc="center", pad=3, color=INK)


def main() -> None:
    """Draw the picture, and print the table beside it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--method", default="VLM2Rec")
    parser.add_argument("--queries", nargs="*", default=[])
    given = parser.parse_args()
    found, pictures = read(given.study, given.method)
    queries = given.queries or found["query"].unique(maintain_order=True).to_list()[:2]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        figure = draw(found, pictures, queries)
        figure.savefig(given.out, dpi=130, bbox_inches="tight", pad_inches=0.08, pil_kwargs={"quality": 85})
    common = pl.read_parquet(given.study / "common.parquet")
    common = common.filter(pl.col("method") == given.method, pl.col("attribute").is_not_null())
    print(common.pivot("view", index=["attribute", "chance"], values="share"))


if __name__ == "__main__":
    main()

"""A whole export in small, for `vlm2rec doctor`: a drawn catalogue, a random backbone, vectors on disk, verified."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from vlm2rec.embedder import schema, verify
from vlm2rec.pipelines import export_items, make_backbone, prepare
from vlm2rec.pipelines.catalogue import draw_catalogue
from vlm2rec.pipelines.config import ExportConfig, MakeBackboneConfig, PrepareConfig


def main() -> None:
    """Export, and say in one line on stderr, the last one, what came out; a fault ends the process with an error."""
    with tempfile.TemporaryDirectory(prefix="vlm2rec-doctor-") as folder:
        print(export(Path(folder)), file=sys.stderr)


def export(folder: Path) -> str:
    """Export twenty items with a backbone of random weights, as the commands would by default."""
    drawn, data, backbone, out = (folder / name for name in ("drawn", "data", "backbone", "embeddings"))
    draw_catalogue(drawn, products=20, users=20, seed=0)
    items, images = drawn / "items.parquet", drawn / "images"
    interactions = drawn / "interactions.parquet"
    prepare.run(PrepareConfig(items=items, interactions=interactions, images=images, out=data, core=1, candidates=2))
    random = MakeBackboneConfig(
        items=items, images=images, out=backbone, hidden_size=64, layers=2, vocabulary=600, max_steps=0
    )
    make_backbone.run(random)
    started = time.perf_counter()
    export_items.run(ExportConfig(data=data, backbone=str(backbone), out=out))
    seconds = time.perf_counter() - started
    if problems := verify.verify(out):
        raise SystemExit(str(problems[0]))
    manifest = schema.read_manifest(out)
    return f"{manifest['num_items']} items in {seconds:.1f} s, {manifest['settings']['dtype']}, verified"

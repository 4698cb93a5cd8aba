"""An export whose catalogue has changed: what is still right is kept, the rest is made, and nothing is mixed up."""

from __future__ import annotations

import csv
import io
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chairs import ITEMS, ShadeEncoder, edit_items, parts, retitle, rows_of, write_dataset
from children import Forked
from PIL import Image

from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError
from vlm2rec.embedder.encoders.item_encoder import EncodedItems
from vlm2rec.embedder.export.export import export
from vlm2rec.embedder.export.reuse import Reuse
from vlm2rec.embedder.export.verify import verify
from vlm2rec.pipelines import verify as verify_command
from vlm2rec.pipelines.config import FailuresConfig

BROKEN = (3, 11)


def square(folder: Path, row: int, shade: int = 90) -> None:
    """Put a grey image in the place of an item's image."""
    Image.fromarray(np.full((60, 60, 3), shade, np.uint8)).save(folder / "images" / f"{row}.png")


def append_items(folder: Path, items: int) -> Dataset:
    """Add items after those that are there."""
    old = pq.read_table(folder / "items.parquet")
    new = {
        "item_id": [f"{row:03d}" for row in range(old.num_rows, items)],
        "title": [f"new chair {row}" for row in range(old.num_rows, items)],
        "image_path": [f"{row}.png" for row in range(old.num_rows, items)],
    }
    for row in range(old.num_rows, items):
        square(folder, row, row)
    pq.write_table(pa.concat_tables([old, pa.table(new)]), folder / "items.parquet")
    return Dataset(folder)


def exported(data: Dataset, out: Path, **choices: Any) -> list[str]:
    """Export in shards of eight, and return the titles that were encoded."""
    encoder = ShadeEncoder()
    export(data, out, encoder.fingerprint, lambda: encoder, shard_size=8, **choices)
    assert verify(out) == []
    return [title for call in encoder.calls for title in call]


# --- appended items -----------------------------------------------------------------------------------------
def test_fault_15_extend_keeps_the_shards_and_encodes_the_new_items_alone(tmp_path: Path) -> None:
    folder, out = write_dataset(tmp_path / "data"), tmp_path / "out"
    exported(Dataset(folder), out)
    before = parts(out)
    data = append_items(folder, 33)
    assert exported(data, out, reuse=Reuse(extend=True)) == [f"new chair {row}" for row in range(ITEMS, 33)]
    assert {name: parts(out)[name] for name in before} == before
    assert [row["item_id"] for row in rows_of(out)] == data.item_ids
    exported(data, tmp_path / "whole")
    assert rows_of(out) == rows_of(tmp_path / "whole")
    assert exported(data, out) == []  # the folder is what the same command without the flag goes on with


def test_without_the_flag_appended_items_are_refused_with_the_flag_s_name(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data")
    exported(Dataset(folder), tmp_path / "out")
    with pytest.raises(ArtifactError, match=r"items was 20, now 21.*--extend encodes them"):
        exported(append_items(folder, 21), tmp_path / "out")
    with pytest.raises(ArtifactError, match="--extend"):
        exported(Dataset(folder), tmp_path / "out", reuse=Reuse(retry_failed=True))


def test_extend_refuses_items_that_are_not_the_first_ones(tmp_path: Path) -> None:
    folder, out = write_dataset(tmp_path / "data"), tmp_path / "out"
    exported(Dataset(folder), out)
    data = edit_items(folder, lambda table: {name: values[::-1] for name, values in table.items()})
    with pytest.raises(ArtifactError, match="are not the first 20"):
        exported(data, out, reuse=Reuse(extend=True))
    fewer = edit_items(folder, lambda table: {name: values[:10] for name, values in table.items()})
    with pytest.raises(ArtifactError, match="are not the first 20 of the dataset's 10"):
        exported(fewer, out, reuse=Reuse(extend=True))


def test_extend_refuses_titles_that_have_changed_meanwhile(tmp_path: Path) -> None:
    folder, out = write_dataset(tmp_path / "data"), tmp_path / "out"
    exported(Dataset(folder), out)
    edit_items(folder, lambda table: {**table, "title": ["another", *table["title"][1:]]})
    data = append_items(folder, 22)
    with pytest.raises(ArtifactError, match=r"titles of items that .* holds have changed.*--retry-failed"):
        exported(data, out, reuse=Reuse(extend=True))
    assert exported(data, out, reuse=Reuse(extend=True, retry_failed=True)) == [
        "another",
        "new chair 20",
        "new chair 21",
    ]


def test_an_interrupted_extension_goes_on(tmp_path: Path) -> None:
    folder, out = write_dataset(tmp_path / "data"), tmp_path / "out"
    exported(Dataset(folder), out)
    data = append_items(folder, 40)

    class Stopped(ShadeEncoder):
        def encode_items(self, titles: Any, images: Any) -> EncodedItems:
            if "new chair 30" in titles:
                raise KeyboardInterrupt
            return super().encode_items(titles, images)

    with pytest.raises(KeyboardInterrupt):
        export(data, out, Stopped().fingerprint, Stopped, shard_size=8, reuse=Reuse(extend=True))
    assert not (out / schema.MANIFEST_FILE).exists()
    assert exported(data, out, reuse=Reuse(extend=True)) == [f"new chair {row}" for row in range(28, 40)]
    exported(data, tmp_path / "whole")
    assert rows_of(out) == rows_of(tmp_path / "whole")


# --- failed items -------------------------------------------------------------------------------------------
def test_fault_18_after_mending_an_image_retry_failed_encodes_that_row_alone(tmp_path: Path) -> None:
    folder, out = write_dataset(tmp_path / "data", broken=BROKEN), tmp_path / "out"
    exported(Dataset(folder), out)
    untouched = parts(out)["part-00002.parquet"]
    square(folder, 3)
    assert exported(Dataset(folder), out, reuse=Reuse(retry_failed=True)) == ["red chair 3"]
    assert [row["item_id"] for row in rows_of(out) if row["status"] == "failed"] == ["011"]
    assert parts(out)["part-00002.parquet"] == untouched
    square(folder, 11)
    assert exported(Dataset(folder), out, reuse=Reuse(retry_failed=True)) == ["wooden chair 11"]
    exported(Dataset(folder), tmp_path / "whole")
    assert rows_of(out) == rows_of(tmp_path / "whole")
    assert exported(Dataset(folder), out, reuse=Reuse(retry_failed=True)) == []


def test_retry_failed_makes_rows_anew_whose_input_was_never_the_reason(tmp_path: Path) -> None:
    data, out = Dataset(write_dataset(tmp_path / "data")), tmp_path / "out"
    encoder = ShadeEncoder(spoil={"red chair 3": lambda batch: np.nan})
    first = export(data, out, encoder.fingerprint, lambda: encoder, shard_size=8)
    assert first is not None and first["counts"]["failed"] == 1
    assert exported(data, out, reuse=Reuse(retry_failed=True)) == ["red chair 3"]
    exported(data, tmp_path / "whole")
    assert rows_of(out) == rows_of(tmp_path / "whole")
    assert exported(data, out, reuse=Reuse(retry_failed=True)) == []


def test_retry_failed_also_makes_anew_what_has_changed_and_the_text_only_rows(tmp_path: Path) -> None:
    folder, out = write_dataset(tmp_path / "data", broken=BROKEN), tmp_path / "out"
    exported(Dataset(folder), out, on_image_error="text_only")
    square(folder, 3)
    edit_items(folder, lambda table: {**table, "title": ["another", *table["title"][1:]]})
    again = exported(Dataset(folder), out, on_image_error="text_only", reuse=Reuse(retry_failed=True))
    assert again == ["another", "red chair 3"]
    assert [row["status"] for row in rows_of(out)].count("text_only") == 1


def test_killed_while_failed_rows_are_made_the_same_command_finishes(tmp_path: Path) -> None:
    folder, out = write_dataset(tmp_path / "data", broken=BROKEN), tmp_path / "out"
    exported(Dataset(folder), out)
    for row in BROKEN:
        square(folder, row)
    code = """
import os, signal, sys
from pathlib import Path
from chairs import ShadeEncoder
from vlm2rec.embedder.contract import publish
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.export.export import export
from vlm2rec.embedder.export.reuse import Reuse
put_in_place = publish.put_in_place
def dies(draft, path, *rest):
    put_in_place(draft, path, *rest)
    if path.name == "part-00001.parquet":
        os.kill(os.getpid(), signal.SIGKILL)
publish.put_in_place = dies
encoder = ShadeEncoder()
export(Dataset(Path(sys.argv[1])), Path(sys.argv[2]), encoder.fingerprint, lambda: encoder, shard_size=8,
       reuse=Reuse(retry_failed=True))
"""
    killed = Forked(code, folder, out)
    told = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, told
    assert not (out / schema.MANIFEST_FILE).exists()
    assert exported(Dataset(folder), out, reuse=Reuse(retry_failed=True)) == []  # the last shard was there: adopted
    exported(Dataset(folder), tmp_path / "whole")
    assert rows_of(out) == rows_of(tmp_path / "whole")


class KilledError(BaseException):
    """Stands for a SIGKILL: nothing is written after it."""


def killed(data: Dataset, out: Path, at_call: int, **choices: Any) -> None:
    """Export, and be killed before the given call of the encoder; 0: while the model loads."""

    class Dying(ShadeEncoder):
        def encode_items(self, titles: Any, images: Any) -> EncodedItems:
            if len(self.calls) + 1 == at_call:
                raise KilledError
            return super().encode_items(titles, images)

    def load() -> ShadeEncoder:
        if at_call == 0:
            raise KilledError
        return Dying()

    with pytest.raises(KilledError):
        export(data, out, ShadeEncoder().fingerprint, load, shard_size=8, **choices)
    assert not (out / schema.MANIFEST_FILE).exists()


@pytest.mark.parametrize("at_call", [0, 1, 2])
@pytest.mark.parametrize("then", ["plain", "retry", "both"])
def test_a_killed_retry_is_never_finished_with_rows_of_the_earlier_titles(
    tmp_path: Path, at_call: int, then: str
) -> None:
    folder, out = write_dataset(tmp_path / "data"), tmp_path / "out"
    exported(Dataset(folder), out)
    data = retitle(folder, 2, 10, 17)
    killed(data, out, at_call, reuse=Reuse(retry_failed=True))
    reuse = {
        "plain": Reuse(),
        "retry": Reuse(retry_failed=True),
        "both": Reuse(retry_failed=True, extend=True),
    }[then]
    again = exported(data, out, reuse=reuse)
    exported(data, tmp_path / "whole")
    assert rows_of(out) == rows_of(tmp_path / "whole")
    changed = [f"another title of {row}" for row in (2, 10, 17)]
    assert set(changed[max(0, at_call - 1) :]) <= set(again)
    assert then == "plain" or len(again) == 3 - max(0, at_call - 1)  # what is right is kept


@pytest.mark.parametrize("then", [Reuse(), Reuse(extend=True), Reuse(extend=True, retry_failed=True)])
def test_a_killed_retry_of_a_killed_extension_is_never_finished_with_rows_of_the_earlier_titles(
    tmp_path: Path, then: Reuse
) -> None:
    folder, out = write_dataset(tmp_path / "data"), tmp_path / "out"
    exported(Dataset(folder), out)
    killed(append_items(folder, 33), out, 2, reuse=Reuse(extend=True))
    data = retitle(folder, 0, 12, 25)
    killed(data, out, 2, reuse=Reuse(extend=True, retry_failed=True))
    exported(data, out, reuse=then)
    exported(data, tmp_path / "whole")
    assert rows_of(out) == rows_of(tmp_path / "whole")


def test_the_earlier_titles_are_refused_after_a_killed_retry(tmp_path: Path) -> None:
    folder, out = write_dataset(tmp_path / "data"), tmp_path / "out"
    exported(Dataset(folder), out)
    earlier = (folder / "items.parquet").read_bytes()
    killed(retitle(folder, 2), out, 0, reuse=Reuse(retry_failed=True))
    (folder / "items.parquet").write_bytes(earlier)
    with pytest.raises(ArtifactError, match="titles was"):
        exported(Dataset(folder), out)
    exported(Dataset(folder), out, reuse=Reuse(retry_failed=True))
    exported(Dataset(folder), tmp_path / "whole")
    assert rows_of(out) == rows_of(tmp_path / "whole")


def test_records_of_an_earlier_version_name_no_plan_and_are_held_against_it(tmp_path: Path) -> None:
    folder, out = write_dataset(tmp_path / "data"), tmp_path / "out"
    exported(Dataset(folder), out)
    killed(retitle(folder, 2), out, 0, reuse=Reuse(retry_failed=True))
    for record in out.glob("_part-*.json"):
        known = json.loads(record.read_text())
        del known["plan"]
        record.write_text(json.dumps(known))
    again = exported(Dataset(folder), out)
    assert len(again) == 8 and again[2] == "another title of 2"


# --- another folder -----------------------------------------------------------------------------------------
def test_changed_since_takes_over_what_is_the_same_in_any_order(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data", broken=BROKEN)
    exported(Dataset(folder), tmp_path / "monday")
    square(folder, 5)  # another image
    order = [7, 19, 0, *range(8, 19), 5, 3]

    def change(table: dict[str, list[Any]]) -> dict[str, list[Any]]:
        found = {name: [values[row] for row in order] for name, values in table.items()}
        found["title"][2] = "another title"
        return {name: [*values, new] for (name, values), new in zip(found.items(), ["x", "new", "5.png"], strict=True)}

    data = edit_items(folder, change)
    again = exported(data, tmp_path / "tuesday", reuse=Reuse(changed_since=tmp_path / "monday"))
    assert sorted(again) == sorted(["another title", "wooden chair 5", "new"])
    exported(data, tmp_path / "whole")
    assert rows_of(tmp_path / "tuesday") == rows_of(tmp_path / "whole")


def test_with_nothing_changed_no_model_is_loaded(tmp_path: Path) -> None:
    data = Dataset(write_dataset(tmp_path / "data"))
    exported(data, tmp_path / "monday")

    def never() -> ShadeEncoder:
        raise AssertionError("the model must not be loaded")

    reuse = Reuse(changed_since=tmp_path / "monday")
    export(data, tmp_path / "tuesday", ShadeEncoder().fingerprint, never, shard_size=6, reuse=reuse)
    assert rows_of(tmp_path / "tuesday") == rows_of(tmp_path / "monday")


def test_by_content_an_image_that_moved_is_the_same(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data")
    exported(Dataset(folder), tmp_path / "monday", images_by="bytes")
    (folder / "images" / "0.png").rename(folder / "images" / "zero.png")
    data = edit_items(folder, lambda table: {**table, "image_path": ["zero.png", *table["image_path"][1:]]})
    reuse = Reuse(changed_since=tmp_path / "monday")
    assert exported(data, tmp_path / "tuesday", images_by="bytes", reuse=reuse) == []
    with pytest.raises(ArtifactError, match="images_by was 'bytes'"):
        exported(data, tmp_path / "wednesday", images_by="mtime", reuse=reuse)


def test_changed_since_refuses_vectors_of_another_model(tmp_path: Path) -> None:
    data = Dataset(write_dataset(tmp_path / "data"))
    exported(data, tmp_path / "monday")
    encoder = ShadeEncoder()
    encoder.fingerprint["model"] = "another"
    with pytest.raises(ArtifactError, match="model was 'shade', now 'another'"):
        export(
            data, tmp_path / "out", encoder.fingerprint, lambda: encoder, reuse=Reuse(changed_since=tmp_path / "monday")
        )


def other_model(data: Dataset, out: Path) -> Path:
    encoder = ShadeEncoder()
    encoder.fingerprint["model"] = "another"
    export(data, out, encoder.fingerprint, lambda: encoder, shard_size=8)
    return out


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda old, other: shutil.copy(other / "part-00001.parquet", old), "part-00001.parquet: .*bytes"),
        (lambda old, other: (old / "part-00002.parquet").write_bytes(b""), "part-00002.parquet: has 0 bytes"),
        (lambda old, other: (old / "part-00000.parquet").unlink(), "part-00000.parquet: is missing"),
        (lambda old, other: flip_bit(old / "part-00001.parquet"), "part-00001.parquet: its bytes have changed"),
        (
            lambda old, other: edit_manifest(old, lambda m: m | {"shards": [*m["shards"][1:], m["shards"][0]]}),
            "shard 0 is not recorded",
        ),
        (lambda old, other: shutil.copy(other / schema.MANIFEST_FILE, old), "made with other settings"),
        (
            lambda old, other: edit_manifest(old, lambda m: m | {"settings": m["settings"] | {"model": "another"}}),
            "the fingerprint is not that of the settings",
        ),
        (lambda old, other: edit_manifest(old, lambda m: {"schema_version": 1}), "dim is missing"),
        (
            lambda old, other: edit_manifest(
                old, lambda m: m | {"shards": [s | {"file": "../other/" + s["file"]} for s in m["shards"]]}
            ),
            "shard 0 is not recorded",
        ),
    ],
)
def test_changed_since_takes_nothing_that_the_manifest_does_not_vouch_for(
    tmp_path: Path, damage: Callable[[Path, Path], object], message: str
) -> None:
    data = Dataset(write_dataset(tmp_path / "data"))
    exported(data, tmp_path / "old")
    damage(tmp_path / "old", other_model(data, tmp_path / "other"))
    encoder = ShadeEncoder()
    with pytest.raises(ArtifactError, match=message):
        export(
            data,
            tmp_path / "new",
            encoder.fingerprint,
            lambda: encoder,
            shard_size=8,
            reuse=Reuse(changed_since=tmp_path / "old"),
        )
    assert not encoder.calls and not list((tmp_path / "new").glob("part-*"))


def flip_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    file = folder / schema.MANIFEST_FILE
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


# --- names, and hashes of earlier versions ------------------------------------------------------------------
class Named(ShadeEncoder):
    """An encoder with a backbone, whose name decides nothing."""

    def __init__(self, name: str = "bb", backbone_hash: str = "sha256:aa") -> None:
        super().__init__()
        self.fingerprint |= {"backbone_hash": backbone_hash, "made_with": {"backbone": name}}


@pytest.mark.parametrize("reuse", ["none", "extend", "retry_failed", "changed_since"])
def test_a_backbone_under_another_name_goes_on_and_gives_the_same_bytes(tmp_path: Path, reuse: str) -> None:
    folder, out = write_dataset(tmp_path / "data", broken=BROKEN), tmp_path / "out"
    data = Dataset(folder)
    for encoder, where in ((Named(), out), (Named("other"), tmp_path / "whole")):
        export(data, where, encoder.fingerprint, lambda encoder=encoder: encoder, shard_size=8)
    assert parts(out) == parts(tmp_path / "whole")
    manifests = [json.loads((where / schema.MANIFEST_FILE).read_text()) for where in (out, tmp_path / "whole")]
    assert [manifest["made_with"] for manifest in manifests] == [{"backbone": "bb"}, {"backbone": "other"}]
    assert manifests[0]["fingerprint"] == manifests[1]["fingerprint"]
    (out / "part-00001.parquet").unlink()
    given = (
        {"changed_since": tmp_path / "whole"} if reuse == "changed_since" else {reuse: True} if reuse != "none" else {}
    )
    again, where = Named("moved"), tmp_path / "new" if reuse == "changed_since" else out
    export(data, where, again.fingerprint, lambda: again, shard_size=8, reuse=Reuse(**given))
    assert verify(where) == [] and rows_of(where) == rows_of(tmp_path / "whole")


@pytest.mark.parametrize("reuse", ["none", "extend", "retry_failed", "changed_since"])
def test_an_export_by_an_earlier_version_s_hash_is_read_and_not_gone_on_with(tmp_path: Path, reuse: str) -> None:
    data, old = Dataset(write_dataset(tmp_path / "data")), tmp_path / "old"
    encoder = Named(backbone_hash="0" * 64)
    export(data, old, encoder.fingerprint, lambda: encoder, shard_size=8)
    assert verify(old) == []
    given = {"none": {}, "changed_since": {"changed_since": old}}.get(reuse, {reuse: True})
    out = tmp_path / "new" if reuse == "changed_since" else old
    now = Named()
    with pytest.raises(ArtifactError, match=r"an earlier vlm2rec wrote .* backbone_hash covers only part.*new --out"):
        export(data, out, now.fingerprint, lambda: now, shard_size=8, reuse=Reuse(**given))
    assert verify(old) == [] and not now.calls


def test_two_sources_of_the_same_vectors_are_refused() -> None:
    with pytest.raises(ConfigError, match="--changed-since together with"):
        Reuse(extend=True, changed_since=Path("monday"))


# --- the list of failures -----------------------------------------------------------------------------------
def test_failures_are_listed_with_what_is_needed_to_mend_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Dataset(write_dataset(tmp_path / "data", broken=BROKEN))
    exported(data, tmp_path / "out")
    verify_command.failures(FailuresConfig(embeddings=tmp_path / "out"))
    printed = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(printed.out)))
    assert [(row["item_id"], row["status"], row["title"]) for row in rows] == [
        ("003", "failed", "red chair 3"),
        ("011", "failed", "wooden chair 11"),
    ]
    assert all("not a JPEG" in row["error"] for row in rows)
    assert [Path(row["image_path"]).read_bytes() for row in rows] == [b"<html>404</html>"] * 2
    assert "2 of 20 items" in printed.err and "--retry-failed" in printed.err

"""One export made by several: the plan and the folder are those of one process, and any of the workers may die."""

from __future__ import annotations

import functools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chairs import ITEMS, ShadeEncoder, parts, rows_of, write_dataset
from children import child, waited

from vlm2rec.embedder.contract import process, publish
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError, ModelError
from vlm2rec.embedder.contract.process import Process, this_process
from vlm2rec.embedder.encoders.item_encoder import EncodedItems
from vlm2rec.embedder.export import shards
from vlm2rec.embedder.export.distribute import Distribution
from vlm2rec.embedder.export.export import export
from vlm2rec.embedder.export.lock import Share, writing
from vlm2rec.embedder.export.reuse import Reuse
from vlm2rec.embedder.export.verify import verify
from vlm2rec.pipelines import export_items
from vlm2rec.pipelines.config import ExportConfig
from vlm2rec.pipelines.console import TERMINAL

SETTINGS = ShadeEncoder().fingerprint
Tiny = Callable[[str], Path]


class Deadly(ShadeEncoder):
    """Kills its process over one title, as often as `file` has letters, and notes which process made what."""

    def __init__(self, title: str, file: Path) -> None:
        super().__init__()
        self.title, self.file = title, file

    def encode_items(self, titles: Any, images: Any) -> EncodedItems:
        if self.title in titles and (left := self.file.read_text()):
            self.file.write_text(left[1:])
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_items(titles, images)


class Refusing(ShadeEncoder):
    """Cannot encode anything."""

    def encode_items(self, titles: Any, images: Any) -> EncodedItems:
        raise ModelError("this model refuses", "one that does not", "take another")


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    return Dataset(write_dataset(tmp_path / "data"))


@pytest.fixture
def whole(data: Dataset, tmp_path: Path) -> dict[str, bytes]:
    export(data, tmp_path / "whole", SETTINGS, ShadeEncoder, shard_size=3)
    return parts(tmp_path / "whole")


def make(data: Dataset, out: Path, load: Callable[[], Any] = ShadeEncoder, **choices: Any) -> dict[str, Any] | None:
    return export(data, out, SETTINGS, load, shard_size=3, reporter=TERMINAL, **choices)


# --- processes of this machine ------------------------------------------------------------------------------
def test_fault_17_any_number_of_workers_makes_the_same_folder(
    data: Dataset, whole: dict[str, bytes], tmp_path: Path
) -> None:
    make(data, tmp_path / "out", distribution=Distribution(num_workers=2))
    assert parts(tmp_path / "out") == whole and verify(tmp_path / "out") == []


def test_fault_17_what_one_worker_has_begun_several_go_on_with(
    data: Dataset, whole: dict[str, bytes], tmp_path: Path
) -> None:
    assert make(data, tmp_path / "out", distribution=Distribution(num_workers=2, worker=1)) is None
    before = parts(tmp_path / "out")
    assert len(before) == 3
    make(data, tmp_path / "out", distribution=Distribution(num_workers=2))
    assert parts(tmp_path / "out") == whole


def test_fault_45_a_worker_that_dies_costs_one_shard_which_another_makes(
    data: Dataset, whole: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "deaths").write_text("x")
    load = functools.partial(Deadly, "red chair 6", tmp_path / "deaths")
    make(data, tmp_path / "out", load, distribution=Distribution(num_workers=2))
    assert parts(tmp_path / "out") == whole and verify(tmp_path / "out") == []
    assert "died (exit code -9) while making part-00002.parquet; another worker makes it now" in " ".join(
        capsys.readouterr().err.split()
    )


def test_fault_45_where_a_shard_kills_every_worker_the_others_are_kept_and_the_rerun_completes(
    data: Dataset, whole: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "deaths").write_text("xx")
    load = functools.partial(Deadly, "red chair 6", tmp_path / "deaths")
    with pytest.raises(ArtifactError, match=r"two workers died while making part-00002\.parquet"):
        make(data, tmp_path / "out", load, distribution=Distribution(num_workers=2))
    assert len(parts(tmp_path / "out")) >= 2
    make(data, tmp_path / "out", load, distribution=Distribution(num_workers=2))
    assert parts(tmp_path / "out") == whole


def test_what_a_worker_complains_of_is_what_the_command_complains_of(data: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="this model refuses"):
        make(data, tmp_path / "out", Refusing, distribution=Distribution(num_workers=2))


def test_workers_take_over_earlier_rows(data: Dataset, whole: dict[str, bytes], tmp_path: Path) -> None:
    reuse = Reuse(changed_since=tmp_path / "whole")
    make(data, tmp_path / "out", Refusing, reuse=reuse, distribution=Distribution(num_workers=2))
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "whole")


def test_no_worker_outlives_a_killed_export(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data", 60)
    code = """
import os, sys, time
from pathlib import Path
from chairs import ShadeEncoder
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.export.distribute import Distribution
from vlm2rec.pipelines.export_items import export
class Slow(ShadeEncoder):
    def encode_items(self, titles, images):
        (Path(sys.argv[3]) / str(os.getpid())).touch()
        time.sleep(0.3)
        return super().encode_items(titles, images)
if __name__ == "__main__":
    export(Dataset(Path(sys.argv[1])), Path(sys.argv[2]), Slow().fingerprint, Slow, shard_size=2,
           distribution=Distribution(num_workers=2))
"""
    (tmp_path / "main.py").write_text(code)  # workers import it again
    (tmp_path / "pids").mkdir()
    with child(tmp_path / "main.py", folder, tmp_path / "out", tmp_path / "pids") as leader:
        waited(lambda: len(list((tmp_path / "pids").iterdir())) == 2)
        leader.kill()
    workers = [int(path.name) for path in (tmp_path / "pids").iterdir()]
    waited(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
    data = Dataset(folder)
    make(data, tmp_path / "whole")
    export(data, tmp_path / "out", SETTINGS, ShadeEncoder, shard_size=2, distribution=Distribution(num_workers=2))
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "whole") and verify(tmp_path / "out") == []


# --- one of several, started by somebody else ---------------------------------------------------------------
def test_each_worker_makes_its_share_and_the_last_one_completes_the_folder(
    data: Dataset, whole: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert make(data, out, distribution=Distribution(num_workers=3, worker=2)) is None
    assert sorted(parts(out)) == ["part-00002.parquet", "part-00005.parquet"]
    assert "other workers still have 5 of 7 to make" in " ".join(capsys.readouterr().err.split())
    assert make(data, out, distribution=Distribution(num_workers=3, worker=0)) is None
    manifest = make(data, out, distribution=Distribution(num_workers=3, worker=1))
    assert manifest is not None and manifest["num_items"] == ITEMS
    assert parts(out) == whole and verify(out) == []
    assert (
        make(data, out, distribution=Distribution(num_workers=3, worker=0)) == manifest
    )  # a scheduler may start it again


def test_workers_at_the_same_time_make_one_folder(data: Dataset, whole: dict[str, bytes], tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from chairs import ShadeEncoder
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.export.distribute import Distribution
from vlm2rec.pipelines.export_items import export
export(Dataset(Path(sys.argv[1])), Path(sys.argv[2]), ShadeEncoder().fingerprint, ShadeEncoder, shard_size=3,
       distribution=Distribution(num_workers=3, worker=int(sys.argv[3])))
"""
    started = [child(code, data.path, tmp_path / "out", worker) for worker in range(3)]
    told = [worker.communicate() for worker in started]
    assert [worker.returncode for worker in started] == [0] * 3, told
    assert parts(tmp_path / "out") == whole and verify(tmp_path / "out") == []
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["manifest.json", *whole]


def test_a_dead_worker_s_share_is_made_by_whoever_comes_next(
    data: Dataset, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    make(data, out, distribution=Distribution(num_workers=2, worker=0))
    (out / ".part-00001.parquet.4711.tmp").write_bytes(b"half")
    dead = this_process()._replace(pid=99999999)
    (out / "export.worker-1-of-2.lock").write_text(json.dumps(dead._asdict()))
    make(data, out)
    assert parts(out) == whole
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", *whole]


def test_workers_and_a_single_writer_keep_out_of_each_other_s_way(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with writing(out, Share(0, 2)):
        with writing(out, Share(1, 2)):
            pass
        for other in (None, Share(0, 2), Share(1, 3)):
            with pytest.raises(ArtifactError, match="is being written by process"), writing(out, other):
                pass
    with writing(out), pytest.raises(ArtifactError, match="is being written by process"), writing(out, Share(0, 2)):
        pass


def test_a_writer_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm2rec.embedder.export.lock.BEAT", 0.05)
    with writing(tmp_path):
        os.utime(tmp_path / "export.lock", (1, 1))
        waited(lambda: (tmp_path / "export.lock").stat().st_mtime > 1)


def temporary_of(writer: Process, name: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "this_process", lambda: writer)
        return publish.temporary_name(name)


def test_the_last_worker_takes_away_what_dead_ones_left_half_written_and_no_more(data: Dataset, tmp_path: Path) -> None:
    out, ours = tmp_path / "out", this_process()
    make(data, out, distribution=Distribution(num_workers=2, worker=0))
    gone = [
        out / temporary_of(ours._replace(pid=99999999), "manifest.json"),
        out / temporary_of(ours._replace(pids="1", pid=1), "part-00000.parquet"),  # of a container that has ended
        out / temporary_of(ours._replace(boot="b00"), "export.json"),
        out / ".manifest.json.4711.tmp",  # of an earlier version
    ]
    alive = out / temporary_of(ours, "manifest.json")
    for path in (*gone, alive):
        path.write_bytes(b"{")
    make(data, out, distribution=Distribution(num_workers=2, worker=1))
    assert [path for path in gone if path.exists()] == [] and alive.exists()
    (out / "part-00000.json").write_text("{}")  # a worker may die between the manifest and the records
    make(data, out, distribution=Distribution(num_workers=2, worker=0))
    assert not (out / "part-00000.json").exists()


def test_a_worker_leaves_the_half_written_files_of_others_alone(data: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(data, out, distribution=Distribution(num_workers=2, worker=0))
    unseen = this_process()._replace(boot="b00")
    mine, other = (out / temporary_of(unseen, f"part-0000{number}.parquet") for number in (1, 0))
    for path in (mine, other):
        path.write_bytes(b"half")
    shards._remove_temporaries(out, range(1, 7, 2))
    assert not mine.exists() and other.exists()


@pytest.mark.parametrize(
    ("choices", "told"),
    [
        ({"worker": 2, "num_workers": 2}, "--worker 2 of --num-workers 2"),
        ({"worker": 0, "num_workers": 2, "engine": "ray"}, "--worker together with --engine ray or --gpus"),
        ({"gpus": 2, "num_workers": 3}, "--gpus 2 together with --num-workers 3"),
    ],
)
def test_contradictions_are_refused(choices: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Distribution(**choices)


def test_more_gpus_than_there_are_are_refused_by_number(data: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--gpus 99, but this machine has"):
        make(data, tmp_path / "out", distribution=Distribution(gpus=99))


def test_the_real_encoder_in_two_processes_gives_the_vectors_of_one(tiny: Tiny, data: Dataset, tmp_path: Path) -> None:
    common: dict[str, Any] = {"data": data.path, "backbone": str(tiny("qwen2_5_vl")), "shard_size": 5}
    common |= {"dtype": "float32", "device": "cpu", "max_pixels": 112 * 112}
    export_items.run(ExportConfig(out=tmp_path / "one", **common))
    export_items.run(ExportConfig(out=tmp_path / "two", num_workers=2, **common))
    assert parts(tmp_path / "one") == parts(tmp_path / "two")

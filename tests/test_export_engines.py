"""One export made by several: the plan and the folder are those of one process, and any of the workers may die."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chairs import ITEMS, ShadeEncoder, edit_items, parts, retitle, rows_of, write_dataset
from children import Forked, child, python_path, waited

from vlm2rec.embedder.contract import process, publish, schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError, DataError, ModelError
from vlm2rec.embedder.contract.process import Process, this_process
from vlm2rec.embedder.encoders.item_encoder import EncodedItems
from vlm2rec.embedder.export import shards
from vlm2rec.embedder.export.distribute import Distribution
from vlm2rec.embedder.export.export import export
from vlm2rec.embedder.export.lock import LOCK_FILE, Share, writing
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


@pytest.mark.usefixtures("forked_workers")
def test_fault_17_what_one_worker_has_begun_several_go_on_with(
    data: Dataset, whole: dict[str, bytes], tmp_path: Path
) -> None:
    assert make(data, tmp_path / "out", distribution=Distribution(num_workers=2, worker=1)) is None
    before = parts(tmp_path / "out")
    assert len(before) == 3
    make(data, tmp_path / "out", distribution=Distribution(num_workers=2))
    assert parts(tmp_path / "out") == whole


@pytest.mark.usefixtures("forked_workers")
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


@pytest.mark.usefixtures("forked_workers")
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


@pytest.mark.usefixtures("forked_workers")
def test_what_a_worker_complains_of_is_what_the_command_complains_of(data: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="this model refuses"):
        make(data, tmp_path / "out", Refusing, distribution=Distribution(num_workers=2))


@pytest.mark.usefixtures("forked_workers")
def test_workers_take_over_earlier_rows(data: Dataset, whole: dict[str, bytes], tmp_path: Path) -> None:
    reuse = Reuse(changed_since=tmp_path / "whole")
    make(data, tmp_path / "out", Refusing, reuse=reuse, distribution=Distribution(num_workers=2))
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "whole")


@pytest.mark.slow
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
    started = [Forked(code, data.path, tmp_path / "out", worker) for worker in range(3)]
    told = [worker.communicate() for worker in started]
    assert [worker.returncode for worker in started] == [0] * 3, told
    assert parts(tmp_path / "out") == whole and verify(tmp_path / "out") == []
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [schema.MANIFEST_FILE, *whole]


def test_a_dead_worker_s_share_is_made_by_whoever_comes_next(
    data: Dataset, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    make(data, out, distribution=Distribution(num_workers=2, worker=0))
    (out / ".part-00001.parquet.4711.tmp").write_bytes(b"half")
    dead = this_process()._replace(pid=99999999)
    (out / Share(1, 2).lock_file).write_text(json.dumps(dead._asdict()))
    make(data, out)
    assert parts(out) == whole
    assert sorted(path.name for path in out.iterdir()) == [schema.MANIFEST_FILE, *whole]


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
        os.utime(tmp_path / LOCK_FILE, (1, 1))
        waited(lambda: (tmp_path / LOCK_FILE).stat().st_mtime > 1)


def temporary_of(writer: Process, name: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "this_process", lambda: writer)
        return publish.temporary_name(name)


def test_the_last_worker_takes_away_what_dead_ones_left_half_written_and_no_more(data: Dataset, tmp_path: Path) -> None:
    out, ours = tmp_path / "out", this_process()
    make(data, out, distribution=Distribution(num_workers=2, worker=0))
    gone = [
        out / temporary_of(ours._replace(pid=99999999), schema.MANIFEST_FILE),
        out / temporary_of(ours._replace(pids="1", pid=1), "part-00000.parquet"),  # of a container that has ended
        out / temporary_of(ours._replace(boot="b00"), schema.STATE_FILE),
        out / f".{schema.MANIFEST_FILE}.4711.tmp",  # of a writer that nothing tells of
    ]
    alive = out / temporary_of(ours, schema.MANIFEST_FILE)
    for path in (*gone, alive):
        path.write_bytes(b"{")
    make(data, out, distribution=Distribution(num_workers=2, worker=1))
    assert [path for path in gone if path.exists()] == [] and alive.exists()
    (out / "_part-00000.json").write_text("{}")  # a worker may die between the manifest and the records
    make(data, out, distribution=Distribution(num_workers=2, worker=0))
    assert not (out / "_part-00000.json").exists()


def test_a_worker_leaves_the_half_written_files_of_others_alone(data: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(data, out, distribution=Distribution(num_workers=2, worker=0))
    unseen = this_process()._replace(boot="b00")
    mine, other = (out / temporary_of(unseen, f"part-0000{number}.parquet") for number in (1, 0))
    for path in (mine, other):
        path.write_bytes(b"half")
    shards._remove_temporaries(out, range(1, 7, 2))
    assert not mine.exists() and other.exists()


# --- a dataset that changes under the workers -----------------------------------------------------------------
class Replacing(ShadeEncoder):
    """Changes something, once, when it has encoded its first items; whoever encodes meanwhile waits for it."""

    def __init__(self, change: Callable[[], Any], done: Path) -> None:
        super().__init__()
        self.change, self.done = change, done

    def encode_items(self, titles: Any, images: Any) -> EncodedItems:
        found = super().encode_items(titles, images)
        changed = self.done.with_suffix(".changed")
        try:
            self.done.touch(exist_ok=False)
        except FileExistsError:
            waited(changed.exists)
        else:
            self.change()
            changed.touch()
        return found


def reverse(folder: Path) -> None:
    edit_items(folder, lambda table: {name: values[::-1] for name, values in table.items()})


def shorten(folder: Path) -> None:
    edit_items(folder, lambda table: {name: values[:-1] for name, values in table.items()})


def swap_images(folder: Path) -> None:
    edit_items(folder, lambda table: {**table, "image_path": table["image_path"][::-1]})


def remove(folder: Path) -> None:
    (folder / "items.parquet").unlink()


def move_images(folder: Path) -> None:
    (folder / "elsewhere").mkdir()
    meta = json.loads((folder / "dataset.json").read_text()) | {"image_root": "elsewhere"}
    (folder / "dataset.json").write_text(json.dumps(meta))


def retitle_all(folder: Path) -> None:
    retitle(folder, *range(ITEMS))


def rewrite(folder: Path) -> None:
    edit_items(folder, lambda table: table)


def repaint(folder: Path) -> None:
    for row in range(12, ITEMS):
        (folder / "images" / f"{row}.png").write_bytes((folder / "images" / "0.png").read_bytes())
        os.utime(folder / "images" / f"{row}.png", (1, 1))


DIVISIONS = {
    "one process": Distribution(),
    "two processes": Distribution(num_workers=2),
    "one of two workers": Distribution(num_workers=2, worker=1),
}


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize("division", DIVISIONS)
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (reverse, r"row 0 has item '019' in place of '000'; row 1 .*; row 2 .*"),
        (shorten, "it has 19 items, 20 were planned"),
        (retitle_all, r"row 0 has title 'another title of 0' in place of 'red chair 0'"),
        (swap_images, r"row 0 has image '19.png' in place of '0.png'"),
        (move_images, "its images are in .*elsewhere, and were in .*images"),
        (remove, "items.parquet does not exist"),
    ],
)
def test_a_dataset_that_is_replaced_under_the_workers_is_refused(
    data: Dataset, tmp_path: Path, division: str, change: Callable[[Path], None], told: str
) -> None:
    load = functools.partial(Replacing, functools.partial(change, data.path), tmp_path / "done")
    with pytest.raises(DataError, match=f"was changed while its items were encoded: .*{told}") as refusal:
        make(data, tmp_path / "out", load, distribution=DIVISIONS[division])
    assert refusal.value.exit_code == 3
    assert not (tmp_path / "out" / schema.MANIFEST_FILE).exists()


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize("division", DIVISIONS)
@pytest.mark.parametrize("images_by", ["mtime", "bytes"])
def test_images_that_are_replaced_under_the_workers_are_refused(
    data: Dataset, tmp_path: Path, division: str, images_by: Any
) -> None:
    load = functools.partial(Replacing, functools.partial(repaint, data.path), tmp_path / "done")
    with pytest.raises(DataError, match=r"images were changed while the items were encoded: 1\d.png") as refusal:
        make(data, tmp_path / "out", load, distribution=DIVISIONS[division], images_by=images_by)
    assert refusal.value.exit_code == 3


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize("division", list(DIVISIONS)[:2])
def test_a_dataset_that_is_written_again_as_it_was_is_the_same(
    data: Dataset, whole: dict[str, bytes], tmp_path: Path, division: str
) -> None:
    load = functools.partial(Replacing, functools.partial(rewrite, data.path), tmp_path / "done")
    make(data, tmp_path / "out", load, distribution=DIVISIONS[division])
    assert parts(tmp_path / "out") == whole


def test_the_dataset_is_not_read_again_while_nobody_writes_it(
    data: Dataset, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(data.item_ids) == ITEMS
    monkeypatch.setattr(schema, "read_table", lambda *arguments, **named: pytest.fail("read again"))
    make(data, tmp_path / "out")
    assert parts(tmp_path / "out") == whole


# --- workers that go on with a folder -----------------------------------------------------------------------
def shares(count: int, *workers: int) -> list[Distribution]:
    return [Distribution(num_workers=count, worker=worker) for worker in workers or range(count)]


RETRY = Reuse(retry_failed=True)


def test_retry_failed_writes_no_manifest_before_every_worker_has_made_its_share(data: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(data, out)
    changed = retitle(data.path, 2, 4, 10, 11, 19)
    make(changed, tmp_path / "fresh")
    for number, division in enumerate(shares(3)):
        made = make(changed, out, reuse=RETRY, distribution=division)
        assert (made is not None) == (out / schema.MANIFEST_FILE).exists() == (number == 2)
    assert rows_of(out) == rows_of(tmp_path / "fresh") and verify(out) == []


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_extend_writes_no_manifest_before_every_worker_has_made_its_share(
    tmp_path: Path, order: tuple[int, ...]
) -> None:
    folder, out = write_dataset(tmp_path / "data", 30), tmp_path / "out"
    longer = (folder / "items.parquet").read_bytes()
    make(edit_items(folder, lambda table: {name: values[:20] for name, values in table.items()}), out)
    (folder / "items.parquet").write_bytes(longer)
    data = Dataset(folder)
    make(data, tmp_path / "fresh")
    for number, division in enumerate(shares(3, *order)):
        made = make(data, out, reuse=Reuse(extend=True), distribution=division)
        assert (made is not None) == (out / schema.MANIFEST_FILE).exists() == (number == 2)
    assert rows_of(out) == rows_of(tmp_path / "fresh") and verify(out) == []


def test_changed_since_writes_no_manifest_before_every_worker_has_made_its_share(
    data: Dataset, whole: dict[str, bytes], tmp_path: Path
) -> None:
    changed = retitle(data.path, 2, 4, 10, 11, 19)
    make(changed, tmp_path / "fresh")
    out, reuse = tmp_path / "out", Reuse(changed_since=tmp_path / "whole")
    for number, division in enumerate(shares(2)):
        made = make(changed, out, reuse=reuse, distribution=division)
        assert (made is not None) == (out / schema.MANIFEST_FILE).exists() == (number == 1)
    assert rows_of(out) == rows_of(tmp_path / "fresh")


def test_a_worker_that_comes_late_leaves_a_complete_folder_as_it_is(data: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(data, out)
    changed = retitle(data.path, 2, 4)
    for division in shares(2):
        make(changed, out, reuse=RETRY, distribution=division)
    before = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.iterdir()}
    for reuse in (RETRY, Reuse(), Reuse(extend=True)):
        for division in (*shares(2), *shares(3), Distribution()):
            assert make(changed, out, Refusing, reuse=reuse, distribution=division) is not None
    assert {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.iterdir()} == before


def test_workers_with_other_items_are_refused_and_the_rest_completes(data: Dataset, tmp_path: Path) -> None:
    out, first, second = tmp_path / "out", *shares(2)
    assert make(data, out, distribution=first) is None
    changed = retitle(data.path, 0, 19)
    with pytest.raises(ArtifactError, match="titles was"):
        make(changed, out, distribution=second)
    assert make(changed, out, reuse=RETRY, distribution=second) is None  # the folder is that of the new titles now
    data = Dataset(data.path)
    assert make(data, out, distribution=first) is not None
    make(data, tmp_path / "fresh")
    assert rows_of(out) == rows_of(tmp_path / "fresh")


def test_a_worker_whose_folder_goes_on_with_other_items_ends_and_writes_nothing_more(
    data: Dataset, tmp_path: Path
) -> None:
    out, first, second = tmp_path / "out", *shares(2)
    earlier = (data.path / "items.parquet").read_bytes()

    class Overtaken(ShadeEncoder):
        def encode_items(self, titles: Any, images: Any) -> EncodedItems:
            if not self.calls:
                make(retitle(data.path, 0, 19), out, reuse=RETRY, distribution=second)
                (data.path / "items.parquet").write_bytes(earlier)
            return super().encode_items(titles, images)

    with pytest.raises(ArtifactError, match="is no longer what this export began: another worker continues with other"):
        make(data, out, Overtaken, distribution=first)
    assert sorted(parts(out)) == [f"part-0000{number}.parquet" for number in (1, 3, 5)]


def test_a_worker_that_begins_while_another_finishes_takes_nothing_away(
    data: Dataset, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    for division in shares(3, 0, 1):
        make(data, out, distribution=division)
    written, begun, told = threading.Event(), threading.Event(), dict[str, Any]()
    tidy, known = shards._tidy, shards._known

    def slow_tidy(*arguments: Any) -> None:
        written.set()  # the manifest is there, the records and the state file are, too
        begun.wait(1)
        tidy(*arguments)

    def slow_known(folder: Any) -> Any:
        found = known(folder)
        if threading.current_thread().name == "late":
            begun.set()
        return found

    monkeypatch.setattr(shards, "_tidy", slow_tidy)
    monkeypatch.setattr(shards, "_known", slow_known)

    def run(name: str, division: Distribution) -> None:
        told[name] = make(data, out, distribution=division)

    last = threading.Thread(target=run, args=("last", shares(3)[2]))
    late = threading.Thread(target=run, args=("late", shares(3)[0]), name="late")
    last.start()
    written.wait(30)
    late.start()
    for thread in (last, late):
        thread.join(60)
    assert told["last"] == told["late"] == schema.read_manifest(out)
    assert sorted(path.name for path in out.iterdir()) == [schema.MANIFEST_FILE, *whole] and parts(out) == whole


def test_of_workers_that_end_at_the_same_moment_one_writes_the_manifest(
    data: Dataset, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, write, together = [], schema.write_json, threading.Barrier(3)

    def counted(path: Path, value: Any) -> None:
        if path.name == schema.MANIFEST_FILE:
            written.append(threading.current_thread().name)
            time.sleep(0.2)
        write(path, value)

    def finish(*arguments: Any) -> Any:
        together.wait(60)
        return shards_finish(*arguments)

    shards_finish = shards.finish
    monkeypatch.setattr(shards, "finish", finish)
    monkeypatch.setattr(schema, "write_json", counted)
    threads = [
        threading.Thread(target=make, args=(data, tmp_path / "out"), kwargs={"distribution": s}) for s in shares(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(written) == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [schema.MANIFEST_FILE, *whole]


CONTAINERS = (
    shutil.which("unshare") is not None
    and not subprocess.run(["unshare", "--pid", "--fork", "true"], capture_output=True, check=False).returncode
)


PROCESS_1 = """
assert os.getpid() == 1
fsync = os.fsync
os.fsync = lambda descriptor: (fsync(descriptor), time.sleep(0.05))
export(Dataset(Path(sys.argv[1])), Path(sys.argv[2]), ShadeEncoder().fingerprint, ShadeEncoder, shard_size=3,
       distribution=Distribution(num_workers=3, worker=int(sys.argv[3])))
"""
IMPORTS = """
import ctypes, os, sys, time
from pathlib import Path
from chairs import ShadeEncoder
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.export.distribute import Distribution
from vlm2rec.pipelines.export_items import export
"""
# the next child is process 1 of what looks like a machine of its own
IN_A_CONTAINER = """
assert ctypes.CDLL(None).unshare(0x20000000) == 0
if child := os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not CONTAINERS, reason="needs root and unshare")
def test_workers_that_are_all_process_1_make_one_folder(data: Dataset, whole: dict[str, bytes], tmp_path: Path) -> None:
    code = IMPORTS + IN_A_CONTAINER + PROCESS_1
    started = [Forked(code, data.path, tmp_path / "out", worker) for worker in range(3)]
    told = [worker.communicate() for worker in started]
    assert [worker.returncode for worker in started] == [0] * 3, told
    assert parts(tmp_path / "out") == whole and verify(tmp_path / "out") == []


@pytest.mark.slow
@pytest.mark.skipif(not CONTAINERS, reason="needs root and unshare")
@pytest.mark.parametrize("mount", [["--mount-proc"], []], ids=["own /proc", "the machine's /proc"])
def test_interpreters_that_are_all_process_1_make_one_folder(
    data: Dataset, whole: dict[str, bytes], tmp_path: Path, mount: list[str]
) -> None:
    run = ["unshare", "--pid", "--fork", *mount, sys.executable, "-c", IMPORTS + PROCESS_1]
    environment = os.environ | {"PYTHONPATH": python_path()}
    pipe = subprocess.PIPE
    started = [
        subprocess.Popen(
            [*run, str(data.path), str(tmp_path / "out"), str(worker)],
            stdout=pipe,
            stderr=pipe,
            text=True,
            env=environment,
        )
        for worker in range(3)
    ]
    told = [worker.communicate() for worker in started]
    assert [worker.returncode for worker in started] == [0] * 3, told
    assert parts(tmp_path / "out") == whole and verify(tmp_path / "out") == []
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [schema.MANIFEST_FILE, *whole]


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


@pytest.mark.usefixtures("forked_workers")
def test_the_real_encoder_in_two_processes_gives_the_vectors_of_one(tiny: Tiny, data: Dataset, tmp_path: Path) -> None:
    common: dict[str, Any] = {"data": data.path, "backbone": str(tiny("qwen2_5_vl")), "shard_size": 5}
    common |= {"dtype": "float32", "device": "cpu", "max_pixels": 112 * 112}
    export_items.run(ExportConfig(out=tmp_path / "one", **common))
    export_items.run(ExportConfig(out=tmp_path / "two", num_workers=2, **common))
    assert parts(tmp_path / "one") == parts(tmp_path / "two")

"""Fault tests that go through a whole export, the table of all fifty, and what the export never does.

The other fault tests stand beside what they test; `pytest -k test_fault_19` finds those of one fault, FAULTS.md names
what each fault does and which tests show it.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from chairs import ShadeEncoder, parts, rows_of, write_dataset
from children import Forked, child
from drawn_lora import without_checksums
from PIL import Image
from test_export_items import never
from test_images import many_scans, png, quarters, slow_bmp
from test_lora import write_adapter
from tiny_encoders import sentence_folder

from vlm2rec.embedder.adapters import lora
from vlm2rec.embedder.backbones import image_readers
from vlm2rec.embedder.backbones.backbone import Backbone, EncodedPrompt
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import DataError, ModelError
from vlm2rec.embedder.encoders import cache_choice
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
from vlm2rec.embedder.export import shards, worker
from vlm2rec.embedder.export.export import export
from vlm2rec.embedder.export.verify import verify
from vlm2rec.embedder.export.worker import encode_rows
from vlm2rec.pipelines import export_items
from vlm2rec.pipelines.config import ExportConfig

Tiny = Callable[[str], Path]
TESTS = Path(__file__).parent


def settings(tiny: Tiny, data: Path, out: Path, family: str = "qwen2_5_vl", **more: Any) -> ExportConfig:
    values: dict[str, Any] = {"dtype": "float32", "device": "cpu", "max_failures": 1.0, **more}
    return ExportConfig(data=data, backbone=str(tiny(family)), out=out, **values)


# --- the table --------------------------------------------------------------------------------------------------
def fault_tests() -> dict[int, set[str]]:
    """Return the names of the tests of each fault, from the test files as they are written."""
    found: dict[int, set[str]] = {}
    for path in TESTS.glob("test_*.py"):
        for name, number in re.findall(r"^def (test_fault_(\d\d)_\w+)", path.read_text(encoding="utf-8"), re.M):
            found.setdefault(int(number), set()).add(f"{path.name}::{name}")
    return found


def test_each_of_the_fifty_faults_has_a_test() -> None:
    assert set(fault_tests()) == set(range(1, 51))


def test_the_table_of_faults_names_every_fault_and_the_files_of_its_tests() -> None:
    rows = re.findall(r"^\| (\d+) \|.+\|.+\|(.+)\|$", (TESTS / "FAULTS.md").read_text(encoding="utf-8"), re.M)
    assert [int(number) for number, _ in rows] == list(range(1, 51))
    listed = {int(number): set(re.findall(r"`(test_\w+\.py)`", files)) for number, files in rows}
    tests = fault_tests()
    assert listed == {n: {name.partition("::")[0] for name in tests.get(n, set())} for n in range(1, 51)}


def test_the_other_faults_name_files_of_tests() -> None:
    others = (TESTS / "FAULTS.md").read_text(encoding="utf-8").partition("## Faults that")[2]
    rows = re.findall(r"^\| (?!\*\*|fault |-)(.+) \| (.+) \| (.+) \|$", others, re.M)
    assert len(rows) > 40
    for fault, what, files in rows:
        named = re.findall(r"`(test_\w+\.py)`", files)
        assert what and named == sorted(named), fault
        assert named and all((TESTS / name).is_file() for name in named), fault


# --- the disk ---------------------------------------------------------------------------------------------------
def test_fault_05_on_a_full_disk_the_command_ends_with_exit_code_5_and_the_rerun_works(
    tiny: Tiny, tmp_path: Path
) -> None:
    config = settings(tiny, write_dataset(tmp_path / "data"), tmp_path / "out", shard_size=8)
    code = """
from test_faults import *
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (1_500, resource.RLIM_INFINITY))  # no file may grow beyond 1.5 kB
from vlm2rec.pipelines.cli import main
main()
"""
    flags = ["--data", config.data, "--backbone", config.backbone, "--out", config.out, "--dtype", "float32"]
    full = Forked(code, "export-items", *flags, "--shard-size", 8)
    told = " ".join(full.communicate()[1].split())
    assert full.returncode == 5, told
    assert "vision cache: File too large" in told and "continuing without it" in told
    assert "cannot be written (File too large)" in told and "Traceback" not in told
    assert [path.name for path in config.out.iterdir()] == [schema.STATE_FILE]
    assert [path.stat().st_size for path in config.data.glob("vision-cache/*/segment-*")] == [0]
    assert export_items.run(config)["num_items"] == 20 and verify(config.out) == []


# --- files from strangers ---------------------------------------------------------------------------------------
def reasons(tmp_path: Path, files: dict[str, bytes]) -> dict[str, str]:
    """Export items with these files as images, between two sound ones; return why each failed."""
    data = write_dataset(tmp_path / "data", items=len(files) + 2, image_path=["0.png", *files, f"{len(files) + 1}.png"])
    for name, content in files.items():
        (data / "images" / name).write_bytes(content)
    encoder = ShadeEncoder()
    export(Dataset(data), tmp_path / "out", encoder.fingerprint, lambda: encoder)
    first, *rows, last = rows_of(tmp_path / "out")
    assert first["fused"] is not None and last["fused"] is not None
    assert {row["status"] for row in rows} == {"failed"} and verify(tmp_path / "out") == []
    return {name: row["error"] for name, row in zip(files, rows, strict=True)}


def encoded(kind: str, image: Image.Image | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image or quarters(64)).save(buffer, format=kind, **options)
    return buffer.getvalue()


def test_fault_19_truncated_images_are_failure_rows(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    whole = {kind: encoded(kind, noise) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP")}
    found = reasons(tmp_path, {f"{kind}.jpg": content[: len(content) // 2] for kind, content in whole.items()})
    assert all("cannot be decoded" in reason for reason in found.values())


def test_fault_20_empty_files_and_web_pages_are_failure_rows(tmp_path: Path) -> None:
    found = reasons(tmp_path, {"empty.jpg": b"", "page.jpg": b"<!DOCTYPE html><html>404</html>"})
    assert found["empty.jpg"] == "the image file is empty" and "DOCTYPE" in found["page.jpg"]


def test_fault_21_images_with_flipped_bits_are_vectors_or_failure_rows(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    whole = [encoded(kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP")]
    data = write_dataset(tmp_path / "data", items=40, image_path=[f"{row}.jpg" for row in range(40)])
    for row in range(40):
        content = bytearray(whole[row % 5])
        for place in random.integers(0, len(content), 6):
            content[place] ^= 1 << random.integers(8)
        (data / "images" / f"{row}.jpg").write_bytes(content)
    encoder = ShadeEncoder()
    manifest = export(Dataset(data), tmp_path / "out", encoder.fingerprint, lambda: encoder)
    assert manifest["counts"]["failed"] > 5 and manifest["counts"]["ok"] > 5
    assert sum(manifest["counts"].values()) == 40 and verify(tmp_path / "out") == []


def test_fault_27_a_decompression_bomb_is_a_failure_row(tmp_path: Path) -> None:
    found = reasons(tmp_path, {"bomb.png": png(30_000, 30_000, b"\0" * 100), "b.png": png(11_000, 10_000, b"\0" * 99)})
    assert "11000 × 10000 pixels; at most 100000000" in found["b.png"]  # Pillow would only warn
    assert "900000000 pixels" in found["bomb.png"]


def test_fault_29_formats_outside_the_list_are_failure_rows(tmp_path: Path) -> None:
    files = {
        "float.tiff": encoded("TIFF", Image.new("F", (4, 4), 0.5)),
        "a.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "a.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "a.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
        "disguised.jpg": encoded("PPM"),
    }
    assert all("not a JPEG" in reason for reason in reasons(tmp_path, files).values())


def test_images_of_thousands_of_scans_or_blocks_are_failure_rows(tmp_path: Path) -> None:
    whole = encoded("JPEG")
    files = {
        "scans.jpg": many_scans(quarters(64), 4000),
        "blocks.jpg": whole[:2] + b"\xff\xfe\0\x02" * 10**6 + whole[2:],
    }
    found = reasons(tmp_path, files)
    assert "more than 100 scans" in found["scans.jpg"] and "more than 100000 blocks" in found["blocks.jpg"]


def test_images_that_take_minutes_to_decode_are_failure_rows_and_end_no_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_readers, "MOST_STUCK", 0)
    slow = range(3, 9)
    data = write_dataset(
        tmp_path / "data", image_path=[f"{row}.{'bmp' if row in slow else 'png'}" for row in range(20)]
    )
    for row in slow:
        (data / "images" / f"{row}.bmp").write_bytes(slow_bmp(10_000, 10_000))
    encoder = ShadeEncoder()
    export(Dataset(data), tmp_path / "out", encoder.fingerprint, lambda: encoder, image_timeout=0.3)
    rows = rows_of(tmp_path / "out")
    assert [row["item_id"] for row in rows if row["status"] == "failed"] == [f"{row:03d}" for row in slow]
    assert {row["error"] for row in rows} == {None, "reading the image took longer than 0.3 s"}
    assert verify(tmp_path / "out") == []


def seen(tiny: Tiny, tmp_path: Path, odd: bytes, plain: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Export an odd picture and the plain one that a person sees in it; return their image vectors."""
    data = write_dataset(tmp_path / "data", items=2, title=["chair"] * 2, image_path=["odd.jpg", "plain.png"])
    (data / "images" / "odd.jpg").write_bytes(odd)
    plain.save(data / "images" / "plain.png")
    export_items.run(settings(tiny, data, tmp_path / "out"))
    rows = rows_of(tmp_path / "out")
    assert [row["status"] for row in rows] == ["ok", "ok"]
    return np.array(rows[0]["image"]), np.array(rows[1]["image"])


def test_fault_22_sixteen_bit_grey_has_the_vector_of_its_eight_bits(tiny: Tiny, tmp_path: Path) -> None:
    grey = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint16)
    odd, plain = seen(tiny, tmp_path, encoded("PNG", Image.fromarray(grey * 257)), Image.fromarray(grey.astype("u1")))
    np.testing.assert_array_equal(odd, plain)


def test_fault_23_cmyk_has_nearly_the_vector_of_its_colours(tiny: Tiny, tmp_path: Path) -> None:
    ink = Image.new("CMYK", (64, 64), (0, 255, 255, 0))
    odd, plain = seen(tiny, tmp_path, encoded("JPEG", ink, quality=95), Image.new("RGB", (64, 64), "red"))
    assert odd @ plain / np.linalg.norm(odd) / np.linalg.norm(plain) > 0.999


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_fault_24_colours_hidden_under_transparency_do_not_count(tiny: Tiny, tmp_path: Path, mode: str) -> None:
    shown = Image.new("RGB", (64, 64), "white")
    shown.paste("blue", (0, 0, 32, 64))
    if mode == "RGBA":
        hidden = Image.new("RGBA", (64, 64), (200, 0, 0, 0))
        hidden.paste((0, 0, 255, 255), (0, 0, 32, 64))
        content = encoded("PNG", hidden)
    else:
        hidden = Image.new("P", (64, 64), 1)
        hidden.putpalette([0, 0, 255, 200, 0, 0])
        hidden.paste(0, (0, 0, 32, 64))
        content = encoded("PNG", hidden, transparency=1)
    odd, plain = seen(tiny, tmp_path, content, shown)
    np.testing.assert_array_equal(odd, plain)


def test_fault_25_an_animation_has_the_vector_of_its_first_frame(tiny: Tiny, tmp_path: Path) -> None:
    red, blue = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")
    moving = encoded("GIF", red, save_all=True, append_images=[blue, blue], duration=100)
    odd, plain = seen(tiny, tmp_path, moving, red)
    np.testing.assert_array_equal(odd, plain)


def test_fault_26_a_turned_photograph_has_the_vector_of_the_upright_one(tiny: Tiny, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    odd, plain = seen(tiny, tmp_path, encoded("PNG", exif=exif), quarters(64).rotate(-90))
    np.testing.assert_array_equal(odd, plain)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "internvl", "llava", "gemma4", "llava_onevision"])
def test_fault_28_a_dot_and_a_strip_have_vectors_in_every_family(tiny: Tiny, tmp_path: Path, family: str) -> None:
    sizes = [(1, 1), (1, 5000), (5000, 1)]
    data = write_dataset(tmp_path / "data", items=3, image_path=[f"{w}.{h}.png" for w, h in sizes])
    for width, height in sizes:
        Image.new("RGB", (width, height), "red").save(data / "images" / f"{width}.{height}.png")
    export_items.run(settings(tiny, data, tmp_path / "out", family))
    assert [row["status"] for row in rows_of(tmp_path / "out")] == ["ok"] * 3 and verify(tmp_path / "out") == []


# --- a slow disk ------------------------------------------------------------------------------------------------
@contextmanager
def held(*paths: Path) -> Iterator[None]:
    """Let no open of these files come back: the kernel keeps it waiting for the lease of another process.

    It does so for 45 seconds (/proc/sys/fs/lease-break-time), and then gives the file out: a read that was not given
    up before that succeeds.
    """
    code = """
import fcntl, os, signal, sys, time
signal.signal(signal.SIGIO, signal.SIG_IGN)
try:
    files = [os.open(path, os.O_RDWR) for path in sys.argv[1:]]
    for file in files:
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
except (OSError, AttributeError):
    print("no leases", flush=True)
else:
    print("held", flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code, *map(str, paths)], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            if holder.stdout.readline().strip() != "held":
                pytest.skip("this system has no file leases to make a disk slow with")
            yield
        finally:
            holder.kill()
    deadline = time.monotonic() + 60
    while any(thread.name == "image" for thread in threading.enumerate()):  # they have what they waited for now
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_fault_31_images_that_are_never_read_are_failure_rows_and_hold_nobody_up(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data")
    slow = range(2, 2 + worker.READERS + 1)  # more than there are threads
    code = """
from test_faults import *
encoder = ShadeEncoder()
export(Dataset(Path(sys.argv[1])), Path(sys.argv[2]), encoder.fingerprint, lambda: encoder, image_timeout=0.3)
"""
    with held(*(data / "images" / f"{row}.png" for row in slow)):
        run = Forked(code, data, tmp_path / "out")
        told = run.communicate()[1]
        assert run.returncode == 0, told
    rows = rows_of(tmp_path / "out")
    assert [row["item_id"] for row in rows if row["status"] == "failed"] == [f"{row:03d}" for row in slow]
    assert {row["error"] for row in rows} == {None, "reading the image took longer than 0.3 s"}
    assert verify(tmp_path / "out") == []


def test_fault_31_a_disk_that_is_gone_stops_the_export_and_the_rerun_completes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_readers, "MOST_STUCK", 3)
    folder, encoder = write_dataset(tmp_path / "data"), ShadeEncoder()
    data, out = Dataset(folder), tmp_path / "out"
    with (
        held(*(folder / "images" / f"{row}.png" for row in range(8, 16))),
        pytest.raises(DataError, match=r"4 images at the same time could not be read within 0\.3 s.*--image-timeout"),
    ):
        export(data, out, encoder.fingerprint, lambda: encoder, shard_size=8, image_timeout=0.3)
    assert list(parts(out)) == ["part-00000.parquet"]
    assert export(data, out, encoder.fingerprint, lambda: encoder, shard_size=8)["counts"]["failed"] == 0


def test_fault_31_the_command_waits_neither_for_the_estimate_nor_for_the_image(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_choice, "_PATIENCE", 0.3)
    data = write_dataset(tmp_path / "data", items=4)
    with held(data / "images" / "2.png"):
        manifest = export_items.run(settings(tiny, data, tmp_path / "out", image_timeout=0.3))
    assert manifest["counts"] == {"ok": 3, "truncated": 0, "text_only": 0, "failed": 1}


# --- titles -----------------------------------------------------------------------------------------------------
def test_fault_32_empty_blank_and_null_titles_have_vectors(tiny: Tiny, tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", items=4, title=["", " \n", None, "chair"])
    export_items.run(settings(tiny, data, tmp_path / "out"))
    rows = rows_of(tmp_path / "out")
    assert [row["status"] for row in rows] == ["ok"] * 4 and verify(tmp_path / "out") == []
    assert rows[0]["text"] == rows[1]["text"] == rows[2]["text"] != rows[3]["text"]


ODD_TITLES = {
    "emoji 🪑": "🪑🛋️ chair",
    "ימין": "כיסא עץ",
    "nul \0": "red\0chair",
    "10k": "wooden " * 1429,
    "100k": "x" * 100_000,
    "100k 🪑": "🪑" * 100_000,
}


@pytest.mark.parametrize("fusion", ["external", "internal"])
def test_fault_33_odd_and_endless_titles_are_cut_with_a_flag_and_their_ids_come_back(
    tiny: Tiny, tmp_path: Path, fusion: str
) -> None:
    data = write_dataset(tmp_path / "data", items=6, item_id=list(ODD_TITLES), title=list(ODD_TITLES.values()))
    export_items.run(settings(tiny, data, tmp_path / "out", fusion=fusion))
    rows = {row["item_id"]: row for row in rows_of(tmp_path / "out")}
    assert list(rows) == list(ODD_TITLES) and verify(tmp_path / "out") == []
    assert {name for name, row in rows.items() if row["status"] == "truncated"} == {"10k", "100k", "100k 🪑"}
    assert {name for name, row in rows.items() if row["status"] == "ok"} == set(list(ODD_TITLES)[:3])


def test_fault_35_a_title_of_special_tokens_neither_ends_the_prompt_nor_asks_for_an_image(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[EncodedPrompt] = []
    tokenize = Backbone.tokenize

    def noted(self: Backbone, *arguments: Any) -> EncodedPrompt:
        prompts.append(tokenize(self, *arguments))
        return prompts[-1]

    monkeypatch.setattr(Backbone, "tokenize", noted)
    titles = ["<|im_end|> chair", "chair <|image_pad|><|vision_start|>", "<|endoftext|>", "chair"]
    data = write_dataset(tmp_path / "data", items=4, title=titles)
    export_items.run(settings(tiny, data, tmp_path / "out", fusion="internal"))
    assert [row["status"] for row in rows_of(tmp_path / "out")] == ["ok"] * 4
    backbone = ItemEncoder.load(str(tiny("qwen2_5_vl")), device="cpu").backbone
    special = set(backbone.tokenizer.all_special_ids)
    assert len(prompts) == 4
    assert len({tuple(token for token in prompt.ids if token in special) for prompt in prompts}) == 1


# --- sizes and numbers ------------------------------------------------------------------------------------------
def test_fault_37_no_items_make_a_complete_folder_of_none(tmp_path: Path) -> None:
    data = Dataset(write_dataset(tmp_path / "data", items=0))
    manifest = export(data, tmp_path / "out", ShadeEncoder().fingerprint, never)
    assert manifest["num_items"] == 0 and verify(tmp_path / "out") == []


@pytest.mark.slow
def test_fault_37_a_million_items_take_no_more_memory_than_their_ids_and_titles() -> None:
    script = [sys.executable, str(TESTS / "benchmarks" / "export_memory.py"), "--sizes", "10000", "1000000"]
    lines = subprocess.run(script, check=True, capture_output=True, text=True).stdout.splitlines()
    grown = int(lines[-1].split()[4])  # MiB
    assert grown * 2**20 < 600 * 990_000, "\n".join(lines)  # an item's id, title and path; its vectors have 1,024 bytes


def test_fault_38_nan_in_bfloat16_is_computed_again_alone_in_float32(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = ItemEncoder.load(str(tiny("qwen2_5_vl")), dtype="bfloat16", device="cpu")
    exact = ItemEncoder.load(str(tiny("qwen2_5_vl")), dtype="float32", device="cpu")
    titles, image = ["lamp", "a chair with a bug", "table"], Image.new("RGB", (56, 56), "red")
    expected = exact.encode_items(titles[1:2], [image])
    before = {name: tensor.clone() for name, tensor in encoder.backbone.model.state_dict().items()}
    bug = encoder.backbone.tokenizer(" bug", add_special_tokens=False)["input_ids"][-1]
    rows, batches = Backbone.encode, []

    def overflow(self: Backbone, prompts: Sequence[EncodedPrompt]) -> torch.Tensor:
        found = rows(self, prompts)
        batches.append((len(prompts), found.dtype))
        for row, prompt in enumerate(prompts):
            if bug in prompt.ids and found.dtype == torch.bfloat16:
                found[row] = torch.nan
        return found

    monkeypatch.setattr(Backbone, "encode", overflow)
    found = encode_rows(encoder, titles, [image] * 3)
    assert found.status == ["ok"] * 3
    np.testing.assert_allclose(found.vectors["text"][1], expected.text[0], atol=0.05)
    assert {size for size, dtype in batches if dtype == torch.float32} == {1}
    after = encoder.backbone.model.state_dict()
    assert all(
        torch.equal(tensor, after[name]) and tensor.dtype == after[name].dtype for name, tensor in before.items()
    )
    monkeypatch.undo()
    again = encode_rows(encoder, titles, [image] * 3)
    np.testing.assert_array_equal(again.vectors["text"][[0, 2]], found.vectors["text"][[0, 2]])


def test_fault_39_an_export_of_equal_vectors_is_told_with_its_effective_rank(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_dataset(tmp_path / "data", title=["chair"] * 20)
    export_items.run(settings(tiny, data, tmp_path / "out", views="text"))
    told = " ".join(capsys.readouterr().err.split())
    assert "warning: the text vectors hardly differ from item to item (effective rank 0.0)" in told


@pytest.mark.slow
def test_fault_40_when_memory_really_runs_out_rows_are_halved_and_order_is_kept(tiny: Tiny) -> None:
    code = """
from test_faults import *
import resource
encoder = ItemEncoder.load(sys.argv[1], dtype="float32", device="cpu", views="text")
histories = [[f"chair number {row} with arms of wood " * 3 for _ in range(10)] for row in range(200)]
nothing = [[] for _ in histories]
with torch.no_grad():
    expected = encoder.encode_sequences(histories, nothing)["fused"]
    encoder.token_budget = 10**9
    used = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + 80 * 2**20, resource.RLIM_INFINITY))
    found = encoder.encode_sequences(histories, nothing)["fused"]
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(json.dumps([float((found - expected).abs().max()), encoder.token_budget]))
"""
    short = child(code, tiny("qwen2_5_vl"))
    out, told = short.communicate()
    assert short.returncode == 0, told
    difference, budget = json.loads(out)
    assert difference <= 1e-5 and budget < 100_000 and "out of memory: rows of" in told


@pytest.mark.parametrize("fault", ["renamed keys", "other base", "all-zero B"])
def test_fault_42_an_export_with_an_adapter_that_does_nothing_is_refused_without_a_shard(
    tiny: Tiny, tmp_path: Path, fault: str
) -> None:
    write_adapter(tiny("qwen2_vl" if fault == "other base" else "qwen2_5_vl"), tmp_path / "adapter")
    path = tmp_path / "adapter" / lora.WEIGHTS_FILE
    weights = safetensors.torch.load_file(path)
    if fault == "renamed keys":
        weights = {name.replace("language_model", "text_model"): tensor for name, tensor in weights.items()}
    elif fault == "all-zero B":
        weights = {name: tensor * ("lora_B" not in name) for name, tensor in weights.items()}
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
    without_checksums(tmp_path / "adapter")
    config = settings(tiny, write_dataset(tmp_path / "data"), tmp_path / "out", adapter=tmp_path / "adapter")
    with pytest.raises(ModelError) as refusal:
        export_items.run(config)
    assert refusal.value.exit_code == 4
    assert not list(tmp_path.glob("out/part-*")) and not (tmp_path / "out" / schema.MANIFEST_FILE).exists()


class Dies(BaseException):
    """What no reader expects."""


def test_fault_44_a_reader_that_dies_ends_the_export_without_a_hang_and_the_rerun_completes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = worker.open_image

    def dying(root: Path, relative: str, pixels: int) -> Image.Image:
        if relative == "13.png":
            raise Dies
        return read(root, relative, pixels)

    data, encoder, out = Dataset(write_dataset(tmp_path / "data")), ShadeEncoder(), tmp_path / "out"
    monkeypatch.setattr(worker, "open_image", dying)
    with pytest.raises(Dies):
        export(data, out, encoder.fingerprint, lambda: encoder, shard_size=8)
    assert list(parts(out)) == ["part-00000.parquet"]
    monkeypatch.undo()
    assert export(data, out, encoder.fingerprint, lambda: encoder, shard_size=8)["counts"]["failed"] == 0


def test_fault_44_a_writer_that_dies_ends_the_export_without_a_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dying(*arguments: Any) -> None:
        raise Dies

    data, encoder = Dataset(write_dataset(tmp_path / "data")), ShadeEncoder()
    monkeypatch.setattr(shards, "publish_shard", dying)
    with pytest.raises(Dies):
        export(data, tmp_path / "out", encoder.fingerprint, lambda: encoder, shard_size=8)


# --- what an export never does ----------------------------------------------------------------------------------
WATCHED = """
from test_faults import *
from vlm2rec.pipelines.cli import main
import vlm2rec.pipelines.export_items
told = open(os.environ["EVENTS"], "w", buffering=1)
watched = ("socket.__new__", "socket.connect", "socket.getaddrinfo", "urllib.", "subprocess.", "os.system", "os.exec")
watched += ("os.posix_spawn", "os.fork", "pickle.", "open")
def hook(event, arguments):
    if event.startswith(watched):
        told.write(event + " " + (str(arguments[0]) if event == "open" else repr(arguments)[:200]) + "\\n")
sys.addaudithook(hook)
main()
"""


def test_an_export_opens_no_file_outside_the_root_no_socket_no_process_and_no_pickle(
    tiny: Tiny, tmp_path: Path
) -> None:
    hostile = [
        *("0.png", "../secret.png", "out.png", "http://127.0.0.1:9/a.png", "file:///etc/passwd", "pipe.png"),
        *("a.eps", "folder", "/etc/passwd", "a.tiff"),
    ]
    data = write_dataset(tmp_path / "data", items=len(hostile), image_path=hostile)
    images = data / "images"
    quarters().save(data / "secret.png")
    (images / "out.png").symlink_to(data / "secret.png")
    os.mkfifo(images / "pipe.png")
    (images / "a.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (images / "a.tiff").write_bytes(encoded("TIFF"))
    (images / "folder").mkdir()
    write_adapter(tiny("qwen2_5_vl"), tmp_path / "adapter")
    flags = ["--data", data, "--backbone", tiny("qwen2_5_vl"), "--adapter", tmp_path / "adapter"]
    out = ["--out", tmp_path / "out", "--max-failures", 1]
    watched = child(WATCHED, "export-items", *flags, *out, EVENTS=str(tmp_path / "events"))
    told = watched.communicate()[1]
    assert watched.returncode == 0, told
    assert [row["status"] for row in rows_of(tmp_path / "out")] == ["ok"] + ["failed"] * 9
    events = (tmp_path / "events").read_text().splitlines()
    assert sorted({event for event in events if not event.startswith("open ")}) == []
    opened = {event.removeprefix("open ") for event in events}
    assert f"{images}/0.png" in opened  # the hook sees reads
    assert not {path for path in opened if "secret" in path or "pipe.png" in path or path == "/etc/passwd"}


def evil(folder: Path, kind: str) -> Path:
    """Write a text encoder that wants its own code run, or its pickle opened."""
    sentence_folder(folder, dense=9)
    code = folder / "evil.py"
    code.write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Evil: pass\nclass Normalize: pass\n")
    if kind == "module":
        listed = json.loads((folder / "modules.json").read_text())
        (folder / "modules.json").write_text(json.dumps([*listed[:-1], {**listed[-1], "type": "evil.Normalize"}]))
    elif kind == "auto_map":
        config = json.loads((folder / "config.json").read_text())
        auto = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "evil", "auto_map": auto}))
    else:
        weights = (folder if kind == "pickle" else folder / "2_Dense") / "model.safetensors"
        torch.save(safetensors.torch.load_file(weights), weights.with_name("pytorch_model.bin"))
        weights.unlink()
    return folder


def test_of_a_text_encoder_nothing_is_run_or_unpickled_and_what_needs_that_is_refused(tmp_path: Path) -> None:
    data, sound = write_dataset(tmp_path / "data"), sentence_folder(tmp_path / "sound", dense=9)
    wants = {kind: evil(tmp_path / kind, kind) for kind in ("module", "auto_map", "pickle", "dense pickle")}
    config = json.loads((sound / "config.json").read_text())
    auto = {"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"}  # beside a type that transformers knows: not followed
    (sound / "config.json").write_text(json.dumps(config | {"auto_map": auto}))
    (sound / "evil.py").write_text(f"open({str(sound / 'ran')!r}, 'w')\n")
    each = """
    for folder in json.loads(os.environ["FOLDERS"]):
        sys.argv[4:] = ["--encoder", folder, "--out", folder + "-out"]
        try:
            main()
        except SystemExit as ended:
            print(Path(folder).name, ended.code or 0)
"""
    folders = json.dumps([str(folder) for folder in (sound, *wants.values())])
    code = WATCHED.removesuffix("main()\n") + textwrap.dedent(each)
    watched = child(code, "export-items", "--data", data, EVENTS=str(tmp_path / "events"), FOLDERS=folders)
    out, told = watched.communicate()
    assert dict(line.rsplit(" ", 1) for line in out.splitlines()) == {"sound": "0", **dict.fromkeys(wants, "4")}, told
    assert "pickled weights are never opened" in told and "evil.Normalize" in told
    events = (tmp_path / "events").read_text().splitlines()
    assert sorted({event for event in events if not event.startswith("open ")}) == []
    opened = {event.removeprefix("open ") for event in events}
    assert any(path.endswith("sound/2_Dense/model.safetensors") for path in opened)  # the hook sees reads
    assert not {path for path in opened if path.endswith((".bin", "evil.py", "ran"))}
    assert not list(tmp_path.rglob("ran"))

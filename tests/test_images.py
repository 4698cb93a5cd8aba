"""Reading images from strangers: what is accepted looks right, everything else is an `ImageError` with a reason."""

from __future__ import annotations

import io
import os
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from children import child
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlm2rec.embedder.backbones import image_limits, image_readers, images
from vlm2rec.embedder.backbones.image_limits import MAX_BLOCKS, MAX_SCANS, Memory, Timing
from vlm2rec.embedder.backbones.image_process import Decoders
from vlm2rec.embedder.backbones.image_readers import Readers
from vlm2rec.embedder.backbones.images import FORMATS, MAX_ASPECT, ImageError, open_image, read_file
from vlm2rec.embedder.contract import beneath


def save(root: Path, name: str, image: Image.Image, **options: object) -> str:
    image.save(root / name, **options)
    return name


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def quarters(size: int = 32) -> Image.Image:
    """Red top left, green top right, blue bottom left, black bottom right."""
    values = np.zeros((size, size, 3), np.uint8)
    half = size // 2
    values[:half, :half, 0] = values[:half, half:, 1] = values[half:, :half, 2] = 255
    return Image.fromarray(values)


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def many_scans(image: Image.Image, more: int) -> bytes:
    """A progressive JPEG whose shortest scan comes `more` times again."""
    whole = encoded(image, "JPEG", progressive=True, quality=1)
    scans, at = [], 2
    while whole[at + 1] != 0xD9:
        end = at + 2 + int.from_bytes(whole[at + 2 : at + 4], "big")
        if whole[at + 1] == 0xDA:
            while whole[end] != 0xFF or whole[end + 1] == 0:
                end += 1
            scans.append(whole[at:end])
        at = end
    return whole[:at] + min(scans, key=len) * more + whole[at:]


def slow_bmp(width: int, height: int) -> bytes:
    """Run lengths of one pixel in each row, whose rest Pillow fills in Python, one by one."""
    runs = b"\x01\x05\0\0" * height + b"\0\x01"
    start = 54 + 1024
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(runs), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", start + len(runs), 0, 0, start) + header + bytes(1024) + runs


def png(width: int, height: int, body: bytes) -> bytes:
    """A PNG whose header promises `width` × `height` RGB pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("name", "options"),
    [("a.png", {}), ("a.jpg", {"quality": 95}), ("a.webp", {"lossless": True}), ("a.gif", {}), ("a.bmp", {})],
)
def test_each_allowed_format_is_read_as_rgb(tmp_path: Path, name: str, options: dict[str, object]) -> None:
    found = pixels(open_image(tmp_path, save(tmp_path, name, quarters(), **options)))
    assert found.shape == (32, 32, 3)
    for (row, column), colour in {
        (6, 6): (255, 0, 0),
        (6, 26): (0, 255, 0),
        (26, 6): (0, 0, 255),
        (26, 26): (0, 0, 0),
    }.items():
        assert np.abs(found[row, column] - colour).max() <= 8


def test_the_format_is_taken_from_the_bytes_not_from_the_name(tmp_path: Path) -> None:
    quarters().save(tmp_path / "wrong.jpg", format="PNG")
    assert (pixels(open_image(tmp_path, "wrong.jpg"))[0, 0] == (255, 0, 0)).all()


def test_fault_22_sixteen_bit_grey_of_mean_127_stays_127(tmp_path: Path) -> None:
    values = np.full((8, 8), 127 * 257, np.uint16)
    values[0], values[1] = 0, 65_535
    save(tmp_path, "grey.png", Image.fromarray(values))
    found = pixels(open_image(tmp_path, "grey.png"))
    assert found[2:].mean() == 127
    assert found[0].max() == 0 and found[1].min() == 255


def test_fault_23_cmyk_becomes_its_colour(tmp_path: Path) -> None:
    save(tmp_path, "ink.jpg", Image.new("CMYK", (16, 16), (0, 255, 255, 0)), quality=95)
    assert np.abs(pixels(open_image(tmp_path, "ink.jpg"))[8, 8] - (255, 0, 0)).max() <= 8


def test_fault_24_colours_hidden_under_full_transparency_turn_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (4, 2), (200, 0, 0, 0))
    image.putpixel((0, 0), (0, 0, 200, 255))
    image.putpixel((1, 0), (0, 0, 0, 128))
    found = pixels(open_image(tmp_path, save(tmp_path, "alpha.png", image)))
    assert found[0, 0].tolist() == [0, 0, 200]
    assert np.abs(found[0, 1] - 127).max() <= 1
    assert (found[1] == 255).all()


def test_fault_24_grey_with_alpha_is_laid_on_white(tmp_path: Path) -> None:
    image = Image.new("LA", (2, 1), (10, 0))
    image.putpixel((1, 0), (10, 255))
    assert pixels(open_image(tmp_path, save(tmp_path, "la.png", image)))[0].tolist() == [[255] * 3, [10] * 3]


@pytest.mark.parametrize("transparency", [0, b"\x00\xff"])
def test_fault_24_transparent_palette_entries_are_laid_on_white(tmp_path: Path, transparency: int | bytes) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([200, 0, 0, 0, 200, 0])
    image.putpixel((1, 0), 1)
    save(tmp_path, "palette.png", image, transparency=transparency)
    assert pixels(open_image(tmp_path, "palette.png"))[0].tolist() == [[255] * 3, [0, 200, 0]]


@pytest.mark.parametrize(("mode", "key"), [("L", 40), ("RGB", (40, 40, 40)), ("I;16", 40 * 257)])
def test_the_colour_a_png_declares_transparent_turns_white(tmp_path: Path, mode: str, key: object) -> None:
    values = {
        "L": np.array([[40, 90]], np.uint8),
        "RGB": np.array([[[40] * 3, [90] * 3]], np.uint8),
        "I;16": np.array([[40 * 257, 90 * 257]], np.uint16),
    }[mode]
    save(tmp_path, "key.png", Image.fromarray(values), transparency=key)
    assert pixels(open_image(tmp_path, "key.png"))[0].tolist() == [[255] * 3, [90] * 3]


@pytest.mark.skipif("AVIF" not in FORMATS, reason="this Pillow has no AVIF")
def test_an_avif_is_read_where_pillow_has_it_and_a_damaged_one_has_its_reason(tmp_path: Path) -> None:
    save(tmp_path, "a.avif", Image.new("RGB", (40, 30), (200, 40, 90)), quality=100)
    found = open_image(tmp_path, "a.avif")
    assert found.mode == "RGB" and found.size == (40, 30)
    assert np.abs(pixels(found).astype(int) - [200, 40, 90]).max() <= 4
    content = (tmp_path / "a.avif").read_bytes()
    for number, damaged in enumerate((content[:-20], content[:40], content.replace(b"avif", b"heic"))):
        (tmp_path / f"{number}.avif").write_bytes(damaged)
        with pytest.raises(ImageError):
            open_image(tmp_path, f"{number}.avif")


@pytest.mark.parametrize("name", ["moving.gif", "moving.webp"])
def test_fault_25_an_animation_gives_its_first_frame(tmp_path: Path, name: str) -> None:
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    options = {"lossless": True} if name.endswith("webp") else {}
    save(tmp_path, name, red, save_all=True, append_images=[blue, blue], duration=100, **options)
    assert (pixels(open_image(tmp_path, name)) == (255, 0, 0)).all()


@pytest.mark.parametrize("name", ["turned.jpg", "turned.png", "turned.webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_fault_26_exif_orientation_is_applied(tmp_path: Path, name: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = quarters(64)
    save(tmp_path, name, stored, exif=exif, **({"lossless": True} if name.endswith("webp") else {}))
    turned = {
        1: stored,
        2: stored.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: stored.rotate(180),
        4: stored.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: stored.rotate(-90).transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        6: stored.rotate(-90),
        7: stored.rotate(90).transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        8: stored.rotate(90),
    }[orientation]
    assert np.abs(pixels(open_image(tmp_path, name)) - pixels(turned))[8::16, 8::16].max() <= 8


@pytest.mark.parametrize("exif", [b"", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff", b"nonsense"])
def test_a_damaged_exif_block_does_not_lose_the_image(tmp_path: Path, exif: bytes) -> None:
    save(tmp_path, "a.jpg", quarters(), exif=b"Exif\0\0" + exif)
    assert open_image(tmp_path, "a.jpg").size == (32, 32)


def test_a_damaged_animation_block_does_not_lose_the_image(tmp_path: Path) -> None:
    quarters().save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    head = 8 + 25  # signature, IHDR
    block = b"acTL" + struct.pack(">II", 0, 0)  # promises no frames at all
    (tmp_path / "a.png").write_bytes(
        whole[:head] + struct.pack(">I", 8) + block + struct.pack(">I", zlib.crc32(block)) + whole[head:]
    )
    assert open_image(tmp_path, "a.png").size == (32, 32)


def test_fault_28_one_pixel_is_an_image(tmp_path: Path) -> None:
    save(tmp_path, "dot.png", Image.new("RGB", (1, 1), "red"))
    assert pixels(open_image(tmp_path, "dot.png", target_pixels=224 * 224)).tolist() == [[[255, 0, 0]]]


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (2, 60_000)])
@pytest.mark.parametrize("target", [None, 224 * 224])
def test_fault_28_a_strip_is_centred_on_white_within_the_ratio(
    tmp_path: Path, size: tuple[int, int], target: int
) -> None:
    save(tmp_path, "strip.png", Image.new("RGB", size, "red"))
    image = open_image(tmp_path, "strip.png", target_pixels=target)
    assert max(image.size) / min(image.size) <= MAX_ASPECT
    found = pixels(image)
    middle = found[(image.height - 1) // 2, (image.width - 1) // 2]
    assert (middle == (255, 0, 0)).all()
    assert (found[0, 0] == 255).all() and (found[-1, -1] == 255).all()


def test_fault_27_a_decompression_bomb_is_refused_from_its_header(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(png(30_000, 30_000, b"\0" * 100))
    with pytest.raises(ImageError, match="900000000 pixels"):
        open_image(tmp_path, "bomb.png")
    (tmp_path / "small bomb.png").write_bytes(png(11_000, 10_000, b"\0" * 100))
    with pytest.raises(ImageError, match="11000 × 10000 pixels"):  # Pillow would only warn
        open_image(tmp_path, "small bomb.png")


def test_a_line_longer_than_65535_pixels_is_refused(tmp_path: Path) -> None:
    (tmp_path / "line.png").write_bytes(png(1, 70_000, b"\0\0\0\0" * 70_000))
    with pytest.raises(ImageError, match="1 × 70000 pixels"):
        open_image(tmp_path, "line.png")


def test_a_large_jpeg_is_decoded_small_but_not_below_twice_the_target(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(128, 20, (24, 32, 3)).clip(0, 255).astype(np.uint8)
    picture = Image.fromarray(noise).resize((1600, 1200), Image.Resampling.BICUBIC)
    for name in ("large.jpg", "large.png"):
        save(tmp_path, name, picture)
        image = open_image(tmp_path, name, target_pixels=224 * 224)
        assert 4 * 224 * 224 <= image.width * image.height < 16 * 224 * 224
        assert image.width / image.height == pytest.approx(4 / 3, rel=0.01)
        whole = picture.resize((256, 192), Image.Resampling.BICUBIC)
        small = image.resize((256, 192), Image.Resampling.BICUBIC)
        assert np.abs(pixels(whole) - pixels(small)).mean() < 1.5


def test_a_picture_near_the_target_keeps_every_pixel(tmp_path: Path) -> None:
    save(tmp_path, "a.png", quarters(600))
    assert open_image(tmp_path, "a.png", target_pixels=224 * 224).size == (600, 600)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.gif", "a.bmp"])
def test_fault_19_a_truncated_file_is_refused(tmp_path: Path, name: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    save(tmp_path, name, Image.fromarray(noise))
    whole = (tmp_path / name).read_bytes()
    for part in (0.9, 0.5, 0.05):
        (tmp_path / name).write_bytes(whole[: int(len(whole) * part)])
        with pytest.raises(ImageError, match=r"cannot be decoded|not a JPEG"):
            open_image(tmp_path, name)


def test_fault_20_an_empty_file_and_a_web_page_named_jpg_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "page.jpg").write_bytes(b"<!DOCTYPE html><html><body>404</body></html>")
    with pytest.raises(ImageError, match="empty"):
        open_image(tmp_path, "empty.jpg")
    with pytest.raises(ImageError, match=r"not a JPEG, PNG, WEBP, GIF, BMP.*DOCTYPE"):
        open_image(tmp_path, "page.jpg")


def test_fault_29_formats_outside_the_list_are_refused(tmp_path: Path) -> None:
    quarters().save(tmp_path / "a.tiff")
    Image.new("F", (4, 4), 0.5).save(tmp_path / "float.tiff")
    quarters().save(tmp_path / "a.ppm")
    (tmp_path / "a.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (tmp_path / "a.svg").write_bytes(b"<svg xmlns='http://www.w3.org/2000/svg'/>")
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    for name in ("a.tiff", "float.tiff", "a.ppm", "a.eps", "a.svg", "a.heic"):
        (tmp_path / name).rename(tmp_path / "disguised.jpg")
        with pytest.raises(ImageError, match="not a JPEG"):
            open_image(tmp_path, "disguised.jpg")


@pytest.mark.parametrize("relative", ["/etc/hostname", "../secret.png", "a/../../secret.png", "~/x.png"])
def test_fault_30_a_path_that_leads_out_of_the_root_is_refused(tmp_path: Path, relative: str) -> None:
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    quarters().save(tmp_path / "secret.png")
    with pytest.raises(ImageError, match="out of the image root"):
        open_image(root, relative)


def test_fault_30_a_link_may_stay_inside_the_root_but_not_leave_it(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "deep").mkdir(parents=True)
    quarters().save(tmp_path / "secret.png")
    quarters().save(root / "deep" / "own.png")
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "up").symlink_to(tmp_path)
    (root / "in.png").symlink_to("deep/own.png")
    (root / "loop.png").symlink_to("loop.png")
    for relative in ("out.png", "up/secret.png"):
        with pytest.raises(ImageError, match="out of the image root"):
            open_image(root, relative)
    with pytest.raises(ImageError, match="cannot be followed"):
        open_image(root, "loop.png")
    assert open_image(root, "in.png").size == (32, 32)


def test_a_root_that_is_itself_a_link_works(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    quarters().save(tmp_path / "real" / "a.png")
    (tmp_path / "link").symlink_to("real")
    assert open_image(tmp_path / "link", "a.png").size == (32, 32)


@pytest.mark.parametrize("relative", ["http://example.org/a.png", "https://example.org/a.png", "file:///etc/hostname"])
def test_fault_30_a_url_is_refused_unread(tmp_path: Path, relative: str) -> None:
    with pytest.raises(ImageError, match="URL"):
        open_image(tmp_path, relative)


@pytest.mark.parametrize("relative", ["", "  ", "a\0.png", "missing.png", "x" * 5000, "\ud800.png", "none/a.png"])
def test_fault_30_a_path_that_names_nothing_is_refused(tmp_path: Path, relative: str) -> None:
    with pytest.raises(ImageError):
        open_image(tmp_path, relative)


def test_fault_30_a_folder_and_a_fifo_are_refused_without_a_hang(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    reasons: list[str] = []

    def read() -> None:
        for name in ("folder.png", "pipe.png"):
            try:
                open_image(tmp_path, name)
            except ImageError as error:
                reasons.append(str(error))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(timeout=10)
    assert reasons == ["the image path is not a regular file"] * 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_fault_30_a_file_without_permission_is_refused(tmp_path: Path) -> None:
    save(tmp_path, "shut.png", quarters())
    (tmp_path / "shut.png").chmod(0)
    with pytest.raises(ImageError, match="permission"):
        open_image(tmp_path, "shut.png")


def _samples() -> list[bytes]:
    files = []
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP"):
        buffer = io.BytesIO()
        quarters(24).save(buffer, format=kind)
        files.append(buffer.getvalue())
    return files


@given(
    file=st.sampled_from(_samples()), flips=st.lists(st.tuples(st.integers(0, 4000), st.integers(1, 255)), max_size=8)
)
def test_fault_21_flipped_bytes_give_an_image_or_a_reason_and_nothing_else(
    tmp_path: Path, file: bytes, flips: list[tuple[int, int]]
) -> None:
    damaged = bytearray(file)
    for place, change in flips:
        damaged[place % len(damaged)] ^= change
    (tmp_path / "a.jpg").write_bytes(damaged)
    try:
        image = open_image(tmp_path, "a.jpg", target_pixels=64)
    except ImageError:
        return
    assert image.mode == "RGB" and min(image.size) >= 1


# --- links that change ------------------------------------------------------------------------------------------
@contextmanager
def swapping(link: Path, places: list[Path]) -> Iterator[None]:
    """Let a link point here and there in turn, as fast as another process can, and in the end to the first place."""
    code = """
import os, sys
link, *places = sys.argv[1:]
print("begun", flush=True)
while True:
    for place in places:
        os.symlink(place, link + "'")
        os.replace(link + "'", link)
"""
    with child(code, link, *places) as swapper:
        try:
            assert swapper.stdout is not None and swapper.stdout.readline()
            yield
        finally:
            swapper.kill()
    link.unlink()
    link.symlink_to(places[0])


@pytest.fixture(params=["openat2", "by parts"])
def opening(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to open a file beneath the root; the second is that of other systems and of old sandboxes."""
    if request.param == "by parts":
        monkeypatch.setattr(beneath, "_open_in_kernel", lambda root, relative: None)
    return str(request.param)


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    """A root with a picture in a folder, and beside it the same with another picture, a secret."""
    for folder, colour in ((tmp_path / "root" / "inside", "green"), (tmp_path / "outside", "red")):
        folder.mkdir(parents=True)
        save(folder, "a.png", Image.new("RGB", (8, 8), colour))
    return tmp_path


@pytest.mark.parametrize("what", ["the file", "a folder on the way"])
@pytest.mark.usefixtures("opening")
def test_a_link_that_changes_while_it_is_read_never_leads_out(beside: Path, what: str) -> None:
    root, link = beside / "root", beside / "root" / "link"
    name, end = ("link", "a.png") if what == "the file" else ("link/a.png", "")
    secret, own = (beside / "outside" / "a.png").read_bytes(), (root / "inside" / "a.png").read_bytes()
    places = [Path("inside", end), beside / "outside" / end, Path("..", "outside", end)]
    found: set[bytes] = set()
    with swapping(link, places):
        for _ in range(3000):
            with suppress(ImageError):
                found.add(read_file(root, name))
    assert found <= {own} and own != secret
    assert read_file(root, name) == own


def test_a_link_put_in_place_after_the_check_is_not_followed(beside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The moment between resolving and opening, of which openat2 has none."""
    monkeypatch.setattr(beneath, "_open_in_kernel", lambda root, relative: None)
    root, resolve = beside / "root", os.path.realpath
    picture = root / "inside" / "a.png"

    def resolve_and_swap(path: str | Path, *, strict: bool = False) -> str:
        found = resolve(path, strict=strict)
        if strict:
            picture.unlink()
            picture.symlink_to(beside / "outside" / "a.png")
        return found

    monkeypatch.setattr(os.path, "realpath", resolve_and_swap)
    with pytest.raises(ImageError, match="cannot be followed"):
        read_file(root, "inside/a.png")


@pytest.mark.parametrize("kind", ["relative", "absolute", "out and in again", "of a link", "of a folder"])
@pytest.mark.usefixtures("opening")
def test_links_to_places_below_the_root_are_followed(beside: Path, kind: str) -> None:
    root = beside / "root"
    target = {
        "relative": "inside/a.png",
        "absolute": str(root / "inside" / "a.png"),
        "out and in again": "../root/inside/a.png",
        "of a link": "second",
        "of a folder": "inside",
    }
    (root / "second").symlink_to(root / "inside" / "a.png")
    (root / "link").symlink_to(target[kind])
    assert open_image(root, "link/a.png" if kind == "of a folder" else "link").size == (8, 8)


@pytest.mark.usefixtures("opening")
def test_fault_30_sockets_pipes_and_devices_are_refused_without_a_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as bound:
        here = Path.cwd()
        os.chdir(tmp_path)  # the name of a socket is short
        try:
            bound.bind("socket")
        finally:
            os.chdir(here)
        for name in ("pipe", "socket", "."):
            with pytest.raises(ImageError, match="not a regular file"):
                open_image(tmp_path, name)
    with pytest.raises(ImageError, match="not a regular file"):
        open_image(Path("/dev"), "zero")


# --- what decoding costs ----------------------------------------------------------------------------------------
def test_a_jpeg_of_thousands_of_scans_is_refused_undecoded_and_one_of_dozens_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = quarters(64)
    (tmp_path / "dozens.jpg").write_bytes(many_scans(picture, 60))
    (tmp_path / "thousands.jpg").write_bytes(many_scans(picture, 4000))
    assert np.abs(pixels(open_image(tmp_path, "dozens.jpg")) - pixels(picture)).mean() < 40
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("a decoder saw it"))
    with pytest.raises(ImageError, match=f"more than {MAX_SCANS} scans"):
        open_image(tmp_path, "thousands.jpg")


@pytest.mark.parametrize("filling", [b"\xff", b"\xff\xd0", b"\xff\xfe\0\x04\xff\xda"])
def test_scans_behind_fillers_restarts_and_comments_are_counted(filling: bytes) -> None:
    whole = many_scans(quarters(64), 0)
    last = whole.rindex(b"\xff\xda")
    again = whole[last:-2]
    image_limits.survey(whole[:-2] + (filling + again) * (MAX_SCANS // 2) + whole[-2:])
    with pytest.raises(ImageError, match="scans"):
        image_limits.survey(whole[:-2] + (filling + again) * MAX_SCANS + whole[-2:])


def test_what_only_looks_like_a_scan_does_not_count(tmp_path: Path) -> None:
    for progressive in (False, True):
        whole = encoded(quarters(64), "JPEG", progressive=progressive)
        comment = b"\xff\xfe" + struct.pack(">H", 8002) + b"\xff\xda" * 4000
        (tmp_path / "a.jpg").write_bytes(whole[:2] + comment + whole[2:])
        assert open_image(tmp_path, "a.jpg").size == (64, 64)
        second = whole.rindex(b"\xff\xda")
        (tmp_path / "a.jpg").write_bytes(whole[:second] + comment + whole[second:])
        assert open_image(tmp_path, "a.jpg").size == (64, 64)


def _blocks(kind: str, count: int) -> bytes:
    image = quarters(16)
    if kind.startswith("jpeg"):
        whole = encoded(image, "JPEG")
        block = {"jpeg comments": b"\xff\xfe\0\x02", "jpeg fillers": b"\xff", "jpeg garbage": b"\0"}[kind]
        return whole[:20] + block * count + whole[20:]  # behind the first segment
    if kind.startswith("png"):
        whole = encoded(image, "PNG")
        if kind == "png chunks":
            return whole[:33] + chunk(b"teSt", b"") * count + whole[33:]
        data = zlib.compress(b"\0" * (3 * count + 1), 0)[:count]
        header = struct.pack(">IIBBBBB", count, 1, 8, 2, 0, 0, 0)
        return whole[:8] + chunk(b"IHDR", header) + b"".join(chunk(b"IDAT", bytes([byte])) for byte in data)
    whole = encoded(image.convert("P"), "GIF")
    start = 13 + (3 << (whole[10] & 7) + 1)
    block = b"\x21\xfe\x01x\0" if kind == "gif comments" else b"\x01x"
    if kind == "gif pieces":
        return whole[:start] + b"\x21\xfe" + block * count + b"\0" + whole[start:]
    return whole[:start] + block * count + whole[start:]


@pytest.mark.parametrize(
    "kind",
    ["jpeg comments", "jpeg fillers", "jpeg garbage", "png chunks", "png data", "gif comments", "gif pieces"],
)
def test_a_file_of_a_million_blocks_is_refused_from_its_headers(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "few").write_bytes(_blocks(kind, 300))
    if kind != "png data":
        assert open_image(tmp_path, "few").size == (16, 16)
    (tmp_path / "many").write_bytes(_blocks(kind, 2 * MAX_BLOCKS))
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("a decoder saw it"))
    for read in (open_image, images.size_of):
        with pytest.raises(ImageError, match=f"more than {MAX_BLOCKS} blocks"):
            read(tmp_path, "many")


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_of_two_thousand_frames_gives_its_first(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = [Image.new("RGB", (8, 8), (row % 256, row // 256, 99)) for row in range(2000)]
    options = {"lossless": True} if kind == "WEBP" else {}
    whole = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, **options)
    (tmp_path / "a").write_bytes(whole)
    seeks: list[int] = []
    monkeypatch.setattr(Image.Image, "seek", lambda image, frame: seeks.append(frame))
    assert (pixels(open_image(tmp_path, "a")) == (0, 0, 99)).all() and not any(seeks)


def pictures() -> dict[str, tuple[Image.Image, dict[str, object]]]:
    """One of every way that pixels are stored, 300 × 200."""
    random = np.random.default_rng(0)
    colours = Image.fromarray(random.integers(0, 255, (200, 300, 4), dtype=np.uint8))
    colours = colours.resize((30, 20)).resize((300, 200))
    grey = Image.fromarray(random.integers(0, 65_535, (200, 300), dtype=np.uint16))
    return {
        "PNG": (colours, {}),
        "JPEG": (colours.convert("RGB"), {}),
        "GIF": (colours.convert("RGB").convert("P"), {"transparency": 3}),
        "WEBP": (colours, {"lossless": True}),
        "BMP": (colours.convert("1"), {}),
        "PNG grey": (grey, {}),
        "PNG palette": (colours.convert("RGB").convert("P"), {"transparency": bytes(range(256))}),
        "JPEG ink": (colours.convert("RGB").convert("CMYK"), {"progressive": True}),
    }


@pytest.mark.parametrize("name", pictures())
@pytest.mark.parametrize("target", [None, 500])
def test_a_heavy_image_decoded_in_another_process_is_the_same(
    tmp_path: Path, name: str, target: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture, options = pictures()[name]
    (tmp_path / "a").write_bytes(encoded(picture, name.split()[0], **options))
    here = open_image(tmp_path, "a", target)
    monkeypatch.setattr(images, "HEAVY", 0)
    monkeypatch.setattr(images, "_picture", lambda *_: pytest.fail("decoded here"))
    np.testing.assert_array_equal(pixels(open_image(tmp_path, "a", target)), pixels(here))


@pytest.mark.parametrize("name", pictures())
@pytest.mark.parametrize("target", [50, 500, 3000])
def test_a_picture_shrunk_in_bands_is_that_shrunk_as_a_whole(
    tmp_path: Path, name: str, target: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture, options = pictures()[name]
    (tmp_path / "a").write_bytes(encoded(picture, name.split()[0], **options))
    whole = pixels(open_image(tmp_path, "a", target))
    for band in (1, 2000, 10_000):
        monkeypatch.setattr(images, "_BAND", band)
        np.testing.assert_array_equal(pixels(open_image(tmp_path, "a", target)), whole)


def test_reasons_come_back_from_the_other_process_and_the_next_image_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "HEAVY", 0)
    save(tmp_path, "sound.png", quarters())
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    (tmp_path / "cut.png").write_bytes(encoded(Image.fromarray(noise), "PNG")[:5000])
    for _ in range(3):
        with pytest.raises(ImageError, match="cannot be decoded"):
            open_image(tmp_path, "cut.png")
        assert open_image(tmp_path, "sound.png").size == (32, 32)


def test_a_slow_image_is_killed_and_the_next_image_is_read(tmp_path: Path) -> None:
    (tmp_path / "slow.bmp").write_bytes(slow_bmp(10_000, 10_000))  # 40 kB; minutes
    save(tmp_path, "sound.png", quarters())
    timing = Timing(0.5)
    image_limits.work_on(timing)
    try:
        with pytest.raises(ImageError, match=r"longer than 0\.5 s"):
            open_image(tmp_path, "slow.bmp", 64)
    finally:
        image_limits.work_on(Timing())
    assert open_image(tmp_path, "sound.png").size == (32, 32)


def test_an_image_that_ends_its_process_costs_a_reason_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "HEAVY", 0)
    monkeypatch.setattr(images, "_decoders", Decoders("no.such.module"))
    save(tmp_path, "a.png", quarters())
    with pytest.raises(ImageError, match="ended the process"):
        open_image(tmp_path, "a.png")


def test_where_no_process_can_be_started_heavy_images_are_decoded_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "HEAVY", 0)
    monkeypatch.setattr(images, "_decoders", Decoders("none"))
    monkeypatch.setattr("sys.executable", "/no/such/python")
    save(tmp_path, "a.png", quarters())
    assert open_image(tmp_path, "a.png").size == (32, 32)


def test_images_that_decode_slowly_are_not_taken_for_a_disk_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_readers, "MOST_STUCK", 0)
    slow, done = threading.Event(), []

    def decoding(row: int) -> int:
        image_limits.current().decoding = True
        if row:
            slow.wait()
        done.append(row)
        return row

    readers = Readers(2, 0.05)
    readings = [readers.ask(partial(decoding, row)) for row in (0, 1, 2, 0)]
    assert readers.take(readings[0]) == 0
    for reading in readings[1:3]:
        with pytest.raises(ImageError, match=r"longer than 0\.05 s"):
            readers.take(reading)
    assert sum(thread.name == "image" for thread in threading.enumerate()) == 2  # nobody replaces them
    slow.set()
    assert readers.take(readings[3]) == 0
    readers.close()


ENDS = """
import threading, torch
from vlm2rec.embedder.backbones.image_readers import Readers
begun = threading.Event()
def patch():
    begun.set()
    for _ in range(30_000):
        torch.ones(100) + 1
readers = Readers(4, 60.0)
for _ in range(8):
    readers.ask(patch)
begun.wait()
readers.close()
"""


def test_a_process_ends_well_while_images_are_being_read() -> None:
    # torch aborts a process whose daemon threads are inside it at the end: exit code -6
    process = child(ENDS)
    _, error = process.communicate()
    assert (process.returncode, error) == (0, "")


def test_a_thread_that_a_disk_blocks_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_readers, "LAST_IMAGES", 0.2)
    blocked, readers = threading.Event(), Readers(2, 60.0)
    readings = [readers.ask(blocked.wait), readers.ask(lambda: True)]
    assert readers.take(readings[1])
    readers.close()
    assert sum(thread.name == "image" for thread in threading.enumerate()) == 1
    blocked.set()


# --- memory -----------------------------------------------------------------------------------------------------
def _together(memory: Memory, needs: list[int]) -> int:
    """Let a thread each hold so much; return the most that was held at the same time."""
    held, most, lock = 0, 0, threading.Lock()

    def hold(need: int) -> None:
        nonlocal held, most
        with memory.held(need):
            with lock:
                held += need
                most = max(most, held)
            time.sleep(0.005)
            with lock:
                held -= need

    threads = [threading.Thread(target=hold, args=(need,)) for need in needs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return most


def test_large_images_wait_for_memory_and_one_that_needs_more_than_there_is_comes_alone() -> None:
    unit = 2**24
    assert _together(Memory(4 * unit), [unit] * 20 + [2 * unit] * 5) <= 4 * unit
    assert _together(Memory(4 * unit), [6 * unit, unit, 6 * unit, unit]) == 6 * unit


def test_the_time_that_an_image_waits_for_memory_is_not_its_own() -> None:
    memory, timing, seen = Memory(2**24), Timing(0.5, begun=0.0), []
    holding, release = threading.Event(), threading.Event()

    def hold(own: Timing, wait: Callable[[], object]) -> None:
        image_limits.work_on(own)
        with memory.held(2**24):
            seen.append(own.begun)
            wait()

    first = threading.Thread(target=hold, args=(Timing(), lambda: (holding.set(), release.wait())))
    first.start()
    holding.wait()
    second = threading.Thread(target=hold, args=(timing, lambda: None))
    second.start()
    while timing.begun is not None:  # it waits, and no clock runs
        time.sleep(0.001)
    release.set()
    first.join()
    second.join()
    assert seen[1] is not None and seen[1] > 0.0


@pytest.mark.parametrize(
    ("image", "kind", "options", "most"),
    [
        (Image.new("RGBA", (4000, 4000)), "PNG", {}, 5),
        (Image.new("P", (4000, 4000)), "GIF", {}, 2),
        (Image.new("RGB", (4000, 4000)), "WEBP", {"lossless": True, "method": 0}, 17),
        (Image.new("RGB", (4000, 4000)), "JPEG", {}, 1),
        (Image.new("RGB", (4000, 4000)), "JPEG", {"progressive": True}, 7),
    ],
)
def test_the_memory_that_an_image_needs_is_known_from_its_header(
    image: Image.Image, kind: str, options: dict[str, object], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs: list[int] = []
    monkeypatch.setattr(images, "_picture", lambda *_: image)
    monkeypatch.setattr(image_limits.memory, "held", lambda need: needs.append(need) or io.BytesIO())
    monkeypatch.setattr(images, "HEAVY", 1e12)
    images.decode(io.BytesIO(encoded(image, kind, **options)), 224 * 224)
    assert needs[0] <= most * 16_000_000


@pytest.mark.parametrize("size", [(65_535, 1), (1, 65_535), (3, 60_000), (65_535, 200)])
def test_the_canvas_of_a_long_strip_is_no_larger_than_any_picture(tmp_path: Path, size: tuple[int, int]) -> None:
    target = 112 * 112
    save(tmp_path, "strip.png", Image.new("RGB", size, "red"))
    image = open_image(tmp_path, "strip.png", target)
    assert image.width * image.height < 16 * target and max(image.size) / min(image.size) <= MAX_ASPECT
    assert (pixels(image) == (255, 0, 0)).all(2).any()

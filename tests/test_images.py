"""Reading images from strangers: what is accepted looks right, everything else is an `ImageError` with a reason."""

from __future__ import annotations

import io
import os
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlm2rec.embedder.backbones.images import FORMATS, MAX_ASPECT, ImageError, open_image


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


def png(width: int, height: int, body: bytes) -> bytes:
    """A PNG whose header promises `width` × `height` RGB pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

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
    with pytest.raises(ImageError, match=r"not a JPEG, PNG, WEBP, GIF, BMP .*DOCTYPE"):
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

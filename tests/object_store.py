"""A real S3 server (moto's, in a process of its own) and what tests do with it."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vlm2rec.embedder.contract.storage import StorePath

BUCKET = "shop"


@contextmanager
def s3_server() -> Iterator[None]:
    """Start a server with one bucket; in the meantime the environment leads every process there."""
    import s3fs

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
            for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
                patch.setenv(name, "test")
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            _await(server, port)
            s3fs.S3FileSystem.clear_instance_cache()
            s3fs.S3FileSystem().mkdir(BUCKET)
            yield
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.kill()
        server.wait()


def _await(server: subprocess.Popen[bytes], port: int) -> None:
    while True:
        assert server.poll() is None, "the server has ended"
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            time.sleep(0.05)


def upload(folder: Path, to: StorePath) -> StorePath:
    """Copy a local folder into the store."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            (to / path.relative_to(folder).as_posix()).write_bytes(path.read_bytes())
    return to


def download(folder: StorePath, to: Path) -> Path:
    """Copy a folder of the store to a disk."""
    for name in folder.tree():
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        (to / name).write_bytes((folder / name).read_bytes())
    return to


def content(folder: StorePath | Path) -> dict[str, bytes]:
    """Return every shard's bytes by its name."""
    found = {path.name: path for path in folder.iterdir() if path.name.startswith("part-")}
    return {name: found[name].read_bytes() for name in sorted(found) if name.endswith(".parquet")}


def names(folder: StorePath) -> list[str]:
    return sorted(folder.tree())

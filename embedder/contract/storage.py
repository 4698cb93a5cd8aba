"""Folders on a disk or, through fsspec, in an object store (`s3://bucket/folder`, `gs://bucket/folder`).

This module holds what differs between the two. A file on a disk is written under another name, flushed and renamed. An
object appears under its name whole or not at all, and can be neither renamed nor locked. Credentials, region and
endpoint are those of the store's own client: `AWS_ENDPOINT_URL`, `~/.aws`, fsspec's configuration.
"""

from __future__ import annotations

import datetime
import errno
import hashlib
import os
import posixpath
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from vlm2rec.embedder.contract.errors import ConfigError, MissingDependencyError
from vlm2rec.embedder.contract.printable import without_keys

_CLIENTS = {"s3": "s3fs", "gs": "gcsfs"}  # scheme → the library that connects to it
_FOREIGN = ("aiobotocore", "aiohttp", "botocore", "gcsfs", "google", "requests")  # their errors are not OSErrors
_BLOCK = 4 * 2**20  # bytes that a read fetches ahead


class Stat(NamedTuple):
    """What the store says about an object without reading it; the names are those of `os.stat`."""

    st_size: int
    st_mtime_ns: int

    @property
    def st_mtime(self) -> float:
        """Seconds since 1970, by the clock of the store."""
        return self.st_mtime_ns / 1e9


class StorePath:
    """A path in an object store, with the part of pathlib's interface that vlm2rec needs.

    Nothing is cached between calls, as others write there too. Every failure is an `OSError`. An object is missing
    only if the store says so: a store that does not answer is an error. A bucket is never created.

    Args:
        url: scheme, bucket and key; `.`, `..` and empty parts are removed, as a store has no links.

    Raises:
        ConfigError: no bucket, or a scheme that is not supported.
        MissingDependencyError: the library for this store is not installed.
    """

    def __init__(self, url: str) -> None:
        self.scheme, _, rest = url.partition("://")
        bucket, _, key = rest.partition("/")
        inside = posixpath.normpath(f"/{key}").strip("/")
        if "@" in bucket or ":" in bucket:  # no store allows these in a bucket's name
            raise ConfigError(
                f"the address {without_keys(url)!r} holds a key or something else in front of its bucket",
                f"{self.scheme}://bucket/folder, without keys: the store's client reads them from the environment",
                "take it out of the address, and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws",
            )
        if not bucket or bucket in (".", ".."):
            raise ConfigError(f"{url!r} names no bucket", f"{self.scheme}://bucket/folder", "correct the address")
        if self.scheme not in _CLIENTS:
            known = ", ".join(f"{scheme}://" for scheme in _CLIENTS)
            raise ConfigError(f"{url!r} is not a supported store", f"a folder, or {known}", "copy it there")
        self.key = f"{bucket}/{inside}".rstrip("/")  # as fsspec expects it, with the bucket
        _require_client(self.scheme)

    @cached_property
    def _store(self) -> Any:
        import fsspec

        return fsspec.filesystem(self.scheme, use_listings_cache=False)

    def __reduce__(self) -> tuple[type[StorePath], tuple[str]]:
        """Pickle the address only: another process connects with its own credentials."""
        return StorePath, (str(self),)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.key}"

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StorePath) and str(self) == str(other)

    def __lt__(self, other: StorePath) -> bool:
        return str(self) < str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __truediv__(self, below: str) -> StorePath:
        return StorePath(f"{self}/{below}")

    @property
    def name(self) -> str:
        """The last part."""
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> StorePath:
        """The path one level up; that of a bucket is the bucket itself."""
        return StorePath(f"{self.scheme}://{self.key.rpartition('/')[0] or self.key}")

    def resolve(self) -> StorePath:
        """Return the path itself: it is absolute, and a store has no links."""
        return self

    def exists(self) -> bool:
        """Tell whether there is an object with this name, or one below it."""
        return self._info() is not None

    def is_file(self) -> bool:
        """Tell whether there is an object with this name."""
        return (self._info() or {}).get("type") == "file"

    def is_dir(self) -> bool:
        """Tell whether there is an object below this name."""
        return (self._info() or {}).get("type") == "directory"

    def stat(self) -> Stat:
        """Return size and time of an object."""
        info = self._info()
        if info is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        return self._stat_of(info)

    def iterdir(self) -> Iterator[StorePath]:
        """Yield the paths directly below this one; none if there are none."""
        with _as_os_errors():
            try:
                found = self._store.ls(self.key, detail=False)
            except FileNotFoundError:
                return
        names = {key.rstrip("/").rpartition("/")[2] for key in found if key.rstrip("/") != self.key}
        yield from (self / name for name in sorted(names))

    def tree(self) -> dict[str, Stat]:
        """Return every object below, at any depth, by its relative path: one listing instead of a request for each."""
        with _as_os_errors():
            found = self._store.find(self.key, detail=True)
        return {key.removeprefix(f"{self.key}/"): self._stat_of(info) for key, info in found.items()}

    @contextmanager
    def open(self, mode: str = "rb") -> Iterator[BinaryIO]:
        """Open an object for reading; all reads come from the same version of it."""
        with _as_os_errors(), self._store.open(self.key, mode, block_size=_BLOCK, cache_type="readahead") as file:
            yield file

    def read_bytes(self, most: int | None = None) -> bytes:
        """Return the content of an object, or its first bytes; in one request if `most` is given."""
        with _as_os_errors():
            try:
                return bytes(self._store.cat_file(self.key, start=None if most is None else 0, end=most))
            except FileNotFoundError:
                raise
            except OSError:
                if most is not None and self.is_file() and self.stat().st_size == 0:
                    return b""  # no range of an empty object can be requested
                raise

    def read_text(self, encoding: str = "utf-8") -> str:
        """Return the content of an object as text."""
        return self.read_bytes().decode(encoding)

    def write_bytes(self, content: bytes) -> None:
        """Write an object, replacing an existing one."""
        with _as_os_errors():
            self._store.pipe_file(self.key, content)

    def create(self, content: bytes) -> bool:
        """Write an object if there is none, and tell whether that happened.

        If several processes try at once, one succeeds where the store honours `If-None-Match`; elsewhere all of them
        do, and the last object stays.
        """
        if self.exists():
            return False
        with _as_os_errors():
            try:
                self._store.pipe_file(self.key, content, mode="create")
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno == errno.ENOSYS:  # the store has no conditional writes
                    self._store.pipe_file(self.key, content)
                elif self.exists():  # some stores report this with an error of their own
                    return False
                else:
                    raise
        return True

    def replace(self, old: bytes, new: bytes) -> bool:
        """Write an object if its content is still `old`, and tell whether that happened.

        If several processes try at once, one succeeds where the store honours `If-Match`; elsewhere all of them do that
        have seen the same content, and the last object stays.
        """
        try:
            version = (self._info() or {}).get("ETag") if self.scheme == "s3" else None
            if self.read_bytes() != old:
                return False
            condition = {"IfMatch": version} if version else {}
            with _as_os_errors():
                try:
                    self._store.pipe_file(self.key, new, **condition)
                except FileNotFoundError:
                    return False
                except OSError as error:
                    if condition and self.read_bytes() != old:  # stores report a failed condition differently
                        return False
                    if error.errno != errno.ENOSYS:
                        raise
                    self._store.pipe_file(self.key, new)  # the store has no conditional writes
        except FileNotFoundError:
            return False
        return True

    def upload(self, file: Path) -> None:
        """Write a local file's content as an object, replacing an existing one."""
        with _as_os_errors():
            self._store.put_file(str(file), self.key)

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove an object."""
        if not missing_ok and not self.exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        with _as_os_errors():
            try:
                self._store.rm_file(self.key)
            except FileNotFoundError:
                return

    def _info(self) -> dict[str, Any] | None:
        with _as_os_errors():
            try:
                return dict(self._store.info(self.key))
            except FileNotFoundError:
                return None

    def _stat_of(self, info: dict[str, Any]) -> Stat:
        time = info.get("LastModified") or info.get("mtime") or info.get("updated") or 0
        if isinstance(time, str):
            time = datetime.datetime.fromisoformat(time)
        seconds = time.timestamp() if isinstance(time, datetime.datetime) else float(time)
        return Stat(int(info.get("size") or 0), round(seconds * 1000) * 1_000_000)


Location = Path | StorePath
"""A folder or a file, on a disk or in an object store."""


def location(given: str | os.PathLike[str] | StorePath) -> Location:
    """Return the location that a path or the address of an object store names.

    Raises:
        ConfigError, MissingDependencyError: as `StorePath`.
    """
    if isinstance(given, StorePath):
        return given
    return StorePath(given) if isinstance(given, str) and "://" in given else Path(given)


def sha256_file(path: Location) -> str:
    """Return the hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


@contextmanager
def readable(path: Location) -> Iterator[Path | BinaryIO]:
    """Yield what pyarrow and Pillow can read: the path itself, or an open object of a store."""
    if isinstance(path, Path):
        yield path
        return
    with path.open("rb") as file:
        yield file


def free_bytes(folder: Location) -> int | None:
    """Return the free bytes on the disk of a folder, which need not exist; None for a store, which has no limit."""
    if isinstance(folder, StorePath):
        return None
    return shutil.disk_usage(next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())).free


def _require_client(scheme: str) -> None:
    import fsspec

    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError:
        client = _CLIENTS[scheme]
        raise MissingDependencyError(
            f"{scheme}:// needs {client}, which is not installed", client, "pip install 'vlm2rec[store]'"
        ) from None


@contextmanager
def _as_os_errors() -> Iterator[None]:
    """Turn what a store's client raises into the error that a disk would give."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if type(error).__module__.partition(".")[0] in _FOREIGN:
            raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error
        raise

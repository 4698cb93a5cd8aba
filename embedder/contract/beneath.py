"""Opens a file below a folder, and nothing else: no link leads out of it, and no pipe or device holds the reader up.

The file is opened first and looked at then, through what was opened. Looking first at a path and opening it then would
leave a moment in which another process can put a link in its place.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import sys
import time
from pathlib import Path
from typing import BinaryIO

_OPENAT2 = 437  # the number of the system call, the same on every Linux that Python and torch run on
_NO_MAGIC_LINKS, _BENEATH = 0x02, 0x08
_READ = os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
_FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | os.O_CLOEXEC | getattr(os, "O_DIRECTORY", 0)
_NOT_HERE = (errno.ENOSYS, errno.EPERM, errno.EINVAL, errno.E2BIG)  # no such call, or a sandbox that does not know it


class OutsideError(OSError):
    """The path leads out of the folder."""


class NotRegularError(OSError):
    """The path names a folder, a pipe, a socket or a device."""


class _How(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def open_beneath(root: Path, relative: str) -> BinaryIO:
    """Open the regular file `root / relative` for reading.

    The root itself may be a link, and links below it may point to other places below it.

    Raises:
        OutsideError: a link, or the path itself, leads out of the root. Nothing out there is opened.
        NotRegularError: it is not a regular file.
        OSError: it is missing, may not be read, or the links go round in a circle.
        ValueError: no file can have this name.
    """
    try:
        file = _open(root, relative)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket
            raise NotRegularError(errno.ENXIO, "not a regular file", relative) from None
        raise
    try:
        _require_regular(os.fstat(file), relative)  # another file may have taken its place
        return open(file, "rb")  # noqa: PTH123 - a descriptor, not a path
    except BaseException:
        os.close(file)
        raise


def _open(root: Path, relative: str) -> int:
    try:
        file = _open_in_kernel(root, relative)
    except OutsideError:  # or an absolute link to a place below the root, which the kernel does not tell apart
        file = None
    return _open_by_parts(root, relative) if file is None else file


def _require_regular(found: os.stat_result, relative: str) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise NotRegularError(errno.EINVAL, "not a regular file", relative)


def _open_in_kernel(root: Path, relative: str) -> int | None:
    """Open with Linux's openat2, which itself holds every step to the root; None where there is no such call."""
    if not sys.platform.startswith("linux"):
        return None
    name = os.fsencode(relative)
    if b"\0" in name:
        raise ValueError("embedded null byte")
    folder = os.open(root, _FOLDER)
    try:
        found = _openat2(folder, name, os.O_PATH | os.O_CLOEXEC)  # to look at it only: nothing happens to a device
        if found is None:
            return None
        try:
            _require_regular(os.fstat(found), relative)
        finally:
            os.close(found)
        sys.audit("open", f"{root}/{relative}", "rb", _READ)  # Python reports only the opens that it makes itself
        return _openat2(folder, name, _READ)
    finally:
        os.close(folder)


def _openat2(folder: int, name: bytes, flags: int) -> int | None:
    how = _How(flags, 0, _BENEATH | _NO_MAGIC_LINKS)
    while True:
        file = _system_call(_OPENAT2, folder, name, ctypes.byref(how), ctypes.sizeof(how))
        if file >= 0:
            return int(file)
        number = ctypes.get_errno()
        if number == errno.EAGAIN:  # something was renamed meanwhile, or another process holds a lease on the file
            time.sleep(0.01)
        elif number == errno.EXDEV:
            raise OutsideError(number, "leads out of the folder")
        elif number in _NOT_HERE:
            return None
        elif number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def _open_by_parts(root: Path, relative: str) -> int:
    """Resolve the links once, then open part by part and follow none: what has become a link since is an error."""
    base = os.path.realpath(root)
    real = os.path.realpath(os.path.join(base, relative), strict=True)  # noqa: PTH118 - joins text
    if os.path.commonpath([base, real]) != base:
        raise OutsideError(errno.EXDEV, "leads out of the folder", relative)
    *folders, name = Path(os.path.relpath(real, base)).parts or (".",)
    at = os.open(base, _FOLDER)
    try:
        for part in folders:
            below = os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=at)
            os.close(at)
            at = below
        found = os.stat(name, dir_fd=at, follow_symlinks=False)
        if not stat.S_ISLNK(found.st_mode):  # a link is refused when it is opened
            _require_regular(found, relative)
        sys.audit("open", f"{root}/{relative}", "rb", _READ)
        while True:
            try:
                return os.open(name, _READ | os.O_NOFOLLOW, dir_fd=at)
            except BlockingIOError:  # as above
                time.sleep(0.01)
    finally:
        os.close(at)


if sys.platform.startswith("linux"):
    _system_call = ctypes.CDLL(None, use_errno=True).syscall
    _system_call.restype = ctypes.c_long

"""Which process of which machine writes something, and whether it has ended. Two processes are never taken for one.

A process id alone says little: in containers every writer is process 1, and their hosts may have the same name. Clocks
are not compared anywhere, as those of two machines may differ.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

_TOKEN = re.compile(r"(?P<host>\w*)-(?P<boot>\w*)-(?P<pids>\w*)-(?P<pid>\d+)-(?P<started>\w*)-[0-9a-f]+")


class Process(NamedTuple):
    """One process. What this system does not tell is an empty text."""

    host: str
    boot: str  # of the machine's kernel: another one after each start of the machine
    pids: str  # the namespace that the process id is from: another one in each container
    pid: int
    started: str  # clock ticks from the boot to the start of the process

    def has_ended(self) -> bool:
        """Tell whether the process has ended for certain; False also for one that this process cannot see."""
        return self._is_visible() and not self._runs()

    def lives(self) -> bool:
        """Tell whether the process runs for certain; False also for one that this process cannot see."""
        return self._is_visible() and self._runs()

    def is_of_this_boot(self) -> bool:
        """Tell whether it is a process of the same kernel, in whatever container."""
        return bool(self.boot) and self.boot == _boot()

    def _is_visible(self) -> bool:
        if self.boot != _boot() or self.pids != _pids():
            return False
        return bool(self.boot and self.pids) or self.host == _host()

    def _runs(self) -> bool:
        if not process_runs(self.pid):
            return False
        state, started = _status_of(self.pid)
        # the id of a process that has ended may belong to another one by now; a zombie has ended, too
        return state not in ("Z", "X") and (not started or not self.started or started == self.started)


def this_process() -> Process:
    """Return what tells this process from every other one."""
    return Process(_host(), _boot(), _pids(), os.getpid(), _status("self")[1])


def process_of(described: Mapping[str, Any]) -> Process | None:
    """Return the process that a lock describes; None if it does not describe one in full."""
    try:
        texts = {name: str(described[name]) for name in ("host", "boot", "pids", "started")}
        return Process(pid=int(described["pid"]), **texts)
    except (KeyError, TypeError, ValueError):
        return None


def token() -> str:
    """Return a text without dots that names this process and is another one at each call."""
    process = this_process()
    host = re.sub(r"\W", "_", process.host, flags=re.ASCII)[:32]
    return f"{host}-{process.boot}-{process.pids}-{process.pid}-{process.started}-{secrets.token_hex(4)}"


def process_of_token(text: str) -> Process | None:
    """Return the process that a `token` names; None for any other text."""
    found = _TOKEN.fullmatch(text)
    return process_of(found.groupdict()) if found else None


def process_runs(number: int | str) -> bool:
    """Tell whether a process with this id runs on this machine, as far as this process can see."""
    try:
        os.kill(int(number), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:  # it belongs to another user
        return True
    return True


def _host() -> str:
    return socket.gethostname()


@cache
def _boot() -> str:
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    except OSError:
        return ""
    return text.strip().replace("-", "")[:16]


def _pids() -> str:
    try:
        return re.sub(r"\D", "", str(Path("/proc/self/ns/pid").readlink()))
    except OSError:
        return ""


def _status_of(pid: int) -> tuple[str, str]:
    """Return state and start of a process of our namespace; empty if /proc is that of another namespace."""
    try:
        if int(str(Path("/proc/self").readlink())) != os.getpid():
            return "", ""
    except (OSError, ValueError):
        return "", ""
    return _status(str(pid))


def _status(name: str) -> tuple[str, str]:
    try:
        fields = Path("/proc", name, "stat").read_bytes().rpartition(b")")[2].split()  # the name may hold anything
        return fields[0].decode(), fields[19].decode()
    except (OSError, IndexError):
        return "", ""

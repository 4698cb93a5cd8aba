"""`vlm2rec doctor`: checks whether this machine is ready: Python, libraries, device, disk, a tiny export.

The exit code is 0 if every required library is installed, in range and loads, and the export works; otherwise it is 7.
Warnings never change it.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from rich.table import Table
from rich.text import Text

from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import MissingDependencyError
from vlm2rec.pipelines.console import PlainConsole

Status = Literal["ok", "warn", "fail"]
DISK_WANTED = 20e9  # a 3B backbone (8 GB), its adapter and the vectors of a medium-sized catalogue
_COLOURS: dict[Status, str] = {"ok": "green", "warn": "yellow", "fail": "red"}
_OTHER_NAMES = {"faiss-cpu": "faiss"}  # faiss-gpu and conda's faiss provide the same module

_RECBOLE = """
from vlm2rec.downstream.recbole.compat import require_recbole
from vlm2rec.embedder.contract.errors import MissingDependencyError
from vlm2rec.pipelines.console import PlainConsole
try:
    require_recbole()
except MissingDependencyError as error:
    raise SystemExit(f"{error.found}|{error.fix}")
"""

_TORCHVISION = "import torch, torchvision"
_TINY_EXPORT = "from vlm2rec.pipelines.doctor import tiny_export; tiny_export()"


class Check(NamedTuple):
    """One line of the table: what was checked, its status, what was found, and what to do."""

    name: str
    status: Status
    found: str
    advice: str = ""


def run() -> list[Check]:
    """Print the state of this machine on stdout and return it.

    Raises:
        MissingDependencyError: a required library is missing, out of range or broken.
    """
    # these load whole libraries: each runs in its own process, while this one checks the rest
    recbole = _start("-c", _RECBOLE)
    exporting = _start("-c", _TINY_EXPORT)
    torchvision = _start("-c", _TORCHVISION) if importlib.util.find_spec("torchvision") else None
    checks = [
        check_python(),
        *(check_library(text, installed_version(text)) for text in requirements()),
        check_torchvision(torchvision),
        check_device(),
        check_threads(),
        check_recbole(recbole),
        *check_disks(),
        check_export(exporting),
    ]
    _print(checks)
    failed = [check for check in checks if check.status == "fail"]
    if failed:
        raise MissingDependencyError(
            f"not ready: {', '.join(f'{check.name} ({check.found})' for check in failed)}",
            "every required library in its range, and an export that works",
            "; ".join(dict.fromkeys(check.advice for check in failed)),
        )
    return checks


def _print(checks: list[Check]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("", "status", "found", "what to do"):
        table.add_column(column, overflow="fold")
    for check in checks:
        colour = _COLOURS[check.status]
        table.add_row(check.name, Text(check.status, colour), check.found, check.advice)
    # outside a terminal, lines are never folded, so that they can be searched
    PlainConsole(width=None if sys.stdout.isatty() else 1000, highlight=False).print(table)


# --- libraries --------------------------------------------------------------------------------------------------
def requirements(extra: str = "") -> list[str]:
    """Return the requirements of vlm2rec, such as 'torch>=2.8': the basic ones, or those of an extra."""
    found = map(Requirement, metadata.requires("vlm2rec") or [])
    return [f"{each.name}{each.specifier}" for each in found if _extra_of(each) == extra]


def _extra_of(requirement: Requirement) -> str:
    """Return the extra that a requirement belongs to; "" for a basic one."""
    wanted = re.search(r"extra == ['\"](.+?)['\"]", str(requirement.marker or ""))
    return wanted[1] if wanted else ""


def installed_version(requirement: str) -> str | None:
    """Return the version of the library a requirement names; None if it is not installed."""
    try:
        return metadata.version(Requirement(requirement).name)
    except metadata.PackageNotFoundError:
        return None


def check_python() -> Check:
    """Compare this Python with the range in the package's metadata."""
    wanted = metadata.metadata("vlm2rec")["Requires-Python"]
    version = ".".join(map(str, sys.version_info[:3]))
    if in_range(version, wanted):
        return Check("Python", "ok", version)
    return Check("Python", "fail", f"{version}, wanted {wanted}", f"make an environment with Python {wanted}")


def check_library(requirement: str, version: str | None) -> Check:
    """Compare an installed version (None: not installed) with a requirement such as 'pandas<3,>=2.2'."""
    parsed = Requirement(requirement)
    name, wanted = parsed.name, str(parsed.specifier)
    if version is None:
        module = _OTHER_NAMES.get(name)
        if module and importlib.util.find_spec(module):
            return Check(name, "warn", f"module {module} from another package", f"make sure that it is {wanted}")
        return Check(name, "fail", "not installed", f"pip install '{requirement}'")
    if not in_range(version, wanted):
        return Check(name, "fail", f"{version}, wanted {wanted}", f"pip install '{requirement}'")
    return Check(name, "ok", version)


def in_range(version: str, wanted: str) -> bool:
    """Return whether a version lies in a range such as '<3,>=2.2'; of '2.8.0a0+cpu' only the numbers count."""
    return SpecifierSet(wanted).contains(Version(version).base_version)


def check_torchvision(process: subprocess.Popen[str] | None) -> Check:
    """Check the attempt to import torchvision with torch; None if it is not installed, which is fine.

    A torchvision built for CUDA with a CPU torch (or for another torch) breaks every image processor of transformers,
    which imports torchvision if it is installed.
    """
    if process is None:
        return Check("torchvision", "ok", "not installed, not needed")
    _, error = process.communicate()
    if process.returncode == 0:
        return Check("torchvision", "ok", "loads with torch; not needed")
    return Check("torchvision", "fail", f"broken: {_last_line(error)}", "pip uninstall torchvision: it is not needed")


def check_recbole(process: subprocess.Popen[str]) -> Check:
    """Check the attempt to import RecBole, which only `train-recommender` needs."""
    _, error = process.communicate()
    if process.returncode != 0:
        found, _, advice = _last_line(error).partition("|")
        return Check("RecBole", "warn", f"for train-recommender: {found}", advice)
    others = (check_library(text, installed_version(text)) for text in requirements("recbole"))
    wrong = [other for other in others if other.status == "fail"]
    version = installed_version("recbole")
    if wrong:
        listed = ", ".join(f"{other.name} ({other.found})" for other in wrong)
        return Check("RecBole", "warn", f"{version}; beside it: {listed}", "pip install 'vlm2rec[recbole]'")
    return Check("RecBole", "ok", str(version))


def check_export(process: subprocess.Popen[str]) -> Check:
    """Check the attempt to export a few generated items with a random backbone."""
    _, error = process.communicate()
    if process.returncode == 0:
        return Check("tiny export", "ok", _last_line(error))
    return Check("tiny export", "fail", _last_line(error), "fix what fails above; if nothing does, please report it")


def _start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no message"


# --- the machine ------------------------------------------------------------------------------------------------
def check_device() -> Check:
    """Say which device and number format the commands choose by default."""
    try:
        import torch

        from vlm2rec.embedder.backbones.devices import pick_device, pick_dtype
    except Exception as error:  # report whatever a broken installation raises
        return Check("device", "fail", f"torch or transformers does not load: {error}", "fix the libraries above")
    device = pick_device("auto")
    dtype = str(pick_dtype("auto", device)).removeprefix("torch.")
    native = "" if dtype == "bfloat16" else ": no native bfloat16"
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        found = f"{torch.cuda.get_device_name(device)}, {memory / 1e9:.0f} GB, {dtype}{native}"
        return Check("device", "ok", found)
    if torch.version.cuda and device.type == "cpu":
        return Check(
            "device",
            "warn",
            f"cpu, {dtype}{native}; torch is built for CUDA {torch.version.cuda}, but no GPU is visible",
            "check nvidia-smi and CUDA_VISIBLE_DEVICES, or continue without a GPU",
        )
    return Check("device", "ok", f"{device.type}, {dtype}{native}")


def check_threads() -> Check:
    """Compare the threads that a library starts with the cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    setting = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(setting) if setting.isdecimal() else cores
    found = f"{cores} cores, OMP_NUM_THREADS {setting or 'not set'}"
    if threads > cores:
        return Check(
            "threads", "warn", found, f"set OMP_NUM_THREADS={cores}: more threads than cores wait for each other"
        )
    if not setting and hasattr(os, "getloadavg") and os.getloadavg()[0] > cores:
        return Check("threads", "warn", f"{found}, machine busy", "set OMP_NUM_THREADS=1 while others use the cores")
    return Check("threads", "ok", found)


def check_disks() -> list[Check]:
    """Check the free space for outputs and backbones; one line if both are on the same disk."""
    places, without_home = {"disk here": Path.cwd()}, []
    try:
        cache = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    except RuntimeError:  # HOME is not set, and the system knows no such user
        advice = "set HF_HOME to a folder for downloaded backbones"
        without_home.append(Check("disk of the model cache", "warn", "this user has no home directory", advice))
    else:
        while not cache.exists():
            cache = cache.parent
        places["disk of the model cache"] = cache
    seen: dict[int, Check] = {}
    for name, folder in places.items():
        seen.setdefault(folder.stat().st_dev, check_disk(name, folder, shutil.disk_usage(folder).free))
    return [*seen.values(), *without_home]


def check_disk(name: str, folder: Path, free: int) -> Check:
    """Check the free bytes of a folder's disk."""
    found = f"{free / 1e9:.0f} GB free ({folder})"
    if free < DISK_WANTED:
        return Check(name, "warn", found, f"a 3B backbone and its outputs need {DISK_WANTED / 1e9:.0f} GB")
    return Check(name, "ok", found)


def tiny_export() -> None:
    """Export a few items, and print the result as the last line on stderr; a fault ends the process with an error."""
    with tempfile.TemporaryDirectory(prefix="vlm2rec-doctor-") as folder:
        print(_export(Path(folder)), file=sys.stderr)


def _export(folder: Path) -> str:
    """Export twenty items with a backbone of random weights, as the commands do by default."""
    # imported here, not above: this command reports libraries that do not load
    from vlm2rec.embedder.export import verify
    from vlm2rec.pipelines import export_items, make_backbone, prepare
    from vlm2rec.pipelines.config import ExportConfig, MakeBackboneConfig, PrepareConfig
    from vlm2rec.pipelines.synthetic.drawn_catalogue import draw_catalogue

    drawn, data, backbone, out = (folder / name for name in ("drawn", "data", "backbone", "embeddings"))
    draw_catalogue(drawn, products=20, users=20, seed=0)
    items, images = drawn / "items.parquet", drawn / "images"
    interactions = drawn / "interactions.parquet"
    prepare.run(PrepareConfig(items=items, interactions=interactions, images=images, out=data, core=1, candidates=2))
    random = MakeBackboneConfig(
        items=items, images=images, out=backbone, hidden_size=64, layers=2, vocabulary=600, max_steps=0
    )
    make_backbone.run(random)
    started = time.perf_counter()
    export_items.run(ExportConfig(data=data, backbone=str(backbone), out=out))
    seconds = time.perf_counter() - started
    if problems := verify.verify(out):
        raise SystemExit(str(problems[0]))
    manifest = schema.read_manifest(out)
    return f"{manifest['num_items']} items in {seconds:.1f} s, {manifest['settings']['dtype']}, verified"

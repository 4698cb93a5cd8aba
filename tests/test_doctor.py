"""`vlm2rec doctor`: what it finds in order, out of range, missing and broken."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from vlm2rec.embedder.contract.errors import MissingDependencyError
from vlm2rec.pipelines import doctor

ROOT = Path(__file__).parents[1]


def run_doctor(**environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("vlm2rec")), "doctor"]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)


def status_of(output: str) -> dict[str, str]:
    words = (line.split() for line in output.splitlines()[1:])
    return {" ".join(row[: row.index(s)]): s for row in words for s in ("ok", "warn", "fail") if s in row}


@pytest.fixture(scope="module")
def finished() -> subprocess.CompletedProcess[str]:
    return run_doctor()


def test_a_ready_machine_passes_and_every_required_library_has_a_line(
    finished: subprocess.CompletedProcess[str],
) -> None:
    assert finished.returncode == 0, finished.stderr
    found = status_of(finished.stdout)
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {text.split(">=")[0] for text in declared}
    assert {name: found.get(name) for name in names} == dict.fromkeys(names, "ok")
    assert {"Python", "torchvision", "device", "threads", "RecBole", "disk here", "tiny export"} <= set(found)
    assert "fail" not in found.values()
    assert finished.stderr == "Next: vlm2rec demo\n"
    assert re.search(r"tiny export +ok +20 items in \d+\.\d s, (bfloat16|float32), verified", finished.stdout)


def test_the_device_line_is_what_the_commands_choose(finished: subprocess.CompletedProcess[str]) -> None:
    from vlm2rec.embedder.backbones.devices import pick_device, pick_dtype

    device = pick_device("auto")
    line = next(text for text in finished.stdout.splitlines() if text.startswith("device"))
    assert str(pick_dtype("auto", device)).removeprefix("torch.") in line


def fake_package(folder: Path, name: str, version: str, code: str) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(code)
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_a_torchvision_that_does_not_fit_torch_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_package(tmp_path, "torchvision", "0.25.0", "raise RuntimeError('operator torchvision::nms does not exist')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    check = doctor.check_torchvision(doctor._start("-c", doctor._TORCHVISION))
    assert check.status == "fail"
    assert "operator torchvision::nms does not exist" in check.found
    assert "pip uninstall torchvision" in check.advice


@pytest.mark.slow
def test_the_command_ends_with_exit_code_7_where_torchvision_does_not_fit_torch(tmp_path: Path) -> None:
    fake_package(tmp_path, "torchvision", "0.25.0", "raise RuntimeError('operator torchvision::nms does not exist')\n")
    result = run_doctor(PYTHONPATH=str(tmp_path))
    assert result.returncode == 7
    assert status_of(result.stdout)["torchvision"] == "fail"
    assert "operator torchvision::nms does not exist" in result.stdout
    assert "pip uninstall torchvision" in result.stderr
    assert "Traceback" not in result.stdout + result.stderr


def test_a_recbole_that_does_not_import_is_a_warning_with_the_command_that_mends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_package(tmp_path, "recbole", "1.2.1", "raise ImportError('no module named nothing')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    check = doctor.check_recbole(doctor._start("-c", doctor._RECBOLE))
    assert check.status == "warn"
    assert "no module named nothing" in check.found
    assert "--no-deps recbole==1.2.1" in check.advice


def test_an_export_that_does_not_work_is_a_failure_with_its_last_words() -> None:
    check = doctor.check_export(doctor._start("-c", "raise OSError('no room for vectors')"))
    assert (check.status, check.found) == ("fail", "OSError: no room for vectors")


def test_a_missing_library_ends_with_exit_code_7_after_the_whole_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = doctor.installed_version
    monkeypatch.setattr(
        doctor, "installed_version", lambda text: None if text.startswith(("peft", "polars")) else real(text)
    )
    # what loads whole libraries was tried above
    monkeypatch.setattr(doctor, "check_device", lambda: doctor.Check("device", "ok", "not asked"))
    monkeypatch.setattr(doctor, "_RECBOLE", "")
    monkeypatch.setattr(doctor, "_TINY_EXPORT", "")
    with pytest.raises(MissingDependencyError, match=r"peft \(not installed\), polars \(not installed\)") as caught:
        doctor.run()
    assert caught.value.exit_code == 7
    assert "pip install 'peft>=" in str(caught.value)
    found = status_of(capsys.readouterr().out)
    assert (found["peft"], found["polars"], found["torch"]) == ("fail", "fail", "ok")
    assert "disk here" in found


@pytest.mark.parametrize(
    ("requirement", "version", "status"),
    [
        ("torch>=2.8", "2.13.0+cpu", "ok"),
        ("torch>=2.8", "2.8", "ok"),
        ("torch>=2.8", "2.7.1", "fail"),
        ("torch>=2.8", None, "fail"),
        ("pandas<3,>=2.2", "2.3.3", "ok"),
        ("pandas<3,>=2.2", "3.0.0rc1", "fail"),
        ("pandas<3,>=2.2", "2.1.9", "fail"),
        ("recbole==1.2.1", "1.2.1", "ok"),
        ("recbole==1.2.1", "1.2.10", "fail"),
        ("thing!=2.0", "2", "fail"),
        ("thing~=2.3", "2.9", "ok"),
        ("thing~=2.3", "3.0", "fail"),
        ("plain", "0.0.1", "ok"),
    ],
)
def test_versions_are_held_against_their_range(requirement: str, version: str | None, status: str) -> None:
    check = doctor.check_library(requirement, version)
    assert check.status == status
    assert bool(check.advice) == (status != "ok")
    assert check.name == requirement.split("=")[0].rstrip("<>!~").partition("<")[0]


def test_requirements_are_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {text.partition(">")[0] for text in doctor.requirements()} == {
        text.partition(">")[0] for text in project["dependencies"]
    }
    assert len(doctor.requirements("recbole")) == len(project["optional-dependencies"]["recbole"])


def test_an_old_python_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    check = doctor.check_python()
    assert (check.status, check.found) == ("fail", "3.9.18, wanted >=3.11")


@pytest.mark.parametrize(("free", "status"), [(30e9, "ok"), (19e9, "warn"), (0, "warn")])
def test_little_disk_is_a_warning(free: float, status: str) -> None:
    assert doctor.check_disk("disk", Path("/data"), int(free)).status == status


def test_a_user_without_a_home_directory_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    here, cache = doctor.check_disks()
    assert here.name == "disk here" and (cache.name, cache.status) == ("disk of the model cache", "warn")
    assert "HF_HOME" in cache.advice


def test_more_threads_than_cores_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    assert doctor.check_threads().status == "warn"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert doctor.check_threads().status == "ok"


def test_libraries_that_do_not_load_are_the_finding_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vlm2rec.embedder.backbones.devices", None)
    check = doctor.check_device()
    assert check.status == "fail"
    assert "does not load" in check.found

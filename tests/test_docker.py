"""The Dockerfiles, read as text: no engine runs here, so what can be checked without one is checked."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
import shlex
from pathlib import Path

import pytest

from vlm2rec.pipelines import cli, config, read_config

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "docker").glob("Dockerfile.*"))
PACKAGES = ("embedder", "downstream", "pipelines")


def joined(lines: list[str]) -> list[str]:
    """Put lines that end in a backslash together with the next one, with single spaces."""
    text = "\n".join(lines)
    return [re.sub(r"\s+", " ", line).strip() for line in re.sub(r"\\\n\s*", " ", text).splitlines() if line.strip()]


def instructions(file: Path) -> list[tuple[str, str]]:
    """Return (INSTRUCTION, arguments) in order, without comments."""
    lines = [line for line in file.read_text().splitlines() if not line.lstrip().startswith("#")]
    return [(word.upper(), rest) for word, _, rest in (line.partition(" ") for line in joined(lines))]


def header_commands(file: Path) -> list[str]:
    """Return the docker commands in the comment above FROM."""
    header = file.read_text().split("\nFROM ")[0].splitlines()
    return [line for line in joined([line.removeprefix("#") for line in header]) if line.startswith("docker ")]


def documented_commands() -> list[str]:
    """Return the docker commands in the fenced blocks of the Docker section of docs/containers.md."""
    section = re.search(
        r"^## Docker\n(.*?)(?=^## |\Z)", (ROOT / "docs/containers.md").read_text(), re.DOTALL | re.MULTILINE
    )
    assert section, "docs/containers.md has no section '## Docker'"
    fenced = re.findall(r"```\w*\n(.*?)```", section[1], re.DOTALL)
    return [line for block in fenced for line in joined(block.splitlines()) if line.startswith("docker ")]


def sources(rest: str) -> list[str]:
    return [word for word in rest.split() if not word.startswith("--")][:-1]


def argument(file: Path, name: str) -> list[str]:
    return [rest for word, rest in instructions(file) if word == name]


@pytest.fixture(params=FILES, ids=[file.name for file in FILES])
def dockerfile(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_there_is_an_image_for_cuda_and_one_for_the_cpu() -> None:
    assert [file.name for file in FILES] == ["Dockerfile.cpu", "Dockerfile.cuda"]


def test_only_known_instructions_are_used(dockerfile: Path) -> None:
    known = {"FROM", "ENV", "RUN", "COPY", "WORKDIR", "USER", "VOLUME", "ENTRYPOINT", "CMD"}
    assert {word for word, _ in instructions(dockerfile)} <= known
    assert instructions(dockerfile)[0][0] == "FROM"


def test_the_base_image_is_pinned_to_a_full_version(dockerfile: Path) -> None:
    (base,) = argument(dockerfile, "FROM")
    tag = base.rpartition(":")[2]
    assert tag != base, f"{base} has no tag"
    assert re.match(r"\d+\.\d+\.\d+-", tag), f"{base} moves with time"


def test_the_image_runs_as_a_user_who_is_not_root(dockerfile: Path) -> None:
    user = argument(dockerfile, "USER")[-1]
    assert user not in {"root", "0"}
    assert any(f"useradd --uid {user}" in rest for rest in argument(dockerfile, "RUN"))
    after = instructions(dockerfile)
    last = max(place for place, (word, _) in enumerate(after) if word == "USER")
    assert "RUN" not in [word for word, _ in after[last:]], "something runs after the last USER"


def test_vlm2rec_is_the_entry_point(dockerfile: Path) -> None:
    assert argument(dockerfile, "ENTRYPOINT") == ['["vlm2rec"]']


def test_torch_is_installed_first_and_everything_under_the_constraints(dockerfile: Path) -> None:
    installs = [
        command.strip()
        for rest in argument(dockerfile, "RUN")
        for command in rest.split("&&")
        if "pip install" in command
    ]
    assert len(installs) == 2
    assert all("--constraint constraints.txt" in command for command in installs)
    assert installs[0].endswith(" torch")
    assert installs[1].endswith(" .")
    pins = (ROOT / "constraints.txt").read_text()
    assert re.search(r"^torch==\d", pins, re.MULTILINE)
    cpu_index = "--index-url https://download.pytorch.org/whl/cpu"
    assert (cpu_index in installs[0]) == (dockerfile.suffix == ".cpu")
    assert "index-url" not in installs[1]


def test_no_package_cache_stays_in_a_layer(dockerfile: Path) -> None:
    assert any("PIP_NO_CACHE_DIR=1" in rest for rest in argument(dockerfile, "ENV"))
    for rest in argument(dockerfile, "RUN"):
        if "apt-get install" in rest:
            assert "--no-install-recommends" in rest
            assert "rm -rf /var/lib/apt/lists/*" in rest


def test_every_copied_file_exists_and_is_let_through_by_dockerignore(dockerfile: Path) -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    copied = [name for rest in argument(dockerfile, "COPY") for name in sources(rest)]
    for name in copied:
        assert (ROOT / name).exists(), f"{name} does not exist"
        assert f"!{name}" in rules
    assert sorted(copied) == sorted(rule[1:] for rule in rules if rule.startswith("!"))


def test_the_copied_files_are_all_that_an_installation_needs(dockerfile: Path) -> None:
    copies = argument(dockerfile, "COPY")
    copied = {name for rest in copies for name in sources(rest)}
    assert {*PACKAGES, "pyproject.toml", "README.md", "LICENSE", "constraints.txt"} == copied
    # a folder keeps its name, or setuptools' mapping would not find it
    assert {f"{name} {name}" for name in PACKAGES} <= set(copies)


def test_nothing_in_the_packages_is_ignored_but_caches() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] not in "#!*"]
    assert rules == []
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("**/")]
    files = [path for name in PACKAGES for path in (ROOT / name).glob("*") if path.is_file()]
    for pattern in patterns:
        assert not fnmatch.filter([path.name for path in files], pattern.removeprefix("**/"))


def test_the_documented_folders_are_the_volumes(dockerfile: Path) -> None:
    (volumes,) = argument(dockerfile, "VOLUME")
    header = dockerfile.read_text().split("\nFROM ")[0]
    for folder in re.findall(r'"(/\w+)"', volumes):
        assert re.search(rf"^# {folder}\s+\w", header, re.MULTILINE)
        assert all(f":{folder}" in line for line in header_commands(dockerfile) if " run " in line)
    assert argument(dockerfile, "WORKDIR")[-1] == "/work"


def test_the_commands_build_and_run_this_very_image(dockerfile: Path) -> None:
    build, *runs = header_commands(dockerfile)
    assert shlex.split(build)[:4] == ["docker", "build", "--file", f"docker/{dockerfile.name}"]
    tag = shlex.split(build)[shlex.split(build).index("--tag") + 1]
    assert runs
    for line in runs:
        assert tag in shlex.split(line)
        assert ("--gpus" in line) == (dockerfile.suffix == ".cuda")


def test_the_commands_after_the_image_name_are_commands_of_vlm2rec(dockerfile: Path) -> None:
    configs = {"export-items": config.ExportConfig, "finetune": config.FinetuneConfig}
    for line in header_commands(dockerfile)[1:]:
        words = shlex.split(line)
        name, *flags = words[next(i for i, word in enumerate(words) if word.startswith("vlm2rec:")) + 1 :]
        assert name in {command.name for command in cli.app.registered_commands}
        given = {flags[i].removeprefix("--").replace("-", "_"): flags[i + 1] for i in range(0, len(flags), 2)}
        read = read_config.read_config(configs[name], None, (), given)
        assert {field.name for field in dataclasses.fields(read)} >= set(given)


def test_the_docs_show_the_commands_of_the_dockerfiles() -> None:
    assert documented_commands() == [command for file in FILES for command in header_commands(file)]

"""How long `vlm2rec --help` takes beside a bare Python: wall and CPU time, and their ratios.

python tests/benchmarks/startup.py [runs]
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path


def seconds(command: list[str]) -> tuple[float, float]:
    """Run a command once; return its wall and CPU seconds."""
    before, begun = os.times(), time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    wall, after = time.perf_counter() - begun, os.times()
    return wall, after.children_user + after.children_system - before.children_user - before.children_system


def main(runs: int = 9) -> None:
    """Print the medians of `runs` runs, taken in turn so that a busy moment meets both."""
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "vlm2rec --help": [str(Path(sys.executable).with_name("vlm2rec")), "--help"],
    }
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for command in commands.values():
        seconds(command)  # fills the file cache: not counted
    for _ in range(runs):
        for name, command in commands.items():
            taken[name].append(seconds(command))
    median = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in taken.items()}
    print(f"median of {runs} runs       wall s     CPU s")
    for name, (wall, cpu) in median.items():
        print(f"{name:<22}{wall:>10.3f}{cpu:>10.3f}")
    bare, ours = (median[name] for name in commands)
    print(f"{'ratio':<22}{ours[0] / bare[0]:>10.1f}{ours[1] / bare[1]:>10.1f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

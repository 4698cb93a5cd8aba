"""Checksums over whole files: what a folder of several files records, so that a reader can tell a damaged one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from vlm2rec.embedder.contract.storage import Location, sha256_file

SEAL = "seal"  # key of a JSON object: the checksum of everything else in it


def checksums(folder: Location, names: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 of files in a folder, by name."""
    return {name: sha256_file(folder / name) for name in names}


def first_damage(folder: Location, recorded: Mapping[str, str]) -> str | None:
    """Return what is wrong with the first file that is not as `checksums` recorded it, or None if all are.

    The answer names the file: `optimizer.safetensors is missing`.
    """
    for name, sha256 in recorded.items():
        try:
            if sha256_file(folder / name) != sha256:
                return f"{name} does not have the bytes that were written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or error})"
    return None


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object with the checksum of its content, under `SEAL`."""
    content = {key: item for key, item in value.items() if key != SEAL}
    return {**content, SEAL: _checksum(content)}


def is_intact(value: Mapping[str, Any]) -> bool:
    """Tell whether the content of a JSON object is that which `sealed` has seen; one without a seal counts as intact.

    Folders from before there were seals stay readable.
    """
    content = {key: item for key, item in value.items() if key != SEAL}
    return SEAL not in value or value[SEAL] == _checksum(content)


def _checksum(content: Mapping[str, Any]) -> str:
    # through JSON once: tuples become lists and numbers as keys become text, as a reader will find them
    plain = json.loads(json.dumps(content))
    return hashlib.sha256(json.dumps(plain, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

"""Text from outside as text for people: on a terminal, in a table that a spreadsheet opens, in a message."""

from __future__ import annotations

import re

# C0 and C1 control characters (terminal escapes begin with one), Unicode's line ends, and the characters that turn the
# direction of what follows; the marks of right-to-left scripts stay
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]+")
_CONTROLS_OF_A_LINE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]+")
# what makes spreadsheet programs compute a cell instead of showing it; the wide forms count in some languages
_FORMULA = re.compile("^\\s*[=+\\-@\uff1d\uff0b\uff0d\uff20]")
CONTROLS, FORMULA = _CONTROLS.pattern, _FORMULA.pattern
"""What `cell` replaces by a space, and what gets an apostrophe in front, as regular expressions for whole columns."""
# scheme://key:secret@, where a secret may hold a slash; scheme://token@; ?token=. A path has lost one of the slashes.
_KEYS = (
    (re.compile(r"(\w:/{1,2})[^\s'\"@/][^\s'\"@]*:[^\s'\"@]*@"), r"\1***@"),
    (re.compile(r"(\w:/{1,2})[^\s'\"@/]+@"), r"\1***@"),
    (re.compile(r"([?&][\w-]*(?:key|token|secret|sig|password|credential)[\w-]*=)[^\s&'\"]+", re.IGNORECASE), r"\1***"),
)


def size(count: float) -> str:
    """Return a number of bytes in the largest unit of which there is one: `1.5 GiB`, `340.0 KiB`."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def one_line(text: str) -> str:
    """Return text on one line, without terminal escapes and changes of direction: each run of them is a space."""
    return _CONTROLS.sub(" ", _encodable(text))


def printable(text: str) -> str:
    """Return text for a terminal: as `one_line`, but line feeds stay."""
    return _CONTROLS_OF_A_LINE.sub(" ", _encodable(text))


def _encodable(text: str) -> str:
    """Return text in which bytes of a file name that are no UTF-8 stand as `\\udcff`."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def cell(text: str | None) -> str:
    """Return one line of text as a cell of a CSV or TSV file for people.

    A spreadsheet program would compute a cell that begins with `=`, `+`, `-` or `@`. Such a cell gets an apostrophe in
    front, which these programs read as "this is text".
    """
    line = one_line(text or "")
    return f"'{line}" if _FORMULA.match(line) else line


def without_keys(text: str) -> str:
    """Return text in which the keys inside addresses (`s3://key:secret@bucket`, `?token=...`) are `***`."""
    for pattern, instead in _KEYS:
        text = pattern.sub(instead, text)
    return text

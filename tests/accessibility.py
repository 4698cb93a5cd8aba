"""What a page has to have so that everyone can read it, checked in its HTML and its colours, without a browser."""

from __future__ import annotations

import html.parser
import re
from dataclasses import dataclass, field

LANDMARKS = ("header", "main", "footer")
_VOID = {"meta", "br", "link", "img", "hr", "input", "use", "path", "rect", "stop"}


@dataclass
class Element:
    """One element: its attributes, the text in it, and whether something around it is hidden from readers."""

    tag: str
    attributes: dict[str, str]
    hidden: bool
    text: str = ""

    @property
    def label(self) -> str:
        """What is read out."""
        return (self.attributes.get("aria-label") or self.attributes.get("alt") or self.text).strip()


@dataclass
class Page(html.parser.HTMLParser):
    """The elements of a page, in order."""

    elements: list[Element] = field(default_factory=list)
    open: list[Element] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        hidden = attributes.get("aria-hidden") == "true" or any(each.hidden for each in self.open)
        self.elements.append(Element(tag, attributes, hidden))
        if tag not in _VOID:
            self.open.append(self.elements[-1])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.text += data


def faults(text: str, landmarks: tuple[str, ...] = LANDMARKS) -> list[str]:
    """Everything that a reader without eyes, mouse or large screen would miss; an empty list if nothing."""
    page = Page()
    page.feed(text)
    page.close()
    found = [f"<{tag}>: {count}" for tag in landmarks if (count := _count(page, tag)) != 1]
    found += [f"<{tag}>: {count}" for tag in ("h1", "title") if (count := _count(page, tag)) != 1]
    for element in page.elements:
        found += [f"<{element.tag}> {element.attributes}: {problem}" for problem in _of_element(element)]
    levels = [int(each.tag[1]) for each in page.elements if re.fullmatch(r"h[1-6]", each.tag)]
    found += [f"h{b} follows h{a}" for a, b in zip([0, *levels], levels, strict=False) if b > a + 1]
    ids = [each.attributes["id"] for each in page.elements if "id" in each.attributes]
    found += [f"id {name} is there twice" for name in sorted({name for name in ids if ids.count(name) > 1})]
    names = [each.label for each in page.elements if each.attributes.get("role") == "region" or each.tag == "nav"]
    found += [f"two regions are called {name}" for name in sorted({name for name in names if names.count(name) > 1})]
    return found


def _count(page: Page, tag: str) -> int:
    return sum(each.tag == tag and bool(each.text.strip()) for each in page.elements)


def _of_element(element: Element) -> list[str]:
    own, tag = element.attributes, element.tag
    found = []
    if tag == "html" and not re.fullmatch(r"[a-z]{2}(-[A-Z]{2})?", own.get("lang", "")):
        found.append("no language")
    if own.get("name") == "viewport" and re.search(r"maximum-scale|user-scalable", own.get("content", "")):
        found.append("cannot be enlarged")
    if element.hidden:
        return found
    if tag == "svg" and own.get("role") != "img":
        found.append("a drawing without role")
    named = tag in {"img", "nav", "a", "summary", "th"} or own.get("role") in {"img", "region", "group"}
    if (named or own.get("tabindex") == "0") and not element.label:
        found.append("no name")
    if tag == "th" and own.get("scope") not in {"col", "row", "colgroup", "rowgroup"}:
        found.append("a heading of nothing")
    if tag == "table" and not element.text.strip():
        found.append("an empty table")
    if "onclick" in own or int(own.get("tabindex", 0)) > 0:
        found.append("for the mouse alone, or out of order")
    return found


# --- colours ------------------------------------------------------------------------------------------------


def contrast(one: str, other: str) -> float:
    """The ratio of WCAG 2: from 1 to 21, of two colours such as #1f2328."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    """Relative luminance of a colour in sRGB, from 0 to 1."""
    parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in _parts(colour)]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def mixed(one: str, other: str, share: float) -> str:
    """What `color-mix(in srgb, one share, other)` gives."""
    pairs = zip(_parts(one), _parts(other), strict=True)
    return "#" + "".join(f"{round(255 * (share * a + (1 - share) * b)):02x}" for a, b in pairs)


def _parts(colour: str) -> list[float]:
    return [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]


def palettes(text: str) -> dict[str, dict[str, str]]:
    """The CSS variables of a page that are colours, of its light and its dark mode."""
    light, dark = re.findall(r":root \{(.*?)\}", text, re.DOTALL)[:2]
    found = {name: dict(re.findall(r"--(\w+): (#\w{6})\b", part)) for name, part in (("light", light), ("dark", dark))}
    return {"light": found["light"], "dark": found["light"] | found["dark"]}

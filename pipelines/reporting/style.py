"""The style of the figures, and a figure as SVG. In all figures, colour is the method and line style the modality.

Colour-blind readers can tell the colours apart (blue, orange, greys of different lightness). In the page every colour
becomes a CSS variable, so that figures follow the reader's light or dark theme.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

ID, VANILLA, SFT, VLM2REC = "id", "vanilla", "sft", "vlm2rec"

INK, MUTED, GRID = "#1f2328", "#6a7079", "#e4e0d9"
COLOURS = {ID: "#4a5160", VANILLA: "#868b94", SFT: "#2f6fb3", VLM2REC: "#d1500b"}
OTHERS = ("#5f8f6b", "#8d6aa8", "#9c7a3c", "#3f8f97")
VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "line",
    **{colour: method for method, colour in COLOURS.items()},
    **{colour: f"other{number}" for number, colour in enumerate(OTHERS)},
}
"""Colour → its CSS variable in the page."""
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: selectable, and in the page's font
    "svg.hashsalt": "vlm2rec",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelpad": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


@dataclass(frozen=True)
class Picture:
    """One figure: its file name without ending, a description in words, and the SVG text."""

    name: str
    alt: str
    svg: str

    def inline(self) -> str:
        """Return the SVG for a page: colours as CSS variables, the page's font, and ids that are unique in the page."""
        text = self.svg[self.svg.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        text = re.sub(r'\bid="', f'id="{self.name}-', text)
        text = re.sub(r'(xlink:href="|href="|url\()#', rf"\1#{self.name}-", text)
        text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text)
        for colour, variable in VARIABLES.items():
            text = text.replace(colour, f"var(--{variable})")
        return re.sub(r'<svg\b[^>]*?(viewBox="[^"]*")[^>]*>', self._opening, text, count=1, flags=re.DOTALL)

    def _opening(self, match: re.Match[str]) -> str:
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {match[1]}'
            f' role="img" aria-label="{self.alt}">'
        )

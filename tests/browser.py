"""Pages in a headless Chromium: screenshots, where things lie, and what an accessibility checker finds.

A window cannot be narrower than 500 pixels, so the page is shown in a frame, as wide as a phone or a desktop window.
"""

from __future__ import annotations

import html
import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from importlib import resources, util
from pathlib import Path
from typing import Any

PHONE, DESKTOP = 390, 1280
SECONDS = 300
TALL = 30_000
"""Of the frame in which a page is measured: what lies outside of it, axe-core cannot judge."""
_MEASURE = """
addEventListener('load', async () => {
  const rect = e => { const r = e.getBoundingClientRect(); return [r.x, r.y + scrollY, r.width, r.height]; };
  const seen = e => e.checkVisibility() && e.getClientRects().length;  // not what is in closed details
  const named = s => [...document.querySelectorAll(s)].filter(seen)
    .map(e => ({name: e.getAttribute('aria-label') || e.getAttribute('alt') || '', box: rect(e)}));
  const wide = [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, .figure, svg')
    && seen(e) && rect(e)[0] + rect(e)[2] > document.documentElement.clientWidth + 1);
  const found = {height: Math.ceil(document.body.getBoundingClientRect().height),
    width: document.documentElement.scrollWidth,
    dark: matchMedia('(prefers-color-scheme: dark)').matches,
    figures: named('.figure svg'), pictures: named('.thumb, img'),
    wide: wide.map(e => e.tagName + '.' + e.className + ': ' + e.textContent.trim().slice(0, 40)), violations: null};
  if (window.axe) {
    const result = await axe.run(document);
    found.version = axe.version; found.passes = result.passes.map(r => r.id);
    found.violations = result.violations.map(r => ({id: r.id, impact: r.impact, help: r.help,
      nodes: r.nodes.map(n => n.html.slice(0, 200) + ' ' + n.failureSummary)}));
    found.incomplete = result.incomplete.map(r => ({id: r.id, count: r.nodes.length}));
  }
  parent.postMessage(JSON.stringify(found), '*');
});
"""


def chromium() -> str | None:
    """The program, if there is one."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def axe() -> str | None:
    """The source of axe-core: the file that AXE names, else that of axe-core-python; None without either."""
    if "AXE" in os.environ:
        return Path(os.environ["AXE"]).read_text(encoding="utf-8")
    if util.find_spec("axe_core_python") is None:
        return None
    return (resources.files("axe_core_python") / "axe.min.js").read_text(encoding="utf-8")


@dataclass
class Browser:
    """A headless Chromium with a folder of its own for what it keeps."""

    folder: Path

    def measure(self, page: Path, width: int, dark: bool = False, checker: str = "") -> dict[str, Any]:
        """Sizes of the page and of its figures and pictures; what is wider than the window; what axe-core finds."""
        copy = self.folder / "measured.html"
        scripts = "".join(f"<script>{source}</script>" for source in (checker, _MEASURE) if source)
        copy.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{scripts}</body>"), encoding="utf-8")
        text = self._run(self._frame(copy, width, TALL), dark, "--virtual-time-budget=60000", "--dump-dom").stdout
        found = text.partition('<pre id="found">')[2].partition("</pre>")[0]
        return dict(json.loads(html.unescape(found)))

    def screenshot(self, page: Path, width: int, height: int, out: Path, dark: bool = False) -> Path:
        """A PNG of the whole page."""
        size = f"--window-size={max(width, 500)},{height}"
        self._run(self._frame(page, width, height), dark, size, f"--screenshot={out}", "--hide-scrollbars")
        assert out.is_file()
        return out

    def _frame(self, page: Path, width: int, height: int) -> Path:
        frame = self.folder / "frame.html"
        frame.write_text(
            '<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
            "<style>*{margin:0;border:0}iframe{display:block}</style>"
            f'<iframe src="{page.resolve().as_uri()}" width="{width}" height="{height}" scrolling="no"></iframe>'
            '<pre id="found"></pre><script>addEventListener("message",'
            ' e => {document.getElementById("found").textContent = e.data})</script>',
            encoding="utf-8",
        )
        return frame

    def _run(self, page: Path, dark: bool, *flags: str) -> subprocess.CompletedProcess[str]:
        program = chromium()
        assert program is not None
        always = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
        theme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
        profile = f"--user-data-dir={self.folder / 'profile'}"
        command = [program, *always, profile, theme, *flags, page.resolve().as_uri()]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS)

"""The report in a real browser: a phone and a desk, light and dark, on paper, and not one request beyond itself."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from services.cli import browser
from services.cli.__main__ import main
from services.cli.report import write_report
from tests.support.chromium import Chromium
from tests.support.evidence import make_run

CHROMIUM = browser.find()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome on the path"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("page"))
    assert write_report(folder, folder / "report.html")
    return folder


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chromium]:
    assert CHROMIUM is not None
    with Chromium(CHROMIUM) as found:
        yield found


@pytest.mark.parametrize("width", [320, 380, 768, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_the_window_and_asks_for_nothing(run: Path, chromium: Chromium, width: int, dark: bool) -> None:
    url = (run / "report.html").as_uri()
    chromium.open(url, width, dark=dark)
    assert chromium.requests() == [url]
    assert chromium.evaluate("document.documentElement.scrollWidth") <= width
    assert chromium.evaluate(_WIDER) == []


@pytest.mark.parametrize("dark", [False, True])
def test_words_stand_out_from_their_paper(run: Path, chromium: Chromium, dark: bool) -> None:
    """Contrast of every text at least 4.5 (WCAG AA), in both colour schemes."""
    chromium.open((run / "report.html").as_uri(), 1280, dark=dark)
    low = chromium.evaluate(_CONTRAST)
    assert low == []


def test_small_print_is_still_readable_on_a_phone(run: Path, chromium: Chromium) -> None:
    chromium.open((run / "report.html").as_uri(), 380)
    sizes = chromium.evaluate(
        "[...document.querySelectorAll('svg.picture text')].map(t => t.getBoundingClientRect().height)"
    )
    assert min(sizes) >= 10


def test_it_prints_to_pdf(run: Path) -> None:
    assert main(["report", str(run), "--pdf"]) == 0
    printed = (run / "report.pdf").read_bytes()
    assert printed.startswith(b"%PDF-")
    assert 3 <= printed.count(b"/Type /Page\n") + printed.count(b"/Type /Page ") <= 12


_WIDER = """[...document.querySelectorAll('main *, header *')]
  .filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.wide, thead'))
  .map(e => e.outerHTML.slice(0, 80))"""

_CONTRAST = """(() => {
  const parse = c => (c.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const over = (top, under) => { const a = top[3] ?? 1; return [0, 1, 2].map(i => top[i] * a + under[i] * (1 - a)); };
  const paper = e => {
    const layers = [];
    for (; e; e = e.parentElement) layers.unshift(parse(getComputedStyle(e).backgroundColor));
    return layers.reduce((under, top) => over(top, under), [255, 255, 255]);
  };
  const found = [];
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || e.matches('.mark, title, desc') || !e.getClientRects().length) continue;
    const style = getComputedStyle(e), ink = parse(e.matches('svg *') ? style.fill : style.color), under = paper(e);
    const [a, b] = [light(over(ink, under)), light(under)].sort((x, y) => y - x);
    if ((a + .05) / (b + .05) < 4.5) found.push([e.textContent.slice(0, 30), ink, under]);
  }
  return found;
})()"""

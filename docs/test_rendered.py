"""Every page in a real browser: `make pages`, which needs chromium and chromium-driver (Debian's packages).

Each page of build/docs is loaded once, and looked at with 1280 and 390 pixels, in light and in dark: nothing in the
console, no page that scrolls sideways, no link or picture that leads nowhere, text that stands out from what is behind
it (WCAG 2, AA). So are the reports that commands write, on paper too. The screenshots are left in
build/pages, to be looked at; with HWDBM_SHOTS=no none are taken, which halves the time.
"""

import base64
import functools
import http.server
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urlparse

import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.keys import Keys

from hwdbm import report
from hwdbm.cli import example
from hwdbm.forecast import QEMU, Forecast, replay
from hwdbm.forecast.sweep import passes, sweep
from hwdbm.image import open_image
from hwdbm.image.harvest import Ask, harvest_slots
from hwdbm.memslot import Memslot
from hwdbm.migration.report import Pass, Report
from hwdbm.trace import Writer, analyse, open_trace

DOCS = Path(__file__).parent
BUILT = Path(__file__).parents[1] / "build" / "docs"
SHOTS = Path(__file__).parents[1] / "build" / "pages"
SHOOT = os.environ.get("HWDBM_SHOTS") != "no"
WIDTHS = {1280: 900, 390: 844}
PAGES = sorted(str(path.relative_to(BUILT)) for path in BUILT.rglob("*.html") if "_static" not in path.parts)
SHOT = {page for page in PAGES if not page.startswith(("api/", "_"))}

# As few connections of its own as can be, and as few processes; the machine may have no sandbox for it.
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
)
STILL = """
const style = document.createElement('style');
style.textContent = '* { transition: none !important; }';
document.head.append(style);
"""

LOOK = """
const parse = text => {
  const context = window.__context ||= Object.assign(document.createElement('canvas'), {width: 1, height: 1})
    .getContext('2d', {willReadFrequently: true});
  context.clearRect(0, 0, 1, 1); context.fillStyle = text; context.fillRect(0, 0, 1, 1);
  const [r, g, b, a] = context.getImageData(0, 0, 1, 1).data;
  return [r, g, b, a / 255];
};
const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
  .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const behind = element => {
  const layers = [];
  for (let at = element; at; at = at.parentElement) {
    const style = getComputedStyle(at);
    if (style.backgroundImage !== 'none' && !(at instanceof SVGElement)) return null;
    layers.push(parse(style.backgroundColor));
    if (layers.at(-1)[3] === 1) break;
  }
  return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255, 1]);
};
const shape = text => {
  const box = text.getBoundingClientRect();
  text.scrollIntoView({block: 'center'});
  const at = text.getBoundingClientRect();
  const x = at.left + at.width / 2, y = at.top + at.height / 2;
  for (const each of document.elementsFromPoint(x, y)) {
    if (!(each instanceof SVGGeometryElement)) continue;
    const fill = getComputedStyle(each).fill;
    if (fill !== 'none') return parse(fill);
  }
  return null;
};
const faint = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim()) continue;
  if (!element.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
  if (element.closest('title, desc, script, style, [disabled], .headerlink, .visually-hidden')) continue;
  const style = getComputedStyle(element), drawn = element.closest('svg.picture');
  let ground = behind(element);
  if (!ground) continue;
  if (drawn) { const filled = shape(element); if (filled) ground = over(filled, ground); }
  const ink = over(parse(drawn ? style.fill : style.color), ground);
  const [bright, dark] = [light(ink), light(ground)].sort((a, b) => b - a);
  const size = parseFloat(style.fontSize), large = size >= 24 || size >= 18.66 && +style.fontWeight >= 700;
  const ratio = (bright + 0.05) / (dark + 0.05);
  if (ratio < (large ? 3 : 4.5)) faint.push(`${ratio.toFixed(2)}: ${walker.currentNode.data.trim().slice(0, 40)} `
    + `(${style.color} on ${ground.map(Math.round)}, ${element.tagName}.${element.className})`);
}
window.scrollTo(0, 0);
return faint;
"""

FACTS = """
const wide = [];
if (document.documentElement.scrollWidth > innerWidth)
  for (const each of document.querySelectorAll('main *')) {
    if (each.getBoundingClientRect().right > innerWidth + 1) wide.push(each.tagName + '.' + each.className);
  }
return {
  scroll: document.documentElement.scrollWidth, inner: innerWidth, wide: wide.slice(0, 5),
  links: [...new Set([...document.querySelectorAll('a[href]')].map(a => a.href))],
  broken: [...document.images].filter(each => each.complete && !each.naturalWidth).map(each => each.src),
  mute: [...document.images].filter(each => !each.alt.trim()).map(each => each.src),
  nameless: [...document.querySelectorAll('svg.picture')]
    .filter(each => !each.querySelector('title') || !each.querySelector('desc')).length,
  title: document.title, heading: document.querySelectorAll('main h1').length,
};
"""


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    handler = functools.partial(_Quiet, directory=str(BUILT))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    assert chromium, "apt-get install chromium chromium-driver"
    assert driver, "apt-get install chromium-driver"
    with tempfile.TemporaryDirectory() as profile:
        options = Options()
        options.binary_location = chromium
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        with webdriver.Chrome(options=options, service=Service(driver)) as made:
            made.set_script_timeout(60)
            made.set_page_load_timeout(60)
            yield made


def sized(browser: webdriver.Chrome, width: int) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": WIDTHS[width], "deviceScaleFactor": 1, "mobile": width < 600},
    )


def themed(browser: webdriver.Chrome, theme: str) -> None:
    browser.execute_script(f"document.documentElement.dataset.theme = {json.dumps(theme)}")


def leave(name: str, data: bytes) -> None:
    """Leave a file to be looked at."""
    if SHOOT:
        SHOTS.mkdir(parents=True, exist_ok=True)
        (SHOTS / name).write_bytes(data)


def shoot(browser: webdriver.Chrome, name: str) -> None:
    """Take a picture of the whole page, or of as much as one can look at, where somebody will."""
    if not SHOOT:
        return
    size = browser.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
    clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 6000), "scale": 1}
    taken = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    leave(f"{name}.png", base64.b64decode(taken["data"]))


def test_there_are_pages() -> None:
    assert len(PAGES) > 30, "make docs first"


@pytest.mark.parametrize("page", PAGES)
def test_a_page(page: str, site: str, browser: webdriver.Chrome) -> None:
    wrong: list[str] = []
    sized(browser, 1280)
    browser.get(site + page)
    browser.execute_script(STILL)
    for width in WIDTHS:
        sized(browser, width)
        facts: dict[str, Any] = browser.execute_script(FACTS)
        if facts["scroll"] > facts["inner"]:
            wrong.append(f"{width}: scrolls sideways to {facts['scroll']} pixels: {facts['wide']}")
        if page in SHOT:
            for theme in ("light", "dark"):
                themed(browser, theme)
                shoot(browser, f"{page.replace('/', '-').removesuffix('.html')}-{width}-{theme}")
    sized(browser, 1280)
    for theme in ("light", "dark"):
        themed(browser, theme)
        wrong += [f"{theme}: too faint, {each}" for each in browser.execute_script(LOOK)]
    wrong += [f"console: {each['message']}" for each in browser.get_log("browser") if each["level"] != "INFO"]
    wrong += [f"no picture is at {each}" for each in facts["broken"]]
    wrong += [f"a picture has no text: {each}" for each in facts["mute"]]
    if facts["nameless"]:
        wrong.append(f"{facts['nameless']} drawings have no title and description")
    if facts["heading"] != 1 and page not in {"genindex.html", "py-modindex.html", "search.html"}:
        wrong.append(f"{facts['heading']} headings of the first order")
    wrong += astray(site, facts["links"])
    assert not wrong, "\n".join([page, *wrong])


def astray(site: str, links: list[str]) -> Iterator[str]:
    """Yield what is wrong with links: one of the site leads to a page and a place that are there; no other is read."""
    for link in links:
        target, fragment = urldefrag(link)
        parts = urlparse(target)
        if not target.startswith(site):
            if parts.scheme not in {"https", "mailto"}:
                yield f"a link to {link}"
            continue
        path = unquote(parts.path.lstrip("/")) or "index.html"
        path = path + "index.html" if path.endswith("/") else path
        if not (BUILT / path).is_file():
            yield f"there is no {path}"
        elif fragment and f'id="{unquote(fragment)}"' not in read(path):
            yield f"{path} has no #{fragment}"


@functools.cache
def read(page: str) -> str:
    return (BUILT / page).read_text(encoding="utf-8")


def test_a_link_astray_is_seen() -> None:
    good = ["http://site/", "http://site/migration.html#one-guest", "https://a.b/", "mailto:a@b"]
    bad = ["http://site/no.html", "http://site/#no", "http://site/api/", "http://a.b/", "file:///a"]
    assert list(astray("http://site/", good + bad)) == [
        "there is no no.html", "index.html has no #no", "there is no api/index.html",
        "a link to http://a.b/", "a link to file:///a",
    ]  # fmt: skip


@pytest.mark.parametrize(("word", "page"), [("harvest", "howto/harvest"), ("downtime", "migration"), ("lease", "api/")])
def test_search(word: str, page: str, site: str, browser: webdriver.Chrome) -> None:
    browser.get(f"{site}search.html?q={word}")
    said, found = browser.execute_async_script(
        """const done = arguments[0], until = Date.now() + 20000;
        const look = () => {
          // Results come one by one, and not the best first: the page says when it has all of them.
          const said = document.querySelector('#search-results .search-summary')?.innerText ?? '';
          const links = [...document.querySelectorAll('#search-results a')].map(a => a.href);
          const over = /finished|did not match/.test(said) || Date.now() > until;
          if (over) done([said, links]); else setTimeout(look, 100);
        };
        look();"""
    )
    assert "finished" in said, said
    assert any(page in link for link in found), found


def test_this_would_notice(browser: webdriver.Chrome) -> None:
    """The checks of the browser say something where something is wrong."""
    browser.get(
        "data:text/html,<main><p style='color:%23999;background:%23fff'>faint</p><div style='width:5000px'>wide</div>"
    )
    sized(browser, 390)
    assert browser.execute_script(LOOK)[0].startswith("2.85: faint")
    assert browser.execute_script(FACTS)["scroll"] >= 5000
    browser.execute_script("console.error('loud')")
    assert any("loud" in each["message"] for each in browser.get_log("browser"))


# --- reports -----------------------------------------------------------------------------------------------

A4 = 718  # pixels between the margins of a printed page


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report of each kind, of real data where the project has some."""
    folder = tmp_path_factory.mktemp("reports")
    found = harvest_slots(open_image(example.find("example:4k_ipa40")), Ask("dbm", check=True))
    taken = [report.SnapshotFile(f"guest.{n}", "differential", 1 << 30, 1 << 29 >> n, 1 << 17 >> n) for n in range(9)]
    said = json.loads((DOCS / "pictures" / "migration.json").read_text(encoding="utf-8"))
    moved = Report(4096, said["ram"]["total"], 0.3, status="failed", error="the link went away " * 9)
    for one in said["passes"] * 3:
        expected = one.get("expected-downtime")
        moved.passes.append(
            Pass(
                len(moved.passes) + 1, one["dirty-pages"], one["remaining"], one["dirty-rate"],
                expected_downtime=None if expected is None else expected / 1e3, normal=one["normal"],
                duplicate=one["duplicate"], transferred=one["transferred"], time=one["time"] / 1e3,
                cells=np.linspace(0, 1, 512, dtype=np.float32) ** len(moved.passes),
            )
        )  # fmt: skip
    documents = {
        "forecast": forecast(folder),
        "harvest": report.of_harvest("example:4k_ipa40", found),
        "migration": report.of_migration(moved),
        "snapshots": report.of_snapshots("Snapshots of guest.ram", taken),
    }
    for name, document in documents.items():
        report.write(folder / f"{name}.html", document)
    return {name: folder / f"{name}.html" for name in documents}


def forecast(folder: Path) -> report.Document:
    """Return the report of a guest that converges at some of the bandwidths."""
    words = np.zeros((60, 1024), dtype=np.uint64)
    words[:, :40] = ~np.uint64(0)
    for at in range(60):
        words[at, 100 + 5 * at : 108 + 5 * at] = ~np.uint64(0)
    with Writer(folder / "trace", [Memslot(0, 0, 0x40000, 65536, 0)], 4096, interval=100) as writer:
        for at, row in enumerate(words):
            writer.append((at + 1) * 10**8, row)
    trace = open_trace(folder / "trace")
    found = replay(trace, bandwidth=25e6, terms=QEMU)

    def one(bandwidth: float, limit: float) -> Forecast:
        return replay(trace, bandwidth=bandwidth, max_downtime=limit, terms=QEMU, starts=1, needs=False)

    asked = {"bandwidth": "23.8 MiB/s", "limit of downtime": "300 ms"}
    sent = passes(trace, bandwidth=25e6, max_downtime=0.3, terms=QEMU)
    return report.of_forecast("a trace", found, sweep(one, 25e6, 0.3), sent, asked, analyse(trace, rows=24, cells=180))


def test_the_limit_can_be_moved(reports: dict[str, Path], browser: webdriver.Chrome) -> None:
    """By the keyboard; what is shown is the curve of that limit, and what is said of it."""
    browser.get(reports["forecast"].as_uri())
    shown = (
        "return [...document.querySelectorAll('[data-at]')].filter(e => getComputedStyle(e).display !== 'none')"
        ".map(e => [e.tagName.toLowerCase(), e.dataset.at])"
    )
    slider = browser.find_element("css selector", ".dial input")
    assert slider.is_displayed()
    assert sorted(browser.execute_script(shown)) == [["g", "3"], ["output", "3"], ["p", "3"]]
    slider.send_keys(Keys.ARROW_RIGHT)
    assert sorted(browser.execute_script(shown)) == [["g", "4"], ["output", "4"], ["p", "4"]]
    assert slider.get_attribute("aria-valuetext") == "600 ms"
    slider.send_keys(Keys.HOME)
    said = browser.find_element("css selector", "p[data-at='0']")
    assert said.is_displayed()
    assert said.text.startswith("With 37.5 ms allowed")
    media(browser, "print", "light")
    assert not slider.is_displayed()
    assert said.is_displayed()
    media(browser, "", "")


@pytest.mark.parametrize("name", ["forecast", "harvest", "migration", "snapshots"])
def test_a_report(name: str, reports: dict[str, Path], browser: webdriver.Chrome) -> None:
    """It fits a wide screen, a narrow one and paper, can be read in light and dark, and asks for nothing else."""
    wrong: list[str] = []
    sized(browser, 1280)
    browser.get(reports[name].as_uri())
    for width in WIDTHS:
        sized(browser, width)
        for theme in ("light", "dark"):
            media(browser, "screen", theme)
            facts = browser.execute_script(FACTS)
            if facts["scroll"] > facts["inner"]:
                wrong.append(f"{width}: scrolls sideways to {facts['scroll']} pixels: {facts['wide']}")
            wrong += [f"{width} {theme}: too faint, {each}" for each in browser.execute_script(LOOK)]
            shoot(browser, f"report-{name}-{width}-{theme}")
    for theme in ("light", "dark"):  # paper is white, whatever the screen is
        media(browser, "print", theme)
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", {"width": A4, "height": 1016, "deviceScaleFactor": 1, "mobile": False}
        )
        facts = browser.execute_script(FACTS)
        if facts["scroll"] > A4:
            wrong.append(f"print: {facts['scroll']} pixels wide: {facts['wide']}")
        hidden = "return [...document.querySelectorAll('.table')].filter(e => e.scrollWidth > e.clientWidth + 1).length"
        if browser.execute_script(hidden):
            wrong.append("print: a table is cut")
        paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        if paper != "rgb(255, 255, 255)":
            wrong.append(f"print: the paper is {paper}")
        wrong += [f"print: too faint, {each}" for each in browser.execute_script(LOOK)]
        shoot(browser, f"report-{name}-print-{theme}")
    printed = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"])
    leave(f"report-{name}.pdf", printed)
    if not printed.startswith(b"%PDF"):
        wrong.append("it can't be printed")
    media(browser, "", "")
    asked = browser.execute_script("return performance.getEntriesByType('resource').map(each => each.name)")
    wrong += [f"it asks for {each}" for each in asked]
    wrong += [f"console: {each['message']}" for each in browser.get_log("browser") if each["level"] != "INFO"]
    assert not wrong, "\n".join([name, *wrong])


def media(browser: webdriver.Chrome, kind: str, theme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": theme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": kind, "features": features})

"""A report in a real browser: it is quiet, asks the network for nothing, fits a phone, hands out its numbers, turns."""

from __future__ import annotations

import csv
import io
import itertools
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from browser import NAMES, Browser, find_chromium
from chains import chain

from openmm_bg import analysis as bga

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=f"needs a browser: {', '.join(NAMES)}")
PANELS = "document.querySelector('.panels')"


@pytest.fixture(scope="module")
def sides(alanine):
    """Two ensembles by name: phi, psi, energies, weights, and the positions of the first."""
    found = {}
    for name, seed in (("MD", 1), ("generator", 2)):
        x, energies = chain(alanine, 600, seed, shares=(0.5, 0.35, 0.15), memory=5.0)
        angles = bga.backbone_dihedrals(x, alanine.topology)
        weights = None if seed == 1 else np.random.default_rng(3).gamma(2.0, size=600)
        found[name] = (angles.phi[:, 0], angles.psi[:, 0], energies, weights, x)
    return found


@pytest.fixture(scope="module")
def page(alanine, sides, tmp_path_factory) -> Path:
    moves = {
        name: bga.Chain((phi > 0).astype(float), cost)
        for (name, (phi, *_)), cost in zip(sides.items(), (500, 510), strict=True)
    }
    records = [
        {"seconds": float(k), "loss": 5.0 / (k + 1)} | ({"ess": 0.01 * k} if k % 3 == 0 else {}) for k in range(60)
    ]
    md = sides["MD"]
    log_weights = 0.5 * np.random.default_rng(4).normal(size=600)
    accepted = np.random.default_rng(5).random(300) < 0.4
    of = {
        key: {name: tuple(side[k] for k in key) for name, side in sides.items()} for key in ((0, 1, 3), (0, 3), (2, 3))
    }
    drawings = [
        ("Where it is", bga.ramachandran_maps(of[0, 1, 3]), True),
        ("Free energy along φ", bga.phi_profile(of[0, 3]), False),
        ("Potential energy", bga.energy_histograms(of[2, 3]), False),
        ("Weights", bga.log_weight_histogram(log_weights, log_weights[:100] + 1), False),
        ("Acceptance", bga.acceptance_trace(accepted, moves), False),
        ("Memory", bga.indicator_autocorrelation(moves), False),
        ("Training", bga.training_curves(records, losses=["loss"]), False),
    ]  # fmt: skip
    figures = [
        bga.Figure(title, bga.to_svg(drawn), f"Caption of {title}.", wide=wide) for title, drawn, wide in drawings
    ]
    view = bga.MoleculeView(
        "What the basins look like", alanine.topology, bga.representatives(md[4], alanine.topology), "Drag it."
    )
    basins = bga.populations(md[0], md[1])
    return bga.report(
        tmp_path_factory.mktemp("report") / "report.html",
        title="Alanine dipeptide: molecular dynamics with generator moves",
        summary=bga.Summary(
            "MD with moves agrees with plain MD within their errors.", bga.Status.GOOD, "A paragraph of context.",
            [bga.Card(f"Figure {k}", f"{k}0 %", "of 8000 proposals") for k in range(1, 5)],
        ),
        figures=[figures[0], view, *figures[1:]],
        tables=[bga.Table(
            "Populations, %", ("basin", "MD", "difference"),
            [(p.name, bga.format_value(100 * p.value, 100 * p.error), bga.format_value(-3.14, 0.2)) for p in basins],
            "Errors from the statistical inefficiency.",
        ), bga.Table(
            "Rounds of adaptation", [f"a long heading, number {k}" for k in range(8)],
            [["the last training", *["75.0 (80.0)"] * 6, "the largest log p/q is 12.5, above 6; and 2 more"]],
        )],
        notes=["The moves are exact; the dynamics is not."],
        provenance={"System sha256": "0123456789abcdef" * 4, "seed": "0", "command": "openmm-bg run alanine_dipeptide"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(CHROMIUM, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def drawn(text: str) -> list[tuple[str, list[float]]]:
    """Balls and sticks in the order in which they are drawn: what they are, and all that is drawn of them."""
    found = []
    for element in ElementTree.fromstring(text).iter():
        kind = element.get("class", "")
        if kind.startswith(("ball", "stick")):
            what = ("transform",) if kind.startswith("ball") else ("x1", "y1", "x2", "y2", "stroke-width")
            numbers = re.findall(r"-?[\d.]+", " ".join(element.get(key) for key in (*what, "style")))
            found.append((element.get("data-atom") or element.get("data-ends"), [float(x) for x in numbers]))
    return found


def first_drawing(browser: Browser) -> list[tuple[str, list[float]]]:
    return drawn(browser.run("new XMLSerializer().serializeToString(document.querySelector('.panels svg'))"))


def same(a, b) -> bool:
    return [k for k, _ in a] == [k for k, _ in b] and all(
        np.allclose(x, y, atol=0.02) for (_, x), (_, y) in zip(a, b, strict=True)
    )


def rotated(positions: np.ndarray, reach: float, eye: float, about: str, angle: float) -> dict[str, np.ndarray]:
    """Where each ball must be, by the other way to write a rotation and a projection."""
    from scipy.spatial.transform import Rotation

    p = Rotation.from_euler(about, angle, degrees=True).apply(positions)
    scale = 1 / (1 - p[:, 2] / eye)
    depth = 0.5 - p[:, 2] / (2 * reach)
    return {
        str(k): np.array(row) for k, row in enumerate(zip(p[:, 0] * scale, -p[:, 1] * scale, scale, depth, strict=True))
    }


def test_it_is_quiet_alone_and_visible(browser, page):
    browser.open(page)
    browser.painted()
    methods = [event["method"] for event in browser.events]
    assert not {"Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"} & set(methods)
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert page.as_uri() in asked
    assert all(url.startswith("data:") or url == page.as_uri() for url in asked)
    figures = browser.run("document.querySelectorAll('figure').length")
    sizes = browser.run(
        "[...document.querySelectorAll('figure svg')].map(svg => [svg.getBoundingClientRect(), svg.checkVisibility(), "
        "svg.getBBox()].flatMap(x => typeof x == 'boolean' ? [+x] : [x.width, x.height]))"
    )
    assert figures == 8 and len(sizes) == 7 + 3
    assert all(width > 150 and height > 100 and shown and a > 0 and b > 0 for width, height, shown, a, b in sizes)


def test_a_phone_shows_it_without_scrolling_sideways(browser, page):
    browser.open(page, width=360, height=740, mobile=True)
    assert browser.run("document.documentElement.scrollWidth") <= 360
    panels = browser.run("[...document.querySelectorAll('.panels svg')].map(svg => svg.getBoundingClientRect().width)")
    assert min(panels) > 200


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_word_stands_out_from_its_ground(browser, page, scheme):
    browser.open(page, scheme=scheme)
    worst, where = browser.run("""(() => {
      const rgba = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
      const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
      const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
      let worst = [99, ""];
      for (const element of document.querySelectorAll("body *")) {
        const words = [...element.childNodes].filter(n => n.nodeType === 3 && n.data.trim()).map(n => n.data).join("");
        if (!words || !element.checkVisibility() || ["SCRIPT", "title", "metadata"].includes(element.tagName)) continue;
        let ground = element;
        while (ground && rgba(getComputedStyle(ground).backgroundColor)[3] === 0) ground = ground.parentElement;
        const style = getComputedStyle(element);
        const drawing = element.closest("svg");
        let color = rgba(drawing ? style.fill : style.color);
        if (drawing && getComputedStyle(drawing).filter.includes("invert")) color = color.map(v => 255 - v);
        const ink = light(color);
        const paper = light(rgba(getComputedStyle(ground).backgroundColor));
        const ratio = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
        if (ratio < worst[0]) worst = [ratio, words];
      }
      return worst;
    })()""")
    assert 4.5 <= worst < 99, where  # WCAG 2.1, AA


def test_links_hold_the_numbers_that_are_drawn(browser, page, sides):
    browser.open(page)
    texts = browser.run(
        "Promise.all([...document.querySelectorAll('a.data')].map(a => fetch(a.href).then(r => r.text())))"
    )
    names = browser.run("[...document.querySelectorAll('a.data')].map(a => a.download)")
    assert len(names) == len(set(names)) == 10 and names[0] == "figure-1-where-it-is.csv"
    tables = {}
    for name, text in zip(names, texts, strict=True):
        header, *rows = csv.reader(io.StringIO(text))
        assert all(len(row) == len(header) for row in rows) and rows, name
        tables[name] = {column: [row[k] for row in rows] for k, column in enumerate(header)}

    def numbers(name: str, *columns: str) -> np.ndarray:
        rows = zip(*(tables[name][column] for column in columns), strict=True)
        return np.array([[float(cell) for cell in row] for row in rows if all(row)])

    phi, psi, energies, weights, _ = sides["generator"]
    assert {"MD: free energy / kT", "generator: free energy / kT"} < tables["figure-1-where-it-is.csv"].keys()
    rama = numbers("figure-1-where-it-is.csv", "φ / degrees", "ψ / degrees", "generator: free energy / kT")
    counts = np.histogram2d(np.degrees(phi), np.degrees(psi), 60, [[-180, 180]] * 2, weights=weights)[0]
    cells = np.floor((rama[:, :2] + 180) / 6).astype(int)
    assert len(rama) == (counts > 0).sum()
    assert np.allclose(rama[:, 2], np.log(counts.max() / counts[tuple(cells.T)]), atol=1e-5)

    column = "MD: free energy / kT"
    profile = numbers(
        "figure-3-free-energy-along.csv", "φ / degrees", column, f"{column} (lower)", f"{column} (upper)"
    )  # fmt: skip
    expected = bga.free_energy_profile(sides["MD"][0], bins=48)
    known = np.isfinite(expected.free_energy)
    assert np.allclose(profile[:, 0], np.degrees(expected.centres[known]), atol=1e-3)
    assert np.allclose(profile[:, 1], expected.free_energy[known], atol=1e-4)
    assert np.allclose(profile[:, 3] - profile[:, 2], 2 * expected.error[known], atol=1e-4)

    (column,) = [c for c in tables["figure-4-potential-energy.csv"] if c.startswith("generator")]
    energy = "reduced energy u / kT"
    bars = numbers("figure-4-potential-energy.csv", f"{energy} (from)", f"{energy} (to)", column)
    inside = [weights[(energies >= low) & (energies < high)].sum() / weights.sum() for low, high, _ in bars]
    assert np.allclose(bars[:, 2] * (bars[:, 1] - bars[:, 0]), inside, atol=1e-3)  # a frame may lie on a rounded edge

    training = numbers("figure-8-training.csv", "wall time / s", "ESS / %")
    assert np.allclose(training, [(k, k) for k in range(0, 60, 3)])
    trace = numbers("figure-6-acceptance.csv", "proposals", "accepted so far / %")
    accepted = np.random.default_rng(5).random(300) < 0.4
    assert np.allclose(trace[:, 1], [100 * accepted[: int(n)].mean() for n in trace[:, 0]], atol=1e-3)
    assert tables["table-1-populations.csv"]["difference"] == ["-3.14 ± 0.20"] * 3
    assert len(tables["figure-2-what-the-basins-look-like.csv"]["atom"]) == 3 * 22


def test_a_click_saves_a_file(browser, page, tmp_path):
    browser.open(page)
    browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path), eventsEnabled=False)
    browser.run("document.querySelector('table').closest('.table').querySelector('a.data').click()")
    saved = tmp_path / "table-1-populations.csv"
    assert browser.until(saved.exists, seconds=20.0)
    assert saved.read_text().startswith("basin,MD,difference\n")


def test_the_script_takes_over_what_is_drawn_and_turns_it(browser, page):
    written = re.findall(r"<svg[^>]*data-eye.*?</svg>", page.read_text(), re.DOTALL)[0]
    browser.open(page)
    start = first_drawing(browser)
    assert same(start, drawn(written)) and len(start) == 22 + 2 * 21

    at = {e.get("data-atom"): e.get("data-at") for e in ElementTree.fromstring(written).iter() if e.get("data-at")}
    positions = np.array([at[str(k)].split() for k in range(22)], dtype=float)
    eye, reach = (float(re.search(rf'data-{key}="([\d.]+)"', written)[1]) for key in ("eye", "reach"))
    browser.run(f"{PANELS}.focus()")
    height = browser.run("scrollY")
    for key, about, angle in (("ArrowRight", "y", 10), ("ArrowUp", "x", -10)):
        browser.press(key)
        shown = first_drawing(browser)
        expected = rotated(positions, reach, eye, about, angle)
        assert all(np.allclose(numbers, expected[name], atol=0.06) for name, numbers in shown if name in expected)
        depths = [numbers[-1] for _, numbers in shown]
        assert all(a >= b - 0.011 for a, b in itertools.pairwise(depths))  # what is far is drawn first
        assert browser.run("scrollY") == height  # the page stays
        browser.press("Home")
        assert same(first_drawing(browser), start)


@pytest.mark.parametrize("touch", [False, True])
def test_mouse_and_finger_turn_it(browser, page, touch):
    browser.open(page, width=600, mobile=touch)
    start = first_drawing(browser)
    x, y = browser.run(
        f"{PANELS}.scrollIntoView(), (({{x, y, width}}) => [x + width / 2, y + 60])({PANELS}.getBoundingClientRect())"
    )
    browser.drag((x, y), (x + 90, y + 5), touch=touch)
    turned = first_drawing(browser)
    assert not same(start, turned)
    assert len(turned) == len(start)
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    browser.painted()
    assert same(first_drawing(browser), turned)  # nothing is held any more


def test_nothing_moves_by_itself_for_those_who_want_it_so(browser, page):
    for motion in (False, True):
        browser.open(page, motion=motion)
        start = first_drawing(browser)
        browser.run(f"{PANELS}.scrollIntoView({{block: 'center'}})")
        seconds = 20.0 if motion else 0.4
        moved = browser.until(lambda start=start: not same(first_drawing(browser), start), seconds=seconds)
        assert moved is motion


def test_paper_and_a_browser_without_scripts_show_the_drawing(browser, page):
    state = (
        "[document.querySelector('.hint'), document.querySelector('a.data'), document.querySelector('.panels svg')]"
        ".map(element => element.checkVisibility())"
    )
    browser.open(page, scheme="dark", media="print", width=670)  # A4 without its margins
    assert browser.run("document.documentElement.scrollWidth") <= 670
    assert browser.run(state) == [False, False, True]
    assert browser.run("getComputedStyle(document.querySelector('.molecules')).backgroundColor") == "rgb(255, 255, 255)"
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(page)
        assert browser.run(state) == [False, True, True]
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)

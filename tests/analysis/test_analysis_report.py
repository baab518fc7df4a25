"""Figures become SVG, and a report stands alone."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from urllib.parse import unquote

import numpy as np
import pytest

from openmm_bg import analysis as bga
from openmm_bg.analysis.formatting import format_value
from openmm_bg.analysis.style import colors_of, prefix_ids, split_data, with_data
from openmm_bg.errors import InputError

VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(HTMLParser):
    """Checks that tags nest, and collects ids, addresses and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.addresses, self.tags, self.words, self.links = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._note(attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self._note(attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def _note(self, attrs):
        if "download" in dict(attrs):
            self.links.append(dict(attrs))
        for key, value in attrs:
            if key == "id":
                self.ids.append(value)
            if key in ("src", "href", "xlink:href", "action", "data", "poster"):
                self.addresses.append(value)


def ensembles():
    rng = np.random.default_rng(0)
    phi = np.where(rng.random(600) < 0.1, 1.0, -1.4) + 0.2 * rng.normal(size=600)
    psi = 0.5 * rng.normal(size=600)
    return rng, phi, psi, rng.random(600)


def figures():
    rng, phi, psi, w = ensembles()
    moves = (phi > 0).astype(float)
    stuck = np.zeros(600)
    u = rng.gamma(5.0, size=600)
    records = [{"seconds": float(k), "NLL": 5.0 / (k + 1)} | ({"ess": 0.1 * k} if k % 2 else {}) for k in range(30)]
    return {
        "maps": bga.ramachandran_maps({"MD": (phi, psi, None), "reweighted": (phi, psi, w)}, bins=24),
        "profile": bga.phi_profile({"MD": (phi, None), "reweighted": (phi, w), "third": (phi[:100], None)}),
        "energies": bga.energy_histograms({"MD": (u, None), "generator": (np.r_[u[1:] + 1, np.inf], None)}),
        "weights": bga.log_weight_histogram(np.r_[-u, -np.inf], np.r_[-u + 1, np.inf]),
        "acceptance": bga.acceptance_trace(
            rng.random(300) < 0.3, {"MD": bga.Chain(stuck, 500), "MD with moves": bga.Chain(moves, 510)}
        ),
        "training": bga.training_curves(records, losses=["NLL"]),
        "autocorrelation": bga.indicator_autocorrelation(
            {"MD": bga.Chain(stuck, 500), "MD with moves": bga.Chain(moves, 510)}
        ),
    }


@pytest.fixture(scope="module")
def drawn():
    return {name: (figure, bga.to_svg(figure)) for name, figure in figures().items()}


def test_svg_is_well_formed_reproducible_and_alone(drawn):
    again = figures()
    for name, (_, svg) in drawn.items():
        ElementTree.fromstring(svg)
        assert svg == bga.to_svg(again[name])
        assert "<style" not in svg  # a style sheet inside would rule the whole page
        assert svg.count("<metadata>") == 1  # the figure's own numbers
        for address in re.findall(r'href="([^"]*)"', svg):
            assert address.startswith(("#", "data:image/png;base64,"))
        ids = re.findall(r'\sid="([^"]*)"', svg)
        assert len(ids) == len(set(ids))
        wanted = set(re.findall(r'href="#([^"]*)"', svg)) | set(re.findall(r"url\(#([^)]*)\)", svg))
        assert wanted <= set(ids)
    every = [i for _, svg in drawn.values() for i in re.findall(r'\sid="([^"]*)"', svg)]
    assert len(every) == len(set(every))


def test_figures_say_what_cannot_be_drawn(drawn):
    def texts(name):
        return " ".join(ElementTree.fromstring(drawn[name][1]).itertext())

    assert "MD: no transition seen" in texts("autocorrelation")
    assert "1 invalid" in texts("weights")
    assert "1 unreachable" in texts("weights")
    assert "% beyond" in texts("energies")
    assert "φ / degrees" in texts("maps")
    assert "free energy / kT" in texts("profile")


def test_axes_carry_labels(drawn):
    for name, (figure, _) in drawn.items():
        for ax in figure.axes:
            shares_y = name == "maps" and ax is not figure.axes[0]
            assert ax.get_ylabel() or shares_y
            assert ax.get_xlabel() or name in ("maps", "training")  # a colour bar; panels above the last


def test_colours_are_the_same_from_figure_to_figure():
    assert colors_of(["MD", "x"])["MD"] == colors_of(["x", "y", "MD"])["MD"]
    assert len(set(colors_of(["MD", "generator", "reweighted", "MD with moves", "a", "b"]).values())) == 6
    with pytest.raises(InputError):
        colors_of(map(str, range(9)))


def test_figures_refuse_what_they_cannot_show():
    with pytest.raises(InputError):
        bga.ramachandran_maps({})
    with pytest.raises(InputError, match="No record"):
        bga.training_curves([{"seconds": 1.0}], losses=["NLL"], ess=None)
    with pytest.raises(InputError):
        bga.log_weight_histogram([0.0, np.nan])
    with pytest.raises(InputError):
        prefix_ids("<svg></svg>", "1 x")


def write(path, drawn, **changes):
    inputs = {
        "title": "Alanine & <b>dipeptide</b>",
        "summary": bga.Summary(
            "It agrees.", bga.Status.GOOD, "Context.", [bga.Card("Acceptance", "36 %", "<script>alert(1)</script>")]
        ),
        "figures": [bga.Figure(name, svg, f'Caption "{name}"') for name, (_, svg) in drawn.items()],
        "tables": [bga.Table("Populations", ("Basin", "MD"), [("left", "3.0 ± 0.2"), ("<i>", "1")])],
        "notes": ["The move is exact & MD is not."],
        "provenance": {"Seed": "1", "System": "sha256 00<ff"},
    }
    return bga.report(path, **(inputs | changes))


def test_report_is_one_page_that_needs_nothing(tmp_path, drawn):
    path = write(tmp_path / "report.html", drawn)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert page.tags.count("svg") == page.tags.count("figure") == len(drawn)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert "i" not in page.tags
    assert "b" not in page.tags
    assert len(page.ids) == len(set(page.ids))
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    saved = {attributes["download"]: unquote(attributes["href"]).partition(",")[2] for attributes in page.links}
    assert len(saved) == len(page.links) == len(drawn) + 1
    assert saved["table-1-populations.csv"] == "Basin,MD\nleft,3.0 ± 0.2\n<i>,1\n"
    for number, (name, (_, svg)) in enumerate(drawn.items(), 1):
        assert saved[f"figure-{number}-{name}.csv"] == split_data(svg)[1]
    bare = re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert not re.search(r"https?://|//\w|@import|url\((?!#)", re.sub(r"data:image/png;base64,[\w+/=\s]*", "", bare))
    words = " ".join(page.words)
    for expected in ("It agrees.", "Passed", "Acceptance", "3.0 ± 0.2", "sha256 00<ff", 'Caption "maps"', "MD is not."):
        assert expected in words
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert list(tmp_path.iterdir()) == [path]


def test_an_svg_keeps_its_data_whatever_they_hold():
    data = 'a <b> & "c",</metadata>\n1,2\n'
    svg = with_data("<svg><g/></svg>", data)
    ElementTree.fromstring(svg)
    assert split_data(svg) == ("<svg><g/></svg>", data)
    assert split_data("<svg></svg>") == ("<svg></svg>", "") and with_data("<svg></svg>", "") == "<svg></svg>"


def test_only_a_view_of_molecules_needs_a_script(tmp_path, drawn, alanine):
    shown = bga.Conformation("as in its <file>", alanine.positions, "99 ± 1 %", 0.99)
    view = bga.MoleculeView("The molecule", alanine.topology, [shown, shown], "Caption.")
    page = Page(write(tmp_path / "r.html", drawn, figures=[view, view]).read_text())
    assert page.tags.count("script") == 1 and page.tags.count("svg") == 4
    assert len(page.ids) == len(set(page.ids))
    assert "as in its <file>" in page.words and "99 ± 1 %" in page.words


def test_a_figure_shown_twice_has_two_sets_of_ids(tmp_path, drawn):
    svg = drawn["energies"][1]
    text = write(tmp_path / "r.html", drawn, figures=[bga.Figure("a", svg), bga.Figure("b", svg)]).read_text()
    ids = Page(text).ids
    assert len(ids) == len(set(ids))


def test_report_is_written_whole_or_not_at_all(tmp_path, drawn, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("the old one")

    def broken(source, target):
        raise OSError("the disk is full")

    monkeypatch.setattr("os.replace", broken)
    with pytest.raises(OSError, match="full"):
        write(path, drawn)
    assert path.read_text() == "the old one"
    assert list(tmp_path.iterdir()) == [path]


def test_report_refuses_what_does_not_fit(tmp_path, drawn):
    with pytest.raises(InputError, match="cells"):
        write(tmp_path / "r.html", drawn, tables=[bga.Table("t", ("a", "b"), [("1",)])])
    with pytest.raises(InputError, match="svg"):
        write(tmp_path / "r.html", drawn, figures=[bga.Figure("t", "<img>")])
    with pytest.raises(InputError, match="folder"):
        write(tmp_path / "nowhere" / "r.html", drawn)
    assert not list(tmp_path.iterdir())


def test_a_bare_report(tmp_path):
    page = Page(bga.report(tmp_path / "r.html", title="t", summary=bga.Summary("v")).read_text())
    assert "section" not in page.tags


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.42137, 0.0131, "0.421 ± 0.013"),
        (0.42137, 0.0296, "0.42 ± 0.03"),
        (0.42137, 0.0999, "0.42 ± 0.10"),
        (12345.6, 387.0, "12300 ± 400"),
        (-0.0004, 0.01, "0.000 ± 0.010"),
        (-3.6, 1.8, "−3.6 ± 1.8"),  # noqa: RUF001
        (5.0, None, "5.00"),
        (1234567.0, None, "1230000"),
        (0.0, float("nan"), "0 ± ?"),
        (float("nan"), 1.0, "not measured"),
        (float("inf"), None, "∞"),
    ],
)
def test_no_more_digits_than_the_error_warrants(value, error, text):
    assert format_value(value, error) == text


def test_importing_draws_nothing_in():
    code = "import sys, openmm_bg.analysis; print({'matplotlib', 'ot', 'openmmtools', 'mdtraj'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_drawing_leaves_matplotlib_as_it_was():
    import matplotlib

    before = dict(matplotlib.rcParams)
    bga.energy_histograms({"MD": (np.arange(10.0), None)})
    assert dict(matplotlib.rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()

import html.parser
import shutil
import subprocess

import matplotlib.figure
import pytest

from subquad.lra.report import page
from subquad.lra.report.page import Section
from subquad.lra.report.text_tables import Table

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Reader(html.parser.HTMLParser):
    """The rows of a page's tables, the words of its pictures, and what it would fetch."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.words, self.fetched, self._cell, self._in_picture = [], [], [], None, False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self._cell = ""
        self._in_picture |= tag == "svg"
        links = [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        self.fetched += [link for link in links if not link.startswith(("#", "data:"))]

    def handle_data(self, data):
        if self._cell is not None:
            self._cell += data
        if self._in_picture and data.strip():
            self.words.append(data.strip())

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.rows[-1].append(self._cell)
            self._cell = None
        self._in_picture &= tag != "svg"


def picture():
    figure = matplotlib.figure.Figure()
    figure.add_subplot().plot([1, 2], [3, 4], label="local, slope 1.00")
    figure.axes[0].legend()
    return figure


COSTS = Table("Times", [["layer", "µs"], ["a<b", "3"], ["s4", "5"]])
SCORES = Table("Scores", [["layer", "recall"], ["s4", "20 %"]], ["A note."], [[None, 0.1]])
SECTIONS = [
    Section("What it costs", "Time & memory.", [COSTS], [(picture(), "time")]),
    Section("Ability", "Of layers.", [SCORES]),
]


def test_a_page_holds_all_its_rows_and_pictures_and_fetches_nothing(tmp_path):
    page.write("A page", SECTIONS, tmp_path / "index.html", footer="The end.")
    text = (tmp_path / "index.html").read_text()
    read = Reader(text)
    assert read.rows == [["layer", "µs"], ["a<b", "3"], ["s4", "5"], ["layer", "recall"], ["s4", "20 %"]]
    assert "local, slope 1.00" in read.words and not read.fetched
    assert all(word in text for word in ("Time &amp; memory.", "A note.", "The end.", 'id="what-it-costs"'))


def test_the_same_page_twice_is_the_same_text():
    assert page.render("A page", SECTIONS) == page.render("A page", SECTIONS)


def test_shades_colour_cells_from_white_to_green():
    table = Table("", [["x", "y"], ["a", "b"], ["c", "d"]], (), [[None, 0.0], [None, 1.0]])
    text = page.render("A page", [Section("A", "", [table])])
    assert "<td>a</td>" in text and '<td style="background: hsl(145 55% 100%)">b</td>' in text and "62%" in text


def test_a_section_is_printed_with_its_notes(capsys):
    page.show(SECTIONS[1])
    assert capsys.readouterr().out.split() == "Ability. Of layers. Scores layer recall s4 20 % A note.".split()


@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome here")
def test_a_browser_opens_it(tmp_path):
    assert_browser_shows(page.render("A page", SECTIONS), tmp_path)


def assert_browser_shows(text, folder):
    """The browser finds every row and picture of the text, and writes nothing on its console."""
    (folder / "page.html").write_text(text)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={folder}/profile"]
    address = (folder / "page.html").as_uri()
    opened = subprocess.run([BROWSER, *options, "--dump-dom", address], capture_output=True, text=True, timeout=120)
    assert Reader(opened.stdout).rows == Reader(text).rows
    assert opened.stdout.count("<svg") == text.count("<svg")
    assert "CONSOLE" not in opened.stderr

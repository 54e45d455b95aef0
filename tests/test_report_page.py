"""Pages: what they consist of, and how they are shown, sorted and read in Chromium."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from tdhook_rl.errors import ArtifactError, InputError
from tdhook_rl.report import (
    Cautions,
    Facts,
    Finding,
    Findings,
    Fragment,
    Page,
    Section,
    Table,
    page_of,
    read_run,
    save_findings,
)
from tdhook_rl.report.drawing import Drawing
from tdhook_rl.report.page.findings_file import load_findings
from tdhook_rl.statistics import grouped_mean
from tests.browser import needs_chromium, shared
from tests.reporting import a_figure, checked, data_of, interval, make_runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_runs(tmp_path_factory.mktemp("runs"))


def test_findings_come_back_as_they_were(tmp_path: Path) -> None:
    found = [
        Finding(
            question="What?", measured="share", value=interval(), beside={"chance": 0.25, "shuffled": interval()},
            words="so", met=True,
        ),
        Finding(question="How?", measured="in words", value="by looking"),
        Finding(question="Why?", measured="unknown", value=grouped_mean([1.0])),
    ]  # fmt: skip
    back = load_findings(save_findings(tmp_path, found))
    assert back[:2] == found[:2]
    assert (back[2].value.words, back[2].value.known) == (found[2].value.words, False)
    for odd in ("[]x", '[{"question": 1}]', "{}", '[{"question": "a", "measured": "b", "value": {"low": 1}}]'):
        (tmp_path / "odd.json").write_text(odd)
        with pytest.raises(ArtifactError, match="holds no findings"):
            load_findings(tmp_path / "odd.json")


def test_a_page_that_is_kept_is_made_again(tmp_path: Path) -> None:
    found = [Finding(question="What?", measured="share", value=interval(), beside={"chance": 0.25})]
    drawings = [Drawing(figure=a_figure(), title=f"Line {n}", alt="It rises.", data={"y": [0, n]}) for n in range(3)]
    page = Page(title="t", parts=[Findings(found), drawings[0], Section("more", [drawings[1:]])])
    assert page.keep(tmp_path / "run") == tmp_path / "run" / "report.html"
    again = page_of(tmp_path / "run")
    parsed = checked(again)
    assert [one.get("alt") for tag, one in parsed.tags if tag == "img"] == ["It rises."] * 3
    assert json.loads(data_of(parsed)["line-2.json"]) == {"y": [0, 2]}
    assert next(part for part in again.parts if isinstance(part, Findings)).found == found


def test_each_figure_of_a_page_that_is_kept_has_a_file(tmp_path: Path) -> None:
    titles = ["成功率", "回报率", "the same", "the same", f"{'long ' * 20}a", f"{'long ' * 20}b"]
    drawings = [Drawing(figure=a_figure(), title=one, alt=f"{n}", data={"y": [n]}) for n, one in enumerate(titles)]
    Page(title="t", parts=drawings).keep(tmp_path / "run")
    found = {one.data["y"][0]: one.title for one in read_run(tmp_path / "run").figures}
    assert found == dict(enumerate(titles))


def test_what_is_no_part_of_a_page_is_refused() -> None:
    with pytest.raises(InputError, match="a page consists of Cautions, DataTable, Drawing"):
        Page(title="t", parts=[3]).html()
    with pytest.raises(InputError, match="a row has 1 cells, and the table 2 columns"):
        Table("t", ["a", "b"], [["1"]])


def test_drawings_of_one_title_do_not_share_ids() -> None:
    drawings = [Drawing(figure=a_figure(), title="same", alt="a line", data={"y": [0, 1]}) for _ in range(3)]
    page = Page(title="t", parts=[*drawings, Section("same", [drawings[:2]]), Table("same", ["a"], [[1]])])
    parsed = checked(page)
    assert sum(tag == "svg" for tag, _ in parsed.tags) == 5
    assert "iframe" in page._repr_html_()


# ------------------------------------------------------------------ in a browser


@pytest.fixture(scope="module")
def shown(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with everything that a page can hold."""
    page = page_of(runs["local"])
    rows = [[f"row {n % 7}", 0.1 * n, "yes" if n % 2 else "no", interval(), None if n == 3 else n] for n in range(40)]
    parts = [
        *page.parts, Table("A wide table", ["name", "number", "met", "interval", "gaps " + "and words " * 6], rows),
        Cautions(["x" * 300], "More to be careful of"), Facts("Facts", {"a" * 200: "b" * 400}),
        Findings([Finding(question="Is it?", measured="share", value=interval(), met=one) for one in (True, False)]),
        Fragment("Others", "<p>as it is</p>"),
    ]  # fmt: skip
    path = tmp_path_factory.mktemp("page") / "report.html"
    return Page(title=page.title, lead=page.lead, parts=parts, command="tdhook-rl report " + "x" * 200).save(path)


@needs_chromium
@pytest.mark.parametrize(("width", "dark"), [(1440, False), (1100, True), (390, False), (390, True)])
def test_a_page_fits_and_can_be_read(width: int, dark: bool, shown: Path) -> None:
    with shared().page(shown, width=width, dark=dark) as page:
        assert page.console == []
        assert all(address.startswith(("file:", "data:")) for address in page.requests)
        assert page.run("document.documentElement.scrollWidth") <= width
        cut = page.run(
            """[...document.querySelectorAll('body *')].filter(one => {
              const box = one.getBoundingClientRect();
              const inner = one.closest('.box, .drawing, pre, .skip, svg') || one.closest('nav');
              return !inner && box.width && box.right > document.documentElement.clientWidth + 1;
            }).map(one => one.outerHTML.slice(0, 80))"""
        )
        assert cut == []
        assert page.run(CONTRAST) == []


#: The texts whose colour is too near to what is behind them.
CONTRAST = """(() => {
  const parse = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(one => one / 255)
    .map(one => one <= .04045 ? one / 12.92 : ((one + .055) / 1.055) ** 2.4)
    .reduce((sum, one, at) => sum + one * [.2126, .7152, .0722][at], 0);
  const behind = one => {
    for (; one; one = one.parentElement) {
      const colour = parse(getComputedStyle(one).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  return [...document.querySelectorAll('body *')].filter(one =>
    [...one.childNodes].some(node => node.nodeType === 3 && node.textContent.trim()) && one.checkVisibility()
    && !['SCRIPT', 'STYLE', 'title'].includes(one.tagName)
  ).map(one => {
    const look = getComputedStyle(one);
    const ink = parse(one.closest('svg') && look.fill !== 'none' ? look.fill : look.color);
    const [high, low] = [light(ink), light(behind(one.closest('svg') ? one.closest('svg').parentElement : one))]
      .sort((a, b) => b - a);
    return [(high + .05) / (low + .05), one.tagName, one.textContent.slice(0, 30)];
  }).filter(([ratio]) => !(ratio >= 4.5));
})()"""


@needs_chromium
def test_tables_sort_and_themes_turn_by_keys(shown: Path) -> None:
    column = """(at => [...document.querySelectorAll('#table-a-wide-table tbody tr')].map(
        row => row.cells[at].textContent))"""
    with shared().page(shown) as page:
        head = "document.querySelectorAll('#table-a-wide-table thead th')"
        assert page.run(f"[...{head}].map(one => one.getAttribute('aria-sort')).join()") == ",".join(["none"] * 5)
        page.run(f"{head}[4].querySelector('button').focus()")
        page.press("Enter")
        numbers = page.run(f"{column}(4)")
        assert numbers == [*map(str, [n for n in range(40) if n != 3]), "-"]
        page.press(" ")
        assert page.run(f"{column}(4)") == [*map(str, [n for n in range(39, -1, -1) if n != 3]), "-"]
        assert page.run(f"{head}[4].getAttribute('aria-sort')") == "descending"
        page.run(f"{head}[0].querySelector('button').focus()")
        page.press("Enter")
        assert page.run(f"{column}(0)") == sorted(f"row {n % 7}" for n in range(40))
        page.run("document.querySelector('input.filter[data-table=table-a-wide-table]').focus()")
        page.press(*"row 3")
        assert page.run(
            "[...document.querySelectorAll('#table-a-wide-table tbody tr')].filter(one => !one.hidden).length"
        ) == sum(n % 7 == 3 for n in range(40))
        before = page.run("getComputedStyle(document.body).backgroundColor")
        page.run("document.getElementById('theme').focus()")
        page.press("Enter")
        assert page.run("getComputedStyle(document.body).backgroundColor") != before
        assert page.run("document.getElementById('theme').textContent") == "Light"
        assert page.console == []
    with shared().page(shown) as page:
        page.press("Tab")
        assert page.run("document.activeElement.className") == "skip"
        assert page.run("document.activeElement.getBoundingClientRect().left") >= 0
        page.press("Enter")
        assert page.run("location.hash") == "#content"
        assert page.console == []


@needs_chromium
def test_players_of_a_run_play_in_its_page(shown: Path) -> None:
    with shared().page(shown) as page:
        step = "document.querySelector('.tdp').innerText.match(/step \\d+ of \\d+/)?.[0]"
        assert page.wait(step).startswith("step 0 of")
        page.run("document.querySelector('.tdp').querySelector('button, [tabindex]').focus()")
        page.press("ArrowRight")
        assert page.wait(step).startswith("step 1 of")
        assert page.console == []


@needs_chromium
def test_data_is_saved_from_within_the_page(shown: Path) -> None:
    with shared().page(shown) as page:
        text = page.run(
            "fetch(document.querySelector('a[download=\"a-wide-table.csv\"]').href).then(one => one.text())"
        )
    table = [*csv.reader(io.StringIO(text))]
    assert len(table) == 41
    assert table[1][:6] == ["row 0", "0.0", "no", "0.5", "0.25", "0.75"]

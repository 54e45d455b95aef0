"""The page of the episode player in a browser: keys, links, jumps, choices, sizes, and what is said."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from tdhook_rl.report import player
from tests.browser import Page, needs_chromium, shared
from tests.players import READY, STEP, corners, told, track

# ---------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of two sets side by side, and one with two players."""
    folder = tmp_path_factory.mktemp("pages")
    policy, env, plain = corners()
    _, _, steered = corners(alpha=8.0)
    flat = plain["observation"].sum(-1)
    for one in (plain, steered):
        wave = (torch.arange(one.batch_size[1]) % 7 > 3).float().expand(one.batch_size)
        one.set("probe", TensorDict({"xor": torch.stack([1 - wave, wave], -1)}, one.batch_size))
        one.set("state_value", flat.unsqueeze(-1))
    both = player({"plain": plain, "steered": steered}, policy=policy, env=env, title="Side by side")
    both.save(folder / "both.html")
    vector = player(plain, title="Vector")
    body = vector.fragment() + both.fragment(with_code=False)
    (folder / "two.html").write_text(f'<!doctype html><html lang="en"><title>two</title><body>{body}</body></html>')
    assert vector._repr_html_().count("<iframe") == 1
    (folder / "frame.html").write_text(f"<!doctype html><title>frame</title><body>{vector._repr_html_()}</body>")
    return folder


@pytest.fixture
def both(pages: Path) -> Iterator[Page]:
    with shared().page(pages / "both.html", ready=READY) as page:
        yield page


def shown_now(page: Page) -> dict[str, Any]:
    """Everything that depends on the step, as the page shows it."""
    return page.run(
        """(() => {
        const all = (query) => [...document.querySelectorAll(query)];
        const line = document.querySelector('.tdp-now-line');
        return {
          step: Number(document.querySelector('.tdp-time').getAttribute('aria-valuenow')),
          counter: document.querySelector('.tdp-counter').textContent,
          frames: all('canvas.tdp-frame').map((one) => one.toDataURL()),
          units: all('canvas.tdp-units').map((one) => one.toDataURL()),
          words: all('.tdp-panel').map((one) => one.innerText),
          values: all('.tdp-value').map((one) => one.textContent),
          cursor: line.getAttribute('x1'), strip: all('.tdp-cursor').map((one) => one.style.left),
          said: document.querySelector('.tdp-time').getAttribute('aria-valuetext'),
        }})()"""
    )


@needs_chromium
def test_keys_move_everything_at_once(both: Page) -> None:
    before = shown_now(both)
    assert before["step"] == 0
    both.press("ArrowRight", "ArrowRight")
    after = shown_now(both)
    assert after["step"] == 2
    assert after["counter"].startswith("step 2 of ")
    for what in ("frames", "units", "words", "values", "cursor", "strip", "said"):
        assert after[what] != before[what], what
    for keys, step in ((["ArrowLeft"], 1), (["End"], 14), (["PageUp"], 4), (["PageDown"], 14), (["Home"], 0)):
        both.press(*keys)
        assert both.run(STEP) == step, keys
    both.press(" ")
    both.wait(f"{STEP} > 1")
    both.press(" ")
    stopped = both.run(STEP)
    assert both.run(f"new Promise((done) => setTimeout(() => done({STEP}), 400))") == stopped
    assert both.console == []


@needs_chromium
def test_the_address_leads_to_the_step(both: Page, pages: Path) -> None:
    both.press("ArrowRight", "ArrowRight", "ArrowRight")
    both.wait("location.hash === '#player=side-by-side&episode=0&step=3'")
    both.run("location.hash = '#player=side-by-side&episode=1&step=2'")
    both.wait(f"{STEP} === 2")
    assert both.run("document.querySelector('.tdp-head select').value") == "1"
    with shared().page(f"{pages / 'two.html'}#player=side-by-side&episode=1&step=4", ready=READY) as page:
        steps = page.run("[...document.querySelectorAll('.tdp-time')].map((one) => one.getAttribute('aria-valuenow'))")
        assert steps == ["0", "4"]
        page.run("document.querySelector('.tdp').focus()")
        page.press("ArrowRight")
        steps = page.run("[...document.querySelectorAll('.tdp-time')].map((one) => one.getAttribute('aria-valuenow'))")
        assert steps == ["1", "4"]
        page.wait("location.hash === '#player=vector&episode=0&step=1'")
        assert page.console == []


@needs_chromium
def test_jumps_and_the_first_difference(both: Page) -> None:
    marked = both.run("[...document.querySelectorAll('[data-differs]')].map((one) => one.dataset.differs)")
    assert "action" in marked
    differs = both.run("JSON.parse(document.querySelector('.tdp script').textContent).episodes[0].differs")
    both.press("d")
    assert both.run(STEP) == min(differs.values())
    both.press("Home", "p")
    assert both.run(STEP) == 4
    both.press("p")
    assert both.run(STEP) == 7
    courses: dict[str, list[float]] = {"entropy": [], "attribution": []}
    for step in range(15):
        both.press("ArrowRight" if step else "Home")
        names, values = (
            both.run(f"[...document.querySelectorAll('{one}')].map((one) => one.textContent)")
            for one in (".tdp-lane", ".tdp-value")
        )
        for name, course in courses.items():
            course.append(max(float(one) for one in values[names.index(name)].split(" / ")))
    for key, course in zip("ua", courses.values(), strict=True):
        both.press(key)
        assert course[both.run(STEP)] == max(course)


@needs_chromium
def test_choices_change_what_is_drawn(both: Page) -> None:
    frame = "document.querySelector('canvas.tdp-frame').toDataURL()"
    seen = {both.run(frame)}
    for label, value in (("Attribution of", "entropy"), ("Plane", "2"), ("Attribution of", "(none)"), ("Episode", "1")):
        both.run(
            f"""(() => {{
            const fields = [...document.querySelectorAll('.tdp-field')];
            const field = fields.find((one) => one.innerText.startsWith({label!r}));
            field.control.value = {value!r};
            field.control.dispatchEvent(new Event('change'));
            }})()"""
        )
        seen.add(both.run(frame))
    assert len(seen) == 5
    assert both.run("document.querySelector('.tdp-legend')") is None
    assert both.console == []


@needs_chromium
@pytest.mark.parametrize("name", ["both.html", "two.html", "frame.html"])
def test_pages_fit_and_complain_of_nothing(name: str, pages: Path) -> None:
    ready = (
        READY
        if name != "frame.html"
        else "document.querySelector('iframe').contentDocument.querySelector('[data-ready]') && true"
    )
    with shared().page(pages / name, 390, 844, ready=ready) as page:
        assert page.run("document.documentElement.scrollWidth <= innerWidth")
        page.resize(1280, 900)
        assert page.run("document.documentElement.scrollWidth <= innerWidth")
        light = page.screenshot()
        page.dark()
        assert page.screenshot() != light or name == "two.html"
        assert page.console == []
        assert [one for one in page.requests if not one.startswith(("file:", "data:", "about:"))] == []


@needs_chromium
def test_it_is_said_to_those_who_do_not_see_it(both: Page) -> None:
    tree = both.ask("Accessibility.getFullAXTree")["nodes"]
    roles = [one["role"]["value"] for one in tree if not one["ignored"]]
    named = {"button", "slider", "combobox", "image", "img"}
    unnamed = [one for one in tree if not one["ignored"] and one["role"]["value"] in named and not one["name"]["value"]]
    assert unnamed == []
    assert {"slider", "button", "combobox", "status"} <= set(roles)
    both.press("ArrowRight")
    both.wait("document.querySelector('[role=status]').textContent.startsWith('step 1 of')")
    both.run("document.querySelector('.tdp-text').open = true")
    both.wait("!!document.querySelector('.tdp-words table')")
    words = both.run("document.querySelector('.tdp-words').innerText")
    for what in ("action", "reward", "value", "entropy", "probe xor", "largest attribution", "concept bits"):
        assert what in words
    both.run("document.querySelector('.tdp').focus()")
    reached = []
    for _ in range(60):
        both.press("Tab")
        reached.append(
            both.run("document.activeElement.getAttribute('aria-label') || document.activeElement.innerText")
        )
    assert {"Step", "Play", "most uncertain", "Link to this step"} <= set(reached)


@needs_chromium
def test_what_was_not_computed_is_shown_as_such(tmp_path: Path) -> None:
    data = corners()[2][:1, :6].clone()
    data["computed", "attr"] = torch.tensor([[True, False, True, False, False, True]])
    data["computed", "cache"] = data["computed", "attr"].clone()
    with shared().page(player(data).save(tmp_path / "page.html"), ready=READY) as page:
        for step, there in enumerate(data["computed", "attr"][0].tolist()):
            page.run(f"tdhookPlayers[0].go({step})")
            words = page.run("document.querySelector('.tdp').innerText")
            assert ("not computed at this step" not in words) == there
            lanes, values = (
                page.run(f"[...document.querySelectorAll('{one}')].map((one) => one.textContent)")
                for one in (".tdp-lane", ".tdp-value")
            )
            assert values[lanes.index("attribution")][0].isdigit() == there
        assert page.console == []


@needs_chromium
def test_of_many_pictures_each_is_shown_at_its_step(tmp_path: Path) -> None:
    pixels = torch.zeros(300, 3, 8, 8)
    pixels[:, 0] = torch.linspace(0, 1, 300)[:, None, None]  # red says which, and blue breaks the ties
    pixels[:, 2] = (torch.arange(300) % 2)[:, None, None]
    shown = player(TensorDict({"pixels": pixels}, 300))
    with shared().page(shown.save(tmp_path / "page.html"), ready=READY) as page:
        pixel = "document.querySelector('canvas').getContext('2d').getImageData(0, 0, 1, 1).data"
        script = f"tdhookPlayers[0].go(step); found.push([...{pixel}].slice(0, 3))"
        found = page.run(
            f"(() => {{ const found = []; for (let step = 0; step < 300; step++) {{ {script} }} return found }})()"
        )
    assert (torch.tensor(found) == (pixels[:, :, 0, 0] * 255).round()).all()


@needs_chromium
def test_the_page_reads_the_numbers_that_were_packed(tmp_path: Path) -> None:
    """Every code of the packing, through the browser's own reader."""
    drawn = np.random.default_rng(0)
    values = {
        "bits": drawn.integers(0, 2, (9, 11)).astype(float),
        "pairs": drawn.integers(0, 4, (9, 3)).astype(float),
        "nibbles": np.where(drawn.random((9, 5)) < 0.2, np.nan, drawn.integers(0, 12, (9, 5))),
        "bytes": drawn.integers(0, 200, (60, 7)) / 3,
        "steps": drawn.normal(size=(90, 6)),
    }
    data = TensorDict({"observation": torch.from_numpy(np.zeros((90, 1))), "probe": {}}, 90)
    for name, value in values.items():
        whole = np.full((90, *value.shape[1:]), np.nan)
        whole[: len(value)] = value
        data["probe", name] = torch.from_numpy(whole)
    shown = player(data)
    assert {one["code"] for one in told(shown)["arrays"]} == {"list", "steps"}
    with shared().page(shown.save(tmp_path / "page.html"), ready=READY) as page:
        for name in values:
            index = next(one["array"] for one in told(shown)["tracks"] if one["name"] == name)
            rows = f"tdhookPlayers[0].arrays[{index}]"
            number = "(one) => Number.isNaN(one) ? null : one"
            found = page.run(f"Array.from({{length: 90}}, (_, row) => [...{rows}.row(row)].map({number}))")
            expected = track(shown, "probe", name)
            found = np.array([[math.nan if one is None else one for one in row] for row in found])
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@needs_chromium
def test_large_numbers_are_those_that_were_played(tmp_path: Path) -> None:
    """Three digits of 2,497 would be read as a return of 2,500."""
    done = torch.tensor([False, True])[:, None]
    after = {"reward": torch.tensor([[1248.0], [1249.0]]), "done": done, "terminated": done}
    data = TensorDict({"observation": torch.zeros(2, 3), "action": torch.zeros(2, 1), "next": after}, batch_size=2)
    player(data, title="Paid").save(tmp_path / "paid.html")
    with shared().page(tmp_path / "paid.html", ready=READY) as page:
        assert "2497 in 2 steps" in page.run("document.querySelector('option').textContent")
        assert {"1248"} <= set(shown_now(page)["values"])

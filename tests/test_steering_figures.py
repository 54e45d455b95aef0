"""Sweeps as figures and findings: what is drawn, marked and said is what was played."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torchrl.envs.utils import ExplorationType

from tdhook_rl.errors import InputError
from tdhook_rl.report import steering_curve, sweep_grid, sweep_page
from tdhook_rl.report.sweep_pages import played_in_words, sweep_cautions, sweep_findings
from tdhook_rl.sweeps import Condition, SweepResult

ALPHAS = (-1.0, 0.5, 1.0)


def known(
    seed: int = 0, episodes: int = 24, *, controls: int = 6, shuffled: int = 3, noise: float = 0.2
) -> SweepResult:
    """Vectors ``up``, whose slope is 1, and ``idle``, which does nothing; the return falls by 3 per unit of ``up``."""
    draws = torch.Generator().manual_seed(seed)
    base = torch.rand(episodes, generator=draws, dtype=torch.float64)
    conditions, score, cost = [Condition(), Condition(draw=1)], [base, base], [50 + 9 * base] * 2
    for vector, slope in (("up", 1.0), ("idle", 0.0)):
        kinds = (
            [("", 0)] + [("random", draw) for draw in range(controls)] + [("shuffled", one) for one in range(shuffled)]
        )
        for kind, draw in kinds:
            for alpha in ALPHAS:
                own = torch.randn(episodes, generator=draws, dtype=torch.float64)
                rise = (0.0 if kind else slope) * alpha
                conditions.append(Condition(vector, alpha, kind, draw))
                score.append(base + rise + noise * own)
                cost.append(50 + 9 * base - 3 * rise + own)
    return SweepResult(conditions=conditions, values={"score": torch.stack(score), "return": torch.stack(cost)})


def test_a_curve_holds_the_sweep_its_controls_its_half_and_its_costs() -> None:
    result = known()
    drawing = steering_curve(result, "score", "up", competence=["return"])
    data = drawing.data
    assert data["strengths"] == [-1.0, 0.0, 0.5, 1.0]
    assert [one["estimate"] for one in data["response"]] == [one.estimate for one in result.response("score", "up")]
    assert data["random"] == result.control_response("score", "up").tolist()
    assert data["shuffled"] == result.control_response("score", "up", "shuffled").tolist()
    assert data["half"]["low"] < 0.5 < data["half"]["high"]
    assert [one["low"] for one in data["competence"]["return"]] == [one.low for one in result.response("return", "up")]
    assert len(drawing.figure.axes) == 2  # a return is no share: it has axes of its own
    assert "half of it at" in drawing.alt
    assert "3 shuffled labels" in drawing.alt
    assert steering_curve(result, "score", "idle").data["half"] is None  # where nothing is half of nothing
    with pytest.raises(InputError, match="say which"):
        steering_curve(result, "score")


def test_of_several_runs_each_is_a_line_and_intervals_are_over_runs() -> None:
    runs = [known(seed) for seed in range(4)]
    drawing = steering_curve(SweepResult.together(runs), "score", "up")
    assert len(drawing.data["runs"]) == 4
    for number, one in enumerate(runs):
        expected = [float(one.mean("score", "up", alpha)) for alpha in one.alphas("up")]
        assert drawing.data["runs"][f"run {number}"] == pytest.approx(expected)
    assert {one["groups"] for one in drawing.data["response"]} == {4}
    assert "of 4 training runs" in drawing.caption


def test_a_grid_marks_what_does_something_and_no_more() -> None:
    for seed in range(5):
        data = sweep_grid(known(seed), "score").data
        assert (data["rows"], data["columns"]) == (["up", "idle"], ["-1", "0.5", "1"])
        assert data["marked"] == [{"row": "up", "column": one} for one in sorted(data["columns"])]
    expected = [[known(4).effect("score", name, alpha).estimate for alpha in ALPHAS] for name in ("up", "idle")]
    assert [pytest.approx(row) for row in data["cells"]] == expected


def test_a_page_opens_with_the_answer_and_says_what_to_be_careful_of() -> None:
    result = known()
    page = sweep_page(result, "score", command="again")
    assert page.lead.startswith("up at alpha ")
    assert "this is more than random directions of equal norm (adjusted p" in page.lead
    assert "It does most of 2 vectors." in page.lead
    found = sweep_findings(result, "score", ["return"])
    assert sorted(one.measured[-2:].strip() for one in found) == ["-1"] * 4 + ["1"] * 4  # to either side
    up, cost = next(found[at : at + 2] for at in (0, 2) if found[at].measured.endswith(" 1"))
    idle = found[4]
    assert up.value == result.effect("score", "up", 1.0)
    assert "more than random directions" in up.words
    assert "not surely anything" not in up.words
    assert cost.question == "What does up cost?"
    assert "not surely anything" in idle.words
    html = page.html()
    for words in ("What each vector does to score", "score by strength of up", "Every vector and strength"):
        assert words in html, words
    assert not any("paired" in line for line in sweep_cautions(result, "score"))
    odd = replace(known(controls=0, shuffled=0), facts={"unfinished": 0.25, "max_steps": 9})
    odd.values["score"][1, 0] += 1
    told = " ".join(sweep_cautions(odd, "score"))
    for words in ("are not paired", "25.0% of all episodes did not end within 9 steps", "up has no controls"):
        assert words in told, words
    json.dumps([one.data for one in page.parts if hasattr(one, "data")], allow_nan=False)
    with pytest.raises(InputError, match="nearest: 'score'"):
        sweep_page(result, "scor")


@pytest.mark.parametrize("kind", [None, *ExplorationType])
def test_a_page_says_in_words_how_actions_were_taken(kind: ExplorationType | None) -> None:
    played = played_in_words(replace(known(), facts={"exploration": str(kind), "layout": "in rows"}))
    assert "action" in played
    assert f", {str(kind).rpartition('.')[2].lower()}," not in played


@pytest.mark.parametrize("controls", [1, 2])
def test_one_control_is_one(controls: int) -> None:
    lead = sweep_page(known(controls=controls, shuffled=0), "score").lead
    assert ("one random direction of equal norm changes it by" in lead) == (controls == 1)
    assert ("2 random directions of equal norm change it by" in lead) == (controls == 2)

"""What an episode player is given: no rollout, unknown names, odd texts, anything under its keys."""

from __future__ import annotations

import contextlib
import math
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from tdhook_rl.errors import InputError, MissingKeyError
from tdhook_rl.report import player
from tests.browser import chromium, open_page
from tests.players import READY, corners, told, track

# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("given", "options", "said"),
    [
        (TensorDict({}, batch_size=[0]), {}, "nothing to play"),
        (TensorDict({"observation": torch.zeros(3)}, batch_size=[]), {}, "no steps; its last dimension is time"),
        ([1, 2], {}, "got int"),
        ({}, {}, "one to 4 sets"),
        (3, {}, "TensorDict of shape"),
    ],
)
def test_what_holds_no_rollout_is_refused(given: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        player(given, **options)


def test_unknown_names_are_told_with_the_nearest() -> None:
    policy, _, data = corners()
    with pytest.raises(MissingKeyError, match=r"lacks; nearest: 'module\.0\.module\.3'"):
        player(data, policy=policy, sites=["module.0.module.4"])
    with pytest.raises(MissingKeyError, match=r"frames_key= names 'observatoin'.*nearest: 'observation'"):
        player(data, frames_key="observatoin")
    with pytest.raises(InputError, match="which is no picture"):
        player(data, frames_key="observation")
    with pytest.raises(InputError, match="names= has 1 names"):
        player(data, names=["one"])
    with pytest.raises(InputError, match=r"action_names= has 2 names, and 'action' has 4 actions"):
        player(data, action_names=["left", "right"])
    with pytest.raises(InputError, match="feature_names= has 2 names"):
        player(data, feature_names=["a", "b"])


def test_nothing_but_numbers_is_enough() -> None:
    shown = player(
        TensorDict({"reward": torch.zeros(3), "observation": torch.tensor([[math.nan], [1], [math.inf]])}, 3)
    )
    assert np.isnan(track(shown, "features", "observation")[[0, 2]]).all()
    assert told(shown)["episodes"][0]["parts"][0]["end"] == "goes on"


SHAPES = (
    [], [1], [0], [3], [2, 3], [1, 1], [8, 8], [3, 8, 8], [8, 8, 3], [4, 9, 9], [1, 7, 7], [7, 7, 3], [2, 3, 4, 5],
    [700], [3, 1, 1], [5, 5, 5], [0, 3, 3], [36, 36, 1],
)  # fmt: skip
DTYPES = (
    torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool, torch.bfloat16, torch.complex64, torch.float16,
)  # fmt: skip
KEYS = (
    "observation", "pixels", "image", "action", "logits", "probs", "loc", "scale", "action_value", "state_value",
    "is_init", ("agents", "observation"), ("agents", "action"), ("agents", "logits"), ("attr", "observation"),
    ("attr", "x", "pixels"), ("attr", "image"), ("attr", "module.0"), ("attr", "agents", "observation"),
    ("probe", "p"), ("control", "c"), ("steered", "s"), ("cache", "module.0"), ("concept", "xor"),
    ("computed", "attr"), ("computed", "cache"), ("next", "reward"), ("next", "done"), ("next", "terminated"),
    ("next", "agents", "reward"), ("collector", "mask"),
)  # fmt: skip


@pytest.mark.parametrize("start", range(0, 60, 10))
def test_whatever_lies_under_its_keys_is_played_or_refused(start: int, tmp_path: Path) -> None:
    """Random shapes, dtypes and values under all the keys that are looked at."""
    for seed in range(start, start + 10):
        drawn = random.Random(seed)
        torch.manual_seed(seed)
        batch = drawn.choice([[1], [5], [2, 4], [2, 2, 3]])
        data = TensorDict({}, batch_size=batch)
        for key in drawn.sample(KEYS, drawn.randint(1, 14)):
            value, dtype = torch.randn(*batch, *drawn.choice(SHAPES)), drawn.choice(DTYPES)
            if drawn.random() < 0.2 and value.numel():
                value.view(-1)[0] = math.nan
            value = value * drawn.choice([3, 3, 3, 1e38])
            data.set(key, value > 0 if dtype == torch.bool else value.to(dtype))
        given = {"a": data, "b": data.clone()} if drawn.random() < 0.3 else data
        try:
            shown = player(given)
        except InputError as error:
            assert "nothing to play" in str(error)  # noqa: PT017
            continue
        assert told(shown)["steps"] > 0
        with contextlib.suppress(InputError):  # nothing to look at
            assert shown.gif(tmp_path / "one.gif").stat().st_size


def test_texts_end_nothing_that_they_are_in(tmp_path: Path) -> None:
    odd = "</script><img src=x onerror=alert(1)> \"quoted\" 'single' \u2028 日本 & <b>"
    data = TensorDict(
        {"observation": torch.randn(3, 2), "action": torch.zeros(3).long(), "probe": {odd: torch.rand(3)}}, 3
    )
    shown = player({odd: data, "b": data}, title=odd, names=[odd], feature_names=[odd, "b"], action_names=[odd])
    text = shown.fragment(with_code=False)
    assert "<img" not in text
    assert "</script><img" not in text
    assert "&lt;img" in text  # the title
    assert told(shown)["title"] == odd
    assert told(shown)["episodes"][0]["name"] == odd
    assert shown.name == re.sub(r"[^a-z0-9-]", "", shown.name)
    shown.save(tmp_path / "page.html")
    if chromium() is None:
        return
    found = open_page(tmp_path / "page.html", script="!document.querySelector('img') && document.title", ready=READY)
    assert found.value == odd
    assert found.console == []

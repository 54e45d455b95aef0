"""The episode player: what is packed comes back, what is read from rollouts, bad input, and the page in a browser."""

from __future__ import annotations

import contextlib
import json
import math
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Unbounded
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import NormalParamExtractor, ProbabilisticActor, TanhNormal

from tdhook_rl import ActivationCaching, Compose, ControlRecord, Saliency, SteeringVectors, targets
from tdhook_rl.envs import Cheese, CueCorners, KeyDoor
from tdhook_rl.errors import ArtifactError, InputError, MissingKeyError
from tdhook_rl.examples.agent import FC2, make_actor
from tdhook_rl.report import Player, player
from tdhook_rl.report.player.packing import Packed, pack_frames, pack_values, unpack
from tdhook_rl.report.player.page import code
from tests.browser import Page, chromium, needs_chromium, open_page, shared
from tests.mock_env import MockEnv
from tests.policies import actor
from tests.zoo_agents import SEPARATE

READY = "(!!document.querySelector('.tdp') && !document.querySelector('.tdp:not([data-ready])'))"
STEP = "Number(document.querySelector('.tdp-time').getAttribute('aria-valuenow'))"


# ---------------------------------------------------------------------- packing

NUMBERS = st.floats(-1e6, 1e6, width=32) | st.just(math.nan) | st.just(math.inf)


@settings(max_examples=60, deadline=None)
@given(
    arrays.arrays(np.float32, arrays.array_shapes(min_dims=2, max_dims=3, max_side=5), elements=NUMBERS),
    st.sampled_from([14, 62, 254, 65_534]),
    st.booleans(),
    st.booleans(),
)
def test_numbers_come_back_within_half_a_step(values: np.ndarray, levels: int, by_column: bool, exact: bool) -> None:
    packed = pack_values(values, levels=levels, by_column=by_column, exact=exact)
    found = unpack(packed)
    assert found.shape == values.shape
    finite = np.isfinite(values)
    assert (np.isnan(found) == ~finite).all()
    steps = np.asarray(packed.spec["step"] if packed.spec["code"] == "steps" else [0.0])
    within = np.broadcast_to(steps, values.reshape(len(values), -1).shape).reshape(values.shape) / 2 * (1 + 1e-6)
    assert (np.abs(found - values)[finite] <= within[finite]).all()
    if not by_column:
        assert (found[values == 0] == 0).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(300, 32_000), st.booleans())
def test_whole_numbers_are_exact(seed: int, most: int, by_column: bool) -> None:
    """More of them than are listed: they say which picture is shown, and what was chosen."""
    values = np.random.default_rng(seed).permutation(np.arange(-most, most))[:600].reshape(300, 2)
    packed = pack_values(values.astype(float), by_column=by_column)
    assert packed.spec["code"] == "steps"
    assert (unpack(packed) == values).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 400), st.integers(1, 7), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_pictures_come_back_as_they_were(colours: int, rows: int, count: int, seed: int) -> None:
    drawn = np.random.default_rng(seed)
    listed = drawn.integers(0, 256, (colours, 3), dtype=np.uint8)
    frames = listed[drawn.integers(0, colours, (count, rows, 20))]
    assert (unpack(pack_frames(frames)) == frames).all()


def test_what_does_not_fit_its_spec_is_refused() -> None:
    packed = pack_values(np.arange(600.0).reshape(300, 2))
    for spec, data in (
        ({**packed.spec, "shape": [301, 2]}, packed.data),
        ({**packed.spec, "shape": [10**9, 10**9]}, packed.data),
        ({}, packed.data),
        (packed.spec, b"no zlib"),
        ({**packed.spec, "shape": [299, 2]}, packed.data),
    ):
        with pytest.raises(ArtifactError, match="not what it says"):
            unpack(Packed(spec, data))


# ---------------------------------------------------------------------- reading


def rollout(env: Any, policy: Any, steps: int, seed: int = 0) -> TensorDictBase:
    torch.manual_seed(seed)
    with set_exploration_type(ExplorationType.RANDOM):
        return policy.annotate(env.rollout(steps, policy, break_when_any_done=False)).detach()


def corners(alpha: float = 0.0, seed: int = 0) -> tuple[Any, CueCorners, TensorDictBase]:
    torch.manual_seed(0)
    method = Compose(
        SteeringVectors({FC2: torch.ones(64)}, alpha=0.0),
        ActivationCaching(FC2),
        Saliency(target={"action": targets.taken_action_log_prob(), "entropy": targets.entropy()}),
        ControlRecord(),
    )
    policy = method.prepare(make_actor(), return_context=False)
    policy.controls["steering.alpha"] = alpha
    env = CueCorners(batch_size=[3], max_steps=15, seed=0)
    return policy, env, rollout(env, policy, 30, seed)


def told(shown: Player) -> dict[str, Any]:
    """What the page is given, without its data."""
    data = json.loads(re.search(r'application/json">(.*?)</script>', shown.fragment(with_code=False), re.DOTALL)[1])
    del data["data"]
    return data


def track(shown: Player, kind: str, name: str, agent: int | None = None) -> np.ndarray:
    """The rows of a track."""
    known = told(shown)["tracks"]
    (found,) = [one for one in known if (one["kind"], one["name"], one["agent"]) == (kind, name, agent)]
    return unpack(shown._contents.arrays[found["array"]])


def test_a_track_holds_what_the_rollout_does() -> None:
    policy, env, data = corners()
    shown = player(data, policy=policy, env=env)
    head = told(shown)
    assert sum(part["length"] for one in head["episodes"] for part in one["parts"]) == data.numel()
    places = []  # episodes end inside rows of the batch, and come in the order of the rows
    flat = data.reshape(-1)
    order = torch.arange(data.numel())
    for one in head["episodes"]:
        (part,) = one["parts"]
        places += order[part["start"] : part["start"] + part["length"]].tolist()
        rewards = flat["next", "reward"][part["start"] : part["start"] + part["length"]]
        assert part["total"] == pytest.approx(float(rewards.sum()), rel=1e-4)
    assert places == order.tolist()
    probabilities = flat["logits"].softmax(-1).numpy()
    assert np.abs(track(shown, "choice", "action") - probabilities).max() < 1e-4
    assert (track(shown, "chosen", "action") == flat["action"].numpy()).all()
    saliency = flat["attr", "action", "observation"].unflatten(-1, (3, 6, 5)).numpy()
    found = track(shown, "attribution", "action")
    assert np.abs(found - saliency).max() <= np.abs(saliency).max() / 126 / 2 * 1.001
    cache = flat["cache", FC2].numpy()
    assert np.abs(track(shown, "activation", FC2) - cache).max() <= cache.max() / 253 / 2 * 1.001
    (control,) = [one for one in head["tracks"] if one.get("role") == "control"]
    assert control["name"] == "steering.alpha"
    assert [one["name"] for one in head["views"]] == ["state"]
    assert next(one for one in head["tracks"] if one["kind"] == "attribution")["over"] == ["state"]


def test_frames_are_those_of_the_environment() -> None:
    policy, env, data = corners()
    view = told(shown := player(data[:1], policy=policy, env=env))["views"][0]
    places = unpack(shown._contents.arrays[view["places"]]).astype(int).ravel()
    pictures = unpack(shown._contents.arrays[view["pictures"]])
    assert (pictures[places] == env.render(data[0]).numpy()).all()


def test_rows_that_were_not_computed_are_not_there() -> None:
    data = corners()[2][:1].clone()
    data["computed", "attr"][0, 3] = False
    found = track(player(data), "attribution", "action")
    assert np.isnan(found[3]).all()
    assert not np.isnan(found[4]).any()


def test_without_a_policy_the_same_is_read() -> None:
    policy, env, data = corners()
    with_policy, without = (told(player(data, policy=one, env=env)) for one in (policy, None))
    assert [one["kind"] for one in with_policy["tracks"]] == [one["kind"] for one in without["tracks"]]


def test_sets_are_put_side_by_side() -> None:
    policy, env, plain = corners()
    _, _, steered = corners(alpha=8.0)
    head = told(player({"plain": plain, "steered": steered}, policy=policy, env=env))
    assert head["sets"] == ["plain", "steered"]
    first = head["episodes"][0]
    same = [bool((plain["action"][0, step] == steered["action"][0, step]).all()) for step in range(15)]
    assert first["differs"]["action"] == same.index(False)
    moved = [bool((plain["observation"][0, step] == steered["observation"][0, step]).all()) for step in range(15)]
    assert first["differs"].get("observation", 99) >= min(15, moved.index(False) if False in moved else 15)
    twice = told(player({"one": plain, "the same": plain.clone()}))
    assert all(one["differs"] == {} for one in twice["episodes"])


def test_a_set_may_lack_an_episode_or_a_result() -> None:
    _, env, data = corners()
    head = told(player({"all": data, "some": data[:1].exclude("cache", "attr")}, policy=None, env=env))
    assert head["episodes"][-1]["parts"][1] is None
    shown = player({"all": data[:1], "some": data[:1].exclude("cache", "attr")}, env=env)
    found = track(shown, "activation", FC2)
    assert np.isnan(found[len(found) // 2 :]).all()


def test_continuous_actions_are_shown_where_they_are() -> None:
    net = nn.Sequential(nn.Linear(3, 4), NormalParamExtractor())
    module = TensorDictModule(net, ["observation"], ["loc", "scale"])
    kind = {"distribution_class": TanhNormal, "distribution_kwargs": {"low": -2.0, "high": 2.0}}
    policy = ProbabilisticActor(module, in_keys=["loc", "scale"], **kind)
    env = MockEnv({"observation": Unbounded(3)}, {"action": Unbounded(2)}, length=9)
    with Saliency().prepare(policy) as hooked:
        data = rollout(env, hooked, 9)
        shown = player(data, policy=hooked)
        band = track(shown, "continuous", "action")
        middle = 2 * torch.tanh(hooked.get_dist(data).base_dist.mean).detach()
    assert np.abs(band[..., 0] - data["action"].numpy()).max() < 1e-3
    assert band.shape == (9, 2, 4)
    assert ((band[..., 2] < band[..., 1]) & (band[..., 1] < band[..., 3])).all()
    assert np.abs(band[..., 1] - middle.numpy()).max() < 1e-3
    assert not shown.notes
    odd = data.clone()
    odd["loc"][2], odd["scale"][3], odd["scale"][4] = math.nan, 0.0, math.inf
    others = track(player(odd, policy=hooked), "continuous", "action")
    assert np.isnan(others[2:5, :, 1:]).all()
    assert np.abs(others[5:] - band[5:]).max() < 1e-3
    assert "loc and scale" in player(data).notes[0]


def test_each_agent_has_tracks_of_its_own() -> None:
    env = MockEnv(SEPARATE.observations, SEPARATE.actions, length=5)
    with Compose(Saliency(), ActivationCaching(SEPARATE.site)).prepare(SEPARATE.build()) as policy:
        data = rollout(env, policy, 5)
    shown = player(data)
    assert told(shown)["agents"] == ["agent 0", "agent 1", "agent 2"]
    for agent in range(3):
        expected = data["agents", "logits"][:, agent].softmax(-1).numpy()
        assert np.abs(track(shown, "choice", "action", agent) - expected).max() < 1e-4
        assert track(shown, "attribution", "default target", agent).shape == (5, 6)
        assert track(shown, "activation", SEPARATE.site, agent).shape[1:] == SEPARATE.features[1:]


@pytest.mark.parametrize(
    ("shape", "dtype", "shown"),
    [
        ((3, 12, 9), torch.uint8, (12, 9)),
        ((12, 9, 3), torch.uint8, (12, 9)),
        ((4, 12, 9), torch.float32, (12, 9)),
        ((12, 9), torch.float32, (12, 9)),
        ((1, 12, 9), torch.uint8, (12, 9)),
    ],
)
def test_pictures_of_any_layout(shape: tuple[int, ...], dtype: torch.dtype, shown: tuple[int, int]) -> None:
    pixels = torch.rand(4, *shape).mul(255).to(dtype)
    data = TensorDict(
        {"pixels": pixels, "attr": {"pixels": torch.randn(4, *shape)}, "action": torch.zeros(4).long()}, 4
    )
    made = player(data)
    view, (attribution, *_) = told(made)["views"][0], told(made)["tracks"]
    assert tuple(made._contents.arrays[view["pictures"]].spec["shape"][1:3]) == shown
    assert tuple(made._contents.arrays[attribution["array"]].spec["shape"]) == (4, 1, *shown)


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


# ---------------------------------------------------------------------- bytes


def pixel_actor() -> nn.Module:
    class Bytes(nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return pixels.float() / 255

    convolutions = (nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(-3))
    return actor(Bytes(), *convolutions, nn.Linear(16 * 81, 4))


@pytest.mark.parametrize("name", ["key_door", "cheese", "cue_corners"])
def test_eight_episodes_of_200_steps_and_the_code_are_two_megabytes(name: str, tmp_path: Path) -> None:
    made = {
        "key_door": (KeyDoor, pixel_actor),
        "cheese": (Cheese, lambda: actor(nn.Flatten(-3), nn.Linear(147, 64), nn.ReLU(), nn.Linear(64, 4))),
        "cue_corners": (CueCorners, make_actor),
    }
    kind, net = made[name]
    torch.manual_seed(0)
    env = kind(batch_size=[8], max_steps=200, seed=0)
    explained = {"action": targets.taken_action_log_prob(), "entropy": targets.entropy()}
    with Saliency(target=explained).prepare(net()) as policy:
        data = rollout(env, policy, 200)
        shown = player(data, policy=policy, env=env)
    assert sum(part["length"] for one in told(shown)["episodes"] for part in one["parts"]) == 1600
    assert shown.save(tmp_path / "page.html").stat().st_size <= 2_000_000
    assert len(code()) <= 300_000
    assert shown.notes == []  # nothing was rounded more or left out


def test_what_does_not_fit_is_left_out_and_said() -> None:
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (6, 10, 3, 64, 64), dtype=torch.uint8)
    data = TensorDict(
        {"pixels": pixels, "attr": {"pixels": torch.randn(6, 10, 3, 64, 64)}, "cache": {"0": torch.randn(6, 10, 99)}},
        [6, 10],
    )
    notes = {}
    for most in (3_000_000, 1_100_000, 300_000):
        shown = player(data, most_bytes=most)
        assert len(shown.fragment()) <= most
        notes[most] = " ".join(shown.notes)
    assert notes[3_000_000] == ""
    assert "rounded to" in notes[1_100_000]
    assert "of 6 episodes the first" in notes[300_000]
    with pytest.raises(InputError, match="the player alone takes"):
        player(data, most_bytes=20_000)


# ---------------------------------------------------------------------- files


def test_a_recorded_player_is_the_same_player(tmp_path: Path) -> None:
    policy, env, data = corners()
    shown = player(data, policy=policy, env=env, title="Corners")
    path = shown.record(tmp_path)
    assert path == tmp_path / "players" / "corners.json"
    assert Player.load(tmp_path).fragment() == shown.fragment()
    player(data, name="another").record(tmp_path)
    assert [one.name for one in Player.load_all(tmp_path)] == ["another", "corners"]
    with pytest.raises(ArtifactError, match="nearest: 'corners'"):
        Player.load(tmp_path, "corner")
    kept = path.with_suffix(".bin").read_bytes()
    path.with_suffix(".bin").write_bytes(kept[:-1])
    with pytest.raises(ArtifactError, match="not what was recorded"):
        Player.load(tmp_path, "corners")
    path.with_suffix(".bin").write_bytes(kept)
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(ArtifactError, match="format 2"):
        Player.load(tmp_path, "corners")
    for text in ("{}", "[]", "{", path.read_text().replace('"format": 2', '"format": 1').replace("Corners", "Other")):
        path.write_text(text)
        with pytest.raises(ArtifactError):
            Player.load(tmp_path, "corners")


@pytest.mark.parametrize("env", [CueCorners(batch_size=[3]), None])
def test_an_episode_as_gif(env: Any, tmp_path: Path) -> None:
    data = corners()[2]
    shown = player({"a": data, "b": data[:, :20]}, env=env)
    with Image.open(shown.gif(tmp_path / "one.gif", 1)) as image:
        assert image.n_frames == max(part["length"] for part in told(shown)["episodes"][1]["parts"] if part)
    with pytest.raises(InputError, match="there are episodes 0 to"):
        shown.gif(tmp_path / "two.gif", 99)


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


def test_the_readable_code_comes_with_the_package() -> None:
    text = code()
    assert text.count("\n") > 500
    assert max(map(len, text.splitlines())) < 260  # nobody has squeezed it
    assert shutil.which("node") is None or "</script" not in text[:-9]

"""The episode player: what is packed comes back, what is read from rollouts, how many bytes it takes, its files."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Unbounded
from torchrl.modules import NormalParamExtractor, ProbabilisticActor, TanhNormal

from tdhook_rl import ActivationCaching, Compose, Saliency, targets
from tdhook_rl.envs import Cheese, CueCorners, KeyDoor
from tdhook_rl.errors import ArtifactError, InputError
from tdhook_rl.examples.agent import FC2, make_actor
from tdhook_rl.report import Player, player
from tdhook_rl.report.player.packing import Packed, pack_frames, pack_values, unpack
from tdhook_rl.report.player.page import code
from tests.mock_env import MockEnv
from tests.players import corners, rollout, told, track
from tests.policies import actor
from tests.zoo_agents import SEPARATE

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


def test_players_of_other_titles_do_not_overwrite_each_other(tmp_path: Path) -> None:
    """A sign, another alphabet, or what lies behind the sixtieth letter tells titles apart."""
    data = corners()[2]
    titles = [
        "steered -1",
        "steered +1",
        "alpha=-1",
        "alpha=1",
        "训练",
        "测试",
        "x" * 70,
        "x y " * 17 + "1",
        "x y " * 17 + "2",
    ]
    shown = [player(data[:, :2], title=title) for title in titles]
    for one in shown:
        one.record(tmp_path)
        assert re.fullmatch(r"[a-z0-9-]{1,80}", one.name)
    found = Player.load_all(tmp_path)
    assert sorted(one.title for one in found) == sorted(titles)
    assert {one.name for one in found} == {one.name for one in shown}
    assert player(data[:, :2], title="Trained, and not").name == "trained-and-not"
    assert Player.load(tmp_path, shown[0].name).title == "steered -1"


@pytest.mark.parametrize(
    ("title", "other"),
    [("Go left", "go left"), ("go left", "go-left"), ("go left", "go, left"), ("go/left", "go left")],
)
def test_titles_that_come_to_one_name_are_told(title: str, other: str, tmp_path: Path) -> None:
    data = corners()[2]
    first, second = (player(data[:, :2], title=one) for one in (title, other))
    assert first.name == second.name
    path = first.record(tmp_path)
    with pytest.raises(ArtifactError, match=rf"{re.escape(repr(title))}.*{re.escape(repr(other))}.*name="):
        second.record(tmp_path)
    assert Player.load(tmp_path).title == title
    player(data[:, :3], title=title).record(tmp_path)  # played again
    for named in ("before", other):  # a name that was given is replaced
        player(data[:, :2], title=named, name="other").record(tmp_path)
    assert {one.title for one in Player.load_all(tmp_path)} == {title, other}
    path.write_text("{")  # what is damaged is nobody's
    second.record(tmp_path)
    assert Player.load(tmp_path, second.name).title == other


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


def test_the_readable_code_comes_with_the_package() -> None:
    text = code()
    assert text.count("\n") > 500
    assert max(map(len, text.splitlines())) < 260  # nobody has squeezed it
    assert shutil.which("node") is None or "</script" not in text[:-9]

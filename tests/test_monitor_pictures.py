"""What ``Monitor`` shows of frames, features and episodes."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.collectors import Collector
from torchrl.collectors.utils import split_trajectories
from torchrl.data import LazyTensorStorage, MultiStep, ReplayBuffer
from torchrl.envs import Compose as EnvCompose
from torchrl.envs import GymEnv, InitTracker, ParallelEnv, RewardSum, SerialEnv, StepCounter, TransformedEnv
from torchrl.modules import ProbabilisticActor

from tdhook_rl import Saliency, targets
from tdhook_rl.attribution import PerturbationSaliency
from tdhook_rl.envs import Cheese, CueCorners, CueGrid, KeyDoor, KnownValue, TMaze
from tdhook_rl.examples.agent import make_actor
from tdhook_rl.report import Budgets, FileSink, Monitor
from tdhook_rl.report.episodes import Followed, episodes, running_of
from tdhook_rl.report.known_env import known_of
from tdhook_rl.report.pictures import bars, overlays
from tdhook_rl.rollout.newest_rows import NewestRows
from tests.monitoring import METHOD


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 5, stride=4)
        self.out = nn.Linear(4 * 8 * 8, KeyDoor.n_actions)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        batch = pixels.shape[:-3]
        hidden = self.conv(pixels.reshape(-1, *pixels.shape[-3:]).float() / 255).relu()
        return self.out(hidden.flatten(1)).reshape(*batch, -1)


def pixel_actor() -> ProbabilisticActor:
    torch.manual_seed(0)
    net = TensorDictModule(Net(), in_keys=["observation"], out_keys=["logits"])
    return ProbabilisticActor(net, in_keys=["logits"], distribution_class=torch.distributions.Categorical)


@pytest.mark.parametrize("method", [Saliency(), PerturbationSaliency()], ids=lambda one: type(one).__name__)
def test_pixels_are_shown_under_their_attribution(method: Any, tmp_path: Path) -> None:
    with method.prepare(pixel_actor()) as policy, Monitor(policy, tmp_path, budgets=Budgets(images=2)) as monitor:
        monitor.step(KeyDoor(batch_size=[2], max_steps=6).rollout(9, policy, break_when_any_done=False))
    media = tmp_path / "media"
    assert {path.name for path in media.iterdir()} == {
        "overlay.observation.0", "overlay.observation.1", "episode.observation", "episodes"
    }  # fmt: skip
    with Pillow.open(media / "episode.observation" / "000000018.gif") as episode:
        assert episode.n_frames == 6  # an episode, not the nine steps around it
    with Pillow.open(media / "overlay.observation.0" / "000000018.png") as picture:
        assert (picture.width, picture.height) == (180 + 8 + 180, 18 + 180 + 22)


def test_an_outlier_does_not_darken_the_rest() -> None:
    attribution = torch.zeros(2, 20, 20)
    attribution[:, 5:15, 5:15] = 0.003
    attribution[0, 0, 0] = -100.0
    left, right = overlays(np.zeros((2, 20, 20)), attribution)[:, :160].astype(int)
    assert right[80, 168 + 80].tolist() == pytest.approx([213 * 0.9 + 6, 94 * 0.9 + 6, 6], abs=2)  # full colour
    assert left[80, 168 + 80].tolist() == right[80, 168 + 80].tolist()  # on one scale
    assert left[4, 168 + 4, 2] > left[4, 168 + 4, 0]  # and what is negative is blue
    assert right[4, 168 + 4].tolist() == [60, 60, 60]


def test_bars_are_as_long_as_their_values() -> None:
    picture = bars([1.0, -0.5, 0.25, float("nan")], ["a", "b", "c", "d"]).astype(int)
    red = (picture == [213, 94, 0]).all(-1).sum(1)
    blue = (picture == [0, 114, 178]).all(-1).sum(1)
    assert red[9] == pytest.approx(2 * blue[27], abs=3)
    assert red[9] == pytest.approx(4 * red[45], abs=5)


def test_episodes_are_found_by_number_by_end_and_without_padding() -> None:
    done = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 1]], dtype=torch.bool)[..., None]
    reward = torch.tensor([[1.0, 2.0, 4.0, 8.0], [16.0, 32.0, 64.0, 128.0]])[..., None]
    data = TensorDict({"next": {"reward": reward, "done": done}}, batch_size=[2, 4])
    assert [(one.places.tolist(), one.ended, one.total) for one in episodes(data)] == [
        ([0, 1], True, 3.0), ([2, 3], False, 12.0), ([4, 5, 6, 7], True, 240.0)
    ]  # fmt: skip
    data["collector", "traj_ids"] = torch.tensor([[5, 5, 9, 9], [7, 7, 7, 7]])
    data["collector", "mask"] = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)
    assert [(one.number, one.places.tolist()) for one in episodes(data)] == [
        (5, [0, 1]), (7, [4, 5, 6, 7]), (9, [2])
    ]  # fmt: skip
    data["next", "episode_reward"] = torch.full((2, 4, 1), 0.5)
    assert {one.total for one in episodes(data)} == {0.5}


#: What transforms tell of episodes, and under which key.
TELL = {RewardSum: "episode_reward", StepCounter: "step_count", InitTracker: "is_init"}


@functools.cache
def _played(workers: int, rows: int, frames: int, total: int) -> list[list[TensorDictBase]]:
    torch.manual_seed(0)
    several = []
    for worker in range(workers):
        env = TransformedEnv(CueCorners(batch_size=[rows]), EnvCompose(*(add() for add in TELL)))
        env.set_seed(worker)
        options = {"frames_per_batch": frames, "total_frames": total, "auto_register_policy_transforms": False}
        several.append(list(Collector(env, **options)))
    return several


def played(adds: list, **sizes: int) -> list[list[TensorDictBase]]:
    """Batches of each worker as these transforms tell of them: what others add is left out, nothing is played anew."""
    names = [name for add, name in TELL.items() if add not in adds]
    others = [*names, *(("next", name) for name in names)]
    return [[batch.exclude(*others).clone() for batch in batches] for batches in _played(**sizes)]


@pytest.mark.parametrize("told_by", ["RewardSum", "StepCounter", "InitTracker", "all", "batches before"])
@pytest.mark.parametrize("frames", [10, 20, 50, 100])
def test_returns_and_lengths_are_of_episodes_and_not_of_their_parts_in_a_batch(told_by: str, frames: int) -> None:
    """A collector cuts episodes at the ends of its batches; what was cut off is counted, or nothing is said of it."""
    adds = [add for add in TELL if told_by in (add.__name__, "all")]
    (batches,) = played(adds, workers=1, rows=5, frames=frames, total=400)
    whole = torch.cat(batches, 1)
    expected = [(float(whole["next", "reward"].reshape(-1)[one.places].sum()), len(one.places))
                for one in episodes(whole.select(("next", "done"))) if one.ended]  # fmt: skip
    assert len(expected) > 1
    found, running = [], {}
    for batch in batches:
        found += [one for one in episodes(batch, running) if one.ended]
        running = running_of(batch, running) if told_by == "batches before" else {}
    totals, steps = [one.total for one in found], [one.steps for one in found]
    assert len(found) == len(expected)
    if told_by in ("RewardSum", "all", "batches before"):
        assert sorted(totals) == pytest.approx(sorted(total for total, _ in expected), abs=1e-5)
    if told_by in ("StepCounter", "all", "batches before"):
        assert sorted(steps) == sorted(length for _, length in expected)
    if told_by in ("StepCounter", "InitTracker"):  # of those that lie in one batch alone
        known = [value for value in totals if value == value]
        assert len(known) < len(found)
        counts = Counter(round(total, 4) for total, _ in expected)
        assert not Counter(round(value, 4) for value in known) - counts
    if told_by == "InitTracker":
        assert not Counter(value for value in steps if value == value) - Counter(length for _, length in expected)


@pytest.mark.parametrize("told_by", ["numbers", "StepCounter", "all"])
@pytest.mark.parametrize("frames", [10, 20, 50])
def test_batches_of_several_workers_or_collectors_in_turn(told_by: str, frames: int) -> None:
    """Workers number their episodes together; collectors by themselves, and then what the data says goes before."""
    adds = {"numbers": [], "StepCounter": [StepCounter], "all": [RewardSum, StepCounter, InitTracker]}[told_by]
    several = played(adds, workers=3, rows=2, frames=frames, total=400)
    for worker, batches in enumerate(several):
        for batch in batches if told_by == "numbers" else ():
            batch["collector", "traj_ids"] += 1000 * worker
    expected = []
    for batches in several:
        whole = torch.cat(batches, 1)
        expected += [(round(float(whole["next", "reward"].reshape(-1)[one.places].sum()), 4), len(one.places))
                     for one in episodes(whole.select(("next", "done"))) if one.ended]  # fmt: skip
    found, running = [], {}
    for batch in itertools.chain(*zip(*several, strict=True)):
        found += [one for one in episodes(batch, running) if one.ended]
        running = running_of(batch, running)
    assert sorted(one.steps for one in found) == sorted(steps for _, steps in expected)
    totals = Counter(round(one.total, 4) for one in found if one.total == one.total)
    assert not totals - Counter(total for total, _ in expected)
    assert totals.total() == len(expected) or told_by == "StepCounter"
    assert totals


TOLD = [[], [RewardSum], [StepCounter], [InitTracker], [StepCounter, RewardSum]]


@pytest.mark.parametrize("transforms", TOLD)
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("frames", [4, 10, 60])
def test_collectors_that_number_alike_give_no_wrong_returns(frames: int, every: int, transforms: list) -> None:
    """Each of a few episodes is one that was played, or it is left out, which is said where the data does not tell.

    Also where no episode has ended yet when another collector goes on under its number.
    """
    several = played(transforms, workers=3, rows=2, frames=frames, total=min(600, 40 * frames))
    ends = set()
    for batches in several:
        whole = torch.cat(batches, 1)
        for one in episodes(whole.select(("next", "done"), ("next", "reward"))):
            if one.ended:
                ends.add((round(one.total, 4), one.steps))
    followed, found = Followed(), []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for place, batch in enumerate(itertools.chain(*zip(*several, strict=True))):
            if place % every == 0:
                found += [one for one in episodes(batch, followed.before(batch)) if one.ended]
            followed.follow(batch)
    said = [str(one.message) for one in caught if "number theirs alike" in str(one.message)]
    assert len(said) == (transforms != [StepCounter, RewardSum])
    assert all("StepCounter()" in one for one in said)
    whole = [one for one in found if one.total == one.total and one.steps == one.steps]
    assert len(whole) > len(found) / 4 or frames < 60
    assert {(round(one.total, 4), one.steps) for one in whole} <= ends


@pytest.mark.parametrize("collectors", [1, 2, 3])
@pytest.mark.parametrize("parts", [2, 3, 5])
def test_long_episodes_of_collectors_that_number_alike_are_not_joined(parts: int, collectors: int) -> None:
    """None has ended yet when another collector goes on under its number, from what that one had not come to."""
    steps = 4

    def batch(collector: int, part: int) -> TensorDict:
        states = torch.arange(steps + 1.0)[None, :, None] + part * steps + 1000 * collector
        done = torch.zeros(1, steps, 1, dtype=torch.bool)
        done[:, -1] = part == parts - 1
        then = {"observation": states[:, 1:], "reward": torch.full((1, steps, 1), 10.0**collector), "done": done}
        numbers = torch.zeros(1, steps, dtype=torch.long)
        entries = {"observation": states[:, :-1], "next": then, "collector": {"traj_ids": numbers}}
        return TensorDict(entries, [1, steps])

    followed, found = Followed(), []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for part in range(parts):
            for collector in range(collectors):
                one = batch(collector, part)
                found += [one for one in episodes(one, followed.before(one)) if one.ended]
                followed.follow(one)
    assert len(caught) == (collectors > 1)
    assert len(found) == collectors
    known = [(one.total, one.steps) for one in found if one.steps == one.steps]
    assert known == ([(float(steps * parts), float(steps * parts))] if collectors == 1 else [])


def _cut_short(batch: TensorDictBase) -> TensorDictBase:
    """As where workers stop each other: what lies behind the last step is of a batch before, and masked."""
    left = batch[:, -4:].clone()
    left["collector", "traj_ids"][:] = -1
    left["next", "done"][:] = True
    whole = torch.cat([batch, left], 1)
    whole["collector", "mask"] = whole["collector", "traj_ids"] >= 0
    return whole


#: One collector, in several ways to hand out its batches.
WAYS: dict[str, Any] = {
    "as they are": lambda batches: batches,
    "looking ahead": lambda batches: [MultiStep(0.9, 3)(batch) for batch in batches],
    "split": lambda batches: [split_trajectories(batch, prefix="collector") for batch in batches],
    "cut short": lambda batches: [_cut_short(batch) for batch in batches],
    "without numbers": lambda batches: [batch.exclude("collector") for batch in batches],
}


@pytest.mark.parametrize("way", WAYS)
def test_one_collector_is_not_taken_for_several(way: str) -> None:
    """Whatever lies under the next states, and in padding: nothing is said, and every return and length is known."""
    (batches,) = played([], workers=1, rows=2, frames=10, total=200)
    whole = torch.cat(batches, 1)
    expected = sorted(
        (round(float(whole["next", "reward"].reshape(-1)[one.places].sum()), 4), len(one.places))
        for one in episodes(whole.select(("next", "done"))) if one.ended
    )  # fmt: skip
    followed, found = Followed(), []
    for batch in WAYS[way](batches):
        found += [one for one in episodes(batch, followed.before(batch)) if one.ended]
        followed.follow(batch)
    assert len(found) > 5
    assert sorted((round(one.total, 4), one.steps) for one in found) == expected


@pytest.mark.parametrize("transforms", TOLD)
@pytest.mark.parametrize("most", [6, 10_000])
@pytest.mark.parametrize("kept", [50, 10_000])
@pytest.mark.parametrize("ndim", [1, 2])
def test_the_newest_rows_of_a_buffer_tell_no_part_of_an_episode_for_the_whole(
    transforms: list, most: int, kept: int, ndim: int
) -> None:
    """Each episode is one that was played, or it is left out; none is, where no rows were missed."""
    several = played(transforms, workers=2 if ndim == 1 else 1, rows=3, frames=60, total=360)
    expected = Counter()
    for worker, batches in enumerate(several):
        for batch in batches:
            batch["collector", "traj_ids"] = 2 * batch["collector", "traj_ids"] + worker  # they number together
        whole = torch.cat(batches, 1)
        for one in episodes(whole.select(("next", "done"), ("next", "reward"))):
            expected[round(one.total, 4), float(one.steps)] += one.ended
    buffer, newest = ReplayBuffer(storage=LazyTensorStorage(kept * ndim, ndim=ndim)), NewestRows(most)
    followed, found, missed = Followed(), [], 0
    for place, batch in enumerate(itertools.chain(*zip(*several, strict=True))):
        buffer.extend(batch.reshape(-1) if ndim == 1 else batch)
        if place % 3 == 1:
            continue
        data = newest.take(buffer)
        missed += newest.missed
        if newest.missed:
            followed.lose()
        found += [one for one in episodes(data, followed.before(data)) if one.ended]
        followed.follow(data)
    whole = [(round(one.total, 4), one.steps) for one in found]
    known = Counter((total, steps) for total, steps in whole if total == total and steps == steps)
    assert not known - expected
    if not missed:
        assert known == expected


@pytest.mark.parametrize("every", [1, 3])
def test_a_monitor_knows_returns_and_lengths_without_any_transform(every: int, tmp_path: Path) -> None:
    env = TransformedEnv(CueCorners(batch_size=[5]), EnvCompose(RewardSum(), StepCounter()))
    env.set_seed(0)
    options = {"frames_per_batch": 35, "total_frames": 420, "auto_register_policy_transforms": False}
    with METHOD.prepare(make_actor()) as policy:
        transforms = ("step_count", "episode_reward")
        told, alone = (Monitor(policy, tmp_path / name, every=every, media_every=0) for name in ("told", "alone"))
        for batch in Collector(env, policy, **options):
            told.step(batch)
            alone.step(batch.exclude(*transforms, *(("next", key) for key in transforms)))
        told.close()
        alone.close()
        logs = [FileSink.read(one.folder / "log.csv") for one in (told, alone)]
    for name in ("episodes.ended", "episodes.return", "episodes.steps"):
        assert len(logs[0][name]) >= 2
        assert logs[1][name] == [(step, pytest.approx(value, abs=1e-5)) for step, value in logs[0][name]]


@pytest.mark.parametrize("make", [CueCorners, CueGrid, TMaze, KnownValue, Cheese, KeyDoor])
def test_an_environment_says_what_its_features_are_called(make: Any) -> None:
    names, shape = make.feature_names, make().observation_spec["observation"].shape
    assert (names is None) == (len(shape) > 1)
    if names is not None:
        assert len(set(names)) == len(names) == shape.numel()
    if hasattr(make, "light_features"):
        assert [names[place] for place in make.light_features()] == [f"light {number}" for number in range(4)]


def wrapped(env: Any) -> Any:
    return TransformedEnv(TransformedEnv(env, StepCounter()), InitTracker())


class Named:
    """A user's environment, as far as its features are concerned."""

    feature_names = {("agents", "observation"): ["near", "far"]}  # noqa: RUF012


def test_names_are_found_under_what_wraps_an_environment() -> None:
    collector = Collector(CueCorners(), make_actor(), frames_per_batch=4, total_frames=4)
    several = SimpleNamespace(create_env_fn=[partial(CueCorners, batch_size=[2])] * 2)
    made = [CueCorners(), wrapped(CueCorners()), GymEnv("tdhook_rl/CueCorners-v0"), CueCorners]
    for env in (*made, collector, several, SerialEnv(2, CueCorners), ParallelEnv(2, [partial(CueCorners)] * 2)):
        assert known_of(env).names["observation"][60] == "light 0"
    collector.shutdown()
    assert known_of(Named()).names == Named.feature_names
    for env in (None, GymEnv("CartPole-v1"), KeyDoor()):
        assert not known_of(env).names
    assert known_of(wrapped(CueCorners())).render is not None
    assert known_of(GymEnv("CartPole-v1")).render is None


@pytest.mark.parametrize("given", [None, [f"mine {number}" for number in range(90)]], ids=["known", "given"])
def test_features_have_the_environments_names_unless_given(given: Any, tmp_path: Path) -> None:
    env = wrapped(CueCorners(batch_size=[4]))
    with METHOD.prepare(make_actor()) as policy, Monitor(policy, tmp_path, env=env, feature_names=given) as monitor:
        data = env.rollout(12, policy, break_when_any_done=False)
        found, seen = monitor.step(data), policy.annotate(data)["attr", "observation"]
        assert found is not None
    name = "light 1" if given is None else "mine 61"
    assert found[f"attr.observation.{name}"] == pytest.approx(float(seen[..., 61].abs().mean()), rel=1e-5)
    # States are drawn beside the bars, and an episode is an animation of them.
    with Pillow.open(tmp_path / "media" / "bars.observation.0" / "000000048.png") as picture:
        drawn = np.asarray(picture)[4 : 4 + 216, 4 : 4 + 180]
    assert np.array_equal(drawn, CueCorners().render(data.reshape(-1)[:1])[0])
    with Pillow.open(tmp_path / "media" / "episode.observation" / "000000048.gif") as episode:
        assert episode.n_frames > 1


def test_names_give_way_where_a_transform_has_changed_the_features(tmp_path: Path) -> None:
    data = TensorDict({"observation": torch.randn(4, 12)}, batch_size=4)
    net = TensorDictModule(nn.Linear(12, 2), in_keys=["observation"], out_keys=["logits"])
    with Saliency(target=targets.logit(0)).prepare(net) as policy, Monitor(policy, tmp_path, env=TMaze) as monitor:
        found = monitor.step(data)
    assert found is not None
    assert "attr.observation.11" in found

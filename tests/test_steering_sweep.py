"""What a sweep measures is what plain rollouts of the steered policy measure, from the same starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.distributions import Categorical, OneHotCategorical
from torchrl.data import Categorical as CategoricalSpec
from torchrl.data import Composite, Unbounded
from torchrl.envs import EnvBase, GymEnv, GymWrapper
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import MLP, NormalParamExtractor, ProbabilisticActor, QValueActor, TanhNormal

from tdhook_rl import SteeringVectors
from tdhook_rl.envs import Cheese, CueCorners
from tdhook_rl.errors import ArtifactError, InputError, MissingKeyError, SiteError
from tdhook_rl.examples.agent import FC2, make_actor
from tdhook_rl.examples.steer_at_eval import contrast
from tdhook_rl.experiments.agents import recipe
from tdhook_rl.sweeps import Condition, SteeringVector, SweepResult, first_episode, steering_sweep

sampled = partial(set_exploration_type, ExplorationType.RANDOM)


def mlp(features: int, outputs: int) -> nn.Module:
    return MLP(in_features=features, out_features=outputs, num_cells=[16, 16])


def cart_actor() -> nn.Module:
    net = TensorDictModule(mlp(4, 2), ["observation"], ["logits"])
    return ProbabilisticActor(net, in_keys=["logits"], distribution_class=OneHotCategorical, return_log_prob=True)


def cart_q() -> nn.Module:
    return QValueActor(mlp(4, 2), in_keys=["observation"], spec=GymEnv("CartPole-v1").action_spec)


def pendulum_actor() -> nn.Module:
    net = nn.Sequential(mlp(3, 2), NormalParamExtractor())
    module = TensorDictModule(net, ["observation"], ["loc", "scale"])
    bounds = {"low": -2.0, "high": 2.0}
    return ProbabilisticActor(
        module, in_keys=["loc", "scale"], distribution_class=TanhNormal, distribution_kwargs=bounds
    )


class OfPictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(147, 16), nn.ReLU(), nn.Linear(16, 7))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(pixels.flatten(-3).float() / 10)


def door_actor() -> nn.Module:
    module = TensorDictModule(OfPictures(), ["pixels"], ["logits"])
    return ProbabilisticActor(module, in_keys=["logits"], distribution_class=OneHotCategorical)


def door_env() -> EnvBase:
    import gymnasium
    import minigrid  # noqa: F401
    from minigrid.wrappers import ImgObsWrapper

    return GymWrapper(ImgObsWrapper(gymnasium.make("MiniGrid-DoorKey-5x5-v0")))


def corners_actor() -> nn.Module:
    return make_actor()


def cheese_actor() -> nn.Module:
    return recipe("cheese").agent().actor


def maze_actor() -> nn.Module:
    return recipe("t_maze").agent().actor


GRU = recipe("t_maze").sites["gru"]
#: Actor, environment, where to steer, how many features, how conditions are played.
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], Any, tuple[int, ...], str]] = {
    "rows": (corners_actor, CueCorners, FC2, (64,), "rows"),
    "rows of maps": (cheese_actor, Cheese, recipe("cheese").sites["c2"], (16, 7, 7), "rows"),
    "a batched environment": (corners_actor, lambda: CueCorners(batch_size=[4]), FC2, (64,), "one condition"),
    "a recurrent policy": (maze_actor, lambda: recipe("t_maze").env(batch_size=[4]), GRU, (64,), "one condition"),
    "Gymnasium": (cart_actor, lambda: GymEnv("CartPole-v1"), "module.0.module.2", (16,), "one condition"),
    "a function": (cart_actor, lambda: partial(GymEnv, "CartPole-v1"), "module.0.module.2", (16,), "one condition"),
    "Q-values": (cart_q, lambda: GymEnv("CartPole-v1"), "module.0.module.2", (16,), "one condition"),
    "MiniGrid": (door_actor, door_env, "module.0.module.layers.1", (16,), "one condition"),
    "continuous": (pendulum_actor, lambda: GymEnv("Pendulum-v1"), "module.0.module.0.2", (16,), "one condition"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*did not end")
@pytest.mark.parametrize("exploration", [ExplorationType.DETERMINISTIC, ExplorationType.RANDOM])
@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_policy_and_environment(name: str, exploration: ExplorationType) -> None:
    """Alpha 0 repeats itself; a greedy policy returns what a plain rollout of the steered policy returns."""
    torch.manual_seed(0)
    make_actor, make_env, path, shape, layout = CASES[name]
    actor, env = make_actor(), make_env()
    weights = {key: value.clone() for key, value in actor.state_dict().items()}
    vector = SteeringVector(vector=3 * torch.randn(shape), path=path)
    before = torch.get_rng_state()
    with set_exploration_type(exploration):
        found = steering_sweep(
            actor, env, vector, alphas=[0, -1.0, 1.0], controls=1, episodes=6, max_steps=12, progress=False,
            outcomes={"return": "return", "length": "length", "again": total},
        )  # fmt: skip
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, weights[key]) for key, value in actor.state_dict().items())
    assert found.paired
    assert found.facts["layout"].startswith(layout)
    assert found.alphas() == [-1.0, 0.0, 1.0]
    assert found.values["return"].shape == (6, 6)
    assert torch.allclose(found.values["return"], found.values["again"])
    if exploration == ExplorationType.DETERMINISTIC and name in ("rows", "rows of maps"):
        assert torch.equal(found.of("return"), by_hand(actor, env, None, 0.0))
        for alpha in (-1.0, 1.0):
            assert torch.allclose(found.of("return", alpha=alpha), by_hand(actor, env, vector, alpha), atol=1e-6)


def total(episodes: TensorDictBase) -> Tensor:
    assert episodes["mask"].dtype == torch.bool
    return episodes["next", "reward"].double().sum((-1, -2))


def by_hand(actor: nn.Module, env: EnvBase, vector: SteeringVector | None, alpha: float) -> Tensor:
    """The returns of first episodes, of a plain rollout from the same seed."""
    policy = actor
    if vector is not None:
        policy = SteeringVectors(vector, alpha=alpha).prepare(actor, return_context=False)
    env.set_seed(0)
    start = env.reset(TensorDict({"_reset": torch.ones(6, 1, dtype=torch.bool)}, batch_size=[6])).exclude("_reset")
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        played = env.rollout(12, policy, auto_reset=False, tensordict=start, break_when_any_done=False)
    return (played["next", "reward"].squeeze(-1).double() * first_episode(played)).sum(-1)


# ------------------------------------------------------------------ environments that draw by themselves


class Slippery(CueCorners):
    """Actions are exchanged by chance, drawn from the generator that is named."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.numbers = np.random.default_rng(0)
        super().__init__(max_steps=8)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        shape = tensordict.batch_size
        if self.source == "its own":
            slips = torch.rand(shape, generator=self._generator)
        elif self.source == "torch":
            slips = torch.rand(shape)
        else:
            slips = torch.from_numpy(self.numbers.random(shape))
        action = torch.where(slips < 0.3, (tensordict["action"] + 1) % 4, tensordict["action"])
        return super()._step(tensordict.copy().set("action", action))

    def _set_seed(self, seed: int | None) -> None:
        super()._set_seed(seed)
        if self.source == "numpy":
            self.numbers = np.random.default_rng(seed)


@pytest.mark.filterwarnings("ignore:.*did not end")
@pytest.mark.parametrize(
    ("source", "layout", "paired"),
    [
        ("its own", "rows of one rollout", True),
        ("torch", "rows of one rollout", True),
        ("numpy", "one condition after the other", True),
        ("no seed", "one condition after the other", False),
    ],
)
def test_environments_that_draw_by_themselves(source: str, layout: str, paired: bool) -> None:
    vector = SteeringVector(vector=torch.randn(64), path=FC2)
    play = partial(steering_sweep, make_actor(), Slippery(source), vector, alphas=[1.0], controls=1, episodes=64)
    if paired:
        found = play(max_steps=8, progress=False)
        assert found.effect("return").p >= 0
    else:
        with pytest.warns(UserWarning, match="draws by itself"):
            found = play(max_steps=8, progress=False)
        assert "t by group" in found.effect("return").method
    assert (found.facts["layout"], found.paired) == (layout, paired)
    assert found.facts["paired"] == paired


class Unseeded(CueCorners):
    def _set_seed(self, seed: int | None) -> None:
        if getattr(self, "made", False):
            raise NotImplementedError("this environment has no seed")
        super()._set_seed(seed)


@pytest.mark.filterwarnings("ignore:.*did not end")
def test_an_environment_without_a_seed_is_said() -> None:
    env = Unseeded(max_steps=8)
    env.made = True
    vector = SteeringVector(vector=torch.randn(64), path=FC2)
    with pytest.warns(UserWarning, match=r"cannot be seeded \(this environment has no seed\)") as caught:
        found = steering_sweep(make_actor(), env, vector, alphas=[1.0], controls=0, episodes=16, max_steps=8)
    assert sum("cannot be seeded" in str(one.message) for one in caught) == 1
    assert found.paired  # as rows of one rollout they begin alike all the same


# --------------------------------------------------------------------------------------- interrupted sweeps


def test_an_interrupted_sweep_goes_on_and_equals_one_that_was_not(tmp_path: Path) -> None:
    actor = make_actor()
    vectors = {"one": SteeringVector(vector=torch.randn(64), path=FC2), "two": {"module.0.module.1": torch.randn(64)}}
    play = partial(steering_sweep, actor, CueCorners(batch_size=[4], max_steps=6), vectors, alphas=[0.5, 1.0])
    whole = play(controls=2, episodes=8, progress=False)

    def stop(done: int, of: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        play(controls=2, episodes=8, folder=tmp_path, progress=stop)
    with pytest.raises(ArtifactError, match="is at 5 of 14 conditions"):
        SweepResult.load(tmp_path)
    counts: list[int] = []
    resumed = play(controls=2, episodes=8, folder=tmp_path, progress=lambda done, of: counts.append(done))
    assert counts == [*range(6, 15)]
    loaded = SweepResult.load(tmp_path)
    for name, values in whole.values.items():
        assert torch.equal(values, resumed.values[name])
        assert torch.equal(values, loaded.values[name])
    assert loaded.conditions == whole.conditions
    again = play(controls=2, episodes=8, folder=tmp_path, progress=stop)  # nothing is left to play
    assert torch.equal(again.values["return"], whole.values["return"])
    for changed in ({"controls": 3}, {"episodes": 4}, {"seed": 1}, {"max_steps": 3}):
        with pytest.raises(InputError, match="holds a sweep with another"):
            play(**{"controls": 2, "episodes": 8, **changed}, folder=tmp_path)
    for changed in ({"sign": lambda start: -torch.ones(len(start))}, {"outcomes": {"return": total}}, {"when": "done"}):
        with pytest.raises(InputError, match=r"another (sign|measured|when)"):
            play(controls=2, episodes=8, folder=tmp_path, **changed)
    next(actor.parameters()).data[0] += 1
    with pytest.raises(InputError, match="another digest"):
        play(controls=2, episodes=8, folder=tmp_path)


def test_saved_sweeps_are_checked(tmp_path: Path) -> None:
    found = known(8)
    found.save(tmp_path)
    loaded = SweepResult.load(tmp_path)
    assert loaded.conditions == found.conditions
    assert torch.equal(loaded.values["won"], found.values["won"])
    file = tmp_path / "sweep.safetensors"
    content = file.read_bytes()
    for broken in (content[: len(content) // 2], b"", content.replace(b'\\"random\\"', b'\\"rendom\\"', 1)[:-8]):
        file.write_bytes(broken)
        with pytest.raises(ArtifactError):
            SweepResult.load(tmp_path)
    file.unlink()
    with pytest.raises(ArtifactError, match="no artifact"):
        SweepResult.load(tmp_path)


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"alphas": [float("nan")]}, InputError, "nan"),
        ({"alphas": [0.0]}, InputError, "no strength but 0"),
        ({"episodes": 0}, InputError, "nothing to play"),
        ({"controls": -1}, InputError, "nothing to play"),
        ({"vectors": {}}, InputError, "at least one"),
        ({"vectors": SteeringVector(vector=torch.zeros(64), path=FC2)}, InputError, "is zero"),
        ({"vectors": {"a": {FC2: torch.full((64,), torch.nan)}}}, InputError, "NaN"),
        ({"vectors": {"a": {FC2: torch.ones(63)}}}, InputError, "63"),
        ({"vectors": {"a": {"module.0.modul.3": torch.ones(64)}}}, SiteError, "nearest"),
        ({"vectors": [SteeringVector(vector=torch.ones(64), path=FC2)] * 2}, InputError, "name them"),
        ({"outcomes": "retur"}, InputError, "'return'"),
        ({"outcomes": []}, InputError, "outcomes="),
        ({"outcomes": {"a": lambda data: data["next", "reward"]}}, InputError, "one number for each of 4 episodes"),
        ({"outcomes": {"a": lambda data: torch.full((len(data),), torch.nan)}}, InputError, "NaN"),
        ({"outcomes": {"a": lambda data: data["absent"]}}, Exception, "absent"),
        ({"outcomes": {"a": lambda data: 1.0}}, InputError, "float"),
        ({"sign": lambda start: torch.ones(3)}, InputError, "sign="),
        ({"env": lambda: 3}, InputError, "int"),
        ({"outcomes": lambda: 1.0}, InputError, r"called with \(episodes\), but its signature is \(\)"),
        ({"outcomes": {"won": lambda data, goal: data}}, InputError, "the outcome 'won' is called with"),
    ],
)  # fmt: skip
def test_bad_input(changed: dict[str, Any], error: type[Exception], words: str) -> None:
    given = {"env": CueCorners(batch_size=[4], max_steps=4), "vectors": SteeringVector(vector=torch.ones(64), path=FC2)}
    given |= {"alphas": [1.0], "controls": 1, "episodes": 4, "outcomes": "return", **changed}
    with pytest.raises(error, match=words):
        steering_sweep(make_actor(), given.pop("env"), given.pop("vectors"), **given)


@pytest.mark.parametrize("make_env", [lambda: GymEnv("CartPole-v1"), CueCorners, lambda: CueCorners(batch_size=[2])])
def test_an_environment_that_lacks_what_the_policy_reads(make_env: Callable[[], EnvBase]) -> None:
    vector = SteeringVector(vector=torch.ones(16), path="module.0.module.layers.1")
    with pytest.raises(MissingKeyError, match=r"reads 'pixels', which this environment does not write; nearest: '"):
        steering_sweep(door_actor(), make_env(), vector, alphas=[1.0], controls=0, episodes=2, max_steps=2)


def test_questions_that_were_not_played() -> None:
    found = known(8)
    for ask, words in (
        (lambda: found.mean("wun"), "won"),
        (lambda: found.mean("won", alpha=0.3), "strengths: 0, 0.5, 1"),
        (lambda: found.effect("won", "upp"), "up"),
        (lambda: SweepResult.together([]), "at least one"),
        (lambda: SweepResult.together([found, known(8, name="down")]), "differ"),
    ):
        with pytest.raises(InputError, match=words):
            ask()


# ----------------------------------------------------------------------------------------------- statistics


def known(
    episodes: int, *, effect: float = 0.8, spread: float = 0.1, seed: int = 0, name: str = "up", controls: int = 6
) -> SweepResult:
    """Outcomes of which the effect is linear in alpha and known, with what episodes have in common, and controls."""
    draws = torch.Generator().manual_seed(seed)
    conditions = [Condition(), Condition(draw=1)]
    common = torch.randn(episodes, generator=draws, dtype=torch.float64)
    rows = [common, common]
    for kind, draw in (("", 0), *(("random", draw) for draw in range(controls))):
        slope = effect if not kind else 0.05 * float(torch.randn((), generator=draws))
        for alpha in (0.5, 1.0):
            conditions.append(Condition(name, alpha, kind, draw))
            own = torch.randn(episodes, generator=draws, dtype=torch.float64)
            rows.append(common + slope * alpha + spread * own)
    values = torch.stack(rows)
    return SweepResult(conditions=conditions, values={"score": values, "won": (values > 0).double()})


def test_estimates_by_hand() -> None:
    found = known(40)
    values = found.values["score"]
    assert found.effect("score").estimate == pytest.approx(float((values[3] - values[0]).mean()))
    assert found.effect("score", alpha=0.5).estimate == pytest.approx(float((values[2] - values[0]).mean()))
    assert found.effect("score").half_width < found.mean("score", alpha=1.0).half_width / 2  # the common part cancels
    controls = torch.stack([values[5 + 2 * draw] - values[0] for draw in range(6)]).mean(1)
    assert torch.allclose(found.control_effects("score"), controls)
    ratio = found.effect("score").estimate / float(controls.abs().max())
    assert found.specificity("score").estimate == pytest.approx(ratio)
    assert found.control_response("score").shape == (6, 3)
    assert found.iqm("score").groups == 40
    (row,) = [one for one in found.records() if one["outcome"] == "score" and one["alpha"] == 1.0]
    assert (row["effect"], row["random_draws"]) == (found.effect("score").estimate, 6)
    assert row["adjusted"] < 1e-3
    assert "up" in str(found.table())
    assert len(found.frame()) == 4
    assert len(found.episodes()) == 16 * 40


def test_what_does_nothing_is_not_claimed() -> None:
    claims = [known(24, effect=0.0, seed=seed).p("score") < 0.05 for seed in range(200)]
    assert np.mean(claims) < 0.07
    assert all(known(24, effect=0.8, seed=seed).table("score")[1].adjusted < 0.05 for seed in range(20))


def test_the_choice_is_made_in_one_half_and_reported_of_the_other() -> None:
    quiet = [known(16, effect=0.0, spread=2.0, seed=seed) for seed in range(60)]
    bests = [max(float(one.effect("score", alpha=alpha)) for alpha in (0.5, 1.0)) for one in quiet]
    reported = [float(one.chosen("score").effect) for one in quiet]
    assert np.mean(bests) > 0.15
    assert abs(np.mean(reported)) < 0.15
    row = known(40).chosen("score")
    assert (row.vector, row.alpha, row.mean.rows) == ("up", 1.0, 20)
    assert known(40).chosen("score", larger=False).alpha == 0.5
    with pytest.raises(InputError, match="the sweep has one"):
        known(1).chosen("score")


def test_runs_are_the_unit_where_there_are_several() -> None:
    runs = [known(16, effect=effect, seed=seed) for seed, effect in enumerate((0.2, 0.8, 1.4))]
    together = SweepResult.together(runs)
    assert together.effect("score").groups == 3
    assert together.effect("score").half_width > known(48).effect("score").half_width * 5
    assert {one["run"] for one in together.episodes()} == {0, 1, 2}


def test_a_trained_agent_is_steered_and_common_noise_helps() -> None:
    """E2 in small: the direction moves the agent, random ones do not; small effects need fewer episodes in pairs."""
    from tdhook_rl.experiments.checkpoints import load

    actor = load("cue_corners", 0).agent.actor
    lost: Mapping[str, Callable] = {"other": lambda data: (data["next", "reward"] < -0.5).any(1).squeeze(-1)}
    with sampled():
        found = steering_sweep(
            actor, CueCorners(), contrast(actor), alphas=[0.25, 1.0], controls=4, episodes=256, max_steps=30,
            outcomes={"return": "return", **lost}, progress=False,
            sign=lambda start: 1.0 - 2.0 * (start["concept", "paying_corner"] == 0),
        )  # fmt: skip
    assert found.mean("other", alpha=1.0).low > 0.9
    assert float(found.control_effects("other").abs().max()) < 0.2
    assert found.table("other")[1].adjusted < 0.01
    pairs = found.of("return", alpha=0.25) - found.of("return")
    apart = found.of("return", alpha=0.25)[torch.randperm(256)] - found.of("return")
    assert float(pairs.var()) < float(apart.var())


def test_a_memory_is_steered_in_two_places_at_once() -> None:
    """What a recurrent policy gives and what it carries, with one random vector for both."""
    actor, env = maze_actor(), recipe("t_maze").env(batch_size=[8])
    vector = torch.randn(64)
    both = {"memory": {GRU: vector, (GRU, ("next", "recurrent_state")): vector[None]}}
    found = steering_sweep(actor, env, both, alphas=[5.0], controls=2, episodes=8, progress=False)
    assert found.paired
    assert found.facts["vectors"]["memory"]["places"] == [GRU, str((GRU, ("next", "recurrent_state")))]


class Levers(EnvBase):
    """Three agents, each paid for pulling; the episode ends when all have pulled, or after five steps."""

    batch_locked = False

    def __init__(self) -> None:
        super().__init__(batch_size=[])
        self.observation_spec = Composite(agents=Composite(observation=Unbounded(shape=(3, 4)), shape=(3,)))
        self.action_spec = Composite(agents=Composite(action=CategoricalSpec(2, shape=(3,)), shape=(3,)))
        self.reward_spec = Composite(agents=Composite(reward=Unbounded(shape=(3, 1)), shape=(3,)))
        kinds = {key: CategoricalSpec(2, shape=(3, 1), dtype=torch.bool) for key in ("done", "terminated")}
        self.done_spec = Composite(agents=Composite(kinds, shape=(3,)))

    def _reset(self, tensordict: TensorDictBase | None) -> TensorDict:
        batch = () if tensordict is None else tensordict.batch_size
        ended = torch.zeros(*batch, 3, 1, dtype=torch.bool)
        seen = torch.randn(*batch, 3, 4)
        agents = TensorDict({"observation": seen, "done": ended, "terminated": ended.clone()}, batch_size=(*batch, 3))
        return TensorDict({"agents": agents}, batch_size=batch)

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        agents = tensordict["agents"]
        ended = agents["done"] | (agents["action"] == 1).unsqueeze(-1)
        found = {"observation": 0.8 * agents["observation"], "reward": agents["action"].unsqueeze(-1).float()}
        found |= {"done": ended, "terminated": ended.clone()}
        return TensorDict({"agents": TensorDict(found, batch_size=agents.batch_size)}, batch_size=tensordict.batch_size)

    def _set_seed(self, seed: int | None) -> None:
        torch.manual_seed(0 if seed is None else seed)


def test_agents_are_steered_together() -> None:
    from torchrl.modules import MultiAgentMLP

    net = MultiAgentMLP(4, 2, 3, centralized=False, share_params=True, depth=1, num_cells=16)
    module = TensorDictModule(net, [("agents", "observation")], [("agents", "logits")])
    actor = ProbabilisticActor(
        module, in_keys=[("agents", "logits")], out_keys=[("agents", "action")], distribution_class=Categorical
    )
    path = next(name for name, one in actor.named_modules() if isinstance(one, nn.Linear))
    vector = SteeringVector(vector=3 * torch.randn(16), path=path)
    with sampled():
        found = steering_sweep(actor, Levers(), vector, alphas=[1.0], controls=2, episodes=12, max_steps=40)
    assert found.paired
    # Each agent is paid for its pulls until the last has pulled: one at least.
    assert float(found.values["return"].min()) >= 1 - 1e-9
    assert found.values["length"].shape == (5, 12)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.9])
def test_effects_on_shares_cover_and_agree_with_their_p(share: float) -> None:
    """Of episodes that are lost a share is won; the interval holds it, and 0 where the p-value does not reject it."""
    covered = []
    for seed in range(200):
        draws = torch.Generator().manual_seed(seed)
        base = (torch.rand(96, generator=draws) < 0.05).double()
        won = torch.maximum(base, (torch.rand(96, generator=draws) < share).double())
        played = [Condition(), Condition(draw=1), Condition("up", 1.0)]
        found = SweepResult(conditions=played, values={"won": torch.stack([base, base, won])})
        effect = found.effect("won")
        covered.append(0.95 * share in effect)
        assert (0.0 in effect) == (effect.p > 0.05)
    assert np.mean(covered) > 0.9


@pytest.mark.filterwarnings("ignore:.*did not end")
def test_vectors_are_checked_against_the_policy_before_anything_is_played() -> None:
    torch.manual_seed(3)
    actor, other = make_actor(), make_actor()
    found = contrast(actor)
    play = partial(steering_sweep, alphas=[1.0], controls=2, episodes=4, max_steps=3, progress=False)
    for given in (found, {"corner": found}, {"corner": {FC2: found}}):
        result = play(actor, CueCorners(), given)
        assert result.draws(control="shuffled") == 2
    with pytest.warns(UserWarning, match="found in other weights"):
        play(other, CueCorners(), found)
    with pytest.raises(InputError, match="16"):
        play(cart_actor(), GymEnv("CartPole-v1"), SteeringVector(vector=torch.ones(64), path="module.0.module.2"))


@pytest.mark.filterwarnings("ignore:.*did not end")
def test_a_loaded_sweep_says_what_the_first_said(tmp_path: Path) -> None:
    vector = SteeringVector(vector=torch.ones(64), path=FC2)
    played = steering_sweep(make_actor(), CueCorners(), vector, alphas=[1.0], episodes=4, max_steps=2, folder=tmp_path)
    assert played.facts["unfinished"] > 0
    assert {"tdhook_rl", "torch"} <= set(played.facts["versions"])
    loaded = SweepResult.load(tmp_path)
    assert {**loaded.facts, "paired": loaded.paired} == played.facts
    again = SweepResult.load(loaded.save(tmp_path / "again").parent)
    assert again.facts == loaded.facts

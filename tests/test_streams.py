"""What follows from one seed is drawn apart: first states, noise, controls, and what is put in."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.data import Composite, Unbounded
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import ProbabilisticActor

from tdhook_rl import Saliency, Scheduled, SteeringVectors
from tdhook_rl.arguments.seeds import stream_of
from tdhook_rl.artifacts import load_artifact, save_artifact
from tdhook_rl.errors import InputError
from tdhook_rl.latent.probing import BilinearEstimator, LinearEstimator, LowRankBilinearEstimator
from tdhook_rl.metrics import InfidelityMetric, deletion_insertion, random_target_loss
from tdhook_rl.rollout import alike_episodes
from tdhook_rl.sweeps import ablate_units, patch_sites, steering_sweep
from tdhook_rl.sweeps.conditions import directions_of

MANY = 256
SEEDS = (0, 1, 7)


class OneStep(EnvBase):
    """Episodes of one step, from a generator of its own: the first state, beside what is done in it."""

    batch_locked = False

    def __init__(self, draw: Callable[..., Tensor], reward: Callable[[Tensor, Tensor], Tensor], rows: tuple = ()):
        super().__init__(batch_size=rows)
        self._draw, self._reward, self._generator = draw, reward, torch.Generator()
        self.observation_spec = Composite(observation=Unbounded(shape=(*rows, 2)), shape=rows)
        self.action_spec = Unbounded(shape=(*rows, 2))
        self.reward_spec = Unbounded(shape=(*rows, 1))

    def _set_seed(self, seed: int | None) -> None:
        self._generator.manual_seed(seed or 0)

    def _reset(self, tensordict: TensorDictBase | None = None, **_: object) -> TensorDictBase:
        rows = self.batch_size if tensordict is None else tensordict.batch_size
        return TensorDict({"observation": self._draw(*rows, 2, generator=self._generator)}, batch_size=rows)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        reward = self._reward(tensordict["observation"], tensordict["action"])
        done = torch.ones_like(reward, dtype=torch.bool)
        step = {"observation": tensordict["observation"], "reward": reward, "done": done}
        return TensorDict(step, batch_size=tensordict.batch_size)


class Uniform(torch.distributions.Uniform):
    def __init__(self, loc: Tensor) -> None:
        super().__init__(loc - 0.5, loc + 0.5, validate_args=False)


class Gaussian(torch.distributions.Normal):
    def __init__(self, loc: Tensor) -> None:
        super().__init__(loc, torch.ones_like(loc))


class Untold(torch.distributions.StudentT):
    """Draws by a method of its own, which noise in common does not reach."""

    def __init__(self, loc: Tensor) -> None:
        super().__init__(torch.full_like(loc, 50.0), loc, torch.ones_like(loc))


def centred(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.rand(*shape, generator=generator) - 0.5


#: What an environment begins with, and what draws an action that knows nothing of it.
ALIKE = {"normal": (torch.randn, Gaussian), "uniform": (centred, Uniform), "mixed": (torch.randn, Untold)}


def blind(distribution: type) -> nn.Module:
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2))
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    return ProbabilisticActor(
        TensorDictModule(net, ["observation"], ["loc"]), in_keys=["loc"], distribution_class=distribution
    )


def product(state: Tensor, action: Tensor) -> Tensor:
    return (state * action).sum(-1, keepdim=True)


def unrelated(products: Tensor) -> bool:
    """Whether products of what has mean 0 have it too."""
    return bool(products.mean().abs() < 5 * products.std() / len(products) ** 0.5)


@pytest.mark.parametrize("alike", [np.int64(1), np.uint8(1), torch.tensor(1), True], ids=lambda one: type(one).__name__)
def test_one_number_is_one_seed_whatever_its_class(alike: Any) -> None:
    assert stream_of(alike, "noise", 0) == stream_of(1, "noise", 0)
    with pytest.raises(TypeError):
        stream_of(1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("rows", [(), (MANY,), (4, 8)])
@pytest.mark.parametrize("kind", ALIKE)
def test_noise_of_actions_knows_nothing_of_first_states(kind: str, rows: tuple[int, ...], seed: int) -> None:
    draw, distribution = ALIKE[kind]
    actor, env = blind(distribution), OneStep(draw, product, rows)
    vector = {"v": {"module.0.module.1": torch.ones(4)}}
    with set_exploration_type(ExplorationType.RANDOM):
        found = steering_sweep(actor, env, vector, alphas=[1.0], controls=0, episodes=MANY, seed=seed, progress=False)
    assert unrelated(found.of("return"))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ALIKE)
def test_episodes_that_are_shown_draw_apart(kind: str, seed: int) -> None:
    draw, distribution = ALIKE[kind]
    with SteeringVectors({"module.0.module.1": torch.ones(4)}, alpha=0.0).prepare(blind(distribution)) as policy:
        env = OneStep(draw, product, (MANY,))
        played = alike_episodes(policy, env, episodes=MANY, max_steps=1, seed=seed, deterministic=False)
    assert unrelated(torch.cat([one["next", "reward"].flatten() for one in played]))


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_put_in_is_not_what_the_start_would_give(seed: int) -> None:
    """States in order, and an environment that draws one of them by its number."""

    def numbered(*shape: int, generator: torch.Generator) -> Tensor:
        number = torch.randint(4, shape[:-1], generator=generator).float()
        return torch.stack([number, torch.zeros_like(number)], -1)

    def near(state: Tensor, action: Tensor) -> Tensor:
        return -(state - action)[..., :1].abs()

    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Identity())
    nn.init.eye_(net[0].weight)
    actor = TensorDictModule(net, ["observation"], ["action"])
    states = TensorDict({"observation": torch.tensor([[number, 0.0] for number in range(4)])}, batch_size=4)
    env = OneStep(numbered, near, (MANY,))
    table = ablate_units(actor, states, "module.0", by="resample", env=env, episodes=MANY, most=1, seed=seed)
    returned = table["module.0", 0].returned
    assert returned is not None
    assert abs(returned.estimate + 1.25) < 0.3  # as far as two of four numbers are apart


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("size", [2, 8, 40])
def test_random_directions_are_not_those_of_the_seed_itself(size: int, seed: int) -> None:
    torch.manual_seed(seed)
    given = torch.randn(size, dtype=torch.float64)
    (random,) = directions_of({"v": {"0": given}}, 1, seed)["v"].controls["random"].values()
    assert torch.cosine_similarity(random[0], given, dim=0) < 0.999
    torch.manual_seed(seed)
    net = TensorDictModule(nn.Sequential(nn.Identity(), nn.Linear(size, 1)), ["x"], ["y"]).double()
    one, other = (TensorDict({"x": torch.randn(9, size, dtype=torch.float64)}, batch_size=9) for _ in range(2))
    table = patch_sites(net, one, other, ["module.0"], direction=given, controls=1, seed=seed, metric="y")
    (cell,) = table
    assert not torch.allclose(cell.at_random[0], cell.shares)


# ---------------------------------------------------------------------- data that were drawn by the seed itself

given = pytest.mark.parametrize("seed", SEEDS)
by_rows = pytest.mark.parametrize("rows", [(64,), (8, 8)])


def drawn(how: Callable[..., Tensor], seed: int, *shape: int) -> TensorDict:
    torch.manual_seed(seed)
    return TensorDict({"x": how(*shape)}, batch_size=shape[:-1])


@given
@by_rows
def test_random_targets_are_not_the_states(rows: tuple[int, ...], seed: int) -> None:
    """A network that would only have to repeat what it reads has nothing easier to do."""
    data = drawn(torch.randn, seed, *rows, 1)
    net = TensorDictModule(nn.Sequential(nn.Linear(1, 1)), ["x"], ["y"])
    loss = random_target_loss(net, data, seed=seed, steps=200, lr=0.05).mean()
    assert loss > 0.5  # of the variance, 1


@given
@by_rows
def test_random_rankings_are_not_those_of_the_data(rows: tuple[int, ...], seed: int) -> None:
    data = drawn(torch.rand, seed, *rows, 6)
    net = TensorDictModule(nn.Sequential(nn.Linear(6, 1, bias=False)), ["x"], ["y"])
    nn.init.ones_(net.module[0].weight)
    with Saliency().prepare(net) as hooked:
        found = deletion_insertion(hooked, hooked.annotate(data), baseline=0.0, n_random=1, seed=seed)
    half = 0.5 * data["x"].sum(-1).mean()  # in any order that has nothing to do with their sizes
    assert abs(found.random.mean() / half - 1) < 0.1


class Norm(nn.Module):
    """Along its input it is straight."""

    def forward(self, x: Tensor) -> Tensor:
        return x.norm(dim=-1, keepdim=True)


@given
@by_rows
def test_perturbations_are_not_along_the_data(rows: tuple[int, ...], seed: int) -> None:
    data = drawn(torch.randn, seed, *rows, 6)
    with Saliency().prepare(TensorDictModule(Norm(), ["x"], ["y"])) as hooked:
        batch = hooked.annotate(data)
        own, other = (InfidelityMetric(1, noise_scale=0.5, seed=one)(hooked, batch).mean() for one in (seed, 123456))
    assert own > other / 3


def test_a_sweep_whose_numbers_followed_otherwise_is_not_gone_on_with(tmp_path: Path) -> None:
    """Half of its conditions would be played with other noise than the rest."""
    policy = TensorDictModule(nn.Linear(2, 2), ["observation"], ["action"])
    env = OneStep(torch.randn, product)
    play = partial(
        steering_sweep, policy, env, {"one": {"module": torch.ones(2)}}, alphas=[1.0], controls=0, episodes=4
    )
    play(folder=tmp_path, progress=False)
    tensors, facts = load_artifact(tmp_path / "sweep", "steering_sweep")
    del facts["streams"]
    save_artifact(tmp_path / "sweep", "steering_sweep", tensors, facts)
    with pytest.raises(InputError, match=r"another streams .*by the release that began it"):
        play(folder=tmp_path, progress=False)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("kind", [LinearEstimator, BilinearEstimator, LowRankBilinearEstimator])
def test_initial_weights_of_probes_are_not_their_inputs(kind: type, given: bool, seed: int) -> None:
    torch.manual_seed(seed)
    inputs = [torch.randn(MANY, 8) for _ in range(1 if kind is LinearEstimator else 2)]
    probe = kind(num_classes=2, epochs=1, lr=1e-12, seed=seed if given else None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probe.fit(*inputs, y=torch.arange(MANY) % 2)
    start = torch.cat([one.double().flatten() for name, one in probe.weights.items() if name != "bias"])
    drawn = torch.cat([one.double().flatten() for one in inputs])[: len(start)]
    assert abs(torch.corrcoef(torch.stack([start, drawn]))[0, 1].item()) < 5 / len(start) ** 0.5


@pytest.mark.parametrize("seed", SEEDS)
def test_rows_of_a_schedule_are_not_those_of_an_order_by_its_seed(seed: int) -> None:
    net = TensorDictModule(nn.Linear(2, 1), ["observation"], ["value"])
    with Scheduled(Saliency(when="step"), fraction=0.25, seed=seed).prepare(net) as hooked:
        found = hooked(TensorDict({"observation": torch.randn(MANY, 2)}, MANY))
    order = torch.randperm(MANY, generator=torch.Generator().manual_seed(seed))[: MANY // 4]
    chosen = found["computed", "attr"].nonzero().squeeze(-1)
    assert len(chosen) == len(order)
    assert len(set(chosen.tolist()) & set(order.tolist())) < MANY // 8  # a quarter of them by chance

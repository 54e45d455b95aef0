"""One noise for all conditions: rows of one episode share it, episodes do not, and its distribution is torch's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from scipy import stats
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, distributions, nn
from torch.distributions import Normal
from torchrl.data import Categorical as CategoricalSpec
from torchrl.data import OneHot
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import EGreedyModule, ProbabilisticActor, TanhNormal

from tdhook_rl.sweeps.shared_draws import SharedDraws

EPISODES, CONDITIONS = 5, 4
ROWS = EPISODES * CONDITIONS
LEVEL = torch.linspace(0.1, 0.9, 3)

DRAWS: dict[str, Callable[[int], Tensor]] = {
    "rand": lambda rows: torch.rand(rows, 3),
    "rand of a size": lambda rows: torch.rand((rows, 3)),
    "randn": lambda rows: torch.randn(rows, 3, dtype=torch.float64),
    "randint": lambda rows: torch.randint(0, 50, (rows, 3)),
    "randint below": lambda rows: torch.randint(50, size=(rows, 3)),
    "rand_like": lambda rows: torch.rand_like(torch.zeros(rows, 3)),
    "randn_like": lambda rows: torch.randn_like(torch.zeros(rows, 3)),
    "normal": lambda rows: torch.normal(torch.zeros(rows, 3), torch.ones(rows, 3)),
    "normal of one spread": lambda rows: torch.normal(torch.zeros(rows, 3), 2.0),
    "normal_": lambda rows: torch.empty(rows, 3).normal_(),
    "uniform_": lambda rows: torch.empty(rows, 3).uniform_(-1.0, 1.0),
    "exponential_": lambda rows: torch.empty(rows, 3).exponential_(),
    "bernoulli": lambda rows: torch.bernoulli(LEVEL.expand(rows, 3)),
    "multinomial": lambda rows: torch.multinomial(LEVEL.expand(rows, 3), 1),
    "multinomial, several": lambda rows: torch.multinomial(LEVEL.expand(rows, 3), 4, True),
    "multinomial, without replacement": lambda rows: torch.multinomial(LEVEL.expand(rows, 3), 2),
    "a generator of its own": lambda rows: torch.rand(rows, 3, generator=torch.Generator().manual_seed(rows)),
    "Categorical": lambda rows: distributions.Categorical(logits=LEVEL.expand(rows, 3)).sample(),
    "Categorical of agents": lambda rows: distributions.Categorical(logits=LEVEL.expand(rows, 2, 3)).sample(),
    "OneHotCategorical": lambda rows: distributions.OneHotCategorical(logits=LEVEL.expand(rows, 3)).sample(),
    "Normal": lambda rows: Normal(torch.zeros(rows, 3), 1.0).rsample(),
    "TanhNormal": lambda rows: TanhNormal(torch.zeros(rows, 3), torch.ones(rows, 3)).rsample(),
    "Uniform": lambda rows: distributions.Uniform(torch.zeros(rows, 3), 1.0).sample(),
    "Gumbel": lambda rows: distributions.Gumbel(torch.zeros(rows, 3), 1.0).sample(),
    "Bernoulli": lambda rows: distributions.Bernoulli(LEVEL.expand(rows, 3)).sample(),
}  # fmt: skip


def shared(seed: int = 0, episodes: int = EPISODES, of_row: Tensor | None = None) -> SharedDraws:
    mode = SharedDraws(episodes)
    mode.rows_of(torch.arange(episodes).repeat(CONDITIONS) if of_row is None else of_row)
    return mode.seeded(seed)


@pytest.mark.parametrize("name", DRAWS)
def test_rows_of_an_episode_share_their_noise(name: str) -> None:
    draw = DRAWS[name]
    before = torch.get_rng_state()
    with shared():
        found = draw(ROWS)
    assert torch.equal(torch.get_rng_state(), before)
    each = found.unflatten(0, (CONDITIONS, EPISODES))
    assert (each == each[:1]).all()
    with shared():
        assert torch.equal(found, draw(ROWS))
    # Rows that have left change nothing for the others.
    left = torch.tensor([0, 3, 4, 7, 11, 19])
    with shared(of_row=left % EPISODES):
        assert torch.equal(draw(len(left)), found[left]) or name == "a generator of its own"
    differs = []
    for seed in range(8):
        with shared(seed):
            rows = draw(ROWS)[:EPISODES].reshape(EPISODES, -1)
        differs.append(bool((rows != rows[:1]).any()))
    assert any(differs)


@pytest.mark.parametrize("name", DRAWS)
def test_the_distribution_is_that_of_torch(name: str) -> None:
    draw, count = DRAWS[name], 4000
    with shared(1, count, torch.arange(count)):
        found = draw(count).double().reshape(count, -1)[:, 0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        expected = draw(count).double().reshape(count, -1)[:, 0]
    assert stats.ks_2samp(found.numpy(), expected.numpy()).pvalue > 1e-3


def test_what_is_not_about_rows_stays_as_torch_draws_it() -> None:
    draws = (lambda: torch.rand(7), lambda: torch.rand(()), lambda: torch.randn(3, ROWS), lambda: torch.randperm(ROWS))
    for draw in draws:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            expected = draw()
            torch.manual_seed(0)
            with shared():
                found = draw()
        assert torch.equal(found, expected)


def test_policies_act_alike_in_rows_of_one_episode() -> None:
    net = nn.Linear(4, 6)
    logits = TensorDictModule(net, ["observation"], ["logits"])
    spec = OneHot(6)
    policies = {
        "categorical": ProbabilisticActor(logits, in_keys=["logits"], distribution_class=distributions.Categorical),
        "epsilon-greedy": nn.Sequential(
            TensorDictModule(lambda x: nn.functional.one_hot(net(x).argmax(-1), 6), ["observation"], ["action"]),
            EGreedyModule(spec=spec, eps_init=0.5, eps_end=0.5),
        ),
        "epsilon-greedy, index": nn.Sequential(
            TensorDictModule(lambda x: net(x).argmax(-1), ["observation"], ["action"]),
            EGreedyModule(spec=CategoricalSpec(6), eps_init=0.5, eps_end=0.5),
        ),
    }
    seen = torch.randn(EPISODES, 4).repeat(CONDITIONS, 1)
    for policy in policies.values():
        actions = []
        for seed in range(6):
            with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM), shared(seed):
                data = policy(TensorDict({"observation": seen.clone()}, batch_size=[ROWS]))
            each = data["action"].unflatten(0, (CONDITIONS, EPISODES))
            assert (each == each[:1]).all()
            actions.append(each[0])
        assert any(not torch.equal(one, actions[0]) for one in actions)

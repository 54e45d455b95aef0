"""The agents of the experiments: for each environment a small actor and critic, and how they are trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torch.distributions import Categorical
from torchrl.envs import Compose, EnvBase, InitTracker, TransformedEnv
from torchrl.modules import ActorValueOperator, ConvNet, GRUModule, ProbabilisticActor, ValueOperator

from tdhook_rl.envs import Cheese, CueCorners, CueGrid, KnownValue, TMaze
from tdhook_rl.errors import InputError, nearest
from tdhook_rl.examples.agent import make_actor, make_critic

UNITS = 64  # of the recurrent agent


@dataclass(frozen=True, eq=False)
class Agent:
    """An actor and a critic, which may share layers.

    Args:
        actor: the policy, which outputs ``"logits"`` and ``"action"``.
        critic: outputs ``"state_value"``.
    """

    actor: nn.Module
    critic: nn.Module


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How an agent is built and trained by PPO (Schulman et al. 2017).

    Args:
        env: makes the training environment from ``batch_size`` and ``seed``.
        agent: makes an untrained agent from torch's generator.
        sites: the paths of the actor's layers, by the name that the tables use.
        frames: of training.
        lr: of Adam; it falls linearly to 0.
        gamma: the discount.
        lmbda: of the generalised advantage estimate.
        entropy: the coefficient of the entropy bonus.
        steps: of each of the 128 environments in one batch.
        minibatch: the rows of one step of the optimiser.
        recurrent: the minibatches are trajectories, not rows.
        saved: what a checkpoint holds.
        snapshots: after how many frames the actor is also saved.
    """

    env: Callable[..., EnvBase]
    agent: Callable[[], Agent]
    sites: Mapping[str, str]
    frames: int
    lr: float = 1e-3
    gamma: float = 0.95
    lmbda: float = 0.95
    entropy: float = 0.01
    steps: int = 16
    minibatch: int = 512
    recurrent: bool = False
    saved: tuple[str, ...] = ("actor",)
    snapshots: tuple[int, ...] = ()


def recipe(name: str) -> Recipe:
    """The recipe of an environment.

    Raises:
        InputError: for an unknown name.
    """
    if name not in RECIPES:
        raise InputError(f"no agent is trained for {name!r}; {nearest(name, RECIPES)}")
    return RECIPES[name]


def known_value() -> Agent:
    """Two networks 16-64-64, tanh."""
    actor, critic = (_mlp((16, 64, 64), outputs, nn.Tanh) for outputs in (KnownValue.n_actions, 1))
    return Agent(_policy(TensorDictModule(actor, ["observation"], ["logits"])), ValueOperator(critic, ["observation"]))


def cue_corners() -> Agent:
    """The agent of the demo: two networks 90-64-64-64, ReLU."""
    return Agent(make_actor(), make_critic())


def cue_grid() -> Agent:
    """One network 80-64-64-64, ReLU, with a head for the policy and one for the value."""
    widths = (CueGrid.observation_features, 64, 64, 64)
    trunk = nn.Sequential(*[layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())])
    return _shared(trunk, 64, CueGrid.n_actions)


def cheese() -> Agent:
    """Two convolutions of 16 channels and a layer of 64, with two heads."""
    convolutions = ConvNet(in_features=3, num_cells=[16, 16], kernel_sizes=3, paddings=1, activation_class=nn.ReLU)
    trunk = nn.Sequential(convolutions, nn.Linear(16 * 7 * 7, 64), nn.ReLU())
    return _shared(trunk, 64, Cheese.n_actions)


def t_maze() -> Agent:
    """A GRU of 64 units for the policy; the critic sees the present observation only, as a baseline."""
    core = GRUModule(input_size=TMaze.observation_features, hidden_size=UNITS, in_key="observation", out_key="hidden")
    head = TensorDictModule(nn.Linear(UNITS, TMaze.n_actions), in_keys=["hidden"], out_keys=["logits"])
    critic = _mlp((TMaze.observation_features, 32), 1, nn.Tanh)
    return Agent(_policy(TensorDictSequential(core, head)), ValueOperator(critic, ["observation"]))


def make_t_maze(**options: object) -> EnvBase:
    """The T-maze with what recurrent policies read: where an episode starts, and the hidden state there."""
    primer = GRUModule(input_size=7, hidden_size=UNITS, in_key="observation", out_key="hidden").make_tensordict_primer()
    return TransformedEnv(TMaze(**options), Compose(InitTracker(), primer))  # type: ignore[arg-type]


RECIPES: dict[str, Recipe] = {
    "known_value": Recipe(
        env=KnownValue, agent=known_value, sites={}, frames=300_000 // 2048 * 2048, gamma=0.9, lmbda=0.5,
        saved=("actor", "critic"),
    ),
    "cue_corners": Recipe(
        env=CueCorners, agent=cue_corners, frames=81_920,
        sites={"pre1": "module.0.module.0", "enc": "module.0.module.1", "fc2": "module.0.module.3",
               "fc3": "module.0.module.5"},
    ),
    "cue_grid": Recipe(
        env=partial(CueGrid, max_steps=12), agent=cue_grid, frames=458_752, lr=3e-3, gamma=0.9, minibatch=256,
        sites={"enc": "module.0.module.1", "fc2": "module.0.module.3", "fc3": "module.0.module.5"},
        snapshots=(16_384, 32_768, 65_536, 131_072, 196_608, 262_144),
    ),
    "t_maze": Recipe(
        env=make_t_maze, agent=t_maze, frames=73_728, lr=3e-3, gamma=0.99, steps=18, recurrent=True,
        sites={"gru": "module.0.module.0"},
    ),
    "cheese": Recipe(
        env=Cheese, agent=cheese, frames=131_072,
        sites={"c1": "module.0.module.0.1", "c2": "module.0.module.0.3", "fc1": "module.0.module.2"},
    ),
}  # fmt: skip


def _mlp(widths: tuple[int, ...], outputs: int, activation: type[nn.Module]) -> nn.Sequential:
    layers = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), activation())]
    return nn.Sequential(*layers, nn.Linear(widths[-1], outputs))


def _policy(net: nn.Module) -> ProbabilisticActor:
    return ProbabilisticActor(net, in_keys=["logits"], distribution_class=Categorical, return_log_prob=True)


def _shared(trunk: nn.Module, width: int, actions: int) -> Agent:
    operator = ActorValueOperator(
        TensorDictModule(trunk, in_keys=["observation"], out_keys=["hidden"]),
        _policy(TensorDictModule(nn.Linear(width, actions), in_keys=["hidden"], out_keys=["logits"])),
        ValueOperator(nn.Linear(width, 1), in_keys=["hidden"]),
    )
    return Agent(operator.get_policy_operator(), operator.get_value_operator())

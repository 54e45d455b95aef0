"""Agents that are plain modules, as in CleanRL's scripts, as TorchRL policies over the same tensors."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

import torch
from tensordict import NestedKey
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn
from torch import distributions as D
from torchrl.modules import ActorCriticWrapper, ActorValueOperator, ProbabilisticActor, QValueActor, ValueOperator

from tdhook_rl.adapters.actions import WithScale
from tdhook_rl.adapters.distributions import DiagonalNormal, MultiCategorical, SquashedNormal
from tdhook_rl.adapters.observations import (
    Features,
    Rows,
    batch_without,
    dtype_of,
    require_tensors,
    unfolded,
)
from tdhook_rl.adapters.pieces import Pieces
from tdhook_rl.adapters.sb3_networks import FEATURES, RAW, Piece
from tdhook_rl.arguments.checked import checked
from tdhook_rl.calls.chains import tells_of
from tdhook_rl.errors import InputError, nearest
from tdhook_rl.policies.tying import tied_clone

Kind = Literal["categorical", "normal", "squashed", "deterministic", "values"]


@checked
def from_module(
    net: nn.Module,
    actor: str | None = None,
    *,
    kind: Kind = "categorical",
    value: str | None = None,
    trunk: str | None = None,
    sizes: Sequence[int] | None = None,
    log_std: str | None = None,
    std: str | None = None,
    action_scale: str | None = None,
    action_bias: str | None = None,
    part: Piece | None = None,
    reads_action: bool = False,
    divide: float | None = None,
    observation_dims: int = 1,
    indices: bool | None = None,
    in_keys: NestedKey = "observation",
) -> TensorDictModuleBase:
    """A TorchRL policy of an agent that is a plain module, over the same tensors.

    The pieces are named, each by the path of a module in ``net``, or by a method of it (``"forward"``: the module
    itself). They run on rows with one dimension, as in the script that they come from, and the policy takes any batch.

    The policy's modules are copies over the same tensors. They begin in the mode that the agent is in; ``train()`` and
    ``eval()`` of one do not reach the other. Where the agent is given other tensors (``load_state_dict(assign=True)``),
    the policy is to be made again.

    Args:
        net: the agent.
        actor: gives, from the observation or what ``trunk`` makes of it, what ``kind`` says.
        kind: ``"categorical"`` (logits), ``"normal"`` (the mean, with ``log_std`` or ``std``), ``"squashed"`` (mean and
            logarithm of the scale, for a tanh), ``"deterministic"`` (the action) or ``"values"`` (of each action).
        value: gives the value of a state; or of a state and an action, with ``reads_action``. What a method of that
            name runs beside it runs for each piece.
        trunk: what actor and value share.
        sizes: of several choices at once (``MultiDiscrete``), whose logits come one after the other: among how many
            each is. The action has an index for each.
        log_std, std: the path of a parameter, for ``"normal"``.
        action_scale, action_bias: paths of what a squashed action is scaled by and moved by. What is drawn is then
            ``"raw_action"``, between -1 and 1, and the score that of the scaled one, as in CleanRL.
        part: ``"actor"``, ``"value"``, or ``"actor_value"``: one module with both. What is named unless given.
        reads_action: ``value`` is of an observation and ``"action"``: it is called with both, and writes
            ``"state_action_value"``.
        divide: what the observation is divided by first, as in ``x / 255.0``.
        observation_dims: how many dimensions an observation has: 1 for vectors, 3 for pictures, 0 for a single index.
        indices: whether integers are given to the network as such (int64), rather than cast to the dtype of its
            weights; unless given, where a piece that reads them has an ``nn.Embedding``.
        in_keys: where it is.

    Returns:
        as of :func:`~tdhook_rl.adapters.from_sb3`.

    Raises:
        InputError: for a name that is not in the module, for pieces that do not fit together, take or give something
            else, or have a memory; and for an argument that would do nothing.

    Warns:
        UserWarning: for a memory that may mix rows, and for weights that actor and value share without ``trunk=``, with
            ``part="actor_value"``: what holds them runs twice.

    Example:
        PPO, of vectors and of Atari frames:

        >>> import torch
        >>> from torch import nn
        >>> from torch.distributions import Categorical
        >>> class Agent(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.network = nn.Sequential(nn.Linear(4, 64), nn.ReLU())
        ...         self.actor, self.critic = nn.Linear(64, 2), nn.Linear(64, 1)
        ...     def get_value(self, x):
        ...         return self.critic(self.network(x))
        ...     def get_action_and_value(self, x, action=None):
        ...         hidden = self.network(x)
        ...         probs = Categorical(logits=self.actor(hidden))
        ...         action = probs.sample() if action is None else action
        ...         return action, probs.log_prob(action), probs.entropy(), self.critic(hidden)
        >>> agent = Agent()
        >>> policy = from_module(agent, "actor", value="critic", trunk="network")
        >>> from tensordict import TensorDict
        >>> data = policy(TensorDict({"observation": torch.randn(3, 4)}, [3]))
        >>> _, log_prob, _, value = agent.get_action_and_value(data["observation"], data["action"])
        >>> torch.equal(data["action_log_prob"], log_prob), torch.equal(data["state_value"], value)
        (True, True)

        Others, by their scripts:

        >>> continuous = lambda agent: from_module(agent, "actor_mean", kind="normal", log_std="actor_logstd")
        >>> atari = lambda agent: from_module(agent, "actor", trunk="network", divide=255.0, observation_dims=3)
        >>> dqn = lambda q_network: from_module(q_network, "forward", kind="values")
        >>> several = lambda agent: from_module(agent, "actor", trunk="network", sizes=agent.nvec.tolist())
        >>> ddpg = lambda actor: from_module(actor, "forward", kind="deterministic")
        >>> sac = lambda actor: from_module(
        ...     actor, "forward", kind="squashed", action_scale="action_scale", action_bias="action_bias"
        ... )
        >>> soft_q = lambda qf1: from_module(qf1, value="forward", reads_action=True)
    """
    if part is None:
        part = "actor" if value is None else "value" if actor is None else "actor_value"
    pieces = Pieces(net, actor, value, trunk, part)
    if kind == "normal" and (log_std is None) == (std is None) and part != "value":
        raise InputError("kind='normal' needs the path of one parameter: log_std= or std=")
    if (action_scale is None) != (action_bias is None) or (action_scale is not None and kind != "squashed"):
        raise InputError("action_scale= and action_bias= go together, with kind='squashed'")
    if kind != "normal" and (log_std or std):
        raise InputError(f"log_std= and std= are for kind='normal', and kind is {kind!r}")
    if reads_action and (value is None or trunk is not None):
        raise InputError("reads_action= is of value=, which is called with an observation and an action, and no trunk=")
    if divide is not None and not (math.isfinite(divide) and divide):
        raise InputError(f"divide= is what the observation is divided by, a number other than 0; got {divide!r}")
    if observation_dims < 0:
        raise InputError(f"observation_dims= is how many dimensions an observation has, got {observation_dims}")
    if indices and divide is not None:
        raise InputError(f"indices= gives integers to the network as they are, and divide={divide!r} makes fractions")
    _require_sizes(sizes, kind, part)
    pieces.require_called(net, reads_action, observation_dims)
    if part == "actor_value":
        pieces.say_shared()
    looked_up = pieces.looks_up() if indices is None and divide is None else bool(indices)
    first = Plain(observation_dims, divide, looked_up)

    def valued(start: nn.Module, keys: list[NestedKey], **layers: nn.Module) -> ValueOperator:
        if reads_action:
            found = WithAction(first, pieces.value)
            return ValueOperator(found, in_keys=[*keys, "action"], out_keys=["state_action_value"])
        rows = _rows(start, **layers, **pieces.named("value"))
        rows.column, rows.gives = True, 1
        return ValueOperator(rows, in_keys=keys)

    def acting(start: nn.Module, keys: list[NestedKey], **layers: nn.Module) -> Any:
        layers |= pieces.named("actor")
        if kind == "normal":
            parameter = _inside(net, log_std or std or "", "parameter")
            layers["scale"] = WithScale(parameter, logarithm=std is None)
        elif kind == "squashed":
            layers["scale"] = Exponent()
        rows = _rows(start, **layers)
        rows.gives = 2 if kind in ("normal", "squashed") else 1
        if kind != "squashed" or action_scale is None:
            return _actor(rows, keys, kind, sizes)
        scale, bias = (_inside(net, one or "", "parameter or buffer") for one in (action_scale, action_bias))
        return _scaled_actor(rows, keys, scale, bias)

    shared = pieces.named("trunk")
    if part == "actor":
        built = acting(first, [in_keys], **shared)
    elif part == "value":
        built = valued(first, [in_keys], **shared)
    elif not shared:
        built = ActorCriticWrapper(acting(first, [in_keys]), valued(first, [in_keys]))
    else:
        common = _rows(first, **shared)
        common.gives, common.vectors = 1, True
        built = ActorValueOperator(
            TensorDictModule(common, in_keys=[in_keys], out_keys=[FEATURES]),
            acting(Features(), [FEATURES]),
            valued(Features(), [FEATURES]),
        )
    return tied_clone(built)


class Plain(nn.Module):
    """An observation of so many dimensions, of which nothing else is known, as rows."""

    writes_nothing = True

    def __init__(self, dims: int, divide: float | None, indices: bool = False) -> None:
        super().__init__()
        self.dims, self.divide, self.indices = dims, divide, indices

    def forward(self, *values: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        [value] = values
        rows = value.reshape(-1, *value.shape[value.ndim - self.dims :])
        if self.indices and not value.is_floating_point():
            return rows.long()  # what tables are looked up by
        rows = rows.to(dtype)  # as scripts do on the way from the environment
        return rows if self.divide is None else rows / self.divide

    @tells_of(forward)
    def hands_on(self, value: Tensor) -> bool:
        return self.dims == 1 and self.divide is None and value.is_floating_point()

    def batch_of(self, *values: Tensor) -> torch.Size:
        return batch_without(values[0], self.dims)


class Exponent(nn.Module):
    """Mean and scale, of mean and logarithm of the scale."""

    writes_nothing = True

    def forward(self, both: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        require_tensors(both, 2)
        loc, log_scale = both
        return loc, log_scale.exp()


class Scale(nn.Module):
    """A scaled and moved action."""

    writes_nothing = True

    scale: Tensor
    bias: Tensor

    def __init__(self, scale: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, action: Tensor) -> Tensor:
        return action * self.scale + self.bias


class WithAction(nn.Module):
    """A network of an observation and an action."""

    writes_nothing = True

    flat_rows = True

    def __init__(self, observation: Plain, network: nn.Module) -> None:
        super().__init__()
        self.observation, self.network = observation, network

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        batch = self.observation.batch_of(observation)
        rows = action.reshape(-1, *action.shape[len(batch) :])
        found = self.network(self.observation(observation, dtype=dtype_of(self)), rows)
        require_tensors(found, 1)
        found = unfolded(found, batch)
        return found.unsqueeze(-1) if found.shape == batch else found


def _rows(first: nn.Module, **layers: nn.Module) -> Rows:
    return Rows(OrderedDict({"observation": first, **layers}))


def _inside(net: nn.Module, path: str, what: str) -> Any:
    found: Any = net
    for step in path.split("."):
        found = getattr(found, step, None)
    if isinstance(found, Tensor):
        return found
    known: Sequence[str] = [name for name, _ in (*net.named_parameters(), *net.named_buffers())]
    raise InputError(f"{path!r} is no {what} in {type(net).__name__}; {nearest(path, known)}")


def _require_sizes(sizes: Sequence[int] | None, kind: Kind, part: Piece) -> None:
    if sizes is None:
        return
    if kind != "categorical" or part == "value":
        raise InputError(f"sizes= is of an actor of kind='categorical', and here kind={kind!r}, part={part!r}")
    if not len(sizes) or any(size < 1 for size in sizes):
        raise InputError(f"sizes= says among how many each choice is, at least 1; got {list(sizes)}")


def _actor(rows: Rows, keys: list[NestedKey], kind: Kind, sizes: Sequence[int] | None) -> TensorDictModuleBase:
    if kind == "values":
        return QValueActor(rows, in_keys=keys, action_space="categorical")
    if kind == "deterministic":
        return TensorDictModule(rows, in_keys=keys, out_keys=["action"])
    names = ["logits"] if kind == "categorical" else ["loc", "scale"]
    classes = {"categorical": D.Categorical, "normal": DiagonalNormal, "squashed": SquashedNormal}
    return ProbabilisticActor(
        TensorDictModule(rows, in_keys=keys, out_keys=names),
        in_keys=names,
        distribution_class=classes[kind] if sizes is None else MultiCategorical,
        distribution_kwargs=None if sizes is None else {"sizes": tuple(map(int, sizes))},
        return_log_prob=True,
    )


def _scaled_actor(rows: Rows, keys: list[NestedKey], scale: Tensor, bias: Tensor) -> TensorDictSequential:
    actor = ProbabilisticActor(
        TensorDictModule(rows, in_keys=keys, out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        out_keys=[RAW],
        distribution_class=SquashedNormal,
        distribution_kwargs={"width": scale},
        return_log_prob=True,
        log_prob_key="action_log_prob",
    )
    return TensorDictSequential(actor, TensorDictModule(Scale(scale, bias), in_keys=[RAW], out_keys=["action"]))

"""Agents of RSL-RL (Isaac Lab's usual library) as TorchRL policies over the same tensors."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torch import Tensor, nn
from torchrl.modules import ActorCriticWrapper, ProbabilisticActor, ValueOperator

from tdhook_rl.adapters.distributions import DiagonalNormal
from tdhook_rl.adapters.observations import Rows, batch_without
from tdhook_rl.adapters.sb3_networks import Piece
from tdhook_rl.arguments.checked import checked
from tdhook_rl.errors import InputError, PreparationError
from tdhook_rl.policies.tying import tied_clone

#: What its numbers come from; a class that overrides one computes something else.
_OWN_WAY = ("forward", "get_latent")


@checked
def from_rsl_rl(agent: Any, part: Piece = "actor") -> TensorDictModuleBase:
    """The policy of an RSL-RL agent (version 4 and newer) as a TorchRL policy, over the agent's own tensors.

    It reads the groups of observations by their names, which are the keys that environments of RSL-RL give, and
    normalises them by the statistics of now. Where not drawn, the action is that of the runner's inference policy, bit
    for bit. Of older versions, whose ``ActorCritic`` reads one tensor:
    ``from_module(actor_critic, "actor", kind="normal", std="std", value="critic")``.

    Args:
        agent: an ``OnPolicyRunner``, its algorithm, or one of its models.
        part: ``"actor"``, ``"value"`` (``"state_value"``), or ``"actor_value"``. Of a model: what it is.

    Returns:
        a ``ProbabilisticActor``, a ``ValueOperator``, or an ``ActorCriticWrapper``.

    Raises:
        PreparationError: for recurrent models, and for distributions or models of another kind.
        InputError: for what is no agent of RSL-RL.
    """
    algorithm = getattr(agent, "alg", agent)
    names = {"actor": ["actor"], "value": ["critic"], "actor_value": ["actor", "critic"]}[part]
    if hasattr(agent, "get_latent"):
        models = [agent]
        if len(names) > 1:
            raise InputError("part='actor_value' needs the algorithm, or the runner, which has both models")
    else:
        models = [getattr(algorithm, name, None) for name in names]
    if not all(hasattr(model, "get_latent") and hasattr(model, "mlp") for model in models):
        raise InputError(
            f"from_rsl_rl takes an OnPolicyRunner of RSL-RL, its algorithm, or a model (version 4 and newer), not a "
            f"{type(agent).__name__}; of older versions: from_module(actor_critic, 'actor', kind='normal', std='std')"
        )
    made = [_of_model(model, name) for model, name in zip(models, names, strict=True)]
    return tied_clone(made[0] if len(made) == 1 else ActorCriticWrapper(*made)).eval()


class Groups(nn.Module):
    """The groups of observations as rows: vectors, and pictures where a network reads them."""

    writes_nothing = True

    def __init__(self, vectors: list[str], pictures: list[str]) -> None:
        super().__init__()
        self.dims = {**dict.fromkeys(vectors, 1), **dict.fromkeys(pictures, 3)}

    def forward(self, *values: Tensor, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        pairs = zip(self.dims.items(), values, strict=True)
        return {name: value.reshape(-1, *value.shape[value.ndim - dims :]) for (name, dims), value in pairs}

    def batch_of(self, *values: Tensor) -> torch.Size:
        return batch_without(values[0], next(iter(self.dims.values())))


class Followed:
    """A module that replaces its buffers as it learns: a copy of a policy reads the ones of now."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __deepcopy__(self, memo: dict[int, Any]) -> Followed:
        return self


class Latent(nn.Module):
    """What the layers read: vectors, normalised, and pictures by their networks."""

    def __init__(self, model: Any, vectors: list[str], pictures: list[str]) -> None:
        super().__init__()
        self.vectors = vectors
        self.normalise = Followed(model.obs_normalizer)
        self.cnns = nn.ModuleDict({name: model.cnns[name] for name in pictures})

    def forward(self, rows: dict[str, Tensor]) -> Tensor:
        parts = []
        if self.vectors:
            parts.append(self.normalise.module(torch.cat([rows[name] for name in self.vectors], -1)))
        if self.cnns:
            parts.append(torch.cat([cnn(rows[name]) for name, cnn in self.cnns.items()], -1))
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0]


class Gaussian(nn.Module):
    """Mean and scale as its distributions have them: the scale a parameter, or an output beside the mean."""

    writes_nothing = True
    gives_parameters = True

    def __init__(self, distribution: Any) -> None:
        super().__init__()
        self.logarithm = distribution.std_type == "log"
        own = dict(distribution.named_parameters())
        self.std = own.get("log_std_param" if self.logarithm else "std_param")
        self.limits = tuple(distribution.log_std_range if self.logarithm else distribution.std_range)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        loc, std = x.unbind(-2) if self.std is None else (x, torch.ones_like(x) * self.std)
        std = std.clamp(*self.limits)
        return loc, std.exp() if self.logarithm else std


def _of_model(model: Any, name: str) -> TensorDictModuleBase:
    kind = type(model)
    home = next((one for one in kind.__mro__ if one.__module__.startswith("rsl_rl.")), None)
    if getattr(model, "is_recurrent", False):
        raise PreparationError(
            f"{kind.__name__} has a memory, which from_rsl_rl does not carry: build the policy from TorchRL's "
            "LSTMModule or GRUModule over its rnn, and its mlp"
        )
    if home is None or any(getattr(kind, one) is not getattr(home, one) for one in _OWN_WAY):
        raise PreparationError(
            f"{kind.__name__} computes in a way of its own, which from_rsl_rl would leave out: put its pieces together "
            "with tdhook_rl.adapters.from_module"
        )
    vectors, pictures = list(model.obs_groups), list(getattr(model, "obs_groups_2d", ()))
    keys: Any = [*vectors, *pictures]
    layers: dict[str, nn.Module] = {
        "observation": Groups(vectors, pictures), "latent": Latent(model, vectors, pictures), "mlp": model.mlp,
    }  # fmt: skip
    drawn = model.distribution
    if name == "critic" or drawn is None:
        net = Rows(OrderedDict(layers))
        return ValueOperator(net, in_keys=keys) if name == "critic" else TensorDictModule(net, keys, ["action"])
    if not hasattr(drawn, "std_range"):
        raise PreparationError(
            f"the action distribution of this agent is a {type(drawn).__name__}; from_rsl_rl knows the normal ones"
        )
    net = Rows(OrderedDict({**layers, "distribution": Gaussian(drawn)}))
    return ProbabilisticActor(
        TensorDictModule(net, in_keys=keys, out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=DiagonalNormal,
        return_log_prob=True,
    )

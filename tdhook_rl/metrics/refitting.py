"""Plasticity: how well a copy of a network can still be fitted to something new."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictModule, TensorDictModuleBase
from tensordict.utils import unravel_key
from torch import Tensor, nn
from torchrl.envs.utils import ExplorationType, set_exploration_type

from tdhook_rl.arguments.checked import checked
from tdhook_rl.arguments.seeds import stream_of
from tdhook_rl.errors import InputError, MissingKeyError, nearest
from tdhook_rl.internals.torch_names import held_parameters
from tdhook_rl.internals.torchrl_names import closed_values
from tdhook_rl.metrics.untrained import own_generators
from tdhook_rl.policies.tying import whole_copy

#: What a network is fitted at where it has one of these and draws nothing.
_VALUES: tuple[NestedKey, ...] = ("state_value", "action_value", "state_action_value")


@checked
def random_target_loss(
    network: Any,
    states: TensorDictBase,
    *,
    out_key: NestedKey | None = None,
    steps: int = 20,
    lr: float = 1e-3,
    seed: int = 0,
    rows: Tensor | None = None,
) -> Tensor:
    """The squared error in each state after a few optimiser steps of a copy on random targets.

    The targets are standard normal, one for each state and output, about the mean output of the network as it is, so
    that neither the size of its outputs nor what it knows helps (Lyle et al. 2023, ICML, shift theirs by that mean
    too). The steps are Adam's, on all states at once. A network that cannot be fitted to them any more has lost
    plasticity; what it is compared with is the same of a network that is new, ``untrained_copy(network)``.

    Args:
        network: a TensorDict module; it is copied, and neither it nor the global generators are touched.
        states: what it reads, of any batch shape.
        out_key: the output that is fitted; unless given what its distribution is made of, or its value, or its last
            output of floats.
        steps, lr: of Adam.
        seed: of the targets.
        rows: which states count, a mask of the batch shape; all of them unless given.

    Returns:
        ``(states,)``, float64; about 1 where nothing was learnt by an output that is constant.

    Raises:
        MissingKeyError: if the network has no such output.
        InputError: if no parameter reaches the output, or for arguments that mean nothing.

    Example:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> net = TensorDictModule(nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 1)), ["x"], ["y"])
        >>> states = TensorDict({"x": torch.randn(32, 4)}, [32])
        >>> few, many = (random_target_loss(net, states, steps=steps, lr=1e-2).mean() for steps in (1, 100))
        >>> bool(many < few)
        True
    """
    if steps < 0 or lr <= 0:
        raise InputError(f"steps= is at least 0 and lr= positive, got {steps} and {lr}")
    if not isinstance(network, TensorDictModuleBase):
        raise InputError(f"random_target_loss reads a TensorDict module, got a {type(network).__name__}")
    if rows is not None and (rows.dtype != torch.bool or rows.numel() != states.batch_size.numel()):
        raise InputError(
            f"rows= is a mask of the batch shape {tuple(states.batch_size)}, true for the states that count; got "
            f"{rows.dtype} of shape {tuple(rows.shape)}"
        )
    with own_generators(seed), torch.enable_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        own = whole_copy(network, "random_target_loss fits")
        for child in own.modules():
            # Dropout would count as a loss; the backward of recurrent layers on a GPU asks for training mode.
            child.training = isinstance(child, nn.RNNBase)
        parameters = [one for one in held_parameters(own).values() if one.is_floating_point()]
        for one in parameters:
            one.requires_grad_(True)
            one.grad = None
        key = fitted_key(own) if out_key is None else unravel_key(out_key)

        def output() -> Tensor:
            found = own(states.clone()).get(key, None)
            if not isinstance(found, Tensor):
                raise MissingKeyError(
                    f"plasticity is measured at {key!r}, which the network does not output; "
                    f"{nearest(key, list(own.out_keys))}"
                )
            found = found.reshape(states.batch_size.numel(), -1)
            return found if rows is None else found[rows.reshape(-1)]

        value = output()
        if not value.requires_grad or not len(value):
            raise InputError(f"no parameter reaches {key!r}, ({tuple(value.shape)}, {value.dtype}): there is no fit")
        # Drawn on the CPU, to be the same on every device.
        draws = torch.Generator().manual_seed(stream_of(seed, "random targets"))
        drawn = torch.randn(value.shape, generator=draws).to(value)
        # A Q-network has the lowest number there is where a mask of actions closes one, which nothing can fit.
        there = ~closed_values(value)
        held = there.sum(0).clamp_min(1)
        targets = value.detach().where(there, 0.0).sum(0) / held + drawn

        def errors() -> Tensor:
            return (value - targets).where(there, 0.0)

        optimiser = torch.optim.Adam(parameters, lr=lr)
        for _ in range(steps):
            optimiser.zero_grad()
            (errors().square().sum() / there.sum()).backward()
            optimiser.step()
            value = output()
        return errors().detach().double().square().sum(-1) / there.sum(-1)


def fitted_key(network: TensorDictModuleBase) -> NestedKey:
    """The output that is fitted unless one is named."""
    known = [unravel_key(key) for key in network.out_keys]
    drawing = [one for one in network.modules() if isinstance(one, ProbabilisticTensorDictModule)]
    read = [unravel_key(key) for key in drawing[-1].in_keys] if drawing else []
    for key in (*read, *_VALUES):
        if key in known:
            return key
    # Names that begin with "next" are states, carried on.
    last = [key for key in known if not (isinstance(key, tuple) and key[0] == "next")]
    return (last or known)[-1]

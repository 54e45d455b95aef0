"""Losses and value estimators of hooked recurrent networks, over trajectories with resets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torch.distributions import Categorical
from torchrl.envs import Compose as EnvCompose
from torchrl.envs import InitTracker, TransformedEnv
from torchrl.modules import GRUModule, LSTMModule, ProbabilisticActor, set_recurrent_mode
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from tdhook_rl import ActivationCaching, Compose, Saliency, SteeringVectors
from tdhook_rl.errors import InputError
from tests.loss_cases import LOSSES
from tests.policies import ACTIONS, FEATURES, HIDDEN
from tests.test_losses import Shift, assert_bits, assert_nothing_kept, vector


def recurrent(kind: type, outputs: int, key: str, shift: Tensor | None, twin: nn.Module | None = None) -> Any:
    """A recurrent net, or the same one with a vector added to what its core puts out."""
    core = kind(input_size=FEATURES, hidden_size=HIDDEN, in_key="observation", out_key="hidden")
    head = TensorDictModule(nn.Linear(HIDDEN, outputs), in_keys=["hidden"], out_keys=[key])
    if twin is not None:
        core, head = twin.module[0], twin.module[-1]
    between = [] if shift is None else [TensorDictModule(Shift(shift), in_keys=["hidden"], out_keys=["hidden"])]
    return TensorDictSequential(core, *between, head)


def acting(net: Any) -> ProbabilisticActor:
    return ProbabilisticActor(net, in_keys=["logits"], distribution_class=Categorical, return_log_prob=True)


@pytest.mark.parametrize(("kind", "core"), [(LSTMModule, "lstm"), (GRUModule, "gru")])
def test_recurrent_losses_over_trajectories_with_resets(kind: type, core: str) -> None:
    actor_net = recurrent(kind, ACTIONS, "logits", None)
    value_net = recurrent(kind, 1, "state_value", None)
    primer = actor_net.module[0].make_tensordict_primer()
    env = TransformedEnv(LOSSES["a2c"].env(), EnvCompose(InitTracker(), primer))
    with torch.no_grad():
        data = env.rollout(7, acting(actor_net), break_when_any_done=False)
    assert bool(data["is_init"][:, 1:].any())

    def losses(actor: Any, critic: Any) -> TensorDict:
        given = data.clone()
        with set_recurrent_mode(True):
            GAE(gamma=0.9, lmbda=0.8, value_network=critic, deactivate_vmap=True)(given)
            found = ClipPPOLoss(actor, critic)(given)
        return TensorDict({"advantage": given["advantage"].mean()}).update(found.detach())

    plain = losses(acting(actor_net), value_net)
    vectors = vector(1), vector(2)
    by_hand = losses(
        acting(recurrent(kind, ACTIONS, "logits", vectors[0], actor_net)),
        recurrent(kind, 1, "state_value", vectors[1], value_net),
    )
    sites = f"module.0.module.0.{core}", f"module.0.{core}"
    steering = [
        Compose(ActivationCaching(site), SteeringVectors({site: shift}))
        for site, shift in zip(sites, vectors, strict=True)
    ]
    with steering[0].prepare(acting(actor_net)) as actor, steering[1].prepare(value_net) as critic:
        assert_bits(losses(acting(actor_net), value_net), plain)
        found = losses(actor, critic)
        assert_nothing_kept(actor)
        assert_nothing_kept(critic)
    for key in by_hand.keys():
        torch.testing.assert_close(found[key], by_hand[key])
    assert not torch.equal(found["advantage"], plain["advantage"])
    assert not torch.equal(found["kl_approx"], plain["kl_approx"])


def test_attribution_per_step_inside_a_recurrent_loss_is_refused() -> None:
    net = recurrent(GRUModule, 1, "state_value", None)
    env = TransformedEnv(LOSSES["a2c"].env(), EnvCompose(InitTracker(), net.module[0].make_tensordict_primer()))
    data = env.rollout(5, break_when_any_done=False)
    with Saliency(when="step", inputs=["observation"]).prepare(net) as hooked, set_recurrent_mode(True):
        with pytest.raises(InputError, match="annotate"):
            GAE(gamma=0.9, lmbda=0.8, value_network=hooked, deactivate_vmap=True)(data)

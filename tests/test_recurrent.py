"""Time is not batch: recurrent policies are explained row by row at their stored hidden state."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torch.distributions import Categorical
from torchrl.modules import GRUModule, ProbabilisticActor, set_recurrent_mode

from tdhook_rl import ActivationCaching, Compose, Saliency, targets
from tdhook_rl.errors import InputError


def recurrent_actor() -> ProbabilisticActor:
    gru = GRUModule(input_size=4, hidden_size=8, in_key="observation", out_key="hidden")
    head = TensorDictModule(nn.Linear(8, 3), in_keys=["hidden"], out_keys=["logits"])
    net = TensorDictSequential(gru, head)
    return ProbabilisticActor(net, in_keys=["logits"], distribution_class=Categorical, return_log_prob=True).double()


def step_by_step(policy: nn.Module, observations: torch.Tensor) -> TensorDict:
    """A rollout of trajectories ``(B, T, 4)`` by hand: the hidden state of each step is stored with it."""
    rows, hidden = [], torch.zeros(len(observations), 1, 8, dtype=torch.float64)
    for step in range(observations.shape[1]):
        data = TensorDict(
            {
                "observation": observations[:, step],
                "recurrent_state": hidden,
                "is_init": torch.full((len(observations), 1), step == 0),
            },
            batch_size=[len(observations)],
        )
        rows.append(policy(data).detach())
        hidden = rows[-1]["next", "recurrent_state"]
    return torch.stack(rows, 1)


def test_annotate_equals_inline_at_the_stored_hidden_states() -> None:
    actor = recurrent_actor()
    observations = torch.randn(3, 6, 4, dtype=torch.float64)
    method = Compose(
        ActivationCaching("module.0.module.1.module"),
        Saliency(target=targets.chosen_logit(), inputs=["observation"], when="step", attribution_key="live"),
        Saliency(target=targets.chosen_logit(), inputs=["observation"]),
    )
    with method.prepare(actor) as hooked:
        data = step_by_step(hooked, observations)
        found = hooked.annotate(data)
    torch.testing.assert_close(found["attr", "observation"], found["live", "observation"])
    # By hand: one step of one trajectory, its hidden state a constant.
    row = data[1, 4]
    x = row["observation"].clone().requires_grad_()
    one = TensorDict(
        {"observation": x, "recurrent_state": row["recurrent_state"], "is_init": row["is_init"]}, batch_size=[]
    )
    logit = actor.get_dist_params(one)["logits"][row["action"]]
    torch.testing.assert_close(found["attr", "observation"][1, 4], torch.autograd.grad(logit, x)[0])


def test_recurrent_mode_is_refused_rather_than_merged() -> None:
    actor = recurrent_actor()
    data = step_by_step(actor, torch.randn(3, 6, 4, dtype=torch.float64))
    with Saliency(inputs=["observation"]).prepare(actor) as hooked, set_recurrent_mode(True):
        with pytest.raises(InputError, match="mix trajectories in recurrent mode"):
            hooked.annotate(data)

"""Time is not batch: recurrent policies are explained row by row at their stored hidden state."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torch.distributions import Categorical
from torchrl.modules import GRUModule, LSTMModule, ProbabilisticActor, set_recurrent_mode

from tdhook_rl import ActivationCaching, Compose, Saliency, targets
from tdhook_rl.attribution import DimsConfig, GradCAM
from tdhook_rl.errors import InputError
from tests.policies import categorical


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


def test_rows_are_explained_at_their_stored_states_also_in_recurrent_mode() -> None:
    actor = recurrent_actor()
    data = step_by_step(actor, torch.randn(3, 6, 4, dtype=torch.float64))
    method = Saliency(inputs=["observation"])
    with method.prepare(actor) as hooked:
        expected = hooked.annotate(data)["attr", "observation"]
        with set_recurrent_mode(True):
            found = hooked.annotate(data)["attr", "observation"]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["gru", "lstm"])
@pytest.mark.parametrize("reset_at", [None, 3])
def test_the_trajectory_horizon_runs_through_time_and_stops_at_resets(kind: str, reset_at: int | None) -> None:
    actor, unroll = recurrent_pair(kind)
    steps = 6
    observations = torch.randn(2, steps, 4, dtype=torch.float64)
    is_init = torch.zeros(2, steps, 1, dtype=torch.bool)
    is_init[:, 0] = True
    if reset_at is not None:
        is_init[1, reset_at] = True
    actions = torch.randint(0, 3, (2, steps))
    states = {
        name: torch.zeros(2, steps, 1, 8, dtype=torch.float64) for name in actor.in_keys if "recurrent" in str(name)
    }
    data = TensorDict(
        {"observation": observations, "is_init": is_init, "action": actions, **states}, batch_size=[2, steps]
    )
    method = Saliency(target=targets.chosen_logit(), inputs=["observation"], horizon="trajectory")
    with method.prepare(actor) as hooked:
        found = hooked.annotate(data)
        one_by_one = torch.stack([hooked.annotate(row)["attr", "observation"] for row in data])
        chunked = hooked.annotate(data, chunk_size=1)["attr", "observation"]
    x = observations.clone().requires_grad_()
    logits = unroll(x, is_init)
    expected = torch.autograd.grad(logits.gather(-1, actions[..., None]).sum(), x)[0]
    torch.testing.assert_close(found["attr", "observation"], expected)
    torch.testing.assert_close(one_by_one, expected)
    torch.testing.assert_close(chunked, expected)
    if reset_at is not None:  # nothing decided after the reset rests on what was seen before it
        late = torch.autograd.grad(unroll(x, is_init)[1, reset_at:].sum(), x)[0][1]
        assert float(late[:reset_at].abs().max()) == 0.0


def recurrent_pair(kind: str):
    """A recurrent policy, and the same unrolled by hand with resets."""
    module = {"gru": GRUModule, "lstm": LSTMModule}[kind]
    rnn = module(input_size=4, hidden_size=8, in_key="observation", out_key="hidden")
    head = TensorDictModule(nn.Linear(8, 3), in_keys=["hidden"], out_keys=["logits"])
    net = TensorDictSequential(rnn, head)
    actor = ProbabilisticActor(net, in_keys=["logits"], distribution_class=Categorical, return_log_prob=True).double()
    core = rnn.gru if kind == "gru" else rnn.lstm

    def unroll(x: torch.Tensor, is_init: torch.Tensor) -> torch.Tensor:
        rows = []
        for trajectory, resets in zip(x, is_init, strict=True):
            state, outputs = None, []
            for step, reset in zip(trajectory, resets, strict=True):
                state = None if bool(reset) else state
                output, state = core(step[None, None], state)
                outputs.append(head.module(output[0, 0]))
            rows.append(torch.stack(outputs))
        return torch.stack(rows)

    return actor, unroll


def test_the_trajectory_horizon_of_a_feed_forward_policy_is_its_step() -> None:
    actor = categorical()
    data = actor(TensorDict({"observation": torch.randn(3, 5, 6)}, batch_size=[3, 5]))
    for horizon in ("step", "trajectory"):
        with Saliency(horizon=horizon).prepare(actor) as hooked:
            data[horizon] = hooked.annotate(data)["attr", "observation"]
    torch.testing.assert_close(data["step"], data["trajectory"])


def test_what_the_trajectory_horizon_cannot_do_is_refused() -> None:
    with pytest.raises(InputError, match="which no step knows"):
        Saliency(horizon="trajectory", when="step")
    with pytest.raises(InputError, match="has the horizons 'step'"):
        GradCAM(modules_to_attribute={"0": DimsConfig()}, horizon="trajectory")
    with Saliency(horizon="trajectory").prepare(categorical()) as hooked:
        with pytest.raises(InputError, match="no batch dimension"):
            hooked.annotate(hooked(TensorDict({"observation": torch.randn(6)}, batch_size=[])))

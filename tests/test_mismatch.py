"""annotate says so when the policy that explains is not the policy that acted."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Module
from tensordict.nn import TensorDictSequential
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import Categorical, Composite
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import NoisyLinear, QValueActor, QValueModule

from tdhook_rl import ActivationCaching, Compose, Saliency, SteeringVectors
from tdhook_rl.attribution import IntegratedGradients, Occlusion
from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import InputError, MismatchError
from tdhook_rl.examples.agent import FC2, make_actor
from tests.policies import CASES, categorical


def collected(policy: nn.Module, rows: int = 8) -> TensorDict:
    with torch.no_grad():
        return policy(CASES["categorical"].data(rows))


METHODS = [
    Saliency(),
    Saliency(input_modules=["module.0.module.1"]),
    IntegratedGradients(baseline=0.0, n_steps=4),
    Occlusion(),
    ActivationCaching("module.0.module.1"),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_changed_weights_are_said_and_equal_ones_are_not(method, mode) -> None:
    actor = categorical()
    data = collected(actor)
    with method.prepare(actor) as hooked, mode():
        hooked.annotate(data)  # warnings are errors here
        hooked.annotate(data.reshape(2, 4), on_mismatch="raise")
        with torch.no_grad():
            actor.module[0].module[0].bias.add_(0.5)
        with pytest.raises(MismatchError, match=r"stored 'logits' of 8 of 8 rows"):
            hooked.annotate(data, on_mismatch="raise")
        with pytest.warns(UserWarning, match="8 of 8 rows"):
            found = hooked.annotate(data)
        hooked.annotate(data)  # once is enough
    assert set(found.keys(True, True)) > set(data.keys(True, True))


def test_it_is_ignored_where_that_is_asked() -> None:
    actor = categorical()
    data = collected(actor)
    with torch.no_grad():
        actor.module[0].module[0].bias.add_(0.5)
    with Saliency().prepare(actor) as hooked:
        hooked.annotate(data, on_mismatch="ignore")
        with pytest.raises(InputError, match="nearest: 'ignore'"):
            hooked.annotate(data, on_mismatch="ignor")


def test_rows_are_counted() -> None:
    actor = categorical()
    data = collected(actor)
    data["logits"] = data["logits"].clone()
    data["logits"][3:5] += 0.1
    with Saliency().prepare(actor) as hooked, pytest.raises(MismatchError, match=r"2 of 8 rows .* 0\.1"):
        hooked.annotate(data, on_mismatch="raise", chunk_size=3)


def test_dropout_and_other_interventions_are_noticed() -> None:
    actor = categorical()
    actor.module[0].module.insert(2, nn.Dropout(0.5))
    with Saliency().prepare(actor) as hooked, pytest.raises(MismatchError, match="dropout"):
        hooked.annotate(collected(actor), on_mismatch="raise")
    actor = categorical()
    method = Compose(SteeringVectors({"module.0.module.1": torch.ones(16)}, alpha=1.0), Saliency())
    with method.prepare(actor) as hooked:
        data = hooked(CASES["categorical"].data(8))
        hooked.annotate(data, on_mismatch="raise")
        hooked.controls["steering.alpha"] = 0.5
        with pytest.raises(MismatchError, match="interventions"):
            hooked.annotate(data, on_mismatch="raise")


def test_random_frames_are_no_mismatch_and_versions_are_named() -> None:
    actor = make_actor()
    with Compose(Saliency(), ActivationCaching(FC2)).prepare(actor) as policy:
        collector = Collector(
            CueCorners(batch_size=[4], seed=0),
            policy,
            postproc=policy.annotate,
            frames_per_batch=32,
            total_frames=96,
            init_random_frames=32,
            track_policy_version=True,
            auto_register_policy_transforms=False,
        )
        batches = []
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            for data in collector:
                batches.append(data.clone())
                collector.update_policy_weights_()
        assert batches[0]["logits"].abs().max() == 0
        with torch.no_grad():
            next(actor.parameters()).add_(0.1)
        with pytest.raises(MismatchError, match="under policy version"):
            policy.annotate(batches[-1].exclude("attr", "cache", "computed"), on_mismatch="raise")
        collector.shutdown()


NETS = {  # of these the first is a chain of known layers, of which the choice is made without a call of its module
    "a chain": lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)),
    "no chain": lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4), nn.Softsign()),
}
CHOICES = {
    "one-hot": {"action_space": "one-hot"},
    "indices": {"action_space": "categorical"},
    "two choices": {"action_space": "mult-one-hot", "var_nums": [3, 1]},
    "of a spec": {"spec": Composite(action=Categorical(4))},
    "of a spec with a dimension": {"spec": Composite(action=Categorical(4, shape=(1,))), "strict_shape": "auto"},
    "of a hooked module": {"action_space": "one-hot"},
}


@pytest.mark.parametrize("method", [Saliency(), IntegratedGradients(baseline=0.0, n_steps=4), Occlusion()])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("net", NETS)
def test_each_output_of_a_q_network_is_compared(net: str, choice: str, method: Any) -> None:
    trunk = Module(NETS[net](), ["observation"], ["action_value"])
    head = QValueModule(**CHOICES[choice])
    if choice == "of a hooked module":
        head.register_forward_hook(lambda module, args, output: output.set("action", output["action"].flip(-1)))
    policy = TensorDictSequential(trunk, head)
    data = TensorDict({"observation": torch.randn(6, 4).round()}, 6)
    data["observation"][2] = data["observation"][1]
    with torch.no_grad():
        data = policy(data)
    with method.prepare(policy) as hooked:
        for batch in ([6], [2, 3]):
            hooked.annotate(data.reshape(batch), on_mismatch="raise")
        for key in policy.out_keys:
            other = data.clone()
            row = other[key][3]
            index = not row.is_floating_point() and row.numel() == 1
            other[key][3] = (row + 1) % 4 if index else row.flip(-1) + 0.5 * row.is_floating_point()
            with pytest.raises(MismatchError, match="of 1 of 6 rows"):
                hooked.annotate(other, on_mismatch="raise")


def test_the_end_of_a_path_is_compared_whatever_its_length() -> None:
    actor = categorical()
    data = collected(actor)
    with IntegratedGradients(baseline=-3e38, n_steps=4).prepare(actor) as hooked:
        far = data.clone()
        far["observation"] = far["observation"] + 1e38  # the way there is longer than any number
        with torch.no_grad():
            far = actor(far)
        hooked.annotate(far, on_mismatch="raise")


def test_noise_that_is_there_while_exploring_only_is_named_and_is_there_under_the_same_type() -> None:
    net = nn.Sequential(NoisyLinear(5, 8), nn.Tanh(), NoisyLinear(8, 3))
    policy = QValueActor(net, in_keys=["observation"], action_space="categorical")
    data = TensorDict({"observation": torch.randn(6, 5)}, [6])
    with Saliency().prepare(policy) as hooked:
        with set_exploration_type(ExplorationType.RANDOM):
            batch = hooked(data).detach()
            found = hooked.annotate(batch.clone(), on_mismatch="raise")
            x = batch["observation"].clone().requires_grad_()
            [expected] = torch.autograd.grad(net(x).gather(-1, batch["action"][:, None]).sum(), x)
        with pytest.raises(MismatchError, match=r"'module.0.module.0' adds its noise.*set_exploration_type"):
            hooked.annotate(batch.clone(), on_mismatch="raise")
    torch.testing.assert_close(found["attr", "observation"], expected)

"""Task vectors: exact arithmetic, and the choice of alpha."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.collectors import Collector
from torchrl.modules import BatchRenorm1d

from tdhook_rl import Compose
from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import InactiveError, InputError, PreparationError
from tdhook_rl.examples.agent import make_actor
from tdhook_rl.weights import TaskVectors
from tests.policies import CASES, HIDDEN, categorical, mlp
from tests.test_weights import assert_bits, bits, shifted


def test_task_and_forget_vectors() -> None:
    net = CASES["pixels"].build()
    finetuned = shifted(net)
    with TaskVectors().prepare(net) as hooked:
        task, forget = hooked.get_task_vector(finetuned), hooked.get_forget_vector(finetuned.state_dict())
        assert list(task.keys()) == list(net.state_dict())
        for name, weight in net.state_dict().items():
            assert torch.equal(task[name], finetuned.state_dict()[name] - weight)
            assert torch.equal(forget[name], -task[name])
            assert not task[name].requires_grad
        data = CASES["pixels"].data(3)
        with hooked.with_applied_vectors(task, alpha=1.0) as applied:
            assert applied is hooked
            torch.testing.assert_close(hooked(data.clone())["logits"], finetuned(data.clone())["logits"])
            assert all(p.requires_grad and p.is_leaf for p in hooked.parameters())
        weights = hooked.get_weights(task, forget, task, alpha=0.5)
        for name, weight in net.state_dict().items():
            torch.testing.assert_close(weights[name], weight + 0.5 * task[name])
        copy.deepcopy(net).load_state_dict(weights)


def test_adding_and_subtracting_a_vector_is_the_identity() -> None:
    actor = categorical()
    with torch.no_grad():
        actor.module[0].module[0].bias.fill_(-0.0)
    values = bits(actor)
    with TaskVectors().prepare(actor) as hooked:
        finetuned = shifted(actor, 3.0)
        task, forget = hooked.get_task_vector(finetuned), hooked.get_forget_vector(finetuned)
        other = hooked.get_task_vector(shifted(actor, 0.2))
        for name, value in hooked.get_weights(task, forget, alpha=0.7).items():
            assert torch.equal(value.view(torch.int32), values[name].view(torch.int32))
        with hooked.with_applied_vectors(task, alpha=0.7):
            once = bits(hooked)
            with hooked.with_applied_vectors(forget, alpha=0.7):
                for name, value in hooked.state_dict().items():
                    assert torch.equal(value.view(torch.int32), values[name].view(torch.int32))
            assert_bits(hooked, once)
            with hooked.with_applied_vectors(other, alpha=0.0):
                assert_bits(hooked, once)
            # A vector is a difference from the policy, whatever is applied at the time.
            for name, change in hooked.get_task_vector(actor).items():
                assert not change.any(), name
        for mine, theirs in zip(hooked.parameters(), actor.parameters(), strict=True):
            assert mine is theirs
        # Outside it follows training.
        with torch.no_grad():
            actor.module[0].module[0].bias.add_(1.0)
        assert torch.equal(hooked.module[0].module[0].bias, actor.module[0].module[0].bias)


def test_running_statistics_are_weights() -> None:
    def build() -> nn.Sequential:
        return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).eval()

    net, finetuned = build(), build()
    finetuned[1].running_mean.add_(2.0)
    finetuned[1].num_batches_tracked.add_(5)
    x = torch.randn(7, 6)
    with TaskVectors().prepare(net) as hooked:
        vector = hooked.get_task_vector(finetuned)
        assert list(vector.keys()) == ["0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"]
        with hooked.with_applied_vectors(vector, alpha=1.0):
            torch.testing.assert_close(hooked(input=x), finetuned(x))
        assert hooked.module[1].running_mean is net[1].running_mean


def test_the_best_adequate_alpha() -> None:
    net = nn.Linear(1, 1, bias=False)
    tried = []

    def distance(hooked: nn.Module) -> float:
        tried.append(round((hooked.module.weight - net.weight).item(), 4))
        return -abs(tried[-1] - 0.6)

    method = TaskVectors((0.0, 0.25, 0.5, 0.75, 1.0), distance, lambda hooked: hooked.module.weight < net.weight + 0.6)
    with method.prepare(net) as hooked:
        vector = hooked.get_task_vector({"weight": net.weight + 1.0})
        assert hooked.compute_alpha(vector) == 0.5  # 0.75 is as near, but not adequate
        assert tried == [0.0, 0.25, 0.5]
        torch.testing.assert_close(hooked.get_weights(vector)["weight"], net.weight.detach() + 0.5)
        with hooked.with_applied_vectors(vector):
            torch.testing.assert_close(hooked.module.weight, net.weight + 0.5)
        assert hooked.module.weight is net.weight
        twin = pickle.loads(pickle.dumps(hooked))
        assert twin.compute_alpha.__self__._policy is twin
    with (
        TaskVectors((0.0, 0.25), distance, lambda hooked: False).prepare(net) as hooked,
        pytest.raises(InputError, match=r"accepted none of the alphas \(0\.0, 0\.25\)"),
    ):
        hooked.compute_alpha(vector)
    # Equal accuracies: the first.
    with TaskVectors([0.3, 0.1], lambda hooked: 1.0).prepare(net) as hooked:
        assert hooked.compute_alpha(vector) == 0.3


def test_returns_of_rollouts_choose_alpha() -> None:
    actor = make_actor()
    values = bits(actor)

    def returns(hooked: nn.Module) -> float:
        torch.manual_seed(0)
        data = CueCorners(batch_size=[8], seed=0).rollout(6, hooked, break_when_any_done=False)
        return float(data["next", "reward"].mean())

    with TaskVectors((0.0, 1.0), returns).prepare(actor) as hooked:
        vector = hooked.get_task_vector(shifted(actor))
        assert hooked.compute_alpha(vector) in (0.0, 1.0)
        collector = Collector(
            CueCorners(batch_size=[2], seed=0),
            hooked,
            frames_per_batch=8,
            total_frames=8,
            auto_register_policy_transforms=False,
        )
        with hooked.with_applied_vectors(vector, alpha=1.0):
            moved = copy.deepcopy(actor)
            moved.load_state_dict(hooked.get_weights(vector, alpha=1.0))
            data = next(iter(collector))
            torch.testing.assert_close(data["logits"], moved(data.clone())["logits"])
        collector.shutdown()
    assert_bits(actor, values)


def test_bad_task_vectors_are_refused() -> None:
    net = mlp()
    method = TaskVectors(alphas=(1.0,), get_test_accuracy=lambda hooked: float("nan"))
    with method.prepare(net) as hooked:
        vector = hooked.get_task_vector(shifted(net))
        weights = dict(net.state_dict())
        lacking = {name: value for name, value in weights.items() if name != "2.bias"}
        for given, message in (
            (lacking, r"the fine-tuned weights lack '2\.bias'; nearest"),
            (weights | {"5.bias": torch.ones(2)}, r"the policy lacks '5\.bias'; nearest"),
            (weights | {"0.bias": torch.ones(2)}, r"'0\.bias' has shape \(2,\), but the policy's has \(16,\)"),
            (weights | {"0.bias": torch.full((HIDDEN,), float("inf"))}, "NaN or infinite"),
            (3, "a module, a state dict or a TensorDict, got a int"),
        ):
            with pytest.raises(InputError, match=message):
                hooked.get_task_vector(given)
        with pytest.raises(InputError, match=r"the vector lacks '0\.weight'"):
            hooked.get_weights({}, alpha=1.0)
        with pytest.raises(InputError, match="at least one vector"):
            hooked.get_weights(alpha=1.0)
        with pytest.raises(InputError, match="finite number"):
            hooked.get_weights(vector, alpha=float("nan"))
        with pytest.raises(InputError, match=r"returned NaN at alpha 1\.0"):
            hooked.compute_alpha(vector)
    with pytest.raises(InactiveError):
        hooked.get_task_vector(net)
    with TaskVectors().prepare(net) as hooked, pytest.raises(InputError, match="no alpha was given"):
        hooked.get_weights(vector)
    with pytest.raises(PreparationError, match="get_task_vector"):
        Compose(TaskVectors(), TaskVectors()).prepare(net).__enter__()
    with pytest.raises(InputError, match="finite number"):
        TaskVectors(alphas=("a",))


@pytest.mark.parametrize("layer", [nn.BatchNorm1d, BatchRenorm1d], ids=lambda one: one.__name__)
def test_variances_that_would_be_negative_are_refused(layer: type[nn.Module]) -> None:
    """Of what fine-tuning has more than doubled, the forget vector leaves none: outputs were NaN without a word."""
    net = nn.Sequential(nn.Linear(3, 4), layer(4), nn.Linear(4, 2)).eval()
    finetuned = copy.deepcopy(net)
    finetuned[1].running_var[2] = 5.0
    data = TensorDict({"input": torch.randn(6, 3)}, 6)
    with TaskVectors(alphas=(0.1,), get_test_accuracy=lambda policy: 1.0).prepare(net) as hooked:
        forget = hooked.get_forget_vector(finetuned)
        for ask in (lambda: hooked.get_weights(forget, alpha=1.0), lambda: enter(hooked, forget)):
            with pytest.raises(InputError, match=r"'1.running_var' would be -3 .*at most 0.25 times this change"):
                ask()
        with hooked.with_applied_vectors(forget):  # a smaller alpha
            assert bool(hooked(data.clone())["output"].isfinite().all())
        with hooked.with_applied_vectors(hooked.get_task_vector(finetuned), alpha=1.0):
            torch.testing.assert_close(hooked(data.clone())["output"], finetuned(data["input"]))
        assert bool(hooked(data)["output"].isfinite().all())


def enter(hooked: Any, vector: TensorDict) -> None:
    with hooked.with_applied_vectors(vector, alpha=1.0):
        pass

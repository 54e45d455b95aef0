"""Methods that change weights: what they leave alone, and where the changed policy runs."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from contextlib import nullcontext

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.collectors import Collector
from torchrl.modules import MultiAgentMLP

from tdhook_rl import ActivationCaching, Compose, Saliency
from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import InputError
from tdhook_rl.examples.agent import FC2, make_actor
from tdhook_rl.weights import Adapters, Pruning, TaskVectors
from tests.policies import CASES, mlp
from tests.test_invariants import Broken, snapshot

CASE = CASES["categorical"]
every_policy = pytest.mark.parametrize("policy", CASES)


def bits(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def assert_bits(module: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def shifted(module: nn.Module, amount: float = 0.1) -> nn.Module:
    other = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(amount * torch.randn_like(parameter))
    return other


METHODS = {
    "pruning": lambda case: Pruning(amount_to_prune=0.5),
    "slices": lambda case: Pruning(modules_to_prune={r".*": (0, 1)}),
    "adapters": lambda case: Adapters({"a.b": (lambda x: x + 1.0, case.site, case.site)}),
    "task_vectors": lambda case: TaskVectors(),
}


@pytest.mark.parametrize("method", METHODS)
@every_policy
def test_the_users_policy_keeps_its_tensors(method: str, policy: str) -> None:
    case = CASES[policy]
    plain = case.build()
    before, values = snapshot(plain), bits(plain)
    keys = list(plain.state_dict())
    structure = list(TensorDict.from_module(plain).keys(True, True))
    context = METHODS[method](case).prepare(plain)

    def use(fail: bool) -> None:
        with context as hooked:
            hooked(case.data(4))
            assert list(hooked.state_dict()) == keys
            assert list(TensorDict.from_module(hooked).keys(True, True)) == structure
            if method == "task_vectors":
                with hooked.with_applied_vectors(hooked.get_task_vector(shifted(plain)), alpha=1.0):
                    hooked(case.data(4))
                    assert list(TensorDict.from_module(hooked).keys(True, True)) == structure
                    assert snapshot(plain) == before
                    if fail:
                        raise ZeroDivisionError
            assert snapshot(plain) == before
            if fail:
                raise ZeroDivisionError

    use(False)
    with pytest.raises(ZeroDivisionError):
        use(True)
    assert snapshot(plain) == before
    assert_bits(plain, values)


@pytest.mark.parametrize("method", METHODS)
def test_a_raising_model_leaves_the_weights(method: str) -> None:
    plain = CASES["value"].build()
    plain.module.append(Broken())
    before, values = snapshot(plain), bits(plain)
    with METHODS[method](CASES["value"]).prepare(plain) as hooked, pytest.raises(ZeroDivisionError):
        hooked(CASES["value"].data(3))
    assert snapshot(plain) == before
    assert_bits(plain, values)


@pytest.mark.parametrize("method", METHODS)
@every_policy
def test_copies_keep_the_change(method: str, policy: str) -> None:
    case = CASES[policy]
    plain, data = case.build(), case.data(4)
    with METHODS[method](case).prepare(plain) as hooked:
        torch.manual_seed(3)
        expected = hooked(data.clone())
        for twin in (pickle.loads(pickle.dumps(hooked)), copy.deepcopy(hooked)):
            torch.manual_seed(3)
            found = twin(data.clone())
            assert_bits(twin, bits(hooked))
            for key in expected.keys(True, True):
                assert torch.equal(found[key], expected[key]), key


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.again = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(self.second(self.first(x)))


def test_tied_parameters_are_counted_once_and_stay_tied() -> None:
    net = Tied()
    x = torch.randn(3, 6)
    with Pruning(amount_to_prune=0.5).prepare(net) as hooked:
        found = hooked.module
        assert found.first.weight is found.second.weight
        assert found.again is found.first
        assert int((found.first.weight == 0).sum()) == 18
        assert list(hooked.state_dict()) == [f"module.{name}" for name in net.state_dict()]
        expected = copy.deepcopy(net)
        expected.load_state_dict({k.removeprefix("module."): v for k, v in hooked.state_dict().items()})
        assert torch.equal(hooked(input=x), expected(x))
    with TaskVectors().prepare(net) as hooked:
        with hooked.with_applied_vectors(hooked.get_task_vector(shifted(net)), alpha=1.0):
            assert hooked.module.first.weight is hooked.module.second.weight
        untied = {name: torch.randn_like(value) for name, value in net.state_dict().items()}
        with (
            pytest.raises(InputError, match="tied to another weight"),
            hooked.with_applied_vectors(hooked.get_task_vector(untied), alpha=1.0),
        ):
            pass
        assert hooked.module.first.weight is net.first.weight


@pytest.mark.parametrize("method", ["pruning", "task_vectors"])
def test_recurrent_layers_compute_with_the_new_weights(method: str) -> None:
    lstm = nn.LSTM(3, 4, batch_first=True)
    x = torch.randn(2, 5, 3)
    twin = copy.deepcopy(lstm)
    before = lstm(x)[0]
    module = METHODS[method](CASE).prepare(lstm, out_keys=["output", "state"])
    with module as hooked:
        vector = hooked.get_task_vector(shifted(lstm)) if method == "task_vectors" else None
        with hooked.with_applied_vectors(vector, alpha=1.0) if vector is not None else nullcontext():
            twin.load_state_dict({k.removeprefix("module."): v for k, v in hooked.state_dict().items()})
            assert torch.equal(hooked(input=x)[0], twin(x)[0])
            assert not torch.equal(hooked(input=x)[0], before)
        if vector is not None:
            assert torch.equal(hooked(input=x)[0], before)
    assert torch.equal(lstm(x)[0], before)


def test_parameters_held_in_a_tensordict() -> None:
    # MultiAgentMLP keeps a TensorDictParams, which the clone shares with the original.
    net = MultiAgentMLP(3, 2, 2, centralized=False, share_params=False, depth=1, num_cells=4)
    module = TensorDictModule(net, in_keys=["x"], out_keys=["y"])
    x = torch.randn(5, 2, 3)
    values, params, locked = bits(module), net.params, net.params.is_locked
    expected = copy.deepcopy(module)
    with Pruning(amount_to_prune=0.5).prepare(module) as hooked:
        assert sum(int((p == 0).sum()) for n, p in hooked.named_parameters() if "weight" in n) == 20
        assert list(hooked.state_dict()) == list(values)
        expected.load_state_dict(hooked.state_dict())
        assert torch.equal(hooked(x=x), expected(x=x))
        assert hooked.module.params is not params
        assert hooked.module.params.is_locked is locked
        twin = pickle.loads(pickle.dumps(hooked))
        assert torch.equal(twin(x=x), expected(x=x))
    with TaskVectors().prepare(module) as hooked:
        other = shifted(module)
        with hooked.with_applied_vectors(hooked.get_task_vector(other), alpha=1.0):
            torch.testing.assert_close(hooked(x=x), other(x=x))
        assert hooked.module.params is params
    assert net.params is params
    assert_bits(module, values)


def test_rollouts_and_collectors() -> None:
    actor = make_actor()
    values = bits(actor)
    method = Compose(
        Pruning(amount_to_prune=0.7), Adapters({"a": (torch.tanh, FC2, FC2)}), ActivationCaching(FC2), Saliency()
    )
    with method.prepare(actor) as policy:
        pruned = copy.deepcopy(actor)
        pruned.load_state_dict(policy.state_dict())
        net = pruned.module[0].module
        env = CueCorners(batch_size=[2], seed=0)
        data = env.rollout(6, policy, break_when_any_done=False)
        torch.testing.assert_close(data["cache", FC2], torch.tanh(net[:4](data["observation"])))
        collector = Collector(
            CueCorners(batch_size=[4], seed=0),
            policy,
            frames_per_batch=32,
            total_frames=64,
            postproc=policy.annotate,
            auto_register_policy_transforms=False,
        )
        for data in collector:
            hidden = torch.tanh(net[:4](data["observation"]))
            torch.testing.assert_close(data["cache", FC2], hidden)
            torch.testing.assert_close(data["logits"], net[4:](hidden))
            collector.update_policy_weights_()
            assert_bits(policy, bits(pruned))
        collector.shutdown()
    assert_bits(actor, values)


def test_methods_compose_on_the_same_weights() -> None:
    net = mlp()
    twice = Compose(Pruning(amount_to_prune=10, modules_to_prune=["0"]), Pruning(amount_to_prune=30), TaskVectors())
    with twice.prepare(net) as hooked:
        # The zeros of the first are the lowest scores of the second.
        weights = [hooked.module[i].weight for i in (0, 2, 4)]
        assert sum(int((weight == 0).sum()) for weight in weights) == 30
        assert int((weights[0] == 0).sum()) >= 10
        vector = hooked.get_task_vector(net)
        assert torch.equal(vector["0.weight"] != 0, weights[0] == 0)
        with hooked.with_applied_vectors(vector, alpha=1.0):
            torch.testing.assert_close(hooked.module[0].weight, net[0].weight)
        assert hooked.module[0].weight is weights[0]


def test_a_hooked_policy_is_freed() -> None:
    with Compose(Pruning(amount_to_prune=3), TaskVectors()).prepare(mlp()) as hooked:
        hooked(input=torch.randn(2, 6))
        held = weakref.ref(hooked)
    del hooked
    gc.collect()
    assert held() is None

"""Losses and value estimators: untouched beside a hooked policy; of a hooked one on purpose they are steered."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.distributions import Categorical
from torchrl.collectors import Collector
from torchrl.modules import ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss, LossModule, SoftUpdate
from torchrl.objectives.value import GAE, TD0Estimator, TD1Estimator, TDLambdaEstimator

from tdhook_rl import ActivationCaching, Compose, LinearProbe, ProbeReadout, Saliency, SteeringVectors
from tdhook_rl.errors import SiteError
from tdhook_rl.method import Method
from tests.loss_cases import LOSSES, LossCase, Modules, Nets
from tests.policies import HIDDEN

ESTIMATORS = {
    "gae": lambda critic: GAE(gamma=0.9, lmbda=0.8, value_network=critic),
    "td0": lambda critic: TD0Estimator(gamma=0.9, value_network=critic),
    "td1": lambda critic: TD1Estimator(gamma=0.9, value_network=critic),
    "td_lambda": lambda critic: TDLambdaEstimator(gamma=0.9, lmbda=0.8, value_network=critic),
}
EVERY_LOSS = pytest.mark.parametrize("name", LOSSES)


class Shift(nn.Module):
    """A steering vector by hand."""

    def __init__(self, vector: Tensor) -> None:
        super().__init__()
        self.__dict__["vector"] = vector  # neither a parameter nor a buffer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.vector


def vector(seed: int) -> Tensor:
    return torch.randn(HIDDEN, generator=torch.Generator().manual_seed(seed))


def methods(case: LossCase, name: str, alpha: float, prefix: str = "") -> Method:
    """Everything at the first activation of a module."""
    site = prefix + case.sites[name]
    probe = LinearProbe(weight=torch.randn(2, HIDDEN), bias=torch.zeros(2), path=site)
    return Compose(
        ActivationCaching(site),
        ProbeReadout({"concept": probe}),
        SteeringVectors({site: vector(len(name))}, alpha=alpha),
        Saliency(when="step", inputs=["observation"]),
    )


def steered_by_hand(nets: Nets, names: set[str]) -> Nets:
    """The same nets, with the same parameters, in which a module adds the vector."""
    return {
        name: nn.Sequential(net[0], net[1], Shift(vector(len(name))), *net[2:]) if name in names else net
        for name, net in nets.items()
    }


def gathered(case: LossCase, modules: Modules) -> TensorDict:
    """Data of the plain policy, with an advantage where the loss reads one."""
    torch.manual_seed(11)
    with torch.no_grad():
        data = case.env().rollout(6, case.explore(modules["actor"]), break_when_any_done=False)
    if case.advantage:
        GAE(gamma=0.9, lmbda=0.8, value_network=modules["critic"])(data)
    return data.reshape(-1)


def evaluated(loss: LossModule, data: TensorDictBase) -> tuple[TensorDict, list[Tensor | None]]:
    """The losses and their gradients, of all parameters in the order of the loss."""
    torch.manual_seed(12)
    loss.zero_grad()
    found = loss(data.clone())
    sum(value for key, value in found.items() if key.startswith("loss")).backward()
    gradients = [None if p.grad is None else p.grad.clone() for p in loss.parameters()]
    return found.detach(), gradients


def assert_bits(found: Any, expected: Any) -> None:
    """The same, bit for bit: TensorDicts, lists, tensors and ``None``."""
    if isinstance(expected, (TensorDictBase, dict)):
        assert set(found.keys()) == set(expected.keys())
        for key in expected.keys():
            assert_bits(found[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        for one, other in zip(found, expected, strict=True):
            assert_bits(one, other)
    elif expected is None:
        assert found is None
    else:
        assert torch.equal(found, expected)


def hooks_of_ours(loss: LossModule) -> list[Any]:
    """Hooks of tdhook_rl on a loss, its networks and its target parameters."""
    networks = [value for value in vars(loss).values() if isinstance(value, nn.Module)]
    assert networks
    found = []
    for child in (child for module in (loss, *networks) for child in module.modules()):
        for store in (child._forward_hooks, child._forward_pre_hooks, child._backward_hooks):
            found += [
                hook for hook in store.values() if "tdhook_rl" in type(getattr(hook, "__self__", hook)).__module__
            ]
    return found


def train(case: LossCase, hook: bool) -> list[Any]:
    """Three updates; with or without a hooked policy that collects and hooked modules in use beside the loss."""
    _, modules = case.build()
    explore = case.explore(modules["actor"])
    wrapped = "module.0." if explore is not modules["actor"] else ""
    record: list[Any] = []
    with ExitStack() as stack:
        acting, critic = explore, None
        if hook:
            acting = stack.enter_context(methods(case, "actor", 0.0, wrapped).prepare(explore))
            for name, module in modules.items():
                if name != "actor":
                    critic = stack.enter_context(methods(case, name, 2.0).prepare(module))
        torch.manual_seed(5)
        loss = case.loss(modules)
        record.append(list(loss.state_dict()))
        updater = SoftUpdate(loss, tau=0.1) if any(k.startswith("target_") for k in loss.state_dict()) else None
        optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
        advantage = GAE(gamma=0.9, lmbda=0.8, value_network=modules["critic"]) if case.advantage else None
        options = {"postproc": acting.annotate} if hook else {}
        collector = Collector(case.env(), acting, frames_per_batch=24, total_frames=72, **options)
        for data in collector:
            assert not hook or bool(data["computed", "cache"].all())
            data = data.exclude("cache", "attr", "probe", "computed")
            if critic is not None:
                critic(data.clone())
            if advantage is not None:
                advantage(data)
            found = loss(data.reshape(-1))
            sum(value for key, value in found.items() if key.startswith("loss")).backward()
            gradients = [p.grad.clone() for p in loss.parameters() if p.grad is not None]
            optimizer.step()
            optimizer.zero_grad()
            if updater is not None:
                updater.step()
            record += [data.clone(), found.detach().clone(), gradients]
            assert not hooks_of_ours(loss)
            assert not hook or not acting._hooked.runtime.slots
        collector.shutdown()
        copy.deepcopy(loss)
    record.append({key: value.clone() for key, value in loss.state_dict().items() if isinstance(value, Tensor)})
    return record


@EVERY_LOSS
def test_training_beside_a_hooked_policy_is_the_plain_training(name: str) -> None:
    expected, found = train(LOSSES[name], hook=False), train(LOSSES[name], hook=True)
    assert found[0] == expected[0]
    assert_bits(found[1:], expected[1:])


@pytest.mark.parametrize(
    ("name", "steered"),
    [
        pytest.param(name, steered, id=f"{name}-{'+'.join(steered)}")
        for name, case in LOSSES.items()
        for steered in (("actor",), ("critic",), ("actor", "critic"))
        if set(steered) <= set(case.sites)
    ],
)
def test_the_loss_of_a_hooked_module_is_that_of_the_net_steered_by_hand(name: str, steered: tuple[str, ...]) -> None:
    case = LOSSES[name]
    nets, modules = case.build()
    data = gathered(case, modules)
    torch.manual_seed(6)
    by_hand = case.loss(case.modules(steered_by_hand(nets, set(steered))))
    expected, expected_gradients = evaluated(by_hand, data)
    torch.manual_seed(6)
    plain, _ = evaluated(case.loss(modules), data)
    with ExitStack() as stack:
        hooked = {
            key: stack.enter_context(methods(case, key, 1.0).prepare(module)) if key in steered else module
            for key, module in modules.items()
        }
        torch.manual_seed(6)
        loss = case.loss(hooked)
        assert list(loss.state_dict()) == list(case.loss(modules).state_dict())
        twin = copy.deepcopy(loss)
        found, gradients = evaluated(loss, data)
        for key in expected.keys():
            torch.testing.assert_close(found[key], expected[key])
        for one, other in zip(gradients, expected_gradients, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other)
        assert any(not torch.equal(found[key], plain[key]) for key in plain.keys())
        for key in steered:
            assert_nothing_kept(hooked[key])
        assert_bits(evaluated(twin, data)[0], found)  # a copy is steered as well
        copy.deepcopy(loss)  # after a pass as before it


def assert_nothing_kept(hooked: Any) -> None:
    runtime = hooked._hooked.runtime
    assert not runtime.slots
    assert not runtime.leaves
    assert not runtime.rows
    assert runtime.replay is None
    pickle.dumps(hooked)  # a tensor of a graph, or of a vmap, would not


class Sentinel:
    """Lives as long as the graph that it is tied to."""


SENTINELS: weakref.WeakSet[Sentinel] = weakref.WeakSet()


class Marked(nn.Module):
    """A tanh whose place in the graph can be watched."""

    def forward(self, x: Tensor) -> Tensor:
        found = x.tanh()
        if found.requires_grad:
            sentinel = Sentinel()
            SENTINELS.add(sentinel)
            found.register_hook(lambda gradient, sentinel=sentinel: None)
        return found


@EVERY_LOSS
def test_a_loss_of_hooked_modules_keeps_no_graph(name: str) -> None:
    case = LOSSES[name]
    nets, modules = case.build()
    data = gathered(case, modules)
    modules = case.modules({key: nn.Sequential(net[0], Marked(), *net[2:]) for key, net in nets.items()})
    gc.collect()
    SENTINELS.clear()
    with ExitStack() as stack:
        hooked = {key: stack.enter_context(methods(case, key, 1.0).prepare(one)) for key, one in modules.items()}
        loss = case.loss(hooked)
        found = loss(data.clone())
        assert SENTINELS
        del found
        gc.collect()
        assert not SENTINELS


@EVERY_LOSS
def test_what_a_loss_records_stays_in_the_tensordict(name: str) -> None:
    case = LOSSES[name]
    _, modules = case.build()
    data = gathered(case, modules)
    torch.manual_seed(6)
    expected = data.clone()
    case.loss(modules)(expected)
    with ExitStack() as stack:
        hooked = {key: stack.enter_context(methods(case, key, 0.0).prepare(one)) for key, one in modules.items()}
        torch.manual_seed(6)
        found = data.clone()
        case.loss(hooked)(found)
        results = {key for one in hooked.values() for key in one.result_keys}
        assert set(found.keys(True, True)) - set(expected.keys(True, True)) <= results
        for key in set(found.keys(True, True)) & results:
            assert not found[key].requires_grad
        for one in hooked.values():
            assert_nothing_kept(one)


@pytest.mark.parametrize("name", ["ppo_clip", "a2c", "reinforce", "sac", "discrete_sac"])
def test_the_steered_log_prob_of_a_loss(name: str) -> None:
    case = LOSSES[name]
    nets, modules = case.build()
    data = gathered(case, modules)
    by_hand = case.modules(steered_by_hand(nets, {"actor"}))["actor"]
    expected = by_hand.get_dist(data.clone()).log_prob(data["action"])
    with methods(case, "actor", 1.0).prepare(modules["actor"]) as hooked:
        torch.testing.assert_close(hooked.get_dist(data.clone()).log_prob(data["action"]), expected)
        torch.testing.assert_close(hooked.log_prob(data.clone()), expected)
        hooked.controls["steering.alpha"] = 0.0
        plain = modules["actor"].get_dist(data.clone()).log_prob(data["action"])
        assert torch.equal(hooked.get_dist(data.clone()).log_prob(data["action"]), plain)


def test_target_parameters_pass_through_the_hooks_too() -> None:
    # A target network is the hooked module with other parameters.
    case = LOSSES["dqn"]
    nets, modules = case.build()
    data = gathered(case, modules)
    with methods(case, "actor", 1.0).prepare(modules["actor"]) as hooked:
        loss = case.loss({"actor": hooked})
        with torch.no_grad():
            for target in loss.target_value_network_params.values(True, True):
                target.mul_(0.5)
        with loss.target_value_network_params.to_module(loss.value_network):
            found = loss.value_network(data.select("observation"))["action_value"]
    halved = copy.deepcopy(steered_by_hand(nets, {"actor"})["actor"])
    with torch.no_grad():
        for parameter in halved.parameters():
            parameter.mul_(0.5)
    torch.testing.assert_close(found, halved(data["observation"]).detach())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_value_estimators_beside_a_hooked_critic(estimator: str) -> None:
    nets, modules = LOSSES["a2c"].build()
    case, make, critic = LOSSES["a2c"], ESTIMATORS[estimator], modules["critic"]
    with torch.no_grad():
        data = case.env().rollout(6, modules["actor"], break_when_any_done=False)
    expected = make(critic)(data.clone())
    with methods(case, "critic", 1.0).prepare(critic) as hooked:
        hooked(data.clone())
        assert_bits(make(critic)(data.clone()), expected)
        steered = make(hooked)(data.clone())
        assert_nothing_kept(hooked)
        hooked.controls["steering.alpha"] = 0.0
        unsteered = make(hooked)(data.clone())
    by_hand = make(ValueOperator(steered_by_hand(nets, {"critic"})["critic"], in_keys=["observation"]))(data.clone())
    for key in ("advantage", "value_target"):
        torch.testing.assert_close(steered[key], by_hand[key])
        assert not torch.equal(steered[key], expected[key])
        torch.testing.assert_close(unsteered[key], expected[key])


def test_strength_of_each_row_in_a_loss() -> None:
    case = LOSSES["ppo_clip"]
    nets, modules = case.build()
    data = gathered(case, modules)
    data["strength"] = torch.rand(len(data))
    site = case.sites["actor"]
    with SteeringVectors({site: vector(5)}, alpha="strength").prepare(modules["actor"]) as hooked:
        found = ClipPPOLoss(hooked, modules["critic"])(data.clone())
        runtime = hooked._hooked.runtime
        assert not runtime.rows
    net = nets["actor"]
    logits = net[2:](net[:2](data["observation"]) + data["strength"].unsqueeze(-1) * vector(5))
    log_prob = logits.log_softmax(-1).gather(-1, data["action"].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(found["kl_approx"], (data["action_log_prob"] - log_prob).mean().detach())


class Idle(nn.Module):
    """A net with a layer that it does not use."""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.net, self.idle = net, nn.Linear(HIDDEN, HIDDEN)

    def forward(self, observation: Tensor) -> Tensor:
        return self.net(observation)


@pytest.mark.parametrize("entry", ["get_dist", "get_dist_params", "log_prob", "loss"])
def test_an_intervention_that_a_loss_never_reaches_is_noticed(entry: str) -> None:
    nets, modules = LOSSES["ppo_clip"].build()
    data = gathered(LOSSES["ppo_clip"], modules)
    net = TensorDictModule(Idle(nets["actor"]), in_keys=["observation"], out_keys=["logits"])
    actor = ProbabilisticActor(net, in_keys=["logits"], distribution_class=Categorical, return_log_prob=True)
    with SteeringVectors({"module.0.module.idle": vector(1)}).prepare(actor) as hooked:
        call = ClipPPOLoss(hooked, modules["critic"]) if entry == "loss" else getattr(hooked, entry)
        with pytest.raises(SiteError, match=r"'module\.0\.module\.idle', which did not run"):
            call(data.clone())
    with SteeringVectors({"module.0.module.net.1": vector(1)}).prepare(actor) as hooked:
        call = ClipPPOLoss(hooked, modules["critic"]) if entry == "loss" else getattr(hooked, entry)
        for _ in range(2):
            call(data.clone())

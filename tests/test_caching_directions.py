"""The four directions of activation caching: against PyTorch's hooks, in losses, agents and transforms."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import MultiAgentMLP
from torchrl.objectives import ClipPPOLoss

from tdhook_rl import ActivationCaching, Compose, Saliency, SteeringVectors
from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import InputError, SiteError
from tdhook_rl.examples.agent import FC2, make_actor, make_critic
from tests.method_table import DIRECTIONS
from tests.policies import CASES, FEATURES, HIDDEN, categorical, mlp

F64 = torch.float64


class Residual(nn.Module):
    """What `inner` and `same` are given is used beside them, and what `inner` returns is changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.inner, self.same = nn.Linear(FEATURES, 4), nn.Linear(4, 4), nn.Identity()
        self.head = nn.Linear(4, 2)
        self.in_place = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        lifted = self.lift(x)
        inner = self.inner(lifted)
        inner = inner.relu_() if self.in_place else inner.relu()
        return self.head(lifted + self.same(inner) * lifted + inner)


def with_torch_hooks(net: nn.Module, path: str, x: torch.Tensor, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The four directions at one module, by the hooks that PyTorch has for them, on a copy."""
    net, found = copy.deepcopy(net), {}
    net.in_place = False  # which full backward hooks do not allow

    def before(module, args):
        found["fwd_pre"] = args[0].detach().clone()

    def after(module, args, output):
        found["fwd"] = output.detach().clone()

    def backward(module, grad_input, grad_output):
        found["bwd"], found["bwd_pre"] = grad_input[0], grad_output[0]

    module = net.get_submodule(path)
    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)
    module.register_full_backward_hook(backward)
    (net(x.clone().requires_grad_()) * weight).sum().backward()
    return found


@pytest.mark.parametrize("path", ["lift", "inner", "same", "head"])
@pytest.mark.parametrize("batch", [(), (5,), (3, 2)])
def test_four_directions_equal_the_hooks_of_pytorch(path: str, batch: tuple[int, ...]) -> None:
    net, cache = Residual().double(), TensorDict()
    x, weight = torch.randn(*batch, FEATURES, dtype=F64), torch.randn(*batch, 2, dtype=F64)
    expected = with_torch_hooks(net, path, x, weight)
    with ActivationCaching(path, directions=DIRECTIONS, cache=cache).prepare(net) as hooked:
        data = hooked(TensorDict({"input": x}, batch_size=batch))
        assert set(cache.keys(True, True)) == {("fwd", path), ("fwd_pre", path)}
        (data["output"] * weight).sum().backward()
    for direction in DIRECTIONS:
        torch.testing.assert_close(cache[direction, path], expected[direction], rtol=1e-12, atol=1e-12)
        assert not cache[direction, path].requires_grad
    assert cache.batch_size == torch.Size(batch)
    for direction in ("fwd", "fwd_pre"):
        assert torch.equal(data["cache", direction, path], expected[direction])
    marks = [("computed", "cache"), ("computed", "cache.stamp")]
    assert hooked.result_keys == [("cache", "fwd", path), ("cache", "fwd_pre", path), *marks]


def test_gradients_of_parameters_are_untouched_bit_for_bit() -> None:
    net, x = Residual(), torch.randn(5, FEATURES)
    net(x).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    names = ["lift", "inner", "same", "head"]
    with ActivationCaching(names, directions=DIRECTIONS, cache=TensorDict()).prepare(net) as hooked:
        hooked(TensorDict({"input": x}, batch_size=5))["output"].square().sum().backward()
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)
    assert not x.requires_grad


def test_a_frozen_module_and_a_change_in_place_behind_it() -> None:
    net = nn.Sequential(nn.Linear(FEATURES, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)).double()
    net.requires_grad_(False)
    cache = TensorDict()
    with torch.inference_mode():
        x = torch.randn(3, FEATURES, dtype=F64)
    with Compose(
        ActivationCaching(["0", "1"], directions=["bwd_pre"], cache=cache),
        ActivationCaching("0", directions=["bwd"], cache=cache, use_nested_keys=True),
    ).prepare(net) as hooked:
        hooked(TensorDict({"input": x}, batch_size=3))["output"].sum().backward()
    active = (net[0](x) > 0).to(F64)
    at_relu = net[2].weight.sum(0).expand(3, -1)
    torch.testing.assert_close(cache["1"], at_relu)
    torch.testing.assert_close(cache["0"], at_relu * active)
    torch.testing.assert_close(cache["bwd", "0"], (at_relu * active) @ net[0].weight)


def test_where_a_change_in_place_would_hide_the_gradient_it_is_refused() -> None:
    data = TensorDict({"input": torch.randn(3, 2, 3)}, batch_size=3)
    net = nn.Sequential(nn.Linear(3, 3), nn.Flatten(), nn.ReLU(inplace=True))
    with ActivationCaching("2", directions=["bwd"], cache=TensorDict()).prepare(net) as hooked:
        with pytest.raises(InputError, match=r"'2' \(ReLU\) changes its input in place.*'bwd_pre'"):
            hooked(data.clone())
    for frozen in (False, True):  # what Flatten returns is a view of what it is given
        net.requires_grad_(not frozen)
        with ActivationCaching("1", directions=["bwd_pre"], cache=TensorDict()).prepare(net) as hooked:
            with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
                hooked(data.clone())
            with torch.no_grad():
                hooked(data.clone())


def test_no_gradient_no_entry() -> None:
    net, cache = mlp(), TensorDict()
    data = TensorDict({"input": torch.randn(3, FEATURES)}, batch_size=3)
    with ActivationCaching(["0", "2"], directions=["bwd"], cache=cache).prepare(net) as hooked:
        assert hooked.out_keys == ["output"]
        with torch.no_grad():
            assert not hooked(data.clone())["output"].requires_grad
        assert cache.is_empty()
        output = hooked(data.clone())["output"].sum()
        torch.autograd.grad(output, [net[2].weight], retain_graph=True)  # ends at module 2
        assert cache.is_empty()
        torch.autograd.grad(output, [net[0].weight], retain_graph=True)
        assert list(cache.keys()) == ["2"]
        output.backward()
        assert list(cache.keys()) == ["0", "2"] or list(cache.keys()) == ["2", "0"]
        hooked(data.clone())  # a new call: the gradients of the old one are gone
        assert cache.is_empty()


def test_explanations_by_other_methods_are_not_seen() -> None:
    case, cache = CASES["categorical"], TensorDict()
    actor = categorical().double()
    method = Compose(
        ActivationCaching(case.site, directions=["bwd_pre"], cache=cache),
        Saliency(when="step"),
        Saliency(when="batch", attribution_key="later"),
    )
    data = case.data(4).to(F64)
    with method.prepare(actor) as hooked:
        found = hooked(data)
        assert cache.is_empty()
        hooked.annotate(found)
        assert cache.is_empty()
        found["logits"][:, 1].sum().backward()
    net = actor.module[0].module
    hidden = net[:2](data["observation"]).detach().requires_grad_()
    (expected,) = torch.autograd.grad(net[2:](hidden)[:, 1].sum(), hidden)
    torch.testing.assert_close(cache[case.site], expected)


def test_an_explained_forward_is_still_the_callers() -> None:
    case, cache, arrived = CASES["value"], TensorDict(), []
    critic = case.build().double()
    data = case.data(4).to(F64)
    saliency = Saliency(when="step", input_modules=[case.site])
    caching = ActivationCaching(
        "module.3",
        directions=["bwd_pre"],
        cache=cache,
        callback=lambda grad_output: (arrived.append(1), grad_output[0])[1],
    )
    with Compose(saliency, caching).prepare(critic) as hooked:
        found = hooked(data)
        assert not arrived
        (3 * found["state_value"]).sum().backward()
        assert len(arrived) == 1
        assert not found["observation"].requires_grad
    torch.testing.assert_close(cache["module.3"], 3 * critic.module[4].weight.expand(4, -1))


def test_a_shared_module_shows_its_last_run_in_every_direction() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.shared(self.shared(x).tanh()).square()

    net, cache = Twice().double(), TensorDict()
    x = torch.randn(3, 4, dtype=F64)
    with ActivationCaching("shared", directions=DIRECTIONS, cache=cache).prepare(net) as hooked:
        hooked(TensorDict({"input": x}, batch_size=3))["output"].sum().backward()
    second_input = net.shared(x).tanh()
    second = net.shared(second_input)
    torch.testing.assert_close(cache["fwd_pre", "shared"], second_input)
    torch.testing.assert_close(cache["fwd", "shared"], second)
    torch.testing.assert_close(cache["bwd_pre", "shared"], 2 * second)
    torch.testing.assert_close(cache["bwd", "shared"], 2 * second @ net.shared.weight)


class Mark:
    """What a node of a graph can hold, to show whether the node is still there."""


class Noting(nn.Tanh):
    """Marks the graph of what it is given."""

    seen: list[weakref.ref] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.seen is not None:
            mark = x.grad_fn.metadata["mark"] = Mark()
            self.seen.append(weakref.ref(mark))
        return super().forward(x)


def test_nothing_keeps_a_graph_and_nothing_grows() -> None:
    net, cache = mlp(), TensorDict()
    data = TensorDict({"input": torch.randn(3, FEATURES)}, batch_size=3)
    alive: list[weakref.ref] = []
    net[3] = Noting()
    with ActivationCaching(["0", "2"], directions=DIRECTIONS, cache=cache).prepare(net) as hooked:
        gc.collect()
        gc.disable()  # reference counts alone must free the graph
        hooked.hooked_root[3].seen = alive
        try:
            output = hooked(data.clone())["output"]
            output.sum().backward()
            del output
            hooked(data.clone())  # and where no backward pass ever runs
            assert [one() for one in alive] == [None, None]
        finally:
            gc.enable()
        hooked.hooked_root[3].seen = None
        size = len(pickle.dumps(hooked))
        for _ in range(3):
            hooked(data.clone())["output"].sum().backward()
        assert len(pickle.dumps(hooked)) == size
        copy.deepcopy(hooked)


def test_steering_is_seen_in_the_order_of_writing() -> None:
    net, caches = mlp(), (TensorDict(), TensorDict())
    steering = SteeringVectors(modules_to_steer=["1"], steer_fn=lambda k, o: 3 * o)
    before, after = (ActivationCaching("1", directions=["bwd_pre"], cache=cache) for cache in caches)
    with Compose(before, steering, after).prepare(net) as hooked:
        hooked(TensorDict({"input": torch.randn(3, FEATURES)}, batch_size=3))["output"].sum().backward()
    torch.testing.assert_close(caches[0]["1"], 3 * caches[1]["1"])


def test_a_loss_shows_its_gradient_at_a_hidden_layer() -> None:
    actor, critic, cache = make_actor(), make_critic(), TensorDict()
    data = CueCorners(batch_size=[4], seed=0).rollout(8, actor, break_when_any_done=False).detach().reshape(-1)
    data["advantage"], data["value_target"] = torch.randn(32, 1), torch.randn(32, 1)
    with ActivationCaching(FC2, directions=["bwd_pre"], cache=cache).prepare(actor) as policy:
        loss = ClipPPOLoss(policy, critic, entropy_bonus=False, normalize_advantage=False)
        loss(data.clone())["loss_objective"].backward()
    net = actor.module[0].module
    hidden = net[:4](data["observation"]).detach().requires_grad_()
    log_prob = torch.distributions.Categorical(logits=net[4:](hidden)).log_prob(data["action"])
    # At equal policies the ratio is 1 and the clip is off: the plain policy gradient.
    (expected,) = torch.autograd.grad(-(log_prob * data["advantage"].squeeze(-1)).mean(), hidden)
    torch.testing.assert_close(cache[FC2], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("share_params", [True, False])
def test_the_gradient_of_what_agents_see_is_cached_though_it_needs_none(share_params: bool) -> None:
    net = MultiAgentMLP(4, 2, 3, centralized=False, share_params=share_params, depth=1, num_cells=8).double()
    module = TensorDictModule(net, in_keys=[("agents", "observation")], out_keys=[("agents", "out")])
    cache, x = TensorDict(), torch.randn(5, 3, 4, dtype=F64)
    with ActivationCaching(".*_empty_net.0$", directions=["bwd"], cache=cache).prepare(module) as hooked:
        hooked(TensorDict({("agents", "observation"): x}, batch_size=5))["agents", "out"].square().sum().backward()
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(net(leaf).square().sum(), leaf)
    (found,) = cache.values()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("share_params", [True, False])
def test_agents_that_a_module_vmaps_are_a_dimension_before_the_features(share_params: bool) -> None:
    net = MultiAgentMLP(4, 2, 3, centralized=False, share_params=share_params, depth=1, num_cells=8).double()
    module = TensorDictModule(net, in_keys=[("agents", "observation")], out_keys=[("agents", "out")])
    cache, x = TensorDict(), torch.randn(5, 2, 3, 4, dtype=F64)
    weight = torch.randn(5, 2, 3, 2, dtype=F64)
    method = ActivationCaching(".*_empty_net.1$", directions=DIRECTIONS, cache=cache)
    with method.prepare(module) as hooked:
        data = hooked(TensorDict({("agents", "observation"): x}, batch_size=(5, 2)))
        (data["agents", "out"] * weight).sum().backward()
    (path,) = data["cache", "fwd"].keys()
    for agent in range(3):
        params = net.params if share_params else net.params[agent]
        first, last = ((params[name, "weight"], params[name, "bias"]) for name in ("0", "2"))
        inner = nn.functional.linear(x[..., agent, :], *first)
        torch.testing.assert_close(cache["fwd_pre", path][..., agent, :], inner)
        torch.testing.assert_close(cache["fwd", path][..., agent, :], inner.tanh())
        at_output = weight[..., agent, :] @ last[0]
        torch.testing.assert_close(cache["bwd_pre", path][..., agent, :], at_output)
        torch.testing.assert_close(cache["bwd", path][..., agent, :], at_output * (1 - inner.tanh() ** 2))


def test_inside_the_users_transforms_nothing_escapes() -> None:
    net, cache = mlp(), TensorDict()
    with ActivationCaching("1", directions=DIRECTIONS, cache=cache).prepare(net) as hooked:

        def value(x: torch.Tensor) -> torch.Tensor:
            return hooked(TensorDict({"input": x}))["output"].sum()

        x = torch.randn(5, FEATURES)
        torch.func.vmap(torch.func.grad(value))(x)
    hidden = net[:2](x)
    torch.testing.assert_close(cache["fwd", "1"], hidden)
    torch.testing.assert_close(cache["bwd_pre", "1"], net[2].weight.T.new_zeros(5, HIDDEN) + _slope(net, hidden))
    for one in cache.values(True, True):
        assert not torch._C._functorch.is_functorch_wrapped_tensor(one)


def _slope(net: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    hidden = hidden.detach().requires_grad_()
    return torch.autograd.grad(net[2:](hidden).sum(), hidden)[0]


def test_convolutions_that_flatten_the_batch_get_it_back() -> None:
    case, cache = CASES["pixels"], TensorDict()
    with ActivationCaching(case.site, directions=DIRECTIONS, cache=cache).prepare(case.build()) as hooked:
        hooked(case.data(3, 2))["logits"].sum().backward()
    assert cache.batch_size == (3, 2)
    assert {tuple(cache[direction, case.site].shape) for direction in DIRECTIONS} == {(3, 2, *case.features)}


def test_what_has_no_gradient_says_so() -> None:
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    cache, tokens = TensorDict(), TensorDict({"input": torch.tensor([1, 2])}, batch_size=2)
    with ActivationCaching("0", directions=["bwd"], cache=cache).prepare(net) as hooked:
        with pytest.raises(InputError, match=r"input of '0' is of torch\.int64"):
            hooked(tokens.clone())
    with ActivationCaching("0", directions=["fwd_pre", "bwd_pre"], cache=cache).prepare(net) as hooked:
        hooked(tokens.clone())["output"].sum().backward()
        assert torch.equal(cache["fwd_pre", "0"], tokens["input"])
        torch.testing.assert_close(cache["bwd_pre", "0"], net[1].weight.sum(0).expand(2, -1))
    actor = categorical()
    with ActivationCaching("module.0", directions=["bwd"], cache=cache).prepare(actor) as hooked:
        with pytest.raises(InputError, match="is given a TensorDict"):
            hooked(CASES["categorical"].data(3))
    with ActivationCaching("module.0", directions=["fwd_pre", "bwd_pre"], cache=cache).prepare(actor) as hooked:
        data = hooked(CASES["categorical"].data(3))
        data["logits"].sum().backward()
    assert torch.equal(data["cache", "fwd_pre", "module.0"], data["observation"])
    assert torch.equal(cache["bwd_pre", "module.0"], torch.ones(3, 4))


def test_a_gradient_site_that_does_not_run_is_an_error() -> None:
    net = nn.Sequential(nn.Linear(FEATURES, 2))
    net.add_module("unused", nn.Linear(2, 2))
    net.forward = lambda x: net[0](x)
    net[0].spare = nn.Linear(2, 2)
    data = TensorDict({"input": torch.randn(3, FEATURES)}, batch_size=3)
    for pattern, message in (("0.spare", "'0.spare' did not run"), ("0.sp.*", "none of the modules")):
        with ActivationCaching(pattern, directions=["bwd"], cache=TensorDict()).prepare(net) as hooked:
            with pytest.raises(SiteError, match=message), torch.no_grad():
                hooked(data.clone())


WRITING = {
    "fwd": lambda output: output.relu_(),
    "fwd_pre": lambda args: args[0].mul_(2),
    "bwd": lambda grad_input: grad_input[0].clamp_(-1, 1),
    "bwd_pre": lambda grad_output: grad_output[0].mul_(0),
}


@pytest.mark.parametrize("direction", WRITING)
def test_a_callback_that_writes_to_what_the_policy_goes_on_with_is_refused(direction: str) -> None:
    net = nn.Sequential(nn.Linear(FEATURES, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    options = {"directions": [direction], "cache": TensorDict(), "callback": WRITING[direction]}
    with ActivationCaching("1", **options).prepare(net) as hooked:
        with pytest.raises(InputError, match=r"callback for '1' has written in place.*work on a copy"):
            hooked(TensorDict({"input": torch.randn(3, FEATURES)}, batch_size=3))["output"].sum().backward()

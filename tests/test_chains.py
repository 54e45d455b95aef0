"""Chains of known layers: explained without a graph, with the numbers and bits that autograd gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torchrl.modules import MLP, ProbabilisticActor, ValueOperator

from tdhook_rl import ActivationCaching, Compose, Saliency, targets
from tdhook_rl.attribution import IntegratedGradients
from tdhook_rl.chains import LAYERS, ChainMixin, Record
from tdhook_rl.errors import TargetError
from tdhook_rl.targets import Target

SQUARES = Target("squares", lambda run: run.outputs["output"].square().sum(-1))
ACTIVATIONS = [kind for kind in LAYERS if kind is not nn.Linear]


def chain(kind: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 16), kind(), nn.Linear(16, 16), kind(), nn.Linear(16, 3)).double()


def data(*batch: int) -> TensorDict:
    return TensorDict({"input": torch.randn(*batch, 6, dtype=torch.double)}, batch_size=batch)


def by_autograd(net: Callable[[Tensor], Tensor], x: Tensor, value: Callable[[Tensor], Tensor]) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(value(net(x)).sum(), x)[0]


def logit(y: Tensor) -> Tensor:
    return y[..., 1]


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> list[Record]:
    """The runs of chains whose gradient was asked of their records."""
    asked: list[Record] = []
    pull = Record.pull

    def counted(self: Record, gradient: Tensor) -> Tensor:
        asked.append(self)
        return pull(self, gradient)

    monkeypatch.setattr(Record, "pull", counted)
    return asked


@pytest.mark.parametrize("batch", [(), (5,), (3, 2)])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_the_bits_of_autograd(kind: type[nn.Module], batch: tuple[int, ...], records: list[Record]) -> None:
    net, one = chain(kind), data(*batch)
    expected = by_autograd(net, one["input"], logit)
    with Saliency(target=targets.logit(1, "output")).prepare(net) as hooked:
        found = [hooked(one.clone())]
        with torch.no_grad():
            found.append(hooked(one.clone()))
        found.append(hooked.annotate(one))
    assert len(records) == 3
    for each in found:
        assert torch.equal(each["attr", "input"], expected)
    for each in found[:2]:
        assert torch.equal(each["output"], net(one["input"]))


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_a_jacobian_as_oracle(kind: type[nn.Module]) -> None:
    net, x = chain(kind), data(4)["input"]
    jacobian = torch.vmap(torch.func.jacrev(net))(x)
    for index in range(3):
        with Saliency(target=targets.logit(index, "output")).prepare(net) as hooked:
            found = hooked.annotate(TensorDict({"input": x}, batch_size=4))
        torch.testing.assert_close(found["attr", "input"], jacobian[:, index])


@pytest.mark.parametrize(
    ("target", "value"),
    [
        (None, lambda y: y.sum(-1)),
        (targets.output_sum(), lambda y: y.sum(-1)),
        (targets.chosen_logit("output"), lambda y: y[..., 2]),
        (targets.margin("output"), lambda y: y[..., 2] - y[..., :2].amax(-1)),
        (targets.state_value("output"), lambda y: y.sum(-1)),
        (SQUARES, lambda y: y.square().sum(-1)),
    ],
    ids=["default", "sum", "chosen", "margin", "value", "squares"],
)
def test_every_target(target: Target | None, value: Callable[[Tensor], Tensor], records: list[Record]) -> None:
    net, one = chain(), data(5)
    one["action"] = torch.full((5,), 2)
    expected = by_autograd(net, one["input"], value)
    with Saliency(target=target).prepare(net) as hooked:
        torch.testing.assert_close(hooked(one.clone())["attr", "input"], expected)
        torch.testing.assert_close(hooked.annotate(one)["attr", "input"], expected)
    assert len(records) == 2


def test_integrated_gradients_weigh_the_points(records: list[Record]) -> None:
    net, one = chain(nn.SiLU), data(5)
    for target, value in ((targets.logit(1, "output"), logit), (SQUARES, lambda y: y.square().sum(-1))):
        with IntegratedGradients(target=target, baseline=0.0, n_steps=64).prepare(net) as hooked:
            found = hooked.annotate(one)["attr", "input"]
        change = value(net(one["input"])) - value(net(torch.zeros_like(one["input"])))
        torch.testing.assert_close(found.sum(-1), change)
    assert len(records) == 2


def test_a_target_that_reads_the_input_as_well() -> None:
    def weighed(run: object) -> Tensor:
        return (run.outputs["input"].square().sum(-1, keepdim=True) * run.outputs["output"]).sum(-1)

    net, one = chain(), data(5)
    x = one["input"].clone().requires_grad_()
    expected = torch.autograd.grad((x.square().sum(-1, keepdim=True) * net(x)).sum(), x)[0]
    with Saliency(target=Target("weighed", weighed)).prepare(net) as hooked:
        torch.testing.assert_close(hooked(one.clone())["attr", "input"], expected)
        torch.testing.assert_close(hooked.annotate(one)["attr", "input"], expected)


def test_a_target_that_no_gradient_reaches() -> None:
    rounded = Target("rounded", lambda run: run.outputs["output"].detach().sum(-1))
    hooked = Saliency(target=rounded).prepare(chain(), return_context=False)
    with pytest.raises(TargetError, match="no gradient reaches the target rounded"):
        hooked(data(5))


def test_rows_without_a_target_have_no_gradient() -> None:
    net, one = chain(nn.ReLU), data(5)
    one["input"][2] = torch.inf
    for target in (targets.logit(1, "output"), SQUARES):
        with Saliency(target=target).prepare(net) as hooked:
            found = hooked(one.clone())["attr", "input"]
        assert found[2].isnan().all()
        assert found[[0, 1, 3, 4]].isfinite().all()
    one = data(50)
    finite = net(one["input"])[..., 1] > 0
    assert 0 < finite.sum() < 50
    with Saliency(target=Target("log", lambda run: run.outputs["output"][..., 1].log())).prepare(net) as hooked:
        found = hooked(one)["attr", "input"]
    assert torch.equal(found.isfinite().all(-1), finite)


def test_callers_train_through_the_outputs() -> None:
    net, one = chain(), data(5)
    with Saliency().prepare(net) as hooked:
        found = hooked(one)
        found["output"].square().sum().backward()
    assert not found["attr", "input"].requires_grad
    gradients = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    net(one["input"]).square().sum().backward()
    for ours, theirs in zip(gradients, net.parameters(), strict=True):
        assert torch.equal(ours, theirs.grad)


# ------------------------------------------------------------------ what is not a chain, or no longer


class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _own_forward(net: nn.Sequential) -> None:
    net[0].forward = lambda x, layer=net[0]: nn.Linear.forward(layer, x) * 2


def _inplace(net: nn.Sequential) -> None:
    net[1].inplace = True


CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "a hook": lambda net: net[0].register_forward_hook(lambda m, a, y: 2 * y),
    "a hook on the chain": lambda net: net.register_forward_hook(lambda m, a, y: 2 * y),
    "an in-place hook": lambda net: net.register_forward_hook(lambda m, a, y: y.mul_(2)),
    "a pre-hook": lambda net: net[2].register_forward_pre_hook(lambda m, a: (2 * a[0],)),
    "a backward hook": lambda net: net[2].register_full_backward_hook(lambda m, g, _: (2 * g[0],)),
    "a backward hook on the chain": lambda net: net.register_full_backward_hook(lambda m, g, _: (2 * g[0],)),
    "a parametrization": lambda net: parametrizations.weight_norm(net[0]),
    "a forward of its own": _own_forward,
    "in place": _inplace,
}


# A parametrization replaces tensors, which is refused once a copy shares them.
@pytest.mark.parametrize(
    ("change", "when"),
    [(c, w) for c in CHANGES for w in ("before", "after") if (c, w) != ("a parametrization", "after")],
)
def test_layers_that_somebody_has_changed(change: str, when: str) -> None:
    net, one = chain(nn.ReLU), data(5)
    if when == "before":
        CHANGES[change](net)
    with Saliency(target=targets.logit(1, "output")).prepare(net) as hooked:
        if when == "after":
            CHANGES[change](net)
            CHANGES[change](hooked.hooked_root)
        expected = by_autograd(net, one["input"], logit)
        for mode in (torch.enable_grad(), torch.no_grad()):
            with mode:
                found = hooked(one.clone())
            assert torch.equal(found["output"], net(one["input"]))
            torch.testing.assert_close(found["attr", "input"], expected)
        torch.testing.assert_close(hooked.annotate(one)["attr", "input"], expected)


def test_subclasses_run_as_they_do(records: list[Record]) -> None:
    net, one = nn.Sequential(Doubling(6, 8), nn.Tanh(), nn.Linear(8, 3)).double(), data(5)
    with Saliency(target=targets.logit(1, "output")).prepare(net) as hooked:
        found = hooked(one.clone())
    assert not records
    torch.testing.assert_close(found["attr", "input"], by_autograd(net, one["input"], logit))


def test_global_hooks_are_heard(records: list[Record]) -> None:
    heard: list[nn.Module] = []
    with Saliency().prepare(chain()) as hooked:
        handle = nn.modules.module.register_module_forward_hook(lambda m, a, y: heard.append(m))
        try:
            hooked(data(5))
        finally:
            handle.remove()
    assert sum(isinstance(module, nn.Linear) for module in heard) >= 3
    assert not records


def test_autocast_runs_as_without_us(records: list[Record]) -> None:
    net, one = chain().float(), data(5).float()
    with Saliency(target=targets.logit(1, "output")).prepare(net) as hooked, torch.autocast("cpu", torch.bfloat16):
        found = hooked(one.clone())
        assert torch.equal(found["output"], net(one["input"]))
        torch.testing.assert_close(found["attr", "input"], by_autograd(net, one["input"], logit))
    assert not records


def test_the_copy_keeps_the_names_of_classes() -> None:
    net = chain()
    with Saliency().prepare(net) as hooked:
        assert repr(hooked.hooked_root) == repr(net)
        assert isinstance(hooked.hooked_root, ChainMixin)
    assert type(net) is nn.Sequential


def test_a_weight_that_a_learner_changes_meanwhile() -> None:
    net, one = chain(), data(5)
    changes = []

    def learns(run: object) -> Tensor:
        if not changes:
            changes.append(True)
            with torch.no_grad():
                net[0].weight.mul_(2)
        return run.outputs["output"][..., 1]

    with Saliency(target=Target("learns", learns)).prepare(net) as hooked:
        found = hooked.annotate(one)  # the pass is made again, with the new weights
    torch.testing.assert_close(found["attr", "input"], by_autograd(net, one["input"], logit))


# ------------------------------------------------------------------ chains inside larger policies


def test_an_actor_is_cut_where_its_chain_ends(records: list[Record]) -> None:
    net = chain()
    logits = TensorDictModule(net, ["observation"], ["logits"])
    actor = ProbabilisticActor(logits, ["logits"], distribution_class=torch.distributions.Categorical)
    x = torch.randn(7, 6, dtype=torch.double)
    with Saliency().prepare(actor) as hooked:
        with torch.no_grad():
            batch = hooked(TensorDict({"observation": x}, batch_size=7))
        found = hooked.annotate(batch)
    assert len(records) == 1
    taken = batch["action"].unsqueeze(-1)
    expected = by_autograd(net, x, lambda y: y.log_softmax(-1).gather(-1, taken))
    torch.testing.assert_close(found["attr", "observation"], expected)


class Mixing(nn.Module):
    """Reads what two chains have made of the same observation, and changes it in place."""

    def forward(self, first: Tensor, second: Tensor, observation: Tensor) -> Tensor:
        return first.mul_(second) + observation[..., :3].square()


def test_chains_that_read_the_same_input(records: list[Record]) -> None:
    one, other, x = chain(), chain(nn.ELU), torch.randn(7, 6, dtype=torch.double)
    policy = TensorDictSequential(
        TensorDictModule(one, ["observation"], ["first"]),
        TensorDictModule(other, ["observation"], ["second"]),
        TensorDictModule(Mixing(), ["first", "second", "observation"], ["logits"]),
    )
    expected = by_autograd(lambda o: one(o) * other(o) + o[..., :3].square(), x, logit)
    both = Saliency(target={"one": targets.logit(1), "all": targets.logit(1)}, when="batch")
    with both.prepare(policy) as hooked:
        found = hooked.annotate(TensorDict({"observation": x}, batch_size=7))
    assert len(records) == 4
    for name in ("one", "all"):
        torch.testing.assert_close(found["attr", name, "observation"], expected)


def test_a_chain_behind_other_layers_is_left_to_autograd(records: list[Record]) -> None:
    net = nn.Sequential(nn.LayerNorm(6), chain()).double()
    one = data(5)
    with Saliency(target=targets.logit(1, "output")).prepare(net) as hooked:
        found = hooked.annotate(one)
    assert not records
    torch.testing.assert_close(found["attr", "input"], by_autograd(net, one["input"], logit))


def test_an_activation_inside_a_chain() -> None:
    net, one = chain(), data(5)
    method = Compose(
        ActivationCaching("1"), Saliency(target=targets.logit(1, "output"), input_modules=["1"], when="batch")
    )
    with method.prepare(net) as hooked:
        found = hooked.annotate(hooked(one))
    hidden = net[1](net[0](one["input"]))
    torch.testing.assert_close(found["cache", "1"], hidden)
    torch.testing.assert_close(found["attr", "1"], by_autograd(net[2:], hidden, logit))


@pytest.mark.parametrize("out_features", [3, (3, 2)])
def test_networks_of_torchrl(out_features: int | tuple[int, int], records: list[Record]) -> None:
    net = MLP(in_features=6, out_features=out_features, num_cells=[8, 8]).double()
    critic = ValueOperator(net, ["observation"], ["state_value"])
    x = torch.randn(5, 6, dtype=torch.double)
    with Saliency().prepare(critic) as hooked:
        found = hooked(TensorDict({"observation": x}, batch_size=5))
    assert bool(records) is (out_features == 3)
    assert torch.equal(found["state_value"], net(x))
    torch.testing.assert_close(found["attr", "observation"], by_autograd(net, x, lambda y: y))

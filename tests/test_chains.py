"""Chains of known layers: explained without a graph, with the numbers and bits that autograd gives."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import ClassVar

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential, set_skip_existing
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torchrl.modules import MLP, ProbabilisticActor, ValueOperator

from tdhook_rl import ActivationCaching, Compose, Saliency, targets
from tdhook_rl.attribution import IntegratedGradients
from tdhook_rl.chains import LAYERS, Record
from tdhook_rl.errors import MismatchError, TargetError
from tdhook_rl.targets import LinearTarget, Target

SQUARES = Target("squares", lambda run: run.outputs["output"].square().sum(-1), reads_inputs=False)
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


LINEAR = {
    "default": (None, lambda y: y.sum(-1)),
    "sum": (targets.output_sum(), lambda y: y.sum(-1)),
    "logit": (targets.logit(1, "output"), logit),
    "chosen": (targets.chosen_logit("output"), lambda y: y[..., 2]),
    "value": (targets.state_value("output"), lambda y: y.sum(-1)),
}
OTHERS = {
    "margin": (targets.margin("output"), lambda y: y[..., 2] - y[..., :2].amax(-1)),
    "squares": (SQUARES, lambda y: y.square().sum(-1)),
}


@pytest.mark.parametrize("name", [*LINEAR, *OTHERS])
def test_every_target(name: str, records: list[Record]) -> None:
    net, one = chain(), data(5)
    one["action"] = torch.full((5,), 2)
    target, value = (LINEAR | OTHERS)[name]
    expected = by_autograd(net, one["input"], value)
    with Saliency(target=target).prepare(net) as hooked:
        torch.testing.assert_close(hooked(one.clone())["attr", "input"], expected)
        torch.testing.assert_close(hooked.annotate(one)["attr", "input"], expected)
    assert len(records) == (2 if name in LINEAR else 0)


@pytest.mark.parametrize("batch", [(), (5,), (3, 2)])
@pytest.mark.parametrize("name", LINEAR)
def test_integrated_gradients_weigh_the_points(name: str, batch: tuple[int, ...], records: list[Record]) -> None:
    net, one = chain(nn.SiLU), data(*batch)
    one["action"] = torch.full(batch, 2)
    target, value = LINEAR[name]
    with IntegratedGradients(target=target, baseline=0.0, n_steps=64).prepare(net) as hooked:
        found = hooked.annotate(one)["attr", "input"]
    change = value(net(one["input"])) - value(net(torch.zeros_like(one["input"])))
    torch.testing.assert_close(found.sum(-1), change)
    assert records


def test_several_targets_of_which_one_is_not_linear() -> None:
    net, one = chain(), data(5)
    method = Saliency(target={"first": targets.logit(1, "output"), "other": SQUARES})
    with method.prepare(net) as hooked:
        found = hooked(one.clone())
    torch.testing.assert_close(found["attr", "first", "input"], by_autograd(net, one["input"], logit))
    expected = by_autograd(net, one["input"], lambda y: y.square().sum(-1))
    torch.testing.assert_close(found["attr", "other", "input"], expected)


class Negative(LinearTarget):
    def __call__(self, run: object) -> Tensor:
        return -super().__call__(run)


class Tripled:
    """Shows the attributes of what it wraps."""

    def __init__(self, inner: Target) -> None:
        self.inner = inner

    def __call__(self, run: object) -> Tensor:
        return 3 * self.inner(run)

    def __getattr__(self, name: str) -> object:
        return getattr(self.__dict__["inner"], name)


def test_targets_that_resemble_ours() -> None:
    net, one, ours = chain(), data(5), targets.logit(1, "output")
    once = by_autograd(net, one["input"], logit)
    for target, factor in (
        (Negative("negative", ours.function.function), -1),
        (Tripled(ours), 3),
        (Target("tripled", Tripled(ours), reads_inputs=False), 3),
    ):
        with Saliency(target=target).prepare(net) as hooked:
            torch.testing.assert_close(hooked(one.clone())["attr", "input"], factor * once)
            torch.testing.assert_close(hooked.annotate(one)["attr", "input"], factor * once)


def test_a_target_that_reads_the_input_as_well() -> None:
    def weighed(run: object) -> Tensor:
        return (run.outputs["input"].square().sum(-1, keepdim=True) * run.outputs["output"]).sum(-1)

    net, one = chain(), data(5)
    x = one["input"].clone().requires_grad_()
    expected = torch.autograd.grad((x.square().sum(-1, keepdim=True) * net(x)).sum(), x)[0]
    with Saliency(target=Target("weighed", weighed)).prepare(net) as hooked:
        torch.testing.assert_close(hooked(one.clone())["attr", "input"], expected)
        torch.testing.assert_close(hooked.annotate(one)["attr", "input"], expected)


def test_weights_of_inference_mode() -> None:
    with torch.inference_mode():
        net = chain()
    one = data(5)
    with Saliency(target=targets.logit(1, "output")).prepare(net) as hooked, torch.no_grad():
        found = [hooked(one.clone()), hooked.annotate(one)]
    for each in found:
        torch.testing.assert_close(
            each["attr", "input"], by_autograd(copy.deepcopy(net).requires_grad_(False), one["input"], logit)
        )


def test_a_target_that_no_gradient_reaches() -> None:
    other = torch.ones(5, requires_grad=True)
    unreached = {
        "rounded": lambda run: run.outputs["output"].detach().sum(-1),
        "of another": lambda run: other * run.outputs["output"].detach().sum(-1),
    }
    for name, function in unreached.items():
        for reads_inputs in (True, False):
            target = Target(name, function, reads_inputs)
            hooked = Saliency(target=target).prepare(chain(), return_context=False)
            with pytest.raises(TargetError, match=f"no gradient reaches the target {name}"):
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
    log = Target("log", lambda run: run.outputs["output"][..., 1].log(), reads_inputs=False)
    with Saliency(target=log).prepare(net) as hooked:
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


def test_the_copy_keeps_its_classes_and_can_be_sliced_and_copied() -> None:
    net, x = chain(), data(3)["input"]
    with Saliency().prepare(net) as hooked:
        assert repr(hooked.hooked_root) == repr(net)
        assert type(hooked.hooked_root) is nn.Sequential
        assert torch.equal(hooked.hooked_root[:2](x), net[:2](x))
        assert "forward" not in vars(net)
        for copied in (copy.deepcopy(hooked), pickle.loads(pickle.dumps(hooked))):
            assert torch.equal(copied(data(3).set("input", x))["output"], net(x))


class Learning:
    """A logit at whose first look the weights change, as a learner in another thread may change them."""

    def __init__(self, net: nn.Module) -> None:
        self.net, self.changed = net, False

    def __call__(self, run: object) -> Tensor:
        return run.outputs["output"][..., 1]

    def slope(self, run: object) -> Tensor:
        if not self.changed:
            self.changed = True
            with torch.no_grad():
                self.net[0].weight.mul_(2)
        return nn.functional.one_hot(torch.ones(run.outputs.batch_size).long(), 3).to(run.outputs["output"])


@pytest.mark.parametrize("how", ["annotate", "no_grad", "grad"])
def test_a_weight_that_a_learner_changes_meanwhile(how: str) -> None:
    net, one = chain(), data(5)
    with Saliency(target=LinearTarget("learning", Learning(net), reads_inputs=False)).prepare(net) as hooked:
        if how == "annotate":
            found = hooked.annotate(one)  # the pass is made again, with the new weights
        else:
            with torch.set_grad_enabled(how == "grad"):
                found = hooked(one.clone())
    torch.testing.assert_close(found["attr", "input"], by_autograd(net, one["input"], logit))


def _replaced_hooks(net: nn.Sequential) -> None:
    net[2]._forward_pre_hooks = OrderedDict()
    net[2].register_forward_pre_hook(lambda m, a: (2 * a[0],))


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


REBUILT: dict[str, Callable[[nn.Sequential], object]] = {
    "appended": lambda net: net.append(nn.Linear(3, 3).double()),
    "replaced": lambda net: net.__setitem__(1, nn.Sigmoid()),
    "replaced by an unknown one": lambda net: net.__setitem__(1, nn.LayerNorm(16).double()),
    "removed": lambda net: net.__delitem__(3),
    "another class": lambda net: setattr(net[2], "__class__", Doubled),
    "another hook dictionary": _replaced_hooks,
}


@pytest.mark.parametrize("change", REBUILT)
def test_chains_that_are_rebuilt_while_hooked(change: str) -> None:
    net, one = chain(), data(5)
    with Saliency(target=targets.logit(1, "output")).prepare(net) as hooked:
        hooked(one.clone())
        REBUILT[change](hooked.hooked_root)
        plain = copy.deepcopy(hooked.hooked_root)
        found = hooked(one.clone())
        assert torch.equal(found["output"], plain(one["input"]))
        torch.testing.assert_close(found["attr", "input"], by_autograd(plain, one["input"], logit))


class Twice(Tensor):
    """A weight that linear layers read doubled, as quantised ones are read through a scale."""

    @classmethod
    def __torch_function__(
        cls, function: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if function is nn.functional.linear:
            x, weight, *bias = args
            return nn.functional.linear(x, weight.as_subclass(Tensor) * 2, *bias)
        return super().__torch_function__(function, types, args, kwargs or {})


def test_weights_of_other_types() -> None:
    net, one = chain(), data(5)
    net[0].weight = nn.Parameter(net[0].weight.detach().as_subclass(Twice))
    with Saliency(target=targets.logit(1, "output")).prepare(net) as hooked:
        found = hooked(one.clone())
    assert torch.equal(found["output"].as_subclass(Tensor), net(one["input"]).as_subclass(Tensor))
    torch.testing.assert_close(
        found["attr", "input"].as_subclass(Tensor), by_autograd(net, one["input"], logit).as_subclass(Tensor)
    )


# ------------------------------------------------------------------ chains inside larger policies


def test_an_actor_is_left_to_autograd(records: list[Record]) -> None:
    net = chain()
    logits = TensorDictModule(net, ["observation"], ["logits"])
    actor = ProbabilisticActor(logits, ["logits"], distribution_class=torch.distributions.Categorical)
    x = torch.randn(7, 6, dtype=torch.double)
    with Saliency().prepare(actor) as hooked:
        with torch.no_grad():
            batch = hooked(TensorDict({"observation": x}, batch_size=7))
        found = hooked.annotate(batch)
    assert not records
    taken = batch["action"].unsqueeze(-1)
    expected = by_autograd(net, x, lambda y: y.log_softmax(-1).gather(-1, taken))
    torch.testing.assert_close(found["attr", "observation"], expected)


def test_modules_that_are_functions() -> None:
    net, x = chain(), torch.randn(7, 6, dtype=torch.double)
    policy = TensorDictSequential(
        TensorDictModule(net, ["observation"], ["logits"]),
        TensorDictModule(lambda logits: logits.argmax(-1), ["logits"], ["action"]),
    )
    for method in (Saliency(target=targets.logit(1)), ActivationCaching("module.0.module.1")):
        with method.prepare(policy) as hooked:
            assert torch.equal(hooked(TensorDict({"observation": x}, batch_size=7))["action"], net(x).argmax(-1))
    with Saliency(target=targets.logit(0, "y")).prepare(TensorDictModule(torch.tanh, ["x"], ["y"])) as hooked:
        found = hooked.annotate(TensorDict({"x": x}, batch_size=7))["attr", "x"]
    torch.testing.assert_close(found, by_autograd(torch.tanh, x, lambda y: y[..., 0]))


class Undeclared(TensorDictModuleBase):
    in_keys: ClassVar = ["input"]
    out_keys: ClassVar = ["action"]

    def __init__(self) -> None:
        super().__init__()
        self.net = chain()

    def forward(self, data: TensorDict) -> TensorDict:
        data["logits"] = self.net(data["input"])
        return data.set("action", data["logits"].argmax(-1))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_outputs_that_are_not_declared_can_be_explained(mode: type) -> None:
    policy, one = Undeclared(), data(5)
    expected = by_autograd(policy.net, one["input"], logit)
    with Saliency(target=targets.logit(1), when="step").prepare(policy) as hooked, mode():
        for _ in range(2):  # at the second call the data has them already
            torch.testing.assert_close(hooked(one)["attr", "input"], expected)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("known", [True, False])
def test_entries_of_the_caller_are_not_explained(known: bool, mode: type) -> None:
    net = chain() if known else nn.Sequential(chain(), nn.LayerNorm(3).double())
    nested = {"x": torch.randn(5, 6).double(), "action_value": torch.randn(5, 4), "action": torch.zeros(5).long()}
    one = TensorDict({"a": nested, "action_value": torch.randn(5, 2)}, batch_size=5)
    policy = TensorDictModule(net, [("a", "x")], [("a", "y")])
    with Saliency(when="step").prepare(policy) as hooked, mode():
        found = hooked(one)["attr", "a", "x"]
    torch.testing.assert_close(found, by_autograd(net, nested["x"], lambda y: y.sum(-1)))


class Tripling(nn.Sequential):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(3 * x)


def _called_twice_as_much() -> TensorDictModule:
    policy = TensorDictModule(chain(), ["input"], ["output"])
    policy._call_module = lambda tensors, **_: 2 * policy.module(*tensors)
    return policy


def test_other_ways_to_be_called() -> None:
    one = data(5)
    for policy in (TensorDictModule(Tripling(*chain()), ["input"], ["output"]), _called_twice_as_much()):
        expected = policy(one.clone())["output"]
        with Saliency(target=targets.logit(1, "output")).prepare(policy) as hooked:
            found = hooked(one.clone())
        assert torch.equal(found["output"], expected)

        def plain(x: Tensor, policy: TensorDictModule = policy) -> Tensor:
            return policy(TensorDict({"input": x}, batch_size=5))["output"]

        torch.testing.assert_close(found["attr", "input"], by_autograd(plain, one["input"], logit))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_errors_are_in_the_policys_own_words(mode: type) -> None:
    wide = TensorDict({"input": torch.randn(5, 7).double()}, batch_size=5)
    with Saliency(target=targets.logit(1, "output")).prepare(chain()) as hooked, mode():
        for call in (hooked, hooked.annotate):
            with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as error:
                call(wide)
            assert "TensorDictModule failed with operation" in str(error.value.__cause__)


def test_paths_do_not_stand_in_for_what_is_stored() -> None:
    net, one = chain(), data(5)
    with IntegratedGradients(target=targets.logit(1, "output"), baseline=0.0, when="batch").prepare(net) as hooked:
        stored = hooked(one)
        hooked.annotate(stored, on_mismatch="raise")
        with torch.no_grad():
            net[0].weight.mul_(2)
        with pytest.raises(MismatchError):
            hooked.annotate(stored, on_mismatch="raise")


def test_outputs_that_are_there_already_may_be_kept() -> None:
    net, one = chain(), data(5).set("output", torch.zeros(5, 3).double())
    method = Saliency(target=targets.logit(1, "output"))
    with method.prepare(net) as hooked, set_skip_existing(True), torch.no_grad():
        assert not hooked(one)["output"].any()


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


# ------------------------------------------------------------------ what a graph of all layers is needed for


class Modulated(nn.Module):
    """Computes weights of its net from a context, or from the input."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.net, self.hyper = how, chain(), nn.Linear(2, 96).double()

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        weight = self.net[0].weight * x.mean().sigmoid()
        if self.how == "context":
            weight = self.hyper(context.mean(0)).view(16, 6)
        return torch.func.functional_call(self.net, {"0.weight": weight}, x)


@pytest.mark.parametrize("how", ["context", "input"])
def test_weights_that_are_computed(how: str) -> None:
    net, x, context = Modulated(how), data(5)["input"], torch.randn(5, 2, dtype=torch.double)
    points = x.clone().requires_grad_(), context.clone().requires_grad_()
    of_x, of_context = torch.autograd.grad(net(*points)[:, 1].sum(), points, allow_unused=True)
    one = TensorDict({"input": x, "context": context}, batch_size=5)
    with Saliency(target=targets.logit(1, "output")).prepare(net, in_keys=["input", "context"]) as hooked:
        found = hooked.annotate(one)
    torch.testing.assert_close(found["attr", "input"], of_x)
    torch.testing.assert_close(
        found["attr", "context"], torch.zeros_like(context) if of_context is None else of_context
    )


def test_weights_of_a_chain_that_carry_a_graph() -> None:
    net, one, scale = chain(), data(5), torch.ones((), dtype=torch.double, requires_grad=True)
    policy = TensorDictModule(net, ["input"], ["output"])
    with Saliency(target=targets.logit(1, "output")).prepare(policy) as hooked:
        found = torch.func.functional_call(hooked, {"module.0.weight": net[0].weight * scale}, (one.clone(),))
    torch.testing.assert_close(found["attr", "input"], by_autograd(net, one["input"], logit))
    assert torch.autograd.grad(found["output"].sum(), scale)[0] != 0


class Force(nn.Module):
    """A policy that differentiates: the gradient of an energy."""

    def __init__(self) -> None:
        super().__init__()
        self.net = chain()

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            return torch.autograd.grad(self.net(x).square().sum(), x, create_graph=True)[0]


class ForceOfEnergy(nn.Module):
    def forward(self, energy: Tensor, x: Tensor) -> Tensor:
        return torch.autograd.grad(energy.square().sum(), x, create_graph=True)[0]


def test_policies_that_differentiate() -> None:
    net, one = Force(), data(5)
    expected = by_autograd(net, one["input"], logit)
    apart = TensorDictSequential(
        TensorDictModule(net.net, ["input"], ["energy"]),
        TensorDictModule(ForceOfEnergy(), ["energy", "input"], ["output"]),
    )
    for policy in (net, apart):
        with Saliency(target=targets.logit(1, "output"), when="batch").prepare(policy) as hooked:
            torch.testing.assert_close(hooked.annotate(one)["attr", "input"], expected)


def test_targets_that_differentiate() -> None:
    def sensitivity(run: object) -> Tensor:
        y, x = run.outputs["output"], run.outputs["input"]
        return torch.autograd.grad(y.sum(), x, create_graph=True)[0].square().sum(-1)

    net, one = chain(), data(5)
    x = one["input"].clone().requires_grad_()
    slope = torch.autograd.grad(net(x).sum(), x, create_graph=True)[0]
    expected = torch.autograd.grad(slope.square().sum(), x)[0]
    with Saliency(target=Target("sensitivity", sensitivity)).prepare(net) as hooked:
        torch.testing.assert_close(hooked(one.clone())["attr", "input"], expected)
        torch.testing.assert_close(hooked.annotate(one)["attr", "input"], expected)


@pytest.mark.parametrize("reads_inputs", [False, True])
def test_targets_that_mask_in_place(reads_inputs: bool) -> None:
    def masked(run: object) -> Tensor:
        y = run.outputs["output"]
        y[:, 0] = -torch.inf
        return y.log_softmax(-1)[:, 1]

    net, one = chain(), data(5)
    expected = by_autograd(net, one["input"], lambda y: y[:, 1:].log_softmax(-1)[:, 0])
    with Saliency(target=Target("masked", masked, reads_inputs)).prepare(net) as hooked:
        torch.testing.assert_close(hooked.annotate(one)["attr", "input"], expected)


MODES = pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])


@MODES
def test_noise_before_the_chain_is_drawn_once(mode: type) -> None:
    net, one = chain(), data(5)
    net.register_forward_pre_hook(lambda m, a: (a[0] + torch.randn_like(a[0]),))
    with Saliency(target=SQUARES).prepare(net) as hooked, mode():
        torch.manual_seed(3)
        found = hooked(one.clone())
        after = torch.randn(3)
    torch.manual_seed(3)
    x = one["input"] + torch.randn_like(one["input"])
    assert torch.equal(torch.randn(3), after)
    clean = nn.Sequential(*net)
    torch.testing.assert_close(found["output"], clean(x))
    torch.testing.assert_close(found["attr", "input"], by_autograd(clean, x, lambda y: y.square().sum(-1)))


def test_a_hook_on_the_gradient_of_the_chain() -> None:
    def doubles(module: nn.Module, args: tuple, y: Tensor) -> None:
        if y.requires_grad:
            y.register_hook(lambda gradient: 2 * gradient)

    net, one = chain(), data(5)
    with Saliency(target=targets.logit(1, "output")).prepare(net) as hooked:
        hooked.hooked_root.register_forward_hook(doubles)
        expected = 2 * by_autograd(net, one["input"], logit)
        torch.testing.assert_close(hooked(one.clone())["attr", "input"], expected)
        torch.testing.assert_close(hooked.annotate(one)["attr", "input"], expected)


def test_a_class_that_somebody_has_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    net, one = chain(), data(5)
    usual = nn.Linear.forward
    with Saliency(target=targets.logit(1, "output")).prepare(net) as hooked:
        monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * usual(self, x))
        found = hooked(one.clone())
        assert torch.equal(found["output"], net(one["input"]))
        torch.testing.assert_close(found["attr", "input"], by_autograd(net, one["input"], logit))


class Backwards(nn.Sequential):
    def __iter__(self) -> Iterator[nn.Module]:
        return reversed(list(self._modules.values()))


def test_sequences_that_run_in_another_order() -> None:
    net, one = Backwards(nn.Linear(16, 3), nn.Tanh(), nn.Linear(6, 16)).double(), data(5)
    with Saliency(target=targets.logit(1, "output")).prepare(net) as hooked:
        found = hooked(one.clone())
    assert torch.equal(found["output"], net(one["input"]))
    torch.testing.assert_close(found["attr", "input"], by_autograd(net, one["input"], logit))


class Ensemble(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.scale = chain(), nn.Parameter(torch.rand(4, 3, dtype=torch.double))

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(lambda scale: self.net(x) * scale)(self.scale).mean(0)


def test_chains_inside_transforms() -> None:
    net, one = Ensemble(), data(5)
    with Saliency(target=targets.logit(1, "output")).prepare(net) as hooked:
        found = hooked.annotate(one)
    torch.testing.assert_close(found["attr", "input"], by_autograd(net, one["input"], logit))


def test_sums_that_overflow_in_half_precision() -> None:
    net = nn.Sequential(nn.Linear(2, 2, bias=False)).half()
    with torch.no_grad():
        net[0].weight.copy_(200 * torch.eye(2))
    rows = TensorDict({"input": torch.tensor([[200.0, 200.0], [-200.0, -200.0], [1.0, 1.0]]).half()}, batch_size=3)
    with Saliency(target=targets.output_sum()).prepare(net) as hooked:
        found = hooked.annotate(rows)["attr", "input"]
    assert found.isnan().all(-1).tolist() == [True, True, False]


@MODES
def test_other_entries_of_the_caller_are_not_explained(mode: type) -> None:
    net, one = chain(), data(5)
    one["next", "action_value"] = torch.randn(5, 2)
    one["action"] = torch.zeros(5, dtype=torch.long)
    policy = TensorDictModule(net, ["input"], ["state_value"])
    expected = by_autograd(net, one["input"], lambda y: y)
    with Saliency(when="step").prepare(policy) as hooked, mode():
        torch.testing.assert_close(hooked(one)["attr", "input"], expected)


@MODES
def test_results_go_where_the_caller_says(mode: type) -> None:
    net, one, out = chain(), data(5), TensorDict({}, batch_size=5)
    with Saliency(target=targets.logit(1, "output")).prepare(net) as hooked, mode():
        assert hooked(one, tensordict_out=out) is out
    assert torch.equal(out["output"], net(one["input"]))
    torch.testing.assert_close(out["attr", "input"], by_autograd(net, one["input"], logit))


class Named(nn.Sequential):
    _steps = slope = 4


class Sloped:
    slope = _steps = 2.0

    def __call__(self, run: object) -> Tensor:
        return run.outputs["output"][..., 1]


def test_names_that_users_give_their_own_things() -> None:
    net, one = Named(*chain()), data(5)
    with Saliency(target=Target("sloped", Sloped())).prepare(net) as hooked:
        found = hooked(one)
    torch.testing.assert_close(found["attr", "input"], by_autograd(net, one["input"], logit))


def test_shapes_without_numbers() -> None:
    net = chain().to("meta")
    with Saliency(target=targets.logit(1, "output")).prepare(net) as hooked:
        found = hooked(TensorDict({"input": torch.empty(5, 6, dtype=torch.double, device="meta")}, batch_size=5))
    assert found["attr", "input"].shape == (5, 6)

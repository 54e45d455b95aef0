"""State that a forward writes beside what its modules hold: kept for our passes as well, or refused by name."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import ClassVar

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from tdhook_rl import IntegratedGradients, Saliency, targets
from tdhook_rl.attribution import Occlusion
from tdhook_rl.errors import InputError

STEPS = 6
CALLS, LIST, TENSOR = 0, [1], torch.zeros(())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)

    def count(self) -> float:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x / self.count()).tanh()


class InClass(Net):
    calls = 0

    def count(self) -> float:
        InClass.calls += 1
        return InClass.calls


class InOwnClass(Net):
    calls = 0

    def count(self) -> float:
        type(self).calls += 1
        return type(self).calls


class InDictOfClass(Net):
    book: ClassVar[dict[str, int]] = {}

    def count(self) -> float:
        self.book["calls"] = self.book.get("calls", 0) + 1
        return self.book["calls"]


class InTensorOfClass(Net):
    calls = torch.zeros(())

    def count(self) -> float:
        self.calls += 1
        return float(self.calls)


class InClosure(Net):
    def __init__(self) -> None:
        super().__init__()
        calls = 0

        def count() -> float:
            nonlocal calls
            calls += 1
            return calls

        self.count = count  # type: ignore[method-assign]


class InGlobal(Net):
    def count(self) -> float:
        global CALLS
        CALLS += 1
        return CALLS


class InHelper(Net):
    def count(self) -> float:
        return helper()


class InListOfModule(Net):
    def count(self) -> float:
        LIST.append(1)
        return len(LIST)


class InTensorOfModule(Net):
    def count(self) -> float:
        TENSOR.add_(1)
        return float(TENSOR)


class InDefault(Net):
    def count(self, box: list[int] = [0]) -> float:  # noqa: B006
        box[0] += 1
        return box[0]


class InFunction(Net):
    def count(self) -> float:
        helper.calls = getattr(helper, "calls", 0) + 1  # type: ignore[attr-defined]
        return helper.calls  # type: ignore[attr-defined]


def helper() -> float:
    global CALLS
    CALLS += 1
    return CALLS


KINDS = [
    InClass, InOwnClass, InDictOfClass, InTensorOfClass, InClosure, InGlobal, InHelper, InListOfModule,
    InTensorOfModule, InDefault, InFunction,
]  # fmt: skip


def reset() -> None:
    global CALLS
    CALLS = InClass.calls = InOwnClass.calls = 0
    LIST[:] = [1]
    TENSOR.zero_()
    InTensorOfClass.calls = torch.zeros(())
    InDictOfClass.book.clear()
    InDefault.count.__defaults__[0][0] = 0  # type: ignore[index]
    vars(helper).clear()


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    reset()
    yield
    reset()


def plain(kind: type[Net]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Inputs, outputs and gradients of a run of the network."""
    torch.manual_seed(0)
    net, inputs, outputs, gradients = kind(), [], [], []
    for _ in range(STEPS):
        x = torch.randn(5, 4).requires_grad_()
        y = net(x)
        inputs.append(x.detach())
        outputs.append(y.detach())
        gradients.append(torch.autograd.grad(y[:, 0].sum(), x)[0])
    reset()
    return inputs, outputs, gradients


def again(kind: type[Net]) -> Net:
    torch.manual_seed(0)
    return kind()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_explained_as_it_ran_and_the_next_one_runs_as_without(kind: type[Net], mode: Callable) -> None:
    run = zip(*plain(kind), strict=True)
    method = Saliency(target=targets.logit(0), when="step")
    with method.prepare(again(kind), in_keys=["x"], out_keys=["logits"]) as hooked:
        for x, y, gradient in run:
            with mode():
                found = hooked(TensorDict({"x": x.clone()}, [5]))
            torch.testing.assert_close(found["logits"], y)
            torch.testing.assert_close(found["attr", "x"], gradient)


@pytest.mark.parametrize(
    "method",
    [
        lambda: Saliency(target=targets.logit(0), when="batch"),
        lambda: IntegratedGradients(target=targets.logit(0), baseline=0.0, n_steps=4, when="step"),
        lambda: Occlusion(target=targets.logit(0)),
    ],
    ids=["batch", "path", "perturbation"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_passes_of_any_method_leave_the_policy_as_it_was(kind: type[Net], method: Callable) -> None:
    inputs, outputs, _ = plain(kind)
    with method().prepare(again(kind), in_keys=["x"], out_keys=["logits"]) as hooked:
        for x, y in zip(inputs, outputs, strict=True):
            found = hooked(TensorDict({"x": x.clone()}, [5]))
            torch.testing.assert_close(found["logits"], y)
            hooked.annotate(found, on_mismatch="ignore")


class Iterated(Net):
    def __init__(self) -> None:
        super().__init__()
        self.calls = itertools.count(1)

    def count(self) -> float:
        return next(self.calls)


class Timed(Net):
    """By four clocks, which are never all where they were."""

    def count(self) -> Tensor:  # type: ignore[override]
        now = time.perf_counter_ns()
        return torch.tensor([1 + now % round_trip / 100_000 for round_trip in (1_000_003, 700_001, 310_019, 130_003)])


class Hebbian(Net):
    """Trains itself while it runs."""

    def count(self) -> float:
        with torch.no_grad():
            self.net.weight.mul_(0.5)
        return 1.0


@pytest.mark.parametrize("when", ["step", "batch"])
@pytest.mark.parametrize("kind", [Iterated, Timed, Hebbian])
def test_what_cannot_be_kept_is_refused_by_name(kind: type[Net], when: str) -> None:
    method = Saliency(target=targets.logit(0), when=when)  # type: ignore[arg-type]
    net = nn.Sequential(nn.Linear(4, 4), kind())
    with method.prepare(net, in_keys=["x"], out_keys=["logits"]) as hooked, torch.no_grad():
        with pytest.raises(InputError, match=f"'1' \\({kind.__name__}\\) reads or writes state"):
            hooked.annotate(hooked(TensorDict({"x": torch.randn(5, 4)}, [5])), on_mismatch="ignore")


def test_a_function_of_the_user_with_a_variable_of_its_own() -> None:
    def build() -> TensorDictModule:
        calls = 0

        def scaled(x: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return (x / calls).tanh()

        return TensorDictModule(scaled, in_keys=["x"], out_keys=["logits"])

    twin, xs = build(), torch.randn(STEPS, 5, 4)
    with Saliency(target=targets.logit(0), when="step").prepare(build()) as hooked, torch.no_grad():
        for x in xs:
            found = hooked(TensorDict({"x": x}, [5]))
            torch.testing.assert_close(found["logits"], twin(TensorDict({"x": x}, [5]))["logits"])


def test_a_counter_that_changes_nothing_counts_the_passes_too() -> None:
    class Profiled(nn.Linear):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Profiled.calls += 1
            return super().forward(x)

    net = nn.Sequential(Profiled(4, 3))
    with Saliency(target=targets.logit(0, "output"), when="step").prepare(net) as hooked, torch.no_grad():
        for _ in range(5):
            hooked(TensorDict({"input": torch.randn(5, 4)}, [5]))
    assert Profiled.calls == 10

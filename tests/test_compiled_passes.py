"""Passes that are compiled on request: numbers, marks and warnings of those that are not, or a word and the same."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.modules import ValueOperator

from benchmarks.actors import ACTORS
from tdhook_rl import Saliency, targets
from tdhook_rl.attribution import IntegratedGradients
from tdhook_rl.errors import InputError, MismatchError, MissingKeyError
from tdhook_rl.method import Method

QUICK = {"backend": "aot_eager"}
ROWS = 5


@pytest.fixture(autouse=True)
def _fresh_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def critic(net: nn.Module) -> ValueOperator:
    torch.manual_seed(0)
    return ValueOperator(net.double(), in_keys=["observation"])


def data(rows: int = ROWS) -> TensorDict:
    return TensorDict({"observation": torch.randn(rows, 4, dtype=torch.double)}, batch_size=rows)


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 1))


def test_the_same_numbers_marks_and_warnings() -> None:
    policy, rows = critic(plain()), data()
    rows["observation"][3] = torch.nan
    with Saliency(when="batch").prepare(policy) as hooked:
        expected = hooked.annotate(policy(rows.clone()))
    with Saliency(when="batch", compile=QUICK).prepare(policy) as hooked:
        before = torch.get_rng_state()
        found = hooked.annotate(policy(rows.clone()))
        assert torch.equal(torch.get_rng_state(), before)
        for key in (("attr", "observation"), ("computed", "attr")):
            torch.testing.assert_close(found[key], expected[key], atol=1e-12, rtol=1e-12, equal_nan=True)
        assert hooked.annotate(found)["attr", "observation"] is found["attr", "observation"]
        assert hooked._hooked.bound[0].compiled.seconds > 0
        with torch.no_grad():
            policy.module[0].weight.mul_(2)
        with pytest.raises(MismatchError):
            hooked.annotate(found, on_mismatch="raise")
        with pytest.raises(MissingKeyError):
            hooked.annotate(TensorDict({"x": torch.ones(ROWS, 4)}, batch_size=ROWS))
        again = hooked.annotate(rows)["attr", "observation"]
        with Saliency(when="batch").prepare(policy) as other:
            expected = other.annotate(rows)["attr", "observation"]
        torch.testing.assert_close(again, expected, atol=1e-12, rtol=1e-12, equal_nan=True)
        assert copy.deepcopy(hooked)._hooked.bound[0].compiled.seconds == 0


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = plain()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if float(x.detach().sum()) > 0 else self.net(-x)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.count = plain(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.net(x) * (1 + 0 * self.count)


def _breaks(graph: Any, inputs: Any) -> Any:
    raise NotImplementedError("no such backend here")


@pytest.mark.parametrize(
    ("net", "options", "reason"),
    [
        (Branching, QUICK, "data-dependent"),
        (Counting, QUICK, "writes state"),
        (plain, {"backend": _breaks}, "no such backend here"),
    ],
)
def test_what_cannot_be_compiled_is_said_once_and_computed(net: Any, options: Any, reason: str) -> None:
    policy, rows = critic(net()), data()
    with Saliency(when="batch").prepare(policy) as hooked:
        expected = hooked.annotate(rows, on_mismatch="ignore")["attr", "observation"]
    with Saliency(when="batch", compile=options).prepare(policy) as hooked:
        with pytest.warns(UserWarning, match=f"(?s)goes on uncompiled.*{reason}"):
            found = hooked.annotate(rows, on_mismatch="ignore")["attr", "observation"]
        assert torch.equal(found, expected)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(hooked.annotate(rows, on_mismatch="ignore")["attr", "observation"], expected)


def test_what_is_refused() -> None:
    with pytest.raises(InputError, match=r"compile= takes arguments of torch.compile; nearest: 'backend'"):
        Saliency(compile={"backnd": "aot_eager"}).prepare(critic(plain())).__enter__()
    for method in (
        Saliency(compile=True, horizon="trajectory"),
        Saliency(compile=True, input_modules=["0"], missing="nan"),
    ):
        with pytest.raises(InputError, match="compile="):
            method.prepare(critic(plain())).__enter__()


def _step(hooked: Any, rows: TensorDict) -> Tensor:
    return hooked(rows.clone())["attr", "observation"]


def _annotated(hooked: Any, rows: TensorDict) -> Tensor:
    return hooked.annotate(rows)["attr", "observation"]


def _in_vmap(hooked: Any, rows: TensorDict) -> Tensor:
    return torch.vmap(lambda row: hooked(row.clone())["attr", "observation"])(rows)


@pytest.mark.parametrize(
    ("net", "mode", "run", "why"),
    [
        (
            lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)),
            torch.no_grad,
            _step,
            "chain of known layers",
        ),
        (plain, torch.enable_grad, _step, "gradients are on"),
        (plain, torch.inference_mode, _step, "inference mode"),
        (plain, torch.inference_mode, _annotated, "inference mode"),
        (plain, torch.no_grad, _in_vmap, "inside vmap"),
    ],
    ids=["a chain", "a graph", "inference mode", "annotate in inference mode", "vmap"],
)
def test_where_it_is_set_aside_that_is_said_once(net: Any, mode: Any, run: Any, why: str) -> None:
    policy, rows = critic(net()), data()
    with Saliency().prepare(policy) as hooked, mode():
        expected = run(hooked, rows)
    with Saliency(compile=QUICK).prepare(policy) as hooked, mode():
        with pytest.warns(UserWarning, match=rf"Saliency\(compile=...\) is set aside.*{why}") as said:
            assert torch.equal(run(hooked, rows), expected)
        assert len(said) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(run(hooked, rows), expected)


def test_a_recurrent_core_that_cannot_be_traced_is_explained_without() -> None:
    problem = ACTORS["GRU"](ROWS)
    with Saliency(target=problem.target, inputs=["observation"], when="batch").prepare(problem.policy) as hooked:
        expected = hooked.annotate(problem.data)["attr", "observation"]
    method = Saliency(target=problem.target, inputs=["observation"], when="batch", compile=QUICK)
    with method.prepare(problem.policy) as hooked, pytest.warns(UserWarning, match="goes on uncompiled"):
        assert torch.equal(hooked.annotate(problem.data)["attr", "observation"], expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Categorical", "OneHot", "TanhNormal", "Q"])
@pytest.mark.parametrize("method", [Saliency, IntegratedGradients])
@pytest.mark.parametrize("options", [QUICK, True], ids=["aot_eager", "inductor"])
def test_every_actor(name: str, method: Any, options: Any) -> None:
    problem = ACTORS[name](8)
    more: dict[str, Any] = {} if method is Saliency else {"baseline": 0.0, "n_steps": 4}

    def made(**compiles: Any) -> Method:
        return method(target=problem.target, inputs=["observation"], when="batch", **more, **compiles)

    with made().prepare(problem.policy) as hooked:
        expected = hooked.annotate(problem.data)["attr", "observation"]
    with made(compile=options).prepare(problem.policy) as hooked, warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*goes on uncompiled")
        found = hooked.annotate(problem.data)["attr", "observation"]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_a_step_is_explained_by_a_graph() -> None:
    net = TensorDictModule(plain().double(), ["observation"], ["logits"])
    with Saliency(target=targets.logit(0), when="step", compile=QUICK).prepare(net) as hooked, torch.no_grad():
        rows = data()
        found = hooked(rows.clone())
        assert not hooked._hooked.bound[0].compiled._failed
    with Saliency(target=targets.logit(0), when="step").prepare(net) as hooked, torch.no_grad():
        torch.testing.assert_close(found["attr", "observation"], hooked(rows)["attr", "observation"])

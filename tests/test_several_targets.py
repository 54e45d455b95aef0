"""Several methods that explain one call together: what each finds is what it finds alone, in fewer passes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Module
from tensordict.nn import TensorDictSequential
from torch import Tensor, nn
from torch.distributions import Categorical
from torchrl.modules import ProbabilisticActor

from tdhook_rl import Compose, Saliency, targets
from tdhook_rl.attribution import IntegratedGradients, copies
from tdhook_rl.calls.passes import Call
from tdhook_rl.errors import MismatchError

ROWS = 5


class Both(nn.Module):
    """Two outputs, of which the first depends on the first input only."""

    def __init__(self, *between: nn.Module) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)
        self.between = nn.Sequential(*between, nn.Softplus())

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.between(self.first(x))
        return hidden, hidden * self.second(y)


def _module(*between: nn.Module) -> Module:
    torch.manual_seed(0)
    return Module(Both(*between).double(), ["x", "y"], ["logits", "values"])


def _recurrent() -> TensorDictSequential:
    from torchrl.modules import GRUModule

    torch.manual_seed(0)
    core = GRUModule(4, 6, in_keys=["x", "state", "is_init"], out_keys=["hidden", ("next", "state")])
    return TensorDictSequential(core, Module(nn.Linear(6, 3), ["hidden"], ["logits"])).double()


def _actor() -> ProbabilisticActor:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)).double()
    return ProbabilisticActor(Module(net, ["x"], ["logits"]), ["logits"], distribution_class=Categorical)


POLICIES: dict[str, tuple[Callable[[], Any], bool]] = {
    "two inputs": (_module, True),
    "dropout": (lambda: _module(nn.Dropout(0.5)), False),
    "batch statistics": (lambda: _module(nn.BatchNorm1d(3)), True),  # which annotate freezes
    "layer norm": (lambda: _module(nn.LayerNorm(3)), True),
    "recurrent": (_recurrent, True),
    "actor": (_actor, True),
}


def _data(rows: int = ROWS) -> TensorDict:
    torch.manual_seed(1)
    more = {"state": torch.randn(rows, 1, 6).double(), "is_init": torch.arange(rows)[:, None] == 2}
    return TensorDict({"x": torch.randn(rows, 4).double(), "y": torch.randn(rows, 4).double(), **more}, [rows])


def _compare(policy: Any, data: TensorDict, asked: list[Any]) -> tuple[list[str], list[str]]:
    """Compare what methods find together with what each finds alone; the warnings of both."""
    with warnings.catch_warnings(record=True) as said_alone:
        warnings.simplefilter("always")
        alone = []
        for target in asked:
            with Saliency(target=target, when="batch").prepare(policy) as hooked:
                alone.append(hooked.annotate(data))
    methods = [Saliency(target=one, when="batch", attribution_key=f"a{place}") for place, one in enumerate(asked)]
    with Compose(*methods).prepare(policy) as hooked, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = hooked.annotate(data)
    for place, expected in enumerate(alone):
        for key in ("x", "y"):
            if ("attr", key) in expected.keys(True):
                ours = found[f"a{place}", key]
                torch.testing.assert_close(ours, expected["attr", key], atol=1e-12, rtol=1e-10, equal_nan=True)
        assert torch.equal(found["computed", f"a{place}"], expected["computed", "attr"])
    return [str(one.message) for one in said_alone], [str(one.message) for one in said]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each pass."""
    rows: list[int] = []
    replay = Call.replay

    def counted(self: Call, inputs: Any = None, stored: Any = None, *args: Any, **options: Any) -> Any:
        rows.append((self.data if stored is None else stored).batch_size.numel())
        return replay(self, inputs, stored, *args, **options)

    monkeypatch.setattr(Call, "replay", counted)
    return rows


@pytest.mark.parametrize("name", POLICIES)
def test_in_one_pass_where_rows_do_not_meet(name: str, passes: list[int]) -> None:
    make, apart = POLICIES[name]
    policy, data = make(), _data()
    with torch.no_grad():
        data = policy(data)
    asked = [targets.logit(index) for index in range(3)]
    has_values = name not in ("recurrent", "actor")
    _compare(policy, data, [*asked, *([targets.logit(1, "values")] if has_values else [])])
    copied = (4 if has_values else 3) * ROWS
    assert (passes.count(copied) == 1) is apart


def test_copies_are_left_where_some_target_has_no_gradient(passes: list[int]) -> None:
    methods = [Saliency(target=targets.logit(place), when="batch", attribution_key=f"a{place}") for place in range(3)]
    with Compose(*methods).prepare(_module()) as hooked:
        with pytest.warns(UserWarning, match="no gradient"):
            hooked.annotate(_data())
        assert passes.count(3 * ROWS) == 1
        assert bool(hooked.annotate(_data())["a1", "y"].isnan().all())
    assert passes.count(3 * ROWS) == 1  # it was tried once


def test_what_no_gradient_reaches_is_said_and_not_a_number() -> None:
    policy, data = _module(), _data()
    asked = [targets.logit(0), targets.logit(1, "values")]
    alone, together = _compare(policy, data, asked)
    assert [one for one in alone if "no gradient" in one] == [one for one in together if "no gradient" in one] != []


def test_rows_without_a_number() -> None:
    policy, data = _module(), _data()
    data["x"][2] = torch.nan
    data["y"][3] = torch.inf
    _compare(policy, data, [targets.logit(0, "values"), targets.logit(1, "values")])


@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_other_batches(shape: tuple[int, ...]) -> None:
    data = _data(6).reshape(2, 3) if shape else _data(1)[0]
    _compare(_module(nn.LayerNorm(3)), data, [targets.logit(index, "values") for index in range(3)])


def test_much_work_goes_target_by_target(monkeypatch: pytest.MonkeyPatch, passes: list[int]) -> None:
    monkeypatch.setattr(copies, "WORK", 10)
    _compare(_module(), _data(), [targets.logit(index, "values") for index in range(3)])
    assert set(passes) == {ROWS}


@pytest.mark.parametrize("shape", [(), (ROWS,), (2, 3)])
@pytest.mark.parametrize("name", ["two inputs", "layer norm", "recurrent", "actor"])
def test_the_end_of_a_path_is_compared_with_what_is_stored(name: str, shape: Any, passes: list[int]) -> None:
    """In the pass of the path; what is found is what is found without a comparison."""
    policy = POLICIES[name][0]()
    rows = torch.Size(shape).numel()
    data = _data(rows)
    data["x"][rows // 2 :] = data["x"][rows // 2 :] if name == "actor" or not shape else torch.inf
    data = data.reshape(shape) if shape else data[0]
    with torch.no_grad():
        data = policy(data)
    method = IntegratedGradients(target=targets.logit(1), baseline=0.1, n_steps=3, inputs=["x"], when="batch")
    with method.prepare(policy) as hooked:
        for _ in range(4):  # what is looked at in the first calls only is over then
            expected = hooked.annotate(data, on_mismatch="ignore")
        passes.clear()
        found = hooked.annotate(data, on_mismatch="raise")
        assert passes == [4 * rows]
        torch.testing.assert_close(found["attr", "x"], expected["attr", "x"], atol=1e-12, rtol=1e-10, equal_nan=True)
        assert torch.equal(found["computed", "attr"], expected["computed", "attr"])
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.neg_()
        with pytest.raises(MismatchError, match=f"of {rows} rows"):
            hooked.annotate(data, on_mismatch="raise")


@pytest.mark.parametrize("padded", [False, True])
def test_whole_trajectories(padded: bool) -> None:
    policy, data = _module(nn.LayerNorm(3)), _data(6).reshape(2, 3)
    data["mask"] = torch.ones(2, 3, dtype=torch.bool)
    data["mask"][1, 2:] = not padded

    def found(names: Sequence[str]) -> TensorDict:
        methods = [
            Saliency(
                target=targets.logit(int(one), "values"), when="batch", horizon="trajectory", attribution_key=f"a{one}"
            )
            for one in names
        ]
        with Compose(*methods).prepare(policy) as hooked:
            return hooked.annotate(data.clone())

    together = found("01")
    for one in "01":
        torch.testing.assert_close(together[f"a{one}", "x"], found(one)[f"a{one}", "x"], equal_nan=True)

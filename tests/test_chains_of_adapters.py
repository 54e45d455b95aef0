"""Policies from elsewhere that are chains of known layers: explained as such, and what is done to them is not missed.

What they would be explained by otherwise, the policy run again and seen by autograd, is the reference.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from tdhook_rl import Compose, Saliency, targets
from tdhook_rl.adapters import from_module, from_sb3
from tdhook_rl.adapters.modules import Plain
from tdhook_rl.adapters.observations import Branch, Rows
from tdhook_rl.attribution import IntegratedGradients
from tdhook_rl.calls.chains import Record
from tdhook_rl.errors import TargetError
from tests.sb3_agents import make_agent

ROWS = 6


class Agent(nn.Module):
    """As in CleanRL's scripts."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(5, 8), nn.Tanh())
        self.actor, self.critic = nn.Sequential(nn.Linear(8, outputs), nn.Identity()), nn.Linear(8, 1)
        self.actor_logstd = nn.Parameter(torch.full((1, outputs), -0.3))
        self.frozen = nn.Parameter(torch.full((1, outputs), -0.3), requires_grad=False)


POLICIES: dict[str, Callable[[], Any]] = {
    "PPO": lambda: from_sb3(make_agent("PPO")),
    "PPO, several choices": lambda: from_sb3(make_agent("PPO", action="several")),
    "PPO, value": lambda: from_sb3(make_agent("PPO"), "value"),
    "PPO, torque": lambda: from_sb3(make_agent("PPO", action="torque")),
    "PPO, a matrix of actions": lambda: from_sb3(make_agent("PPO", action="matrix")),
    "DQN": lambda: from_sb3(make_agent("DQN")),
    "SAC": lambda: from_sb3(make_agent("SAC")),
    "CleanRL": lambda: from_module(Agent(), "actor", trunk="network"),
    "CleanRL, normal": lambda: from_module(Agent(), "actor", trunk="network", kind="normal", log_std="actor_logstd"),
    "CleanRL, a fixed scale": lambda: from_module(Agent(), "actor", trunk="network", kind="normal", log_std="frozen"),
    "CleanRL, values": lambda: from_module(Agent(), "actor", trunk="network", kind="values"),
    "CleanRL, value": lambda: from_module(Agent(), value="critic", trunk="network", part="value"),
}
#: The dimensions of the batch.
BATCHES = (ROWS,), (2, 3), ()


def _case(name: str, batch: tuple[int, ...] = (ROWS,)) -> tuple[Any, TensorDict]:
    torch.manual_seed(0)
    policy = POLICIES[name]().double()
    with torch.no_grad():
        x = torch.randn(*batch, 5, dtype=torch.double)
        return policy, policy(TensorDict({policy.in_keys[0]: x}, batch_size=batch))


@contextmanager
def _by_autograd(hooked: Any) -> Iterator[None]:
    state, kept = hooked._hooked, (hooked._hooked.chain, hooked._hooked.decider)
    state.chain = state.decider = None
    try:
        yield
    finally:
        state.chain, state.decider = kept


def _require_same(hooked: Any, data: TensorDict) -> Tensor:
    ours = hooked.annotate(data, on_mismatch="ignore")["attr"]
    with _by_autograd(hooked):
        usual = hooked.annotate(data, on_mismatch="ignore")["attr"]
    for key, value in usual.items(True, True):
        torch.testing.assert_close(ours[key], value, atol=1e-12, rtol=1e-9)
    return ours["observation"]


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("method", [Saliency(), IntegratedGradients(baseline=0.1, n_steps=7)], ids=["one", "path"])
def test_they_are_explained_by_their_chain(name: str, method: Any, records: list[Record]) -> None:
    for batch in BATCHES:
        policy, data = _case(name, batch)
        records.clear()
        with method.prepare(policy) as hooked:
            _require_same(hooked, data)
        # Without a batch the modules see one row, which another kernel adds up; a path has rows in any case.
        assert len(records) == (1 if batch or isinstance(method, IntegratedGradients) else 0)


@pytest.mark.parametrize("name", ["PPO, torque", "SAC", "CleanRL, a fixed scale"])
def test_other_targets(name: str, records: list[Record]) -> None:
    policy, data = _case(name)
    asked = [targets.logit(0, "loc"), targets.logit(1, "loc"), targets.logit(1, "scale"), targets.entropy()]
    known = []
    for target in asked:
        with Saliency(target=target).prepare(policy) as hooked:
            if target.name == "entropy" or (target is asked[2] and name != "SAC"):
                for way in (nullcontext(), _by_autograd(hooked)):
                    with way, pytest.raises(TargetError):  # of the scale, a parameter; there is none of the other
                        hooked.annotate(data)
            else:
                known.append((target, _require_same(hooked, data)))
    records.clear()
    methods = [Saliency(target=target, attribution_key=f"attr{place}") for place, (target, _) in enumerate(known)]
    with Compose(*methods).prepare(policy) as hooked:
        found = hooked.annotate(data)
    assert len(records) == 1
    for place, (_, expected) in enumerate(known):
        torch.testing.assert_close(found[f"attr{place}", "observation"], expected, atol=1e-12, rtol=1e-9)


def _doubled(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return 2 * value
    return tuple(map(_doubled, value)) if isinstance(value, tuple) else value


def _hook(module: nn.Module) -> Callable[[], None]:
    return module.register_forward_hook(lambda _, args, output: _doubled(output)).remove


def _replace(module: nn.Module) -> Callable[[], None]:
    own = module.forward
    module.forward = lambda *args, **kwargs: _doubled(own(*args, **kwargs))
    return lambda: module.__dict__.pop("forward")


@pytest.mark.parametrize("change", [_hook, _replace])
@pytest.mark.parametrize("name", ["PPO", "PPO, torque", "SAC", "DQN", "CleanRL, normal", "CleanRL, value"])
def test_what_is_done_to_any_of_their_modules_is_seen(name: str, change: Any) -> None:
    policy, data = _case(name)
    with Saliency().prepare(policy) as hooked:
        first = _require_same(hooked, data)
        changed = 0
        inside = [one for one in hooked.modules() if not isinstance(one, nn.ModuleList) and "_td" not in vars(one)]
        for module in inside:
            if hasattr(module, "in_keys"):
                continue  # what it returns is no tensor
            undo = change(module)
            changed += not torch.allclose(_require_same(hooked, data), first)
            undo()
        assert changed >= 4
        torch.testing.assert_close(_require_same(hooked, data), first)


class Doubles(Branch):
    def forward(self, x: Any) -> Any:
        return 2 * super().forward(x)


class Halves(Plain):
    def forward(self, *values: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return super().forward(*values, dtype=dtype) / 2


@pytest.mark.parametrize(
    "parts",
    [
        lambda: {"observation": Plain(1, None), "net": Doubles(inner=nn.Linear(5, 2))},
        lambda: {"observation": Halves(1, None), "net": nn.Linear(5, 2)},
        lambda: {"observation": Plain(1, 255.0), "net": nn.Linear(5, 2)},
    ],
    ids=["another forward", "another preparation", "scaled"],
)
def test_what_computes_something_else_is_left_to_autograd(parts: Any, records: list[Record]) -> None:
    policy = TensorDictModule(Rows(OrderedDict(parts())), ["observation"], ["out"]).double()
    data = TensorDict({"observation": torch.randn(ROWS, 5, dtype=torch.double)}, batch_size=ROWS)
    with Saliency(when="batch").prepare(policy) as hooked:
        _require_same(hooked, data)
    assert not records


def test_observations_of_another_dtype_are_cast_as_ever(records: list[Record]) -> None:
    policy, data = _case("PPO, value")
    with Saliency(when="batch").prepare(policy.float()) as hooked:
        assert _require_same(hooked, data).dtype == torch.float64
    assert not records

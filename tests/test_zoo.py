"""Every method on every policy of the zoo, in a collector: each cell against what the entry computes by hand."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.collectors import Collector

from tdhook_rl import ActivationCaching, Compose, LinearProbe, ProbeReadout, Saliency, SteeringVectors
from tdhook_rl.attribution import IntegratedGradients, Occlusion
from tdhook_rl.latent import DirectionalAblation, DirectionClamping
from tdhook_rl.method import Method
from tdhook_rl.weights import Adapters
from tests.test_invariants import snapshot
from tests.zoo import ZOO, Entry

COPIES, STEPS, BATCHES = 3, 5, 3


def vector(entry: Entry) -> Tensor:
    return torch.randn(entry.features, generator=torch.Generator().manual_seed(1))


def fitted(entry: Entry) -> LinearProbe:
    draws, width = torch.Generator().manual_seed(2), torch.Size(entry.features).numel()
    weight, bias = torch.randn(3, width, generator=draws), torch.randn(3, generator=draws)
    return LinearProbe(weight=weight / width**0.5, bias=bias, path=entry.site)


def shifted(module_key: str, output: Any) -> Any:
    return (output[0] + 1.0, *output[1:]) if isinstance(output, tuple) else output + 1.0


# ---------------------------------------------------------------------- what each cell must find


def gradient(entry: Entry, policy: Any, rows: TensorDictBase, score: Callable) -> dict:
    """By autograd, with respect to the explained inputs, as floats."""
    leaves = {key: rows[key].to(torch.get_default_dtype()).requires_grad_() for key in entry.explained}
    given = rows.clone(recurse=False)
    for key, leaf in leaves.items():
        given.set(key, leaf)
    outputs = entry.rest(policy, entry.first(policy, given), given)
    found = torch.autograd.grad(score(outputs, rows).sum(), list(leaves.values()), allow_unused=True)
    return {
        key: torch.zeros_like(leaf) if value is None else value
        for (key, leaf), value in zip(leaves.items(), found, strict=True)
    }


def inner_gradient(entry: Entry, policy: Any, rows: TensorDictBase) -> Tensor:
    hidden = entry.first(policy, rows).detach().requires_grad_()
    return torch.autograd.grad(entry.score(entry.rest(policy, hidden, rows), rows).sum(), hidden)[0]


def check_cache(entry: Entry, policy: Any, rows: TensorDictBase) -> Tensor:
    found = rows["cache", entry.site]
    assert found.shape == (len(rows), *entry.features)
    close(found, entry.first(policy, rows))
    return found


def check_outputs(change: Callable[[Entry, Tensor, TensorDictBase], Tensor]) -> Callable:
    def check(entry: Entry, policy: Any, rows: TensorDictBase) -> Tensor:
        found = torch.zeros(())
        expected = entry.rest(policy, change(entry, entry.first(policy, rows), rows), rows)
        for key, value in expected.items():
            if key in rows.keys(True):
                close(rows[key], value)
                found = rows[key]
        return found

    return check


def add(entry: Entry, hidden: Tensor, rows: TensorDictBase) -> Tensor:
    return hidden + vector(entry)


def add_per_row(entry: Entry, hidden: Tensor, rows: TensorDictBase) -> Tensor:
    return hidden + rows["strength"].reshape(-1, *(1,) * len(entry.features)) * vector(entry)


def hold(value: float) -> Callable[[Entry, Tensor, TensorDictBase], Tensor]:
    def change(entry: Entry, hidden: Tensor, rows: TensorDictBase) -> Tensor:
        unit = (vector(entry) / vector(entry).norm()).reshape(-1)
        flat = hidden.reshape(len(rows), -1)
        return (flat + (value - flat @ unit)[:, None] * unit).reshape(hidden.shape)

    return change


def check_probe(entry: Entry, policy: Any, rows: TensorDictBase) -> Tensor:
    probe = fitted(entry)
    scores = entry.first(policy, rows).reshape(len(rows), -1) @ probe.weight.T + probe.bias
    close(rows["probe", "concept"], scores.softmax(-1))
    return rows["probe", "concept"]


def check_saliency(score: str) -> Callable:
    def check(entry: Entry, policy: Any, rows: TensorDictBase) -> Tensor:
        found = torch.zeros(())
        expected = gradient(entry, policy, rows, entry.value[1] if score == "value" else entry.score)
        for key, value in expected.items():
            found = rows["attr", key]
            assert found.dtype == torch.get_default_dtype()
            close(found, value)
        return found

    return check


def check_inner(entry: Entry, policy: Any, rows: TensorDictBase) -> Tensor:
    close(rows["attr", entry.site], inner_gradient(entry, policy, rows))
    return rows["attr", entry.site]


def check_completeness(entry: Entry, policy: Any, rows: TensorDictBase) -> Tensor:
    def score(given: TensorDictBase) -> Tensor:
        return entry.score(entry.rest(policy, entry.first(policy, given), given), rows)

    baseline = rows.clone(recurse=False)
    for key in entry.explained:
        baseline.set(key, torch.zeros_like(rows[key]))
    change = score(rows) - score(baseline)
    found = torch.stack([rows["attr", key].reshape(len(rows), -1).sum(-1) for key in entry.explained]).sum(0)
    torch.testing.assert_close(found, change.to(found.dtype), rtol=0.02, atol=0.02)
    return found


def check_occlusion(entry: Entry, policy: Any, rows: TensorDictBase) -> Tensor:
    def score(given: TensorDictBase) -> Tensor:
        return entry.score(entry.rest(policy, entry.first(policy, given), given), rows)

    found = torch.zeros(())
    for key in entry.explained:
        occluded = rows[key].flatten(1).clone()
        occluded[:, -1] = 0
        without = rows.clone(recurse=False).set(key, occluded.reshape(rows[key].shape))
        found = rows["attr", key].flatten(1)[:, -1]
        close(found, score(rows) - score(without))
    return found


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-3, atol=1e-4)


@dataclass(frozen=True)
class Cell:
    """How a method is configured for an entry, and what its results must be."""

    make: Callable[[Entry], Method]
    check: Callable[[Entry, Any, TensorDictBase], Tensor]
    needs: Callable[[Entry], bool] = lambda entry: True
    slow: bool = False


def _value(entry: Entry) -> Any:
    return None if entry.value is None else entry.value[0]


CELLS = {
    "caching": Cell(lambda e: ActivationCaching(e.site), check_cache),
    "steering": Cell(lambda e: SteeringVectors({e.site: vector(e)}), check_outputs(add)),
    "steering_per_row": Cell(
        lambda e: SteeringVectors({e.site: vector(e)}, alpha="strength"), check_outputs(add_per_row)
    ),
    "steering_function": Cell(
        lambda e: SteeringVectors(modules_to_steer=[e.site], steer_fn=shifted),
        check_outputs(lambda e, h, r: h + 1.0),
        slow=True,
    ),
    "ablation": Cell(lambda e: DirectionalAblation({e.site: vector(e)}), check_outputs(hold(0.0))),
    "clamping": Cell(lambda e: DirectionClamping({e.site: vector(e)}, value=1.5), check_outputs(hold(1.5)), slow=True),
    "adapter": Cell(
        lambda e: Adapters({"tanh": (torch.tanh, e.site, e.site)}), check_outputs(lambda e, h, r: h.tanh()), slow=True
    ),
    "probe": Cell(lambda e: ProbeReadout({"concept": fitted(e)}), check_probe),
    "saliency_step": Cell(
        lambda e: Saliency(when="step", target=e.target, inputs=e.explained), check_saliency("action")
    ),
    "saliency_batch": Cell(
        lambda e: Saliency(when="batch", target=e.target, inputs=e.explained), check_saliency("action")
    ),
    "saliency_inner_step": Cell(lambda e: Saliency(when="step", target=e.target, input_modules=[e.site]), check_inner),
    "saliency_inner_batch": Cell(
        lambda e: Saliency(when="batch", target=e.target, input_modules=[e.site]), check_inner
    ),
    "value_step": Cell(
        lambda e: Saliency(when="step", target=_value(e), inputs=e.explained),
        check_saliency("value"),
        lambda e: e.value is not None,
    ),
    "value_batch": Cell(
        lambda e: Saliency(when="batch", target=_value(e), inputs=e.explained),
        check_saliency("value"),
        lambda e: e.value is not None,
    ),
    "integrated_gradients_batch": Cell(
        lambda e: IntegratedGradients(when="batch", target=e.target, inputs=e.explained, baseline=0.0, n_steps=64),
        check_completeness,
        slow=True,
    ),
    "occlusion_batch": Cell(
        lambda e: Occlusion(when="batch", target=e.target, inputs=e.explained), check_occlusion, slow=True
    ),
}


def prepare(entry: Entry, policy: nn.Module, method: Method) -> Any:
    plain = None if hasattr(policy, "in_keys") else {"in_keys": ["observation"], "out_keys": ["action"]}
    return method.prepare(policy, **(plain or {}))


def collected(entry: Entry, policy: nn.Module, hooked: Any) -> Iterator[TensorDict]:
    """Batches of a collector that runs the hooked policy; the weights change between them."""
    collector = Collector(
        entry.env(policy, COPIES),
        None if entry.critic else hooked,
        frames_per_batch=COPIES * STEPS,
        total_frames=COPIES * STEPS * BATCHES,
        postproc=(lambda data: hooked.annotate(hooked(data))) if entry.critic else hooked.annotate,
    )
    try:
        for data in collector:
            yield data
            with torch.no_grad():
                for parameter in policy.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
    finally:
        collector.shutdown()


def cells() -> Iterator[Any]:
    """Every policy with every method, named after both."""
    for policy, entry in ZOO.items():
        for method, cell in CELLS.items():
            if cell.needs(entry):
                slow = cell.slow or (policy == "decision_transformer" and method.endswith("batch"))
                yield pytest.param(policy, method, id=f"{policy}-{method}", marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(("policy", "method"), list(cells()))
def test_cell(policy: str, method: str) -> None:
    entry, cell = ZOO[policy], CELLS[method]
    plain = entry.build()
    found = []
    with prepare(entry, plain, cell.make(entry)) as hooked:
        for data in collected(entry, plain, hooked):
            assert data.batch_size == (COPIES, STEPS)
            assert bool(data["next", "done"].any())
            for root in {key[0] for key in hooked.result_keys} - {"computed"}:
                assert bool(data["computed", root].all())
            found.append(cell.check(entry, plain, data.reshape(-1)))
    assert len(found) == BATCHES
    assert found[0].numel() == 1 or not torch.equal(found[0], found[2])


# ---------------------------------------------------------------------- what holds for every policy


def observing(entry: Entry) -> Compose:
    """Everything that only observes, at every step, and steering at alpha 0."""
    methods = [
        ActivationCaching(entry.site),
        ProbeReadout({"concept": fitted(entry)}),
        Saliency(when="step", target=entry.target, inputs=entry.explained),
        Saliency(when="step", target=entry.target, input_modules=[entry.site], attribution_key="inner"),
        SteeringVectors({entry.site: vector(entry)}, alpha=0.0),
    ]
    if entry.value is not None:
        methods.append(Saliency(when="step", target=entry.value[0], inputs=entry.explained, attribution_key="value"))
    return Compose(*methods)


def run(entry: Entry, policy: nn.Module, acting: nn.Module, batch: tuple[int, ...]) -> tuple[TensorDict, Tensor]:
    torch.manual_seed(4)
    frames = 6 * torch.Size(batch).numel()
    critic = {"policy": None, "postproc": acting} if entry.critic else {"policy": acting}
    collector = Collector(entry.env(policy, *batch), frames_per_batch=frames, total_frames=2 * frames, **critic)
    data = torch.cat([one.clone() for one in collector], -1)
    collector.shutdown()
    return data, torch.get_rng_state()


@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
@pytest.mark.parametrize("policy", ZOO)
def test_an_observing_run_is_the_plain_run(policy: str, batch: tuple[int, ...]) -> None:
    entry = ZOO[policy]
    plain = entry.build()
    acting = plain if hasattr(plain, "in_keys") else TensorDictModule(plain, ["observation"], ["action"])
    expected, state = run(entry, plain, acting, batch)
    with prepare(entry, plain, observing(entry)) as hooked:
        found, state_after = run(entry, plain, hooked, batch)
    assert torch.equal(state, state_after)
    for key in expected.keys(True, True):
        assert found[key].dtype == expected[key].dtype
        assert torch.equal(found[key], expected[key]), key
    rows = found.reshape(-1)
    check_cache(entry, plain, rows)
    check_probe(entry, plain, rows)
    check_saliency("action")(entry, plain, rows)
    close(rows["inner", entry.site], inner_gradient(entry, plain, rows))
    for key in hooked._step_keys():
        assert found[key].shape[: len(batch) + 1] == (*batch, 12)
        assert not found[key].requires_grad


@pytest.mark.parametrize("policy", ZOO)
def test_a_hooked_policy_is_the_policy_and_travels(policy: str) -> None:
    entry = ZOO[policy]
    plain = entry.build()
    data = collect_rows(entry, plain)
    if hasattr(plain, "in_keys"):
        plain(data.clone())  # the first call fills caches of TensorDictParams
    before = snapshot(plain) if hasattr(plain, "in_keys") else None
    with prepare(entry, plain, observing(entry)) as hooked:
        if before is not None:
            assert isinstance(hooked, type(plain))
            assert list(hooked.state_dict()) == list(plain.state_dict())
            ours, theirs = TensorDict.from_module(hooked), TensorDict.from_module(plain)
            assert list(ours.keys(True, True)) == list(theirs.keys(True, True))
            assert hooked.in_keys == plain.in_keys
        torch.manual_seed(3)
        expected = hooked(data.clone())
        for twin in (pickle.loads(pickle.dumps(hooked)), copy.deepcopy(hooked)):
            torch.manual_seed(3)
            found = twin(data.clone())
            for key in expected.keys(True, True):
                assert torch.equal(found[key], expected[key]), key
        hooked.annotate(expected)
        assert before is None or snapshot(plain) == before
    assert before is None or snapshot(plain) == before


def collect_rows(entry: Entry, policy: nn.Module) -> TensorDict:
    """What the policy reads at the start of three episodes, and an action."""
    return entry.env(policy, 3).rollout(1)[:, 0].exclude("next")

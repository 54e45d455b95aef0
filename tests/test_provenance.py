"""Results are kept where they are the policy's own, and computed again where anything else has written them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs.utils import step_mdp

from tdhook_rl import ActivationCaching, Compose, IntegratedGradients, Saliency, SteeringVectors, targets
from tdhook_rl.attribution import Occlusion
from tdhook_rl.calls import provenance
from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import TieError
from tdhook_rl.examples.agent import FC2, make_actor
from tdhook_rl.latent import ActivationPatching
from tdhook_rl.method import Method
from tdhook_rl.replay import analyze

KEYS = {"in_keys": ["observation"], "out_keys": ["logits"]}
KEY = ("attr", "observation")


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def batch(*shape: int) -> TensorDict:
    return TensorDict({"observation": torch.randn(*shape, 4)}, batch_size=shape)


def gradient(net: nn.Module, x: Tensor, index: int = 0) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(net(x)[..., index].sum(), x)[0]


def saliency(index: int = 0, **options: Any) -> Saliency:
    return Saliency(target=targets.logit(index), **options)


def marked(data: TensorDict) -> TensorDict:
    """The same rows with other numbers under the key: what is kept shows."""
    return data.clone().set(KEY, torch.full_like(data[KEY], 7.0))


# ------------------------------------------------------------------ kept


@pytest.mark.parametrize("when", ["step", "batch"])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_own_results_are_kept(when: str, shape: tuple[int, ...], mode: Callable[[], Any]) -> None:
    with saliency(when=when).prepare(network(), **KEYS) as hooked:
        with mode():
            data = hooked(batch(*shape)) if when == "step" else hooked.annotate(batch(*shape))
        again = hooked.annotate(marked(data))
    assert bool((again[KEY] == 7).all())


@pytest.mark.parametrize("when", ["step", "batch"])
def test_own_results_are_kept_where_a_device_has_no_float64(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(provenance.LOWER, "cpu", torch.float32)
    test_own_results_are_kept(when, (5,), torch.no_grad)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda policy: pickle.loads(pickle.dumps(policy))])
def test_copies_are_the_same_policy(copied: Callable[[Any], Any]) -> None:
    with saliency(when="step").prepare(network(), **KEYS) as hooked:
        data = copied(hooked)(batch(5))
        assert bool((hooked.annotate(marked(data))[KEY] == 7).all())


def test_rows_may_be_cut_shuffled_and_cast() -> None:
    with saliency(when="step").prepare(network(), **KEYS) as hooked:
        data = marked(hooked(batch(4, 6)))
        data["observation"] = data["observation"].double()
        for rows in (data.reshape(-1)[torch.randperm(24)], data[1], data[:, 2:4], data.unsqueeze(0), data[0, 0]):
            assert bool((hooked.annotate(rows)[KEY] == 7).all())


def test_a_rollout_keeps_what_each_step_wrote_and_only_lacks_the_rest() -> None:
    with Compose(ActivationCaching(FC2), Saliency()).prepare(make_actor()) as hooked:
        data = CueCorners(batch_size=[4], seed=0).rollout(6, hooked, break_when_any_done=False)
        data["cache", FC2].fill_(7.0)
        found = hooked.annotate(data)
    assert bool((found["cache", FC2] == 7).all())
    assert bool(found["computed", "attr"].all())
    assert bool(found["attr", "observation"].any())


def test_a_control_that_was_set_since_leaves_what_was_written() -> None:
    method = Compose(SteeringVectors({"1": torch.ones(8)}, alpha=1.0), ActivationCaching("1"))
    with method.prepare(network(), **KEYS) as hooked:
        data = hooked(batch(3))
        hooked.controls["steering.alpha"] = 0.0
        assert torch.equal(hooked.annotate(data)["cache", "1"], data["cache", "1"])


# ------------------------------------------------------------------ computed again

OTHERS: dict[str, Method] = {
    "target": saliency(1, when="step"),
    "absolute": saliency(absolute=True, when="step"),
    "product": saliency(multiply_by_inputs=True, when="step"),
    "integrated": IntegratedGradients(target=targets.logit(0), baseline=0.0, when="step"),
    "occlusion": Occlusion(target=targets.logit(0), baseline=0.0, when="step"),
    "the same again": saliency(when="step"),
}


@pytest.mark.parametrize("first", OTHERS)
@pytest.mark.parametrize("way", ["step", "batch"])
def test_results_of_another_method_are_not_handed_on(first: str, way: str) -> None:
    net = network()
    with OTHERS[first].prepare(net, **KEYS) as other:
        stored = other(batch(5)) if way == "step" else other.annotate(batch(5))
    for method in (saliency(when="step"), saliency(when="batch")):
        with method.prepare(net, **KEYS) as hooked:
            found = hooked.annotate(marked(stored), on_mismatch="ignore")
        torch.testing.assert_close(found[KEY], gradient(net, stored["observation"]))


def change_in_place(net: nn.Module) -> None:
    with torch.no_grad():
        net[2].weight.mul_(1.5)


def change_data(net: nn.Module) -> None:
    net[2].weight.data.mul_(1.5)  # no version says so


def negate(net: nn.Module) -> None:
    with torch.no_grad():
        net[2].weight.neg_()


def load(net: nn.Module) -> None:
    net.load_state_dict(network().state_dict())


@pytest.mark.parametrize("when", ["step", "batch"])
@pytest.mark.parametrize("change", [change_in_place, change_data, negate, load])
def test_results_of_other_weights_are_computed_again(when: str, change: Callable[[nn.Module], None]) -> None:
    net = network()
    with saliency(when=when).prepare(net, **KEYS) as hooked:
        data = hooked(batch(5)) if when == "step" else hooked.annotate(batch(5))
        change(net)
        found = hooked.annotate(marked(data), on_mismatch="ignore")
        torch.testing.assert_close(found[KEY], gradient(net, data["observation"]))
        again = hooked(batch(5))
        assert torch.equal(hooked.annotate(again)[KEY], again[KEY]) if when == "step" else True


class Scaled(nn.Module):
    """Computes with numbers that it holds in attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.temperature, self.options = network(), 2.0, {"gain": [1.5]}
        self.mean, self.stats = torch.zeros(4), {"scale": [torch.ones(4)]}

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) * self.stats["scale"][0]
        return self.net(x * self.options["gain"][0]) / self.temperature


ATTRIBUTES: dict[str, Callable[[Scaled], Any]] = {
    "number": lambda net: setattr(net, "temperature", 0.5),
    "NumPy": lambda net: setattr(net, "temperature", np.float32(0.5)),
    "in a dictionary": lambda net: net.options.update(gain=[0.3]),
    "in a list in a dictionary": lambda net: net.options["gain"].__setitem__(0, 0.3),
    "another dictionary": lambda net: setattr(net, "options", {"gain": (0.3,)}),
    "a tensor in place": lambda net: net.mean.add_(0.5),
    "a tensor past its version": lambda net: net.mean.data.add_(0.5),
    "a tensor in a list in place": lambda net: net.stats["scale"][0].mul_(2.0),
    "another tensor, then in place": lambda net: (setattr(net, "mean", torch.ones(4)), net.mean.mul_(0.5)),
}
EXPLAINED: dict[str, tuple[Method, Callable[[nn.Module, Tensor], Tensor]]] = {
    "saliency": (saliency(when="step"), gradient),
    "saliency of a batch": (saliency(when="batch"), gradient),
    "occlusion": (
        Occlusion(target=targets.logit(0), baseline=0.0),
        lambda net, x: torch.stack([(net(x) - net(x * (torch.arange(4) != i)))[..., 0] for i in range(4)], -1),
    ),
}


@pytest.mark.parametrize("change", ATTRIBUTES.values(), ids=ATTRIBUTES)
@pytest.mark.parametrize("explained", EXPLAINED)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_results_of_other_attributes_are_computed_again(
    change: Callable[[Scaled], Any], explained: str, shape: tuple[int, ...]
) -> None:
    net = Scaled()
    method, right = EXPLAINED[explained]
    with method.prepare(net, **KEYS) as hooked:
        data = hooked.annotate(hooked(batch(*shape)))
        assert bool((hooked.annotate(marked(data))[KEY] == 7).all())
        change(net)
        again = hooked.annotate(marked(data), on_mismatch="ignore")
        torch.testing.assert_close(again[KEY], right(net, data["observation"]))
        assert bool((hooked.annotate(marked(again))[KEY] == 7).all())
        copies = [copy.deepcopy(hooked), pickle.loads(pickle.dumps(hooked))]
        assert all(bool((one.annotate(marked(again))[KEY] == 7).all()) for one in copies)


def test_a_layer_that_was_replaced_is_told_where_nothing_is_to_be_computed() -> None:
    net = network()
    with saliency(when="step").prepare(net, **KEYS) as hooked:
        data = hooked(batch(5))
        net[0] = nn.Linear(4, 8)
        with pytest.raises(TieError, match=r"module '(module\.)?0'"):
            hooked.annotate(data)


def test_weights_that_are_buffers() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("matrix", torch.randn(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.matrix.T).tanh()

    net = Fixed()
    with saliency(when="step").prepare(net, **KEYS) as hooked:
        for _ in range(6):
            data = hooked(batch(5))
            net.matrix.mul_(1.5)
        found = hooked.annotate(data, on_mismatch="ignore")
    torch.testing.assert_close(found[KEY], gradient(net, data["observation"]))


@pytest.mark.parametrize("when", ["step", "batch"])
def test_rows_that_were_written_over_are_computed_again(when: str) -> None:
    """Plain rows in a ring leave the results and stamps of the rows that lay there."""
    net = network()
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(8), batch_size=4)
    with saliency(when=when).prepare(net, **KEYS) as hooked:
        data = batch(8)
        buffer.extend(marked(hooked(data) if when == "step" else hooked.annotate(data)))
        buffer.extend(batch(4))
        rows = buffer[:]
        found = hooked.annotate(rows, on_mismatch="ignore")
    right = gradient(net, rows["observation"])
    torch.testing.assert_close(found[KEY][:4], right[:4])
    assert bool((found[KEY][4:] == 7).all())  # of rows that are its own the results stay


def beside_a_clock(*shape: int) -> Tensor:
    return torch.cat([torch.full((*shape, 1), 1e7), torch.randn(*shape, 3)], -1)


def one_pixel_darker(x: Tensor) -> Tensor:
    x = x.clone()
    x[..., 1, 30, 40] -= 5
    return x


FAR_FROM_ZERO: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]] = {
    "an offset": (lambda *shape: 1e6 + torch.randn(*shape, 4), lambda x: x + 1),
    "an offset in float64": (lambda *shape: 1e9 + torch.randn(*shape, 4).double(), lambda x: x + 1),
    "beside a clock": (beside_a_clock, lambda x: torch.cat([x[..., :1], x[..., 1:].flip(0)], -1)),
    "beside no target": (lambda *shape: beside_a_clock(*shape) * 1e2, lambda x: x.roll(1, 0)),
    "a pixel": (lambda *shape: torch.randint(200, 256, (*shape, 3, 60, 60), dtype=torch.uint8), one_pixel_darker),
    "frames in another order": (lambda *shape: torch.rand(*shape, 2, 256, 256), lambda x: x.flip(-3)),
    "half precision": (lambda *shape: 1e3 + torch.randn(*shape, 4).to(torch.bfloat16), lambda x: x + 8),
}


class FromFar(nn.Module):
    """Reads what is far from zero, as a policy does that knows where its world begins."""

    def __init__(self, like: Tensor, rows: int) -> None:
        super().__init__()
        self.offset = like.double().flatten(0, rows - 1).mean(0)
        self.head = nn.Linear(self.offset.numel(), 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(
            ((x.double() - self.offset) / (1 + self.offset.abs()).sqrt()).flatten(-self.offset.ndim)
        ).tanh()


@pytest.mark.parametrize("shape", [(6,), (2, 3)])
@pytest.mark.parametrize("when", ["step", "batch"])
@pytest.mark.parametrize("name", FAR_FROM_ZERO)
def test_a_row_that_has_changed_a_little_is_another_row(name: str, when: str, shape: tuple[int, ...]) -> None:
    make, change = FAR_FROM_ZERO[name]
    x = make(*shape)
    net = FromFar(x, len(shape))
    with saliency(when=when).prepare(net, **KEYS) as hooked:
        data = TensorDict({"observation": x}, shape)
        stored = hooked(data) if when == "step" else hooked.annotate(data)
        assert bool((hooked.annotate(marked(stored))[KEY] == 7).all())
        one = (0,) * len(shape)
        other = marked(stored)
        other["observation"][one] = change(x)[one]
        assert not torch.equal(other["observation"], x)
        found = hooked.annotate(other, on_mismatch="ignore")[KEY]
    right = gradient(net, other["observation"].double())
    torch.testing.assert_close(found[one].double(), right[one], rtol=2e-2, atol=1e-9)
    own = torch.ones(shape, dtype=torch.bool)
    own[one] = False
    assert bool((found[own] == 7).all())


def test_one_hot_rows_and_zeros_are_told_apart() -> None:
    net = network()
    with saliency(when="step").prepare(net, **KEYS) as hooked:
        data = hooked(TensorDict({"observation": torch.cat([torch.eye(4), torch.zeros(1, 4)])}, [5]))
        moved = marked(data).set("observation", data["observation"].roll(1, 0))
        torch.testing.assert_close(
            hooked.annotate(moved, on_mismatch="ignore")[KEY], gradient(net, moved["observation"])
        )
        assert bool((hooked.annotate(marked(data))[KEY] == 7).all())


def test_another_action_is_explained_again() -> None:
    with Saliency(when="step").prepare(make_actor()) as hooked, torch.no_grad():
        data = hooked(CueCorners(batch_size=[6], seed=0).reset())
        other = marked(data).set("action", (data["action"] + 1) % 4)
        found = hooked.annotate(other, on_mismatch="ignore")
        expected = hooked.annotate(other.exclude("attr", "computed"), on_mismatch="ignore")
    torch.testing.assert_close(found[KEY], expected[KEY])


def test_a_baseline_that_the_data_brings_is_part_of_the_row() -> None:
    with IntegratedGradients(target=targets.logit(0), when="step").prepare(network(), **KEYS) as hooked:
        data = hooked(batch(5).set(("baseline", "observation"), torch.zeros(5, 4)))
        other = data.clone().set(("baseline", "observation"), torch.ones(5, 4))
        expected = hooked.annotate(other.exclude("attr", "computed"))
        torch.testing.assert_close(hooked.annotate(other)[KEY], expected[KEY])


def test_entries_of_others_do_not_stay_under_the_mask() -> None:
    net = network()
    both = {"first": targets.logit(0), "second": targets.logit(1)}
    with Saliency(target=both, when="batch").prepare(net, **KEYS) as other:
        stored = other.annotate(batch(5))
    with saliency(when="batch").prepare(net, **KEYS) as hooked:
        found = hooked.annotate(stored)
        assert set(found["attr"].keys()) == {"observation"}
        assert set(stored["attr"].keys()) == {"first", "second"}
        mine = batch(5).set(("attr", "note"), torch.ones(5))  # no result: there is no mask of it
        assert set(hooked.annotate(mine)["attr"].keys()) == {"note", "observation"}


@pytest.mark.parametrize("when", ["step", "batch"])
def test_analyze_reads_no_results(when: str, tmp_path: Any) -> None:
    net = network()
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(8), batch_size=4)
    with saliency(when=when).prepare(net, **KEYS) as hooked:
        buffer.extend(marked(hooked.annotate(batch(8))))
        found = analyze(hooked, buffer, tmp_path, on_mismatch="ignore")
    torch.testing.assert_close(found[KEY], gradient(net, buffer[:]["observation"]))
    assert set(found["computed"].keys()) == {"attr"}


# ------------------------------------------------------------------ what it costs nobody


def test_the_generators_stay_and_results_carry_no_graph() -> None:
    net = network()
    before = torch.get_rng_state()
    with Compose(ActivationCaching("1"), saliency(when="step")).prepare(net, **KEYS) as hooked:
        x = torch.randn(5, 4, requires_grad=True)
        torch.set_rng_state(before)
        data = hooked(TensorDict({"observation": x}, [5]))
        assert torch.equal(torch.get_rng_state(), before)
        assert not data["computed", "attr.stamp"].requires_grad
        assert data["computed", "attr.stamp"].dtype == torch.float64


def test_a_recurrent_carrier_does_not_pass_for_the_next_step() -> None:
    """`step_mdp` carries the results of a step on to the next."""
    policy = TensorDictModule(network(), ["observation"], ["logits"])
    with saliency(when="step").prepare(policy) as hooked:
        data = hooked(batch(3))
        data["next", "observation"] = torch.randn(3, 4)
        later = step_mdp(data, keep_other=True, exclude_action=False)
        found = hooked.annotate(later, on_mismatch="ignore")
    torch.testing.assert_close(found[KEY], gradient(policy.module, later["observation"]))


def test_what_a_method_reads_under_its_root_stays() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    data = TensorDict({"input": torch.randn(3, 4), ("patched", "input"): torch.randn(3, 4)}, batch_size=3)
    with ActivationPatching(["1"]).prepare(net) as hooked:
        first = hooked.annotate(data)
        again = hooked.annotate(first)
    for found in (first, again):
        assert torch.equal(found["patched", "input"], data["patched", "input"])
        assert torch.equal(found["patched", "output"], net(data["input"]))

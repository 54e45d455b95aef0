"""A call reads its controls once: whoever sets them meanwhile changes the next call, and nothing is half of two."""

from __future__ import annotations

import copy
import pickle
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from tdhook_rl import ActivationCaching, Compose, ControlRecord, Saliency, SteeringVectors, targets
from tdhook_rl.sites.controls import Controls
from tdhook_rl.sites.held_controls import HeldControls
from tests.policies import ACTIONS, FEATURES, HIDDEN, actor

F64 = torch.float64
FIRST, SECOND = "module.0.module.0", "module.0.module.3"
MEANWHILE: list[Callable[[], None]] = []


class Waits(nn.Module):
    """A layer in the middle of the network; what others do while it runs is done by the time that it ends."""

    def forward(self, x: Tensor) -> Tensor:
        for act in MEANWHILE:
            thread = threading.Thread(target=act)
            thread.start()
            thread.join()
        return x + 0


SETS: list[Callable[[], None]] = []


class Sets(nn.Module):
    """A layer that does something itself."""

    def forward(self, x: Tensor) -> Tensor:
        for act in SETS:
            act()
        return x + 0


@pytest.fixture
def network() -> Iterator[list[nn.Module]]:
    first, second, last = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, ACTIONS)
    yield [layer.double() for layer in (first, Waits(), nn.Tanh(), second, nn.Tanh(), last)]
    MEANWHILE.clear()
    SETS.clear()


def by_hand(layers: list[nn.Module], x: Tensor, alpha: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
    hidden = layers[0](x) + alpha * vector
    second = layers[3](hidden.tanh()) + alpha * vector
    return second, layers[5](second.tanh())


@pytest.mark.parametrize("batch", [(), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize("how", ["number", "numbers together", "in place"])
def test_sites_passes_and_records_of_a_call_see_the_same_numbers(
    network: list[nn.Module], how: str, batch: tuple[int, ...]
) -> None:
    vector = torch.randn(HIDDEN, dtype=F64)
    method = Compose(
        SteeringVectors({FIRST: vector, SECOND: vector}, alpha=0.5),
        Saliency(target=targets.chosen_logit(), when="step"),
        ActivationCaching(SECOND),
        ControlRecord(),
    )
    with method.prepare(actor(*network)) as policy:
        controls = policy.controls
        places = [f"steering.{path}" for path in (FIRST, SECOND)]
        acts = {
            "number": lambda: controls.update_({"steering.alpha": float(controls["steering.alpha"]) + 1}),
            "numbers together": lambda: controls.update_(
                {"steering.alpha": 2.0} | {place: controls[place] + 1 for place in places}
            ),
            "in place": lambda: controls["steering.alpha"].add_(1),
        }
        MEANWHILE.append(acts[how])
        for _ in range(4):
            then = {name: value.clone() for name, value in controls.items()}
            counts = {place: int(controls.version(place)) for place in places}
            x = torch.randn(*batch, FEATURES, dtype=F64)
            data = policy(TensorDict({"observation": x}, batch_size=batch))
            assert not all(torch.equal(then[name], value) for name, value in controls.items())  # it was set meanwhile
            x = x.clone().requires_grad_()
            second, logits = by_hand(network, x, then["steering.alpha"], then[places[0]])
            (grad,) = torch.autograd.grad(logits.gather(-1, data["action"].unsqueeze(-1)).sum(), x)
            torch.testing.assert_close(data["cache", SECOND], second.detach())
            torch.testing.assert_close(data["logits"], logits)
            torch.testing.assert_close(data["attr", "observation"], grad)
            assert (data["control", "steering.alpha"] == then["steering.alpha"]).all()
            assert all((data["control", place] == counts[place]).all() for place in places)


@pytest.mark.parametrize("call", ["a call", "inside vmap"])
def test_what_its_own_thread_sets_is_seen_at_once(network: list[nn.Module], call: str) -> None:
    vector = torch.randn(HIDDEN, dtype=F64)
    network[1] = Sets()
    with SteeringVectors({FIRST: vector, SECOND: vector}, alpha=0.5).prepare(actor(*network)) as policy:
        for alpha in (0.0, 2.0):
            SETS.append(lambda alpha=alpha: policy.controls.update_({"steering.alpha": alpha}))  # type: ignore[misc]
            first, x = policy.controls["steering.alpha"].item(), torch.randn(3, FEATURES, dtype=F64)
            hidden = network[0](x) + first * vector
            expected = network[5]((network[3](hidden.tanh()) + alpha * vector).tanh())

            def logits(x: Tensor) -> Tensor:
                return policy(TensorDict({"observation": x}, batch_size=[]))["logits"]

            if call == "a call":
                found = policy(TensorDict({"observation": x}, batch_size=[3]))["logits"]
            else:
                found = torch.vmap(logits, randomness="different")(x)
            torch.testing.assert_close(found, expected)
            SETS.clear()


def test_nothing_of_a_mode_is_kept() -> None:
    controls = Controls()
    controls.add("alpha", 1.0)
    held = HeldControls(controls)
    for number in (1.0, 2.0):
        controls["alpha"] = number
        with FakeTensorMode(allow_non_fake_inputs=True), held:
            assert held["alpha"] is controls["alpha"]
        with held:
            assert type(held["alpha"]) is Tensor
            assert held["alpha"] == number


def test_copies_and_pickles_hold_what_is_set_now() -> None:
    controls = Controls()
    controls.add("alpha", 1.0)
    held = HeldControls(controls)
    with held:
        for other in (copy.deepcopy(held), pickle.loads(pickle.dumps(held))):
            assert other.numbers is None
            with other:
                assert other["alpha"] == 1
    copied = copy.deepcopy(held)
    controls["alpha"] = 2.0
    with copied:
        assert copied["alpha"] == 2


def test_what_is_set_together_is_read_together() -> None:
    controls = Controls()
    for name in ("weight", "bias"):
        controls.add(name, torch.zeros(20_000 if name == "weight" else 1))
    held, over = HeldControls(controls), threading.Event()

    def write() -> None:
        number = 0.0
        while not over.is_set():
            number += 1
            controls.update_({"weight": torch.full((20_000,), number), "bias": torch.full((1,), number)})

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen, end = set(), time.monotonic() + 0.5
        while time.monotonic() < end:
            with held:
                assert (held["weight"] == held["bias"]).all()
                assert int(held.version("weight")) == int(held.version("bias")) == int(held["bias"])
                seen.add(float(held["bias"]))
    finally:
        over.set()
        writer.join()
    assert len(seen) > 1


def test_a_writer_that_died_in_the_middle_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr("tdhook_rl.sites.held_controls._PATIENCE", 0.05)
    monkeypatch.setattr("tdhook_rl.sites.held_controls.time.sleep", waited.append)
    controls = Controls()
    controls.add("alpha", 1.0)
    controls.writings[0] += 1
    held, before = HeldControls(controls), 0
    for number in (1.0, 2.0, 3.0):
        controls["alpha"] = number
        with held:
            assert held["alpha"] == number
        before = before or len(waited)
    assert 0 < before == len(waited)


def test_what_is_held_has_gradients_where_the_control_has_and_is_no_inference_tensor() -> None:
    controls = Controls()
    for name, value in {"alpha": 1.0, "half": torch.ones(3, dtype=torch.bfloat16), "none": torch.ones(0)}.items():
        controls.add(name, value)
    held = HeldControls(controls)
    with torch.inference_mode(), held:
        assert not held["half"].is_inference()
        assert held["half"].dtype == torch.bfloat16
        assert held["none"].shape == (0,)
    controls["alpha"].requires_grad_()
    with held:
        (2 * held["alpha"]).backward()
    assert controls["alpha"].grad == 2

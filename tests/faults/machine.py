"""Random sequences of preparing, calling, setting, copying, loading and restoring, against a plain model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from tdhook_rl import ActivationCaching, Compose, Saliency, SteeringVectors
from tdhook_rl.errors import InactiveError, MissingKeyError, PreparationError
from tdhook_rl.targets import Target
from tdhook_rl.testing.subject import require_untouched, snapshot
from tests.faults.fault import WHOLE, Fault, Kind

SEQUENCES, EACH = 12, 20
ALPHAS = st.sampled_from([0.0, 0.5, 1.0, -2.0])
SEEDS = st.integers(0, 5)


def kinds() -> dict[str, Kind]:
    return {"sequences of operations": _all}


def _all(folder: Path) -> Iterator[Fault]:
    for number in range(SEQUENCES):
        yield Fault(f"{EACH} sequences of seed {number}", partial(_try, number))


def _try(number: int, folder: Path) -> str:
    few = settings(phases=[Phase.generate], max_examples=EACH, stateful_step_count=25, deadline=None, database=None,
                   suppress_health_check=list(HealthCheck), print_blob=False)  # fmt: skip
    run_state_machine_as_test(seed(number)(type("Seeded", (Machine,), {})), settings=few)
    return WHOLE


def network(number: int) -> TensorDictModule:
    """A policy of its own weights."""
    torch.manual_seed(number)
    return TensorDictModule(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), ["x"], ["y"])


def rows(number: int) -> TensorDict:
    generator = torch.Generator().manual_seed(100 + number)
    return TensorDict({"x": torch.randn(5, 4, generator=generator)}, [5])


@dataclass
class Handle:
    """A hooked policy, and what holds of it.

    Attributes:
        oracle: a plain network of the weights that it should have; of the user's policy where they are tied.
        alpha: as of its controls, a list that copies share.
        kinds: of its methods.
    """

    hooked: Any
    oracle: TensorDictModule
    alpha: list[float]
    vector: Tensor
    kinds: frozenset[str]
    ended: bool = False
    locked: bool = False  # its controls ended with the policy that it was copied from


class Machine(RuleBasedStateMachine):
    """What a user may do with a policy and its hooked ones, in any order."""

    handles = Bundle("handles")

    @initialize(target=handles, number=SEEDS, alpha=ALPHAS)
    def begin(self, number: int, alpha: float) -> Handle:
        self.policy, self.oracle = network(number), network(number)
        self.first = snapshot(self.policy)
        self.moved = False
        self.all: list[Handle] = []
        return self.prepare(alpha, number, frozenset(["steer", "cache", "saliency"]))

    # ------------------------------------------------------------------ preparing and calling

    @rule(target=handles, alpha=ALPHAS, number=SEEDS,
          kinds=st.frozensets(st.sampled_from(["steer", "cache", "saliency"]), min_size=1))  # fmt: skip
    def prepare_one_more(self, alpha: float, number: int, kinds: frozenset[str]) -> Handle:
        return self.prepare(alpha, number, kinds)

    def prepare(self, alpha: float, number: int, kinds: frozenset[str]) -> Handle:
        vector = torch.randn(6, generator=torch.Generator().manual_seed(number))
        methods: list[Any] = []
        if "steer" in kinds:
            methods.append(SteeringVectors({"module.1": vector}, alpha=alpha))
        if "cache" in kinds:
            methods.append(ActivationCaching("module.1"))
        if "saliency" in kinds:
            methods.append(Saliency(target=Target("sum", lambda run: run.outputs["y"].sum(-1)), when="step"))
        hooked = Compose(*methods).prepare(self.policy, return_context=False)
        handle = Handle(hooked, self.oracle, [alpha], vector, kinds)
        self.all.append(handle)
        return handle

    def call(self, handle: Handle, number: int) -> None:
        data = rows(number)
        if handle.ended:
            try:
                handle.hooked(data)
            except InactiveError:
                return
            raise AssertionError("a policy that was restored can be called")
        found = handle.hooked(data)
        hidden, output, gradient = self._expected(handle, number)
        assert torch.equal(found["y"], output)
        assert (("cache", "module.1") in found.keys(True)) == ("cache" in handle.kinds)
        if "cache" in handle.kinds:
            assert torch.equal(found["cache", "module.1"], hidden)
        if "saliency" in handle.kinds:
            torch.testing.assert_close(found["attr", "x"], gradient, atol=1e-6, rtol=1e-5)

    def _expected(self, handle: Handle, number: int) -> tuple[Tensor, Tensor, Tensor]:
        first, tanh, last = handle.oracle.module
        x = rows(number)["x"].requires_grad_()
        hidden = tanh(first(x))
        if "steer" in handle.kinds and handle.alpha[0]:
            hidden = hidden + handle.alpha[0] * handle.vector
        output = last(hidden)
        return hidden.detach(), output.detach(), torch.autograd.grad(output.sum(), x)[0]

    @rule(handle=handles)
    def call_wrongly(self, handle: Handle) -> None:
        try:
            handle.hooked(TensorDict({"z": torch.zeros(5, 4)}, [5]))
        except (MissingKeyError, KeyError, InactiveError):
            return
        raise AssertionError("rows without the input can be read")

    @rule(handle=handles, number=SEEDS)
    def call_without_hooks(self, handle: Handle, number: int) -> None:
        if handle.ended:
            return
        with handle.hooked.disable_context_hooks():
            found = handle.hooked(rows(number))
        assert set(found.keys(True, True)) == {"x", "y"}
        assert torch.equal(found["y"], handle.oracle(rows(number))["y"])

    @rule(handle=handles, number=SEEDS)
    def run_with_another_value(self, handle: Handle, number: int) -> None:
        if handle.ended:
            return
        with handle.hooked.run(rows(number)) as run:
            run.set("module.1", torch.zeros(5, 6))
            kept = run.save("module.2")
        assert torch.equal(kept.resolve(), handle.oracle.module[2](torch.zeros(5, 6)))

    @rule(handle=handles)
    def prepare_again(self, handle: Handle) -> None:
        try:
            ActivationCaching("module.1").prepare(handle.hooked, return_context=False)
        except PreparationError:
            return
        raise AssertionError("a hooked policy can be hooked again")

    # ------------------------------------------------------------------ controls, copies, weights

    @rule(handle=handles, alpha=ALPHAS)
    def control(self, handle: Handle, alpha: float) -> None:
        if "steer" not in handle.kinds:
            return
        try:
            handle.hooked.controls["steering.alpha"] = alpha
        except InactiveError:
            assert handle.ended or handle.locked
            return
        assert not handle.ended
        handle.alpha[0] = alpha

    @rule(target=handles, handle=handles, way=st.sampled_from(["pickle", "deepcopy"]))
    def copy(self, handle: Handle, way: str) -> Handle:
        if handle.ended:
            return handle
        again = pickle.loads(pickle.dumps(handle.hooked)) if way == "pickle" else copy.deepcopy(handle.hooked)
        alpha = list(handle.alpha) if way == "pickle" else handle.alpha
        oracle = copy.deepcopy(handle.oracle)
        found = Handle(again, oracle, alpha, handle.vector, handle.kinds, locked=handle.locked)
        self.all.append(found)
        return found

    @rule(step=st.sampled_from([0.1, -0.3]))
    def train(self, step: float) -> None:
        for module in (self.policy, self.oracle):
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.add_(step)
        self.moved = True

    @rule(handle=handles, number=SEEDS, way=st.sampled_from(["state_dict", "tensordict"]))
    def load(self, handle: Handle, number: int, way: str) -> None:
        """New weights, into a hooked policy: where it is tied, they are the user's too."""
        other = network(number)
        for module in (handle.hooked, handle.oracle):
            if way == "state_dict":
                module.load_state_dict(other.state_dict())
            else:
                TensorDict.from_module(module).data.update_(TensorDict.from_module(other).data)
        self.moved = self.moved or handle.oracle is self.oracle

    @rule(number=SEEDS)
    def load_into_the_policy(self, number: int) -> None:
        for module in (self.policy, self.oracle):
            module.load_state_dict(network(number).state_dict())
        self.moved = True

    @rule(handle=handles)
    def restore(self, handle: Handle) -> None:
        handle.hooked.restore()
        handle.ended = True
        for other in self.all:
            other.locked = other.locked or other.alpha is handle.alpha

    # ------------------------------------------------------------------ what always holds

    @invariant()
    def the_policy_is_untouched(self) -> None:
        if not hasattr(self, "policy"):
            return
        assert torch.equal(self.policy(rows(0))["y"], self.oracle(rows(0))["y"])
        assert set(self.policy(rows(0)).keys(True, True)) == {"x", "y"}
        for mine, theirs in zip(self.policy.parameters(), self.oracle.parameters(), strict=True):
            assert torch.equal(mine, theirs)
        if not self.moved:
            require_untouched(self.policy, self.first, "after all of it")

    @invariant()
    def every_hooked_policy_is_what_it_should_be(self) -> None:
        for handle in getattr(self, "all", []):
            self.call(handle, 0)
            assert not handle.hooked._hooked.runtime.slots

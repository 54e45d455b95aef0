"""Modules of which another tensor is read than the first, such as a last state: interventions act or are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.distributions import Categorical
from torchrl.modules import ProbabilisticActor

from tdhook_rl import ActivationPatching, DirectionalAblation, HookedModule, Saliency, SteeringVectors
from tdhook_rl.attribution import IntegratedGradients
from tdhook_rl.errors import SiteError, TargetError
from tdhook_rl.latent import DirectionClamping
from tdhook_rl.weights import Adapters


class Net(nn.Module):
    def __init__(self, kind: str, reads: str, batch_first: bool = True, layers: int = 1) -> None:
        super().__init__()
        module = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}[kind]
        self.core, self.head = module(4, 6, layers, batch_first=batch_first), nn.Linear(6, 3)
        self.kind, self.reads, self.batch_first = kind, reads, batch_first

    def forward(self, x: Tensor) -> Tensor:
        out, state = self.core(x[:, None] if self.batch_first else x[None])
        hidden, cell = state if self.kind == "lstm" else (state, state)
        last = out[:, -1] if self.batch_first else out[-1]
        chosen = {"out": last, "h_n": hidden[-1], "c_n": cell[-1]}
        return self.head(last + hidden[-1] if self.reads == "both" else chosen[self.reads])


VECTOR = torch.ones(6)
METHODS: dict[str, Callable[[], Any]] = {
    "steering": lambda: SteeringVectors({"core": VECTOR}),
    "steering of a pattern": lambda: SteeringVectors({"co.e": VECTOR}),
    "function": lambda: SteeringVectors(modules_to_steer=["core"], steer_fn=lambda module_key, output: 2 * output),
    "ablation": lambda: DirectionalAblation({"core": VECTOR}),
    "clamping": lambda: DirectionClamping({"core": VECTOR}, value=1.0),
    "adapter": lambda: Adapters({"double": (lambda h: 2 * h, "core", "core")}),
    "patching by a function": lambda: ActivationPatching(["core"], patch_fn=lambda key, here, there: here + 2 * there),
}
READS = [("rnn", "h_n"), ("gru", "h_n"), ("lstm", "h_n"), ("lstm", "c_n")]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def batch() -> TensorDict:
    return TensorDict({"input": torch.randn(5, 4), ("patched", "input"): torch.randn(5, 4)}, [5])


def called(hooked: Any, mode: str) -> TensorDict:
    data = batch()
    if mode == "vmap":
        return torch.vmap(hooked)(data)
    if mode == "annotate":
        return hooked.annotate(data)
    with {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(mode, torch.enable_grad)():
        return hooked(data)


@pytest.mark.parametrize("mode", ["eager", "no_grad", "inference_mode"])
@pytest.mark.parametrize(("kind", "reads"), READS)
@pytest.mark.parametrize("method", METHODS)
def test_what_would_change_nothing_is_refused_by_name(method: str, kind: str, reads: str, mode: str) -> None:
    with METHODS[method]().prepare(Net(kind, reads)) as hooked:
        with pytest.raises(SiteError, match=r"'core', a .*h_n or c_n"):
            called(hooked, mode)
        with pytest.raises(SiteError, match="'core'"):  # and again: the first forward is not over
            called(hooked, mode)


@pytest.mark.parametrize("reads", ["out", "both"])
@pytest.mark.parametrize("kind", ["rnn", "gru", "lstm"])
@pytest.mark.parametrize("method", METHODS)
def test_what_reads_the_sequence_is_steered_as_ever(method: str, kind: str, reads: str) -> None:
    net = Net(kind, reads)
    with METHODS[method]().prepare(net) as hooked:
        for mode in ("eager", "no_grad", "inference_mode"):
            found = called(hooked, mode)
            where = ("patched", "output") if "patching" in method else "output"
            plain = net(found["patched", "input"] if "patching" in method else found["input"])
            assert (found[where] - plain).abs().amax() > 1e-3


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(("kind", "reads"), READS)
def test_the_state_is_steered_where_it_is_named(kind: str, reads: str, batch_first: bool, layers: int) -> None:
    net, data = Net(kind, reads, batch_first, layers), batch()
    vector, alpha = torch.randn(6), torch.tensor([0.0, 1.0, 2.0, 0.0, -1.0])
    method = SteeringVectors({("core", reads): vector}, alpha="alpha")
    with method.prepare(net) as hooked:
        found = hooked(data.set("alpha", alpha))["output"]
    expected = net(data["input"]) + alpha[:, None] * net.head(vector) - alpha[:, None] * net.head.bias
    torch.testing.assert_close(found, expected)
    # A vector for each layer.
    vectors = torch.randn(layers, 6)
    with SteeringVectors({("core", reads): vectors}).prepare(net) as hooked:
        found = hooked(data)["output"]
    torch.testing.assert_close(found, net(data["input"]) + vectors[-1] @ net.head.weight.T)


@pytest.mark.parametrize("mode", ["eager", "inference_mode", "annotate"])
@pytest.mark.parametrize("reads", ["out", "h_n", "c_n", "both"])
@pytest.mark.parametrize("kind", ["rnn", "gru", "lstm"])
def test_patching_restores_the_clean_output_whatever_is_read(kind: str, reads: str, mode: str) -> None:
    net = Net(kind, reads)
    with ActivationPatching(["core"]).prepare(net) as hooked:
        found = called(hooked, mode)
    if mode != "annotate":
        assert torch.equal(found["patched", "output"], found["output"])
    torch.testing.assert_close(found["patched", "output"], net(found["input"]))


class Several(nn.Module):
    """Several tensors, in several containers."""

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
        return 2 * x, {"twice": 3 * x}, [4 * x, 5 * x]


class ReadsAll(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.several, self.head = Several(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.several(x)
        return self.head(first * second["twice"] + third[0] - third[1].square())


def test_patching_puts_in_all_that_a_module_gives() -> None:
    net, data = ReadsAll(), batch()
    with ActivationPatching(["several"]).prepare(net) as hooked:
        found = hooked(data)
    assert torch.equal(found["patched", "output"], found["output"])
    policy = ProbabilisticActor(
        TensorDictModule(nn.Sequential(nn.Linear(4, 3)), ["input"], ["logits"]),
        in_keys=["logits"],
        distribution_class=Categorical,
    )
    with ActivationPatching(["module.0"]).prepare(policy) as hooked:
        found = hooked(batch())
    assert torch.equal(found["patched", "logits"], found["logits"])


def test_runs_refuse_to_override_what_is_not_read() -> None:
    hooked, value = HookedModule.from_module(Net("lstm", "h_n")), torch.zeros(5, 1, 6)
    with pytest.raises(SiteError, match="'core'"), hooked.run(batch()) as run:
        run.set("core", value)
    hooked = HookedModule.from_module(Net("lstm", "out"))
    with hooked.run(data := batch()) as run:
        run.set("core", value)
    torch.testing.assert_close(data["output"], hooked.module.head.bias.expand(5, 3))


def test_losses_that_enter_by_get_dist_are_told_too() -> None:
    policy = ProbabilisticActor(
        TensorDictModule(Net("gru", "h_n"), ["input"], ["logits"]),
        in_keys=["logits"],
        distribution_class=Categorical,
    )
    site = "module.0.module.core"
    with SteeringVectors({site: VECTOR}).prepare(policy) as hooked, pytest.raises(SiteError, match="h_n or c_n"):
        hooked.get_dist(batch())
    with SteeringVectors({(site, "h_n"): 10 * VECTOR}).prepare(policy) as hooked:
        data = batch()
        steered, plain = hooked.get_dist(data.clone()).logits, policy.get_dist(data.clone()).logits
    assert (steered - plain).abs().max() > 1e-3


def test_names_of_states_that_there_are_not() -> None:
    for kind, name in (("gru", "c_n"), ("lstm", "hidden")):
        with pytest.raises(SiteError, match="core"):
            SteeringVectors({("core", name): VECTOR}).prepare(Net(kind, "h_n"), return_context=False)


@pytest.mark.parametrize("method", [Saliency, IntegratedGradients])
@pytest.mark.parametrize(("kind", "reads"), READS)
def test_an_explanation_at_a_module_of_which_only_the_last_state_is_read_names_it(
    kind: str, reads: str, method: Any
) -> None:
    options = {"baseline": 0.0} if method is IntegratedGradients else {}
    with method(input_modules=["core"], **options).prepare(Net(kind, reads)) as hooked:
        with pytest.raises(TargetError, match=r"from the output of 'core'.* such as h_n"):
            hooked.annotate(TensorDict({"input": torch.randn(5, 4)}, [5]))


# ---------------------------------------------------------------------- other modules that return several tensors

RETURNED: dict[str, tuple[Callable, Callable]] = {
    "tuple": (lambda a, b: (a, b), lambda found: found[1]),
    "nested": (lambda a, b: [a, {"b": [b]}], lambda found: found[1]["b"][0]),
    "TensorDict": (lambda a, b: TensorDict({"a": a, "b": b}, a.shape[:1]), lambda found: found["b"]),
    "views": (lambda a, b: torch.cat([a, b], -1).chunk(2, -1), lambda found: found[1]),
}


class Pair(nn.Module):
    def __init__(self, form: Callable) -> None:
        super().__init__()
        self.one, self.two, self.form = nn.Linear(4, 6), nn.Linear(4, 6), form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.one(x), self.two(x))


class Reads(nn.Module):
    """Reads some of what a module returns, and hands the rest out as it is."""

    def __init__(self, core: nn.Module, read: Callable, *, hands_out: bool = False) -> None:
        super().__init__()
        self.core, self.read, self.hands_out, self.head = core, read, hands_out, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        found = self.core(x)
        head = self.head(self.read(found))
        return (head, found[0]) if self.hands_out else head


@pytest.mark.parametrize("method", ["steering", "function", "ablation", "clamping"])
@pytest.mark.parametrize("form", RETURNED)
def test_what_others_return_beside_is_told_too(form: str, method: str) -> None:
    make, read = RETURNED[form]
    with METHODS[method]().prepare(Reads(Pair(make), read)) as hooked:
        for _ in range(2):
            with pytest.raises(
                SiteError, match="'core', a Pair that returns several tensors, of which it changes the fir"
            ):
                hooked(batch())
    hooked = HookedModule.from_module(Reads(Pair(make), read))
    with pytest.raises(SiteError, match="'core'"), hooked.run(batch()) as run:
        run.set("core", torch.zeros(5, 6))
    net = Reads(Pair(make), lambda found: read(found) + next(iter(found.values() if form == "TensorDict" else found)))
    with METHODS[method]().prepare(net) as hooked:
        found = hooked(batch())
    assert (found["output"] - net(found["input"])).abs().max() > 1e-3


@pytest.mark.parametrize("core", [nn.LSTMCell(4, 6), nn.Sequential(nn.Tanh(), Pair(lambda a, b: (a, b)))])
def test_cells_and_sequences_are_told_and_what_is_handed_out_is_read(core: nn.Module) -> None:
    for hands_out in (False, True):
        net = Reads(core, lambda found: found[1], hands_out=hands_out)
        policy = TensorDictModule(net, ["input"], ["output", "first"] if hands_out else ["output"])
        with SteeringVectors({"module.core": VECTOR}).prepare(policy) as hooked:
            if hands_out:
                found = hooked(batch())
                torch.testing.assert_close(found["first"], core(found["input"])[0] + VECTOR)
                torch.testing.assert_close(found["output"], net(found["input"])[0])
            else:
                with pytest.raises(SiteError, match=r"'module.core', a \w+ that returns several"):
                    hooked(batch())


class Keeps(Reads):
    """Keeps the first tensor for its next call."""

    def forward(self, x: Tensor) -> Tensor:
        kept = getattr(self, "kept", None)
        found = self.core(x)
        self.kept = [found[0].detach()]
        return self.head(found[1] if kept is None else found[1] + kept[0])


def test_what_is_kept_for_the_next_call_is_read_there() -> None:
    net = Keeps(Pair(lambda a, b: (a, b)), lambda found: found[1])
    plain, data = copy.deepcopy(net), batch()
    with SteeringVectors({"core": VECTOR}).prepare(net) as hooked:
        found = [hooked(data.clone())["output"] for _ in range(2)]
    expected = [plain(data["input"]) for _ in range(2)]
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1] + VECTOR @ plain.head.weight.T)

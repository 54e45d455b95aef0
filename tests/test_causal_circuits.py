"""Circuits that are known, because the networks were built by hand: they are found, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.distributions import Categorical
from torchrl.modules import ProbabilisticActor

from tdhook_rl.artifacts import load_artifact, save_artifact
from tdhook_rl.errors import ArtifactError, InputError, SiteError
from tdhook_rl.latent.vectors.origins import weights_of
from tdhook_rl.sweeps import Circuit, faithfulness, find_circuit, patch_sites, patch_units
from tdhook_rl.sweeps.causal.circuits import OTHER_WEIGHTS

ROWS = 24


def filled(layer: nn.Module, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    with torch.no_grad():
        layer.weight.copy_(weight)  # type: ignore[operator, union-attr]
        layer.bias.copy_(torch.zeros_like(layer.bias) if bias is None else bias)  # type: ignore[operator, union-attr, arg-type]
    return layer


def xor() -> nn.Module:
    """Of 8 units, units 2 and 5 compute the XOR of bits 0 and 1; others look at other bits, or nobody reads them."""
    torch.manual_seed(0)
    first, bias = torch.zeros(8, 4), torch.zeros(8)
    first[2, :2], first[5, :2], bias[5] = 1.0, 1.0, -1.0
    first[0, 2], first[1, 3], first[3, :2] = 1.0, -1.0, 1.0
    first[7, 2:] = 1.0
    last = torch.zeros(2, 8)
    last[0, 2], last[0, 5] = 4.0, -8.0
    return nn.Sequential(filled(nn.Linear(4, 8), first, bias), nn.ReLU(), filled(nn.Linear(8, 2), last))


class Nested(nn.Module):
    """A residual stream: a block with two layers inside, of which one unit each is read."""

    def __init__(self) -> None:
        super().__init__()
        one, two = torch.zeros(4, 4), torch.zeros(4, 4)
        one[1, 0], two[3, 1], one[2, 2] = 2.0, 2.0, 1.0
        self.block = nn.Sequential(filled(nn.Linear(4, 4), one), nn.Tanh(), filled(nn.Linear(4, 4), two))
        self.head = filled(nn.Linear(4, 1), torch.tensor([[0.0, 0.0, 0.0, 3.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x))


class Repeated(nn.Module):
    """An activation that runs twice: its unit 1 matters in the first run, its units 0 and 2 in the second."""

    def __init__(self) -> None:
        super().__init__()
        first, mix = torch.zeros(4, 4), torch.zeros(4, 4)
        first[1, 0], first[3, 3] = 2.0, 1.0
        mix[0, 1], mix[2, 1], mix[3, 3] = 1.5, -1.5, 1.0
        self.first, self.mix, self.act = filled(nn.Linear(4, 4), first), filled(nn.Linear(4, 4), mix), nn.Tanh()
        self.head = filled(nn.Linear(4, 1), torch.tensor([[2.0, 0.0, -2.0, 0.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.mix(self.act(self.first(x)))))


def channels() -> nn.Module:
    """Channel 2 of the first convolution sees the first plane, channel 1 of the second sees that."""
    one, two = torch.zeros(4, 2, 3, 3), torch.zeros(3, 4, 3, 3)
    one[2, 0, 1, 1], one[0, 1, 1, 1], two[1, 2, 1, 1], two[0, 0, 1, 1] = 1.0, 1.0, 1.0, 1.0
    head = torch.zeros(1, 75)
    head[0, 25:50] = 0.3
    return nn.Sequential(
        filled(nn.Conv2d(2, 4, 3, padding=1), one), nn.ReLU(), filled(nn.Conv2d(4, 3, 3, padding=1), two), nn.ReLU(),
        nn.Flatten(-3), filled(nn.Linear(75, 1), head),
    )  # fmt: skip


class Heads(nn.Module):
    """Two heads of two units side by side; the second is read."""

    def __init__(self) -> None:
        super().__init__()
        self.values, self.join = filled(nn.Linear(4, 4), torch.eye(4)), nn.Identity()
        self.out = filled(nn.Linear(4, 1), torch.tensor([[0.0, 0.0, 1.0, -1.0]]))

    def forward(self, x: Tensor) -> Tensor:
        values = self.values(x).unflatten(-1, (2, 2)).transpose(-3, -2)
        weights = (values @ values.transpose(-1, -2)).softmax(-1)
        return self.out(self.join((weights @ values).transpose(-3, -2).flatten(-2))).mean(-2)


@dataclass(frozen=True)
class Known:
    """A network, its sites, and the circuit in them."""

    build: Callable[[], nn.Module]
    sites: list[str]
    circuit: dict[str, list[int]]
    shape: tuple[int, ...] = (4,)
    bits: bool = False
    parts: dict[str, int] | None = None

    def states(self, seed: int) -> TensorDict:
        value = torch.randn(ROWS, *self.shape, generator=torch.Generator().manual_seed(seed))
        return TensorDict({"input": (value > 0).float() if self.bits else value}, ROWS)


KNOWN = {
    "xor": Known(xor, ["1"], {"1": [2, 5]}, bits=True),
    "nested": Known(Nested, ["block", r"block\.\d$"], {"block": [3], "block.0": [1], "block.1": [1], "block.2": [3]}),
    "repeated": Known(Repeated, ["act@0", "act@1"], {"act@0": [1], "act@1": [0, 2]}),
    "channels": Known(channels, ["1", "3"], {"1": [2], "3": [1]}, (2, 5, 5)),
    "heads": Known(Heads, ["join", "values"], {"join": [1], "values": [1]}, (3, 4), parts={"join": 2, "values": 2}),
}


@pytest.mark.parametrize("name", KNOWN)
def test_the_circuit_that_was_built_is_the_one_that_is_found(name: str) -> None:
    known = KNOWN[name]
    net, clean, corrupt = known.build(), known.states(1), known.states(2)
    size = sum(map(len, known.circuit.values()))
    metric = (lambda out: out["output"][..., 0]) if name == "xor" else "output"
    found = find_circuit(net, clean, corrupt, known.sites, keep=0.99, metric=metric, parts=known.parts)
    assert found.units == known.circuit
    assert found.size == size
    assert found.faithfulness.estimate == pytest.approx(1, abs=1e-4)
    assert found.without.estimate < 0.99
    assert found.random is not None
    assert found.random.estimate < 0.9
    assert found.beyond < 0.6  # of few sets of one unit a site some are the circuit
    # The curve reaches all with all, and what it says of a size is what patching says of these components.
    assert [point.size for point in found.curve][-1] == found.of
    assert found.curve[-1].faithfulness.estimate == pytest.approx(1, abs=1e-5)
    assert found.curve[0].faithfulness.estimate == pytest.approx(found.nothing.estimate)
    again = faithfulness(net, clean, corrupt, found, metric=metric, parts=known.parts)
    assert again.estimate == pytest.approx(found.faithfulness.estimate)
    others = faithfulness(net, known.states(3), known.states(4), found, metric=metric)  # divided as it was found
    assert others.estimate == pytest.approx(1, abs=1e-4)
    assert f"{size} of {found.of} components keep 1.000" in str(found)


@pytest.mark.parametrize("keep", [0.5, 0.8, 1.0])
def test_a_circuit_keeps_what_was_asked_and_does_without_none_of_its_components(keep: float) -> None:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 1)).double()
    clean, corrupt = (TensorDict({"input": torch.randn(15, 4, dtype=torch.float64)}, 15) for _ in range(2))
    found = find_circuit(net, clean, corrupt, ["1", "3"], keep=keep, metric="output", chunk_size=40)
    assert found.faithfulness.estimate >= keep - 1e-9

    def by_hand(units: dict[str, list[int]]) -> float:
        """Two forward hooks: whatever is not in the set is as it was on the corrupt states."""
        with torch.no_grad():
            first, other = (net[:2](one["input"]) for one in (clean, corrupt))
            hidden = other.clone()
            hidden[:, units.get("1", [])] = first[:, units.get("1", [])]
            second, corrupted = net[2:4](hidden), net[:4](corrupt["input"])
            reached = corrupted.clone()
            reached[:, units.get("3", [])] = second[:, units.get("3", [])]
            ends = [net(one["input"]).squeeze(-1) for one in (clean, corrupt)]
            gap = ends[0] - ends[1]
            return float(((net[4](reached).squeeze(-1) - ends[1]) * gap.sign()).sum() / gap.abs().sum())

    assert by_hand(dict(found.units)) == pytest.approx(found.faithfulness.estimate, abs=1e-9)
    for site, numbers in found.units.items():
        for number in numbers:
            fewer = {name: [one for one in own if (name, one) != (site, number)] for name, own in found.units.items()}
            assert by_hand(fewer) < keep
    rest = {
        site: [n for n in range(count) if n not in found.units.get(site, [])] for site, count in (("1", 7), ("3", 6))
    }
    assert by_hand(rest) == pytest.approx(found.without.estimate, abs=1e-9)


def test_the_circuit_of_a_policy_decides_as_the_policy_does() -> None:
    """By the difference of logits, of an actor whose light is read by three of its units."""
    first, last = torch.zeros(8, 3), torch.zeros(2, 8)
    first[[1, 4, 6], 0], first[[0, 2], 1] = torch.tensor([1.0, -1.0, 0.5]), 1.0
    last[0, [1, 4, 6]] = torch.tensor([1.0, -1.0, 1.0])
    last[1] = 0.2 * torch.eye(8)[3]
    net = nn.Sequential(
        filled(nn.Linear(3, 8), first), nn.Tanh(), filled(nn.Linear(8, 2), last, torch.tensor([0.0, 0.1]))
    )
    module = TensorDictModule(net, ["seen"], ["scores"])
    policy = ProbabilisticActor(module, in_keys={"logits": "scores"}, distribution_class=Categorical)
    clean, corrupt = (torch.randn(40, 3, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    found = find_circuit(
        policy, *(TensorDict({"seen": one}, 40) for one in (clean, corrupt)), "module.0.module.1", keep=0.999
    )
    assert found.units == {"module.0.module.1": [1, 4, 6]}
    assert "with no difference" in found.words  # where both runs decide alike


def test_sites_that_carry_nothing_give_an_empty_circuit() -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.side, self.main = filled(nn.Linear(3, 3), 1e-4 * torch.eye(3)), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.main(x + self.side(x))

    clean, corrupt = (TensorDict({"input": torch.randn(12, 3)}, 12) for _ in range(2))
    found = find_circuit(Beside(), clean, corrupt, "side", metric="output")
    assert found.units == {}
    assert found.size == 0
    assert found.nothing.estimate > 0.99
    assert "enough passes beside them" in str(found)


def test_wrong_input_is_refused_in_words() -> None:
    known = KNOWN["channels"]
    net, clean, corrupt = known.build(), known.states(1), known.states(2)
    for options, words in (
        ({"keep": 0.0}, "keep= is a share"), ({"keep": 1.5}, "keep= is a share"), ({"controls": -1}, "controls= is"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            find_circuit(net, clean, corrupt, known.sites, metric="output", **options)
    with pytest.raises(InputError, match=r"nothing differs.*24 with no difference"):
        find_circuit(net, clean, clean, known.sites, metric="output")
    with pytest.raises(InputError, match="there is no component 9 of '1'"):
        faithfulness(net, clean, corrupt, {"1": [9]}, metric="output")
    one = find_circuit(net, clean[:1], corrupt[:1], known.sites, keep=0.99, metric="output", controls=0)
    assert one.units == known.circuit
    assert not one.faithfulness.known
    assert "one group only" in one.faithfulness.words
    assert one.random is None
    assert "no random sets beside it" in str(one)


def test_a_circuit_of_parts_is_not_read_as_one_of_units() -> None:
    known = KNOWN["heads"]
    net, data = known.build(), [known.states(seed) for seed in (1, 2)]
    found = find_circuit(net, *data, known.sites, metric="output", parts=known.parts)
    again = faithfulness(net, *data, found, ["join", "values"], metric="output")
    assert again.estimate == pytest.approx(found.faithfulness.estimate)
    with pytest.raises(InputError, match="divides 'join' into 4, and the circuit was found among 2 components"):
        faithfulness(net, *data, found, metric="output", parts={"join": 4})


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_differences_are_told_from_rounding_in_the_dtype_of_the_policy(offset: float) -> None:
    """In float64 a difference of a millionth is one; in float32 it is lost in the value itself."""
    for dtype, known in ((torch.float64, True), (torch.float32, not offset)):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).to(dtype)
        states = [TensorDict({"input": torch.randn(8, 4, dtype=dtype)}, 8) for _ in range(2)]
        options = {"metric": lambda out: out["output"] + offset}
        for table in (patch_units(net, *states, "1", **options), patch_sites(net, *states, "1", **options)):
            assert ("8 with no difference between the two runs" in str(table)) is not known


@pytest.mark.parametrize("chunk_size", [0, -3])
def test_no_rows_at_once_are_refused(chunk_size: int) -> None:
    with pytest.raises(InputError, match="chunk_size="):
        find_circuit(xor(), KNOWN["xor"].states(1), KNOWN["xor"].states(2), "1", chunk_size=chunk_size)


# ---------------------------------------------------------------------- in files


@pytest.mark.parametrize("controls", [0, 3])
@pytest.mark.parametrize("name", KNOWN)
def test_a_saved_circuit_is_the_one_that_was_found(name: str, controls: int, tmp_path: Path) -> None:
    known = KNOWN[name]
    net, data = known.build(), [known.states(seed) for seed in (1, 2)]
    options = {"metric": "output", "parts": known.parts}
    found = find_circuit(net, *data, known.sites, controls=controls, **options)
    loaded = Circuit.load(found.save(tmp_path / "circuit"))
    assert str(loaded) == str(found)
    assert loaded.json() == found.json()
    assert loaded.frame().equals(found.frame())
    assert (loaded.units, loaded.widths, loaded.size, loaded.of) == (found.units, found.widths, found.size, found.of)
    assert all(torch.equal(loaded.importance[site], one) for site, one in found.importance.items())
    assert loaded.facts == found.facts
    assert (found.facts["weights"], found.facts["states"]) == (weights_of(net), data[0].batch_size.numel())
    again = faithfulness(net, *data, loaded, metric="output")
    assert again.estimate == faithfulness(net, *data, found, metric="output").estimate


@pytest.mark.parametrize("saved", [False, True])
def test_the_faithfulness_of_a_circuit_of_other_weights_says_so(saved: bool, tmp_path: Path) -> None:
    known = next(iter(KNOWN.values()))
    net, data = known.build(), [known.states(seed) for seed in (1, 2)]
    options = {"metric": "output", "parts": known.parts}
    found = find_circuit(net, *data, known.sites, controls=0, **options)
    circuit = Circuit.load(found.save(tmp_path / "circuit")) if saved else found
    own = faithfulness(net, *data, circuit, metric="output")
    assert "other weights" not in own.words
    with torch.no_grad():
        next(net.parameters()).mul_(1.01)
    other = faithfulness(net, *data, circuit, metric="output")
    assert other.words.endswith(OTHER_WEIGHTS)
    named = faithfulness(net, *data, circuit.units, list(circuit.importance), **options)
    assert named.estimate == other.estimate
    assert "other weights" not in named.words  # numbers of units are of nobody


def test_a_circuit_of_another_network_is_refused_from_its_file_too(tmp_path: Path) -> None:
    states = [TensorDict({"input": torch.randn(8, 4)}, 8) for _ in range(2)]
    nets = [nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1)) for width in (6, 7)]
    find_circuit(nets[0], *states, "1", controls=0).save(tmp_path / "circuit")
    with pytest.raises(InputError, match="among 6 units of '1', and this network has 7"):
        faithfulness(nets[1], *states, Circuit.load(tmp_path / "circuit"))
    with pytest.raises(SiteError, match="'1'"):
        faithfulness(nn.Linear(4, 1), *states, Circuit.load(tmp_path / "circuit"))


DAMAGED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no units": lambda facts: facts.pop("units"),
    "units of no site": lambda facts: facts["units"].update({"2": [0]}),
    "a unit that there is not": lambda facts: facts["units"].update({"1": [99]}),
    "another size": lambda facts: facts.update(size=facts["size"] + 1),
    "a size that is text": lambda facts: facts.update(size="2"),
    "a size that is true": lambda facts: facts.update(size=True),
    "an interval without limits": lambda facts: facts["without"].pop("low"),
    "an interval of words": lambda facts: facts["without"].update(low="low"),
    "an interval upside down": lambda facts: facts["without"].update(low="2.0", high="1.0"),
    "no interval": lambda facts: facts.update(nothing=None),
    "a curve of numbers": lambda facts: facts.update(curve=[1, 2]),
    "a curve that is none": lambda facts: facts.update(curve=None),
    "widths of other sites": lambda facts: facts.update(widths={"7": 6}),
    "units that are a list": lambda facts: facts.update(units=[1]),
    "words that are a number": lambda facts: facts.update(words=3),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_file_that_holds_no_circuit_is_named(name: str, tmp_path: Path) -> None:
    states = [TensorDict({"input": torch.randn(8, 4)}, 8) for _ in range(2)]
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
    find_circuit(net, *states, "1", controls=0).save(tmp_path / "circuit")
    tensors, facts = load_artifact(tmp_path / "circuit", "circuit")
    DAMAGED[name](facts)
    save_artifact(tmp_path / "circuit", "circuit", tensors, facts)
    with pytest.raises(ArtifactError, match="holds no circuit as it is saved"):
        Circuit.load(tmp_path / "circuit")
    save_artifact(tmp_path / "other", "steering_vector", tensors, {})
    with pytest.raises(ArtifactError, match="not a 'circuit'"):
        Circuit.load(tmp_path / "other")

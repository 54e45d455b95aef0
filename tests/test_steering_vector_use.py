"""Directions that are there: arithmetic, cosines, the policy that they are put on, and files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tdhook_rl import SteeringVectors
from tdhook_rl.errors import ArtifactError, InputError, SiteError
from tdhook_rl.latent import DirectionalAblation, DirectionClamping, SteeringVector, cosines
from tests.small_states import close, mlp, states, written

# ---------------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("shape", [(6,), (3, 4), (2, 3, 3)])
def test_arithmetic(shape: tuple[int, ...], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (
        SteeringVector(
            vector=torch.randn(shape, generator=generator), path="1", facts={"source": source, "weights": "w"},
            shuffled=torch.randn(count, *shape, generator=generator),
        )
        for source, count in (("pairs", 4), ("probe", 3))
    )  # fmt: skip
    x, y = a.vector.double(), b.vector.double()
    for made, expected, parts in (
        (a + b, x + y, [1, 1]), (a - b, x - y, [1, -1]), (-a, -x, [-1]), (2 * a / 4 - b * 3, x / 2 - 3 * y, [0.5, -3]),
        (sum([a, b, b]), x + 2 * y, [1, 1, 1]), (a * torch.tensor(0.5), x / 2, [0.5]), (a * np.float32(2), 2 * x, [2]),
        ((a - (a - b)) * 2, 2 * y, [2, -2, 2]),
    ):  # fmt: skip
        assert close(made.vector, expected)
        assert [one["times"] for one in made.facts["terms"]] == parts
        assert made.facts["terms"][0]["of"] == {"source": "pairs", "weights": "w"}
        assert made.facts["weights"] == "w"
        assert made.facts["norm"] == pytest.approx(float(expected.norm()), abs=1e-6)
        made.save(tmp_path / "sum")
        assert SteeringVector.load(tmp_path / "sum").facts == made.facts
    assert torch.allclose((a - 2 * b).shuffled, a.shuffled[:3] - 2 * b.shuffled)  # type: ignore[index, operator, arg-type]
    assert (a + SteeringVector(vector=a.vector, path="1")).shuffled is None


def test_arithmetic_that_means_nothing() -> None:
    a = SteeringVector(vector=torch.ones(3), path="1")
    elsewhere, wider = SteeringVector(vector=torch.ones(3), path="2"), SteeringVector(vector=torch.ones(4), path="1")
    for other in (elsewhere, wider, SteeringVector(vector=torch.ones(3), path=("1", "h"))):
        with pytest.raises(InputError, match="at one place"):
            a + other
        with pytest.raises(InputError, match="at one place"):
            a - other
    for factor in (torch.nan, torch.inf, "2", None, True, torch.ones(3), a, 1e300):
        with pytest.raises(InputError):
            a * factor * 1e300
    for divisor in (0, 0.0, torch.nan, a, False, 1e-320):
        with pytest.raises(InputError):
            a / divisor
    for odd in (1, "b", None, torch.ones(3)):
        with pytest.raises(TypeError):
            a + odd
        with pytest.raises(TypeError):
            a - odd


def test_a_table_of_cosines() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = {name: SteeringVector(vector=torch.randn(5, generator=generator), path="fc2") for name in "abc"}
    x = torch.stack([one.vector.double() for one in vectors.values()])
    vectors["other"] = SteeringVector(vector=torch.ones(5), path="fc1")
    vectors["zero"] = SteeringVector(vector=torch.zeros(5), path="fc2")
    table = cosines(vectors)
    expected = x @ x.T / torch.outer(x.norm(dim=1), x.norm(dim=1))
    assert torch.allclose(table.values[:3, :3], expected)
    assert table["a", "b"] == pytest.approx(float(expected[0, 1]))
    for name in "abc":
        assert np.isnan(table[name, "other"])
        assert np.isnan(table[name, "zero"])
    assert table.frame().loc["b", "c"] == table["b", "c"]
    drawn = torch.nn.functional.normalize(torch.randn(20_000, 2, 5, generator=generator), dim=2).prod(1).sum(1).abs()
    assert abs(float((drawn < table.chance["fc2 (5)"]).double().mean()) - 0.95) < 0.005
    assert str(table).splitlines()[1].split() == ["a", "fc2", "(5)", *(f"{one:.2f}" for one in expected[0]), "-", "-"]
    assert "<td>-</td>" in table._repr_html_()
    with pytest.raises(InputError, match="nearest"):
        table["a", "d"]
    with pytest.raises(InputError, match="none"):
        cosines({})
    huge = cosines({name: SteeringVector(vector=torch.full((2,), size), path="1") for name, size in
                    (("large", 1e30), ("small", 1e-30))})  # fmt: skip
    assert huge["large", "small"] == pytest.approx(1)


# --------------------------------------------------------------------------------------------------- what it is put on


def test_other_weights_are_known() -> None:
    net = mlp()
    found = SteeringVector.from_pairs(net, "1", states(4, seed=1), states(4, seed=2))
    assert found.check(net) == found.check(copy.deepcopy(net)) == "same"
    with SteeringVectors(found).prepare(net) as hooked:
        assert found.check(hooked) == "same"
        inside = SteeringVector.from_pairs(hooked, "1", states(4, seed=1), states(4, seed=2))
    assert torch.equal(inside.vector, found.vector)  # steering does not act where directions are extracted
    with torch.no_grad():
        net[0].weight[0, 0] += 1e-6
    assert found.check(net) == "others"
    assert (found * 2).check(net) == "others"
    assert SteeringVector(vector=found.vector, path="1").check(net) == "unknown"


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).repeat_interleave(2, -1)


def test_what_does_not_fit_a_policy() -> None:
    net, vector = mlp(), SteeringVector(vector=torch.ones(6), path="1")
    with pytest.raises(SiteError, match=r"nearest"):
        SteeringVector(vector=torch.ones(6), path="layer.1").check(net)
    with pytest.raises(InputError, match=r"'2'.*such features|of such features are '0', '1'"):
        SteeringVector(vector=torch.ones(6), path="2").check(net)
    with pytest.raises(InputError, match="no module has such"):
        SteeringVector(vector=torch.ones(7), path="1").check(net)
    assert vector.check(net) == "unknown"
    maps = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    for shape in ((8,), (8, 6, 6), (8, 1, 1), (1, 6, 6), (1, 1)):
        SteeringVector(vector=torch.ones(shape), path="1").check(maps)
    for shape in ((7,), (7, 6, 6), (288,)):
        with pytest.raises(InputError, match="8 channels"):
            SteeringVector(vector=torch.ones(shape), path="1").check(maps)
    act = nn.Tanh()  # what comes before it differs from run to run
    twice = nn.Sequential(nn.Linear(4, 6), act, nn.Linear(6, 3), act)
    SteeringVector(vector=torch.ones(3), path="3@1").check(twice)
    SteeringVector(vector=torch.ones(8), path="0").check(nn.Sequential(Doubled(4, 4)))
    with pytest.raises(SiteError, match="writes no entries"):
        SteeringVector(vector=torch.ones(6), path=("1", "hidden")).check(net)


def test_methods_check_the_vectors_that_they_are_given() -> None:
    net = mlp()
    found = SteeringVector.from_pairs(net, "1", states(4, seed=1), states(4, seed=2))
    other = mlp()
    other[0].bias.data += 1
    for method in (SteeringVectors, DirectionalAblation, lambda one: DirectionClamping(one, value=1.0)):
        vector = SteeringVector(vector=found.vector, path="1", facts={"weights": str(method)})  # said once for each
        with pytest.warns(UserWarning, match="other weights"):
            method(vector).prepare(other, return_context=False).restore()
        method(vector).prepare(other, return_context=False).restore()
        method(vector + vector).prepare(other, return_context=False).restore()
        method({"1": vector.vector}).prepare(other, return_context=False).restore()
        for wrong, words in (
            (SteeringVector(vector=torch.ones(6), path="2"), "'2' of Sequential gives 2"),
            ({"0": vector}, "was found at '1', which the policy has too"),
        ):
            with pytest.raises(InputError, match=words):
                method(wrong).prepare(net, return_context=False)
        with pytest.raises(SiteError, match="nearest"):
            method(SteeringVector(vector=torch.ones(6), path="layer")).prepare(net, return_context=False)
    # Where paths are other ones, as around a wrapped network, the key of the mapping says where.
    wrapped = nn.Sequential(nn.Identity(), net)
    SteeringVectors({"1.1": SteeringVector(vector=found.vector, path="net.1")}).prepare(wrapped, return_context=False)
    with pytest.raises(InputError, match="path alone"):
        DirectionalAblation(SteeringVector(vector=found.vector, path=("1", "h"))).prepare(net, return_context=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_vectors_are_cast_where_they_are_used(dtype: torch.dtype) -> None:
    net, data = mlp(), states(3)
    vector = SteeringVector(vector=torch.tensor([1.0, 2, 3, 4, 5, 6], dtype=dtype), path="1")
    with SteeringVectors(vector).prepare(net) as hooked:
        steered = hooked(data.clone())["output"]
    assert close(steered, net[2](net[:2](data["input"]) + vector.vector.float()))
    assert (vector + SteeringVector(vector=torch.ones(6), path="1")).vector[0] == 2


# -------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("path", ["1", ("0", "hidden"), ("0", ("next", "hidden")), ("lstm", "h_n")])
def test_places_come_back(path: Any, tmp_path: Path) -> None:
    made = SteeringVector(vector=torch.randn(2, 3), path=path, facts={"frames": 3}, shuffled=torch.randn(4, 2, 3))
    made.save(tmp_path / "vector")
    again = SteeringVector.load(tmp_path / "vector")
    assert (again.path, again.facts) == (path, {"frames": 3})
    assert torch.equal(again.vector, made.vector)
    assert torch.equal(again.shuffled, made.shuffled)  # type: ignore[arg-type]


@pytest.mark.parametrize("entry", [3, True, {"a": 1}, [], ["a", 3], [["a"]], "", [""], 1.5])
def test_entries_that_are_none(entry: Any, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError):
        SteeringVector.load(written(tmp_path, {"vector": torch.ones(3)}, entry=entry))


@pytest.mark.parametrize("facts", [
    {"source": "sum", "terms": 3}, {"source": "sum", "terms": [{"times": "x", "of": {}}]}, {"source": "sum"},
    {"source": ["sum"], "weights": 5, "norm": "x"}, {"terms": [1], "weights": {"a": 1}},
    {"source": "sum", "terms": [{"times": 1.0, "of": {"weights": ["x"]}}]},
])  # fmt: skip
def test_facts_from_anybody_do_no_harm(facts: dict[str, Any], tmp_path: Path) -> None:
    found = SteeringVector.load(written(tmp_path, {"vector": torch.ones(6)}, **facts))
    assert found.check(mlp()) == "unknown"
    assert torch.equal((2 * found + found).vector, torch.full((6,), 3.0))
    repr(found)

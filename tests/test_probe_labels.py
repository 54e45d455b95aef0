"""Labels that are not what a probe takes for a class, and classes that only rows have which are held out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from tdhook_rl.errors import InputError
from tdhook_rl.replay import probe_grid
from tdhook_rl.rollout import Future, GroupSplit, OnlineProbe, ProbeSuite, Return

ROWS = 600


def network() -> nn.Module:
    torch.manual_seed(0)
    return TensorDictModule(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), in_keys=["observation"], out_keys=["logits"])


def rows_with(label: Callable[[Tensor], Tensor]) -> TensorDict:
    seen = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(0))
    return TensorDict({"observation": seen, "label": label(seen), "episode": torch.arange(ROWS) // 4}, [ROWS])


def suite(data: TensorDictBase, **options: Any) -> Any:
    one = ProbeSuite(network(), sites=["module.1"], concepts={"it": "label"}, split=GroupSplit("episode"), **options)
    one.update(data)
    return one.table()


def grid(data: TensorDictBase, **options: Any) -> Any:
    return probe_grid(
        network(), data, sites=["module.1"], concepts={"it": "label"}, split=GroupSplit("episode"), **options
    )


@pytest.mark.parametrize("batch_size", [50, 4096])
@pytest.mark.parametrize("places", [[0], [-1], [3, 20]], ids=str)
def test_a_class_that_only_held_out_rows_have_takes_nothing_from_the_others(places: list[int], batch_size: int) -> None:
    """What is said of the other classes is what is said without these rows, wherever they lie."""
    data = rows_with(lambda seen: (seen[:, 0] > 0).long())
    odd = GroupSplit("episode")(data)[1].nonzero()[:, 0][places]
    more = data.clone()
    more["label"][odd] = 2
    kept = torch.ones(ROWS, dtype=torch.bool).index_fill(0, odd, False)
    found, expected = (grid(one, batch_size=batch_size)["module.1", "it"] for one in (more, data[kept]))
    assert float(found.trained) == pytest.approx(float(expected.trained), abs=1e-9)
    assert found.trained.rows == expected.trained.rows
    assert float(found.input) == pytest.approx(float(expected.input), abs=1e-9)
    assert "class 2" in found.words


@pytest.mark.parametrize("probes", [suite, grid])
@pytest.mark.parametrize(
    ("label", "message"),
    [
        (lambda seen: torch.arange(ROWS) * 10, r"'it' are integers up to 5990, .*\.float\(\)"),
        (lambda seen: torch.stack([(seen[:, 0] > 0).long(), torch.arange(ROWS)], 1), r"'it\.1' are integers up to 599"),
        (lambda seen: (seen[:, 0] > 0).long() * 2 - 1, "'it' are numbers from 0, got -1"),
        (lambda seen: torch.zeros(ROWS, 0), "no label of a row"),
        (lambda seen: torch.zeros(ROWS, 0, dtype=torch.long), "no label of a row"),
    ],
    ids=["counts", "counts beside a class", "below 0", "no number", "no class"],
)
def test_what_is_no_class_is_refused_at_once(probes: Any, label: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        probes(rows_with(label))


#: Concepts of each kind; all of them are learnt beside a class, and none changes what is found of it.
KINDS: dict[str, Any] = {
    "a class": lambda rows: (rows["observation"][:, 1] > 0).long(),
    "a number": lambda rows: rows["observation"][:, 1],
    "a future class": Future("label", 1),
    "a future number": Future(lambda rows: rows["observation"][:, 1], 1),
    "a return": Return(reward=lambda rows: rows["observation"][:, :1]),
}


def told(probes: Any, concepts: dict[str, Any]) -> dict[str, Any]:
    data = rows_with(lambda seen: (seen[:, 0] > 0).long())
    data["collector"], data["next"] = {"traj_ids": data["episode"]}, {"done": torch.arange(ROWS)[:, None] % 4 == 3}
    options: dict[str, Any] = {"sites": ["module.1"], "split": GroupSplit("episode"), "penalty": 1e-3}
    if probes is grid:
        table = probe_grid(network(), data, concepts=concepts, **options)
    else:
        one = ProbeSuite(network(), concepts=concepts, **options)
        for part in data.split(200):
            one.update(part)
        table = one.table()
    return {cell.concept: (cell.score, cell.trained, cell.input, cell.left_out) for cell in table}


@pytest.mark.parametrize("probes", [suite, grid])
@pytest.mark.parametrize("kind", KINDS)
def test_a_concept_may_have_any_name(kind: str, probes: Any) -> None:
    """What is found of two concepts is what is found by other names, whichever is named first."""
    expected = told(probes, {"label": "label", "other": KINDS[kind]})
    for concepts in ({"label": "label", "classes": KINDS[kind]}, {"classes": KINDS[kind], "label": "label"}):
        found = told(probes, concepts)
        assert found["label"] == expected["label"]
        assert found["classes"] == expected["other"]


@pytest.mark.parametrize("probes", [suite, grid])
@pytest.mark.parametrize("kind", ["a class", "a number"])
@pytest.mark.parametrize("first", [True, False])
def test_two_concepts_of_one_name_are_refused(first: bool, kind: str, probes: Any) -> None:
    """One of several numbers is called by the name of all and its place."""
    several = {"it": lambda rows: rows["observation"][:, :2] > 0}
    other = {"it.1": KINDS[kind]}
    with pytest.raises(InputError, match=r"'it' and 'it\.1'|'it\.1' and 'it'"):
        told(probes, several | other if first else other | several)


@pytest.mark.parametrize(
    ("shift", "message"), [(1, r"1 to 2, expected 0 to 1: classes=3 has room"), (-1, r"from 0 \(labels \+ 1\)")]
)
def test_an_online_probe_says_how_labels_are_numbered(shift: int, message: str) -> None:
    probe = OnlineProbe(features="observation", label="label", split=GroupSplit("episode"))
    with pytest.raises(InputError, match=message):
        probe.update(rows_with(lambda seen: (seen[:, 0] > 0).long() + shift))

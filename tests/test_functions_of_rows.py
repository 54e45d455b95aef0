"""Functions and policies that are given rows some at a time: they say the same of a row in whatever company."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from tdhook_rl import Compose, Saliency, targets
from tdhook_rl.errors import InputError
from tdhook_rl.latent import ActivationCaching
from tdhook_rl.latent.steering_vector import SteeringVector
from tdhook_rl.replay import analyze, by_feature, feature_means, probe_grid, rows_where
from tdhook_rl.rollout import Future, GroupSplit, Return
from tdhook_rl.statistics import grouped_mean

ROWS = 240


def stored() -> TensorDict:
    draws = torch.Generator().manual_seed(0)
    done = (torch.arange(ROWS) % 6 == 5)[:, None]
    return TensorDict(
        {
            "observation": torch.randn(ROWS, 4, generator=draws).sort(0).values,
            "collector": {"traj_ids": torch.arange(ROWS) // 6},
            "next": {"reward": torch.randn(ROWS, 1, generator=draws), "done": done},
        },
        [ROWS],
    )


def seen(rows: TensorDictBase) -> Tensor:
    return rows["observation"][..., 0]


def of_a_network(rows: TensorDictBase) -> Tensor:
    """Of which the last digits are others beside other rows."""
    weight = torch.linspace(-1, 1, 4 * 4).reshape(4, 4)
    return (rows["observation"] @ weight).tanh().mean(-1)


#: What looks at other rows.
OF_SEVERAL: dict[str, Callable[[TensorDictBase], Tensor]] = {
    "above the median": lambda rows: seen(rows) > seen(rows).median(),
    "in the upper tenth": lambda rows: seen(rows) > seen(rows).quantile(0.9),
    "far from the mean": lambda rows: ((seen(rows) - seen(rows).mean()) / seen(rows).std()).abs() > 1,
    "the best": lambda rows: seen(rows).argsort().argsort() < 10,
    "a change": lambda rows: seen(rows).diff(prepend=seen(rows)[:1]) > 0,
    "every other": lambda rows: torch.arange(len(rows)) % 2 == 0,
}
#: What looks at one row alone.
OF_ONE: dict[str, Callable[[TensorDictBase], Tensor]] = {
    "above a number": lambda rows: seen(rows) > 0.1,
    "a column": lambda rows: rows["next", "done"],
    "nowhere": lambda rows: seen(rows) > 1e9,
    "without a dimension": lambda rows: rows["next", "done"].squeeze(),
    "a network": lambda rows: of_a_network(rows) > 0,
}
#: The same as numbers.
NUMBERS_OF_SEVERAL: dict[str, Callable[[TensorDictBase], Tensor]] = {
    "about the mean": lambda rows: seen(rows) - seen(rows).mean(),
    "a sum so far": lambda rows: seen(rows).cumsum(0),
    "a rank": lambda rows: seen(rows).argsort().argsort().clamp_max(500),
}


def network() -> TensorDictModule:
    torch.manual_seed(0)
    return TensorDictModule(nn.Sequential(nn.Linear(4, 6), nn.Tanh()), ["observation"], ["logits"])


def chosen(function: Callable[[TensorDictBase], Tensor], batch_size: int, folder: Path) -> Tensor:
    with ActivationCaching("module.0").prepare(network()) as hooked:
        return analyze(hooked, stored(), folder, where=function, batch_size=batch_size)["index"]


def asked_for(function: Callable[[TensorDictBase], Tensor], batch_size: int, folder: Path) -> Tensor:
    return rows_where(stored(), function, batch_size=batch_size)["index"]


def leading(where: Any, batch_size: int, **options: Any) -> int:
    """How many rows are on one side of a direction."""
    options = {"shuffles": 0, **options}
    vector = SteeringVector.from_contrast(network(), "module.0", stored(), where, batch_size=batch_size, **options)
    assert vector.facts["positive_rows"] + vector.facts["negative_rows"] == ROWS
    return int(vector.facts["positive_rows"])


def read(function: Any, batch_size: int) -> list[float]:
    """Scores are R² or accuracies, and the first of them is of a function."""
    table = probe_grid(
        network(), stored(), sites="module.1", concepts={"it": function}, untrained=False, batch_size=batch_size,
        penalty=1e-3, min_rows=1, split=GroupSplit(held_out=0.4),
    )  # fmt: skip
    return [cell.trained.estimate for cell in table]


@pytest.mark.parametrize("name", OF_SEVERAL)
def test_directions_are_not_of_what_rows_are_read_with(name: str) -> None:
    where, one = OF_SEVERAL[name], OF_ONE["above a number"]
    assert leading(where, ROWS) == int(where(stored()).sum())
    assert leading(one, 50) == leading(one, ROWS)
    with pytest.raises(InputError, match=r"^where=.* of from_contrast is a function that says of a row some"):
        leading(where, 50)
    with pytest.raises(InputError, match=r"^groups=.* of from_contrast is a function that says of a row some"):
        leading(one, 50, shuffles=2, groups=lambda rows: where(rows).long())


@pytest.mark.parametrize("ask", [chosen, asked_for])
@pytest.mark.parametrize("name", OF_SEVERAL)
def test_rows_are_not_chosen_by_what_they_are_read_with(name: str, ask: Any, tmp_path: Path) -> None:
    whole = OF_SEVERAL[name](stored()).nonzero()[:, 0]
    assert ask(OF_SEVERAL[name], ROWS, tmp_path).tolist() == whole.tolist()
    with pytest.raises(InputError, match=r"where= is a function that says of a row .* 240 reads all of them together"):
        ask(OF_SEVERAL[name], 50, tmp_path / "other")


@pytest.mark.parametrize("ask", [chosen, asked_for])
@pytest.mark.parametrize("name", [name for name in OF_ONE if name != "nowhere"])
def test_rows_are_chosen_by_what_they_are(name: str, ask: Any, tmp_path: Path) -> None:
    whole = OF_ONE[name](stored()).reshape(-1).nonzero()[:, 0].tolist()
    assert all(ask(OF_ONE[name], size, tmp_path / f"{size}").tolist() == whole for size in (ROWS, 50))


@pytest.mark.parametrize("name", ["above a number", "in the upper tenth"])
def test_features_of_rows_that_are_chosen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = stored()
    where = (OF_ONE | OF_SEVERAL)[name]
    found = TensorDict({"attr": {"observation": data["observation"]}}, [ROWS])
    whole = by_feature(found, data, where=where)
    monkeypatch.setattr(feature_means, "READ", 50)
    if name in OF_ONE:
        assert by_feature(found, data, where=where) == whole
        return
    with pytest.raises(InputError, match="other rows are read with it"):
        by_feature(found, data, where=where)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, lambda one: one) for name in ("above the median", *NUMBERS_OF_SEVERAL)),
        ("above the median", lambda one: Future(one, 1)), ("about the mean", lambda one: Return(reward=one)),
    ],
)  # fmt: skip
def test_concepts_are_not_of_what_rows_are_read_with(name: str, kind: Any) -> None:
    function = (OF_SEVERAL | NUMBERS_OF_SEVERAL)[name]
    read(kind(function), ROWS)
    with pytest.raises(InputError, match="the concept 'it' is a function that says of a row something else"):
        read(kind(function), 50)


@pytest.mark.filterwarnings("ignore:the concept 'it' is a function that fails of a row alone")
@pytest.mark.parametrize("function", [*OF_ONE.values(), of_a_network, seen])
def test_concepts_are_of_what_rows_are(function: Any) -> None:
    few, many = read(function, 51), read(function, ROWS)  # a function may squeeze what is one row
    assert few == pytest.approx(many, abs=1e-6, nan_ok=True)


def test_what_fails_of_a_row_alone_is_said(tmp_path: Path) -> None:
    def of_two(rows: TensorDictBase) -> Tensor:
        return rows["observation"].squeeze()[:, 0] > 0.1

    with pytest.warns(UserWarning, match=r"where= is a function that fails of a row alone \(IndexError: too many"):
        found = asked_for(of_two, 50, tmp_path)
    assert found.tolist() == of_two(stored()).nonzero()[:, 0].tolist()


class Layer(nn.Module):
    """Applies a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


#: Layers that look across the rows of a batch, and ones that do not.
ACROSS: dict[str, Callable[[], nn.Module]] = {
    "a mean": lambda: Layer(lambda x: x - x.mean(0)),
    "a softmax": lambda: Layer(lambda x: x.softmax(0)),
    "a rank": lambda: Layer(lambda x: x * x.argsort(0).argsort(0)),
    "the row before": lambda: Layer(lambda x: x + x.roll(1, 0)),
    "attention": lambda: Layer(lambda x: (x @ x.T / 4).softmax(1) @ x),
}
ALONG: dict[str, Callable[[], nn.Module]] = {
    "a mean": lambda: Layer(lambda x: x - x.mean(-1, keepdim=True)),
    "a norm": lambda: nn.LayerNorm(6),
    "statistics": lambda: nn.BatchNorm1d(6).eval(),
    "dropout": lambda: nn.Dropout(0.5),
    "kinks": nn.ReLU,
    "nothing": lambda: Layer(lambda x: 0 * x),
    "no number": lambda: Layer(lambda x: x / 0.0),
}


def with_layer(layer: nn.Module, dtype: torch.dtype = torch.float32) -> TensorDictModule:
    torch.manual_seed(0)
    parts = nn.Sequential(nn.Linear(4, 6), layer, nn.Linear(6, 2)).to(dtype)
    return TensorDictModule(parts, ["observation"], ["logits"])


def analysed(policy: TensorDictModule, folder: Path, rows: Any, **options: Any) -> TensorDict:
    method = Compose(ActivationCaching("module.1"), Saliency(target=targets.logit(0)))
    with method.prepare(policy) as hooked:
        return analyze(hooked, rows, folder, **options).clone()


def read_by(policy: TensorDictModule, batch_size: int) -> Any:
    options: dict[str, Any] = {"concepts": {"it": OF_ONE["above a number"]}, "split": GroupSplit(held_out=0.4)}
    return probe_grid(policy, stored(), sites="module.1", untrained=False, batch_size=batch_size, **options)


@pytest.mark.parametrize("name", ACROSS)
def test_policies_do_not_look_across_rows_that_are_computed_apart(name: str, tmp_path: Path) -> None:
    policy, rows = with_layer(ACROSS[name]()), stored()
    with pytest.raises(InputError, match=r"of a row is something else .* of 240 rows 50 are computed at a time.*=240"):
        analysed(policy, tmp_path / "apart", rows, batch_size=50)
    assert not (tmp_path / "apart").exists()
    found = analysed(policy, tmp_path / "together", rows, batch_size=ROWS)
    torch.testing.assert_close(found["cache", "module.1"], policy.module[:2](rows["observation"]))
    with pytest.raises(InputError, match=r"'trained module\.1' of a row is something else .* a network looks across"):
        read_by(policy, 50)
    read_by(policy, ROWS)


@pytest.mark.filterwarnings("ignore:.*NaN", "ignore:.*dropout", "ignore:.*draw")
@pytest.mark.parametrize(("name", "dtype"), [*((name, torch.float32) for name in ALONG), ("a norm", torch.bfloat16)])
def test_what_is_of_a_row_is_computed_in_any_company(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    policy, rows = with_layer(ALONG[name](), dtype), stored()
    rows["observation"] = rows["observation"].to(dtype)
    apart = analysed(policy, tmp_path / "apart", rows, batch_size=50)
    if name == "dropout":
        return
    together = analysed(policy, tmp_path / "together", rows, batch_size=ROWS)
    for key in (("cache", "module.1"), ("attr", "observation")):
        torch.testing.assert_close(apart[key], together[key], equal_nan=True)


#: What is made of attributions; all of them look at one feature, or at all of a row.
STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "a share": lambda values: values.abs() / values.abs().sum(1, keepdim=True),
    "a rank": lambda values: values.argsort(1).argsort(1),
    "the largest": lambda values: values.abs() == values.abs().amax(1, keepdim=True),
    "a square": lambda values: values.square(),
    "about its mean": lambda values: values - values.mean(0),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_a_statistic_is_given_all_features(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many numbers that is: a share of some of them would be a larger one."""
    data = stored()
    values = data["observation"].double()
    monkeypatch.setattr(feature_means, "BLOCK", 2 * ROWS)
    found = by_feature(TensorDict({"attr": {"observation": values}}, [ROWS]), data, statistic=STATISTICS[name])
    for feature in range(4):
        expected = grouped_mean(STATISTICS[name](values)[:, feature].double(), data["collector", "traj_ids"])
        assert found[str(feature)]["attr.observation"] == expected


@pytest.mark.parametrize(
    ("statistic", "words"),
    [
        (lambda values: values.norm(dim=1), r"gives a real number for each; it gave \(240,\)"),
        (lambda values: values[:, :2], r"it gave \(240, 2\)"),
        (lambda values: None, "it gave None"),
        (lambda values: values + 1j, "complex"),
    ],
)
def test_a_statistic_gives_a_number_for_each(statistic: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        by_feature(TensorDict({"attr": {"observation": torch.ones(ROWS, 4)}}, [ROWS]), stored(), statistic=statistic)

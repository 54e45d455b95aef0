"""Units and squares of maps that are set, and activations of other inputs put in, against hooks by hand."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook_rl import ActivationCaching, Compose
from tdhook_rl.errors import InputError, MissingKeyError
from tdhook_rl.latent import MapPatch, UnitValues
from tests.policies import CASES, POLICIES, Case, mlp
from tests.test_gates import acting, by_case, by_hand, positive, require_equal, some_batch

MAPS = {name: POLICIES[name] for name in ("pixels", "bytes")}


@by_case
def test_units_are_set_as_by_hand(case: Case, batch: tuple[int, ...]) -> None:
    some_batch(case, batch)
    policy, data = case.build(), case.data(*batch)
    channels_first = len(case.features) == 3
    mean = torch.randn(case.features[0] if channels_first else case.features[-1])
    rows = positive(case, data)

    def change(numbers: dict[int, float], gated: bool) -> object:
        def changed(value: Tensor, spread) -> Tensor:
            new = value.clone()
            for unit, number in numbers.items():
                place = (..., unit, slice(None), slice(None)) if channels_first else (..., unit)
                new[place] = number
            return torch.where(spread(rows), new, value) if gated else new

        return changed

    for method, numbers, gated in (
        (UnitValues({case.site: [0, 3]}), {0: 0.0, 3: 0.0}, False),
        (UnitValues({case.site: {1: 2.5, 0: -1.0}}), {1: 2.5, 0: -1.0}, False),
        (UnitValues({case.site: [2]}, value={case.site: mean}), {2: float(mean[2])}, False),
        (UnitValues({case.site: [1]}, value=0.5, when=lambda rows: positive(case, rows)), {1: 0.5}, True),
    ):
        with method.prepare(policy) as hooked:
            found = acting(hooked, data)
            expected = acting(by_hand(policy, case, change(numbers, gated), batch), data)
        require_equal(found, expected, policy.out_keys)


@pytest.mark.parametrize("batch", [(), (5,), (3, 2)], ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_squares_of_maps_are_set_as_by_hand(name: str, batch: tuple[int, ...]) -> None:
    case = MAPS[name]
    some_batch(case, batch)
    policy, data = case.build(), case.data(*batch)
    squares = torch.randint(6, (*batch, 2))
    data["goal"] = squares
    rows = positive(case, data)

    def patched(maps: Tensor, squares: Tensor, channels: list[int], value: float | str, acts: Tensor) -> Tensor:
        new, lead = maps.clone(), maps.reshape(-1, *maps.shape[-3:])
        flat = new.view(-1, *maps.shape[-3:])
        for one, (row, column) in enumerate(squares.reshape(-1, 2).expand(len(flat), 2).tolist()):
            for channel in channels:
                if acts.reshape(-1).expand(len(flat))[one]:
                    plane = lead[one, channel]
                    numbers = {"mean": plane.mean(), "max": plane.max()}
                    flat[one, channel, row, column] = numbers.get(value, value)
        return new

    always = torch.ones(1, dtype=torch.bool)
    for method, square, channels, value, acts in (
        (MapPatch(case.site, square=(1, 4), value=5.5), torch.tensor([1, 4]), range(4), 5.5, always),
        (MapPatch(case.site, square="goal", value="max", channels=[0, 2]), squares, [0, 2], "max", always),
        (
            MapPatch(case.site, square="goal", value="mean", channels=[3], when=lambda rows: positive(case, rows)),
            squares, [3], "mean", rows,
        ),
    ):  # fmt: skip
        with method.prepare(policy) as hooked:
            found = acting(hooked, data)
        plain = by_hand(
            policy,
            case,
            lambda maps, spread, given=(square, channels, value, acts): patched(maps, given[0], *given[1:]),
            batch,
        )
        require_equal(found, acting(plain, data), policy.out_keys)


def test_values_and_squares_are_live() -> None:
    case = CASES["pixels"]
    method = Compose(MapPatch(case.site, square=(0, 0), value=1.0, channels=[1]), ActivationCaching(case.site))
    with method.prepare(case.build()) as hooked:
        hooked.controls.update_({"map_patch.square": torch.tensor([2, 3]), "map_patch.value": 4.0})
        maps = hooked(case.data(2))["cache", case.site]
        assert maps[:, 1, 2, 3].tolist() == [4.0, 4.0]
    with Compose(UnitValues({"1": [4]}), ActivationCaching("1")).prepare(mlp()) as hooked:
        hooked.controls["units.1"] = torch.tensor([0.75])
        assert hooked(TensorDict({"input": torch.randn(2, 6)}, 2))["cache", "1"][:, 4].tolist() == [0.75, 0.75]


def test_bad_units_and_squares_are_refused() -> None:
    for make, said in (
        (lambda: UnitValues({}), "there are none"),
        (lambda: UnitValues({"1": []}), "each once"),
        (lambda: UnitValues({"1": [3, 3]}), "each once"),
        (lambda: UnitValues({"1": [-1]}), "from 0"),
        (lambda: UnitValues({"1": {0: float("inf")}}), "not finite"),
        (lambda: UnitValues({"1": [5]}, value={"1": torch.zeros(3)}), "at least 6"),
        (lambda: UnitValues({"1": [5]}, value={"2": torch.zeros(9)}), "no activation for '1'"),
        (lambda: MapPatch("0", square=(0, -1), value=1.0), "counted from 0"),
        (lambda: MapPatch("0", square=(0, 1), value=1.0, channels=[]), "channels= are numbers"),
        (lambda: MapPatch("0", square=(0, 1), value="median"), "median"),
    ):
        with pytest.raises(InputError, match=said):
            make()
    case = CASES["pixels"]
    data = case.data(3).set("goal", torch.tensor([[0, 0], [1, 6], [2, 2]])).set("floats", torch.zeros(3, 2))
    for method, error, said in (
        (UnitValues({case.site: [4]}), InputError, "unit 4 of .* has 4 units"),
        (MapPatch(case.site, square=(6, 0), value=1.0), InputError, "a square that .* 6 rows and 6 columns"),
        (MapPatch(case.site, square="goal", value=1.0), InputError, "per-row square 'goal' names a square"),
        (MapPatch(case.site, square="floats", value=1.0), InputError, "as integers"),
        (MapPatch(case.site, square="nowhere", value=1.0), MissingKeyError, "'nowhere'"),
        (MapPatch(case.site, square=(0, 0), value=1.0, channels=[9]), InputError, "channel 9"),
        (MapPatch("module.0.module.1", square=(0, 0), value=1.0), InputError, "no maps of rows and columns"),
    ):
        with pytest.raises(error, match=said), method.prepare(case.build()) as hooked:
            hooked(data.clone())
    with UnitValues({"0": [0]}).prepare(nn.Sequential(nn.Linear(4, 2))) as hooked:
        assert hooked(input=torch.randn(3, 4))[:, 0].tolist() == [0.0] * 3  # with tensors too

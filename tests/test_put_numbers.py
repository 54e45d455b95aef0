"""What is put into a site is put there as it is, or refused: every intervention, every dtype, held against numpy."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdhook_rl import ActivationCaching, SteeringVectors
from tdhook_rl.errors import InputError
from tdhook_rl.latent import (
    ActivationAddition,
    ActivationPatching,
    DirectionalAblation,
    DirectionClamping,
    MapPatch,
    StateSubtraction,
    UnitValues,
)
from tdhook_rl.method import Binder, Method
from tdhook_rl.sites.controls import Controls
from tdhook_rl.sweeps.causal import ablate_units, patch_sites
from tdhook_rl.sweeps.conditions import directions_of
from tdhook_rl.weights import Adapters, TaskVectors

pytestmark = pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
QUANTISED = "quantised"
DTYPES = (
    torch.bool, torch.uint8, torch.int8, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64,
    torch.complex64, QUANTISED,
)  # fmt: skip
NUMBERS = {
    "whole": 2.0, "one": 1.0, "negative": -1.0, "half": 0.5, "large": 1e6, "beyond": 1e39, "tiny": 1e-9,
    "imaginary": 1j, "none": 0.0,
}  # fmt: skip
VALUES = torch.tensor([[1.0, 0.0, 3.0, 1.0], [0.0, 1.0, 1.0, 5.0]], dtype=torch.float64)


class Emit(nn.Module):
    def __init__(self, dtype: Any) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (
            torch.quantize_per_tensor(x.float(), 1.0, 0, torch.qint8) if self.dtype == QUANTISED else x.to(self.dtype)
        )


class Keep(nn.Module):
    """Hands on what it is given, as it is, beside a number that any policy has."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones(2, 1), x.dequantize() if x.is_quantized else x


def net(dtype: Any) -> nn.Module:
    return nn.Sequential(Emit(dtype), Keep())


def filled(number: complex, *shape: int) -> torch.Tensor:
    dtype = torch.complex128 if isinstance(number, complex) else torch.float64
    return torch.full(shape, number, dtype=dtype)


def first(number: complex) -> torch.Tensor:
    return filled(number, 4) * torch.tensor([1.0, 0.0, 0.0, 0.0])


def placed(x: np.ndarray, number: complex) -> np.ndarray:
    found = x.astype(np.complex128)
    found[..., 0] = number
    return found


@dataclass(frozen=True, eq=False)
class Own(Method):
    observes = False

    number: Any

    def bind(self, binder: Binder) -> None:
        number = self.number
        binder.intervene("0", lambda rows: filled(number, *rows.shape))


#: By name: what puts a number in, what comes of it, and whether it is added (or multiplied with) rather than put.
Put = tuple[Callable[[complex], Any], Callable[[np.ndarray, complex], np.ndarray], bool]
PUTS: dict[str, Put] = {
    "vector": (lambda n: SteeringVectors({"0": filled(n, 4)}), lambda x, n: x + n, True),
    "vector by row": (lambda n: SteeringVectors({"0": "number"}), lambda x, n: x + n, True),
    "alpha": (lambda n: SteeringVectors({"0": torch.ones(4)}, alpha=n), lambda x, n: x + n, True),
    "alpha by row": (lambda n: SteeringVectors({"0": torch.ones(4)}, alpha="alpha"), lambda x, n: x + n, True),
    "alpha of a function": (
        lambda n: SteeringVectors({"0": torch.ones(4)}, alpha=lambda rows: rows["alpha"]), lambda x, n: x + n, True,
    ),
    "steer_fn": (
        lambda n: SteeringVectors(modules_to_steer="0", steer_fn=lambda k, v: filled(n, *v.shape)),
        lambda x, n: x * 0 + n, False,
    ),
    "clamping": (lambda n: DirectionClamping({"0": first(1.0)}, value=n), placed, False),
    "unit": (lambda n: UnitValues({"0": {0: n}}), placed, False),
    "subtraction": (
        lambda n: StateSubtraction("0", lambda rows: rows.set("input", rows["input"] * 0), alpha=n),
        lambda x, n: x - n * x, False,
    ),
    "patch_fn": (
        lambda n: ActivationPatching("0", lambda k, v, first: filled(n, *v.shape)), lambda x, n: x * 0 + n, False,
    ),
    "method of one's own": (lambda n: Own(n), lambda x, n: x * 0 + n, False),
    "adapter": (lambda n: Adapters({"a": (lambda v: filled(n, *v.shape), "0", "0")}), lambda x, n: x * 0 + n, False),
    "run.set": (lambda n: ActivationCaching("0"), lambda x, n: x * 0 + n, False),
}  # fmt: skip
CONTROLS = ("alpha", "clamping", "subtraction")  # whose number becomes a control, of float32
REAL = (*CONTROLS, "unit", "alpha by row", "alpha of a function")  # take no imaginary numbers


def held(numbers: np.ndarray, dtype: Any) -> bool:
    """Whether a dtype has these numbers, as near as its fractions go."""
    if dtype.is_complex:
        return bool((np.abs(numbers) <= torch.finfo(dtype).max).all())
    if np.iscomplexobj(numbers) and numbers.imag.any():
        return False
    numbers = numbers.real
    if dtype.is_floating_point:
        return bool((np.abs(numbers) <= torch.finfo(dtype).max).all())
    low, high = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    return bool(((numbers % 1 == 0) & (numbers >= low) & (numbers <= high)).all())


def expected(name: str, dtype: Any, number: complex) -> np.ndarray | None:
    """What the module gives in the end; nothing where that cannot be."""
    if dtype == QUANTISED:
        return None
    x = VALUES.to(dtype).to(torch.complex128 if dtype.is_complex else torch.float64).numpy()
    with np.errstate(over="ignore"):
        found = PUTS[name][1](x, number)
    whole = not (dtype.is_floating_point or dtype.is_complex)
    if name in CONTROLS and not held(np.array([number]), torch.float32):
        return None
    if PUTS[name][2]:
        if not held(np.array([number]), torch.int64 if whole else dtype):
            return None
        if dtype == torch.float16 and 0 < abs(number) < 2.0**-25:
            return None
    elif name in ("clamping", "subtraction") and not held(np.array([number]), torch.float64 if whole else dtype):
        return None
    elif name == "subtraction" and dtype == torch.float16 and 0 < abs(number) < 2.0**-25:
        return None
    return found if held(found, dtype) else None


def put(name: str, dtype: Any, number: complex) -> torch.Tensor:
    plain = net(dtype)
    data = TensorDict({"input": VALUES.clone(), ("patched", "input"): VALUES.clone()}, [2])
    data["number"], data["alpha"] = filled(number, 2, 4), filled(number, 2)
    method = PUTS[name][0](number)
    options = {"in_keys": ["input"], "out_keys": ["output", "seen"]}
    with method.prepare(TensorDictModule(plain, **options)) as hooked:
        if name == "run.set":
            with hooked.run(data) as run:
                run.set("0", filled(number, 2, 4))
            return data["seen"]
        found = hooked(data)
        return found["patched", "seen"] if name == "patch_fn" else found["seen"]


CASES = [
    (name, dtype, kind)
    for name, dtype, kind in itertools.product(PUTS, DTYPES, NUMBERS)
    if not (kind == "imaginary" and name in REAL)
    if not (kind == "none" and name == "subtraction" and dtype == QUANTISED)  # which then changes nothing
]


def require(name: str, dtype: Any, kind: str) -> None:
    number = NUMBERS[kind]
    wanted = expected(name, dtype, number)
    if wanted is None:
        with pytest.raises(InputError) as told:
            put(name, dtype, number)
        said = str(told.value)
        if said.startswith("control"):
            assert name in CONTROLS, said
            assert "which ends at 3.4" in said, said
        else:
            parts = ("'0'", str(torch.qint8 if dtype == QUANTISED else dtype), "name a module")
            assert all(part in said for part in parts), said
        return
    found = put(name, dtype, number)
    assert found.dtype == dtype
    exact = not (dtype.is_floating_point or dtype.is_complex)
    eps = 0.0 if exact else 4 * torch.finfo(dtype).eps
    np.testing.assert_allclose(found.to(torch.complex128).numpy(), wanted, rtol=eps, atol=eps)


@pytest.mark.parametrize("seed", range(4))
def test_as_it_is_or_refused(seed: int) -> None:
    for case in random.Random(seed).sample(CASES, 40):
        require(*case)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUTS)
def test_every_case(name: str) -> None:
    for case in CASES:
        if case[0] == name:
            require(*case)


WHOLE = [dtype for dtype in DTYPES if dtype != QUANTISED and not (dtype.is_floating_point or dtype.is_complex)]


class Maps(nn.Conv2d):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(1, 1, 1, bias=False)
        self.weight.data.fill_(1.0)
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).to(self.dtype)


@pytest.mark.parametrize("dtype", WHOLE)
@pytest.mark.parametrize("value", [1.0, 0.5, "mean", "max"])
def test_maps_of_whole_numbers(dtype: torch.dtype, value: Any) -> None:
    maps = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])
    with MapPatch("0", square=(0, 0), value=value).prepare(nn.Sequential(Maps(dtype))) as hooked:
        if value in ("mean", 0.5):
            with pytest.raises(InputError, match=f"has 0.5, but the output of the module is {dtype}"):
                hooked(TensorDict({"input": maps}, [1]))
        else:
            found = hooked(TensorDict({"input": maps}, [1]))["output"]
            assert found.dtype == dtype
            assert found.flatten().tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("dtype", WHOLE)
def test_a_direction_of_whole_numbers(dtype: torch.dtype) -> None:
    data = TensorDict({"input": VALUES.clamp_max(1)}, [2])
    with DirectionalAblation({"0": first(3.0)}).prepare(nn.Sequential(Emit(dtype))) as hooked:
        expected = VALUES.clamp_max(1).clone()
        expected[:, 0] = 0
        assert torch.equal(hooked(data.clone())["output"], expected.to(dtype))
    with DirectionalAblation({"0": torch.tensor([1, 1, 0, 0])}).prepare(nn.Sequential(Emit(dtype))) as hooked:
        with pytest.raises(InputError, match=r"what is left of the output at '0' has -?0.5"):
            hooked(data.clone())
    with pytest.raises(InputError, match=r"is of real numbers, got torch.complex128"):
        DirectionalAblation({"0": first(1j)}).prepare(nn.Sequential(Emit(dtype)), return_context=False)


def test_rows_that_are_left_alone_are_not_looked_at() -> None:
    net = nn.Sequential(Emit(torch.uint8))
    data = TensorDict({"input": torch.tensor([[254.0], [3.0]]), "open": torch.tensor([False, True])}, [2])
    with SteeringVectors({"0": torch.tensor([2])}, when="open").prepare(net) as hooked:
        assert hooked(data.clone())["output"].tolist() == [[254], [5]]
        data["open"][0] = True
        with pytest.raises(InputError, match=r"has 256, but .* torch.uint8, which holds whole numbers from 0 to 255"):
            hooked(data.clone())


def test_a_vector_of_whole_numbers_may_become_one_of_fractions() -> None:
    with SteeringVectors({"0": torch.tensor([1, 0, 0, 0])}).prepare(nn.Sequential(nn.Identity())) as hooked:
        hooked.controls["steering.0"] = torch.tensor([0.5, 0.0, 0.0, 0.25])
        found = hooked(TensorDict({"input": torch.zeros(2, 4)}, [2]))["output"]
    assert found[1].tolist() == [0.5, 0.0, 0.0, 0.25]


@pytest.mark.parametrize(
    ("kept", "value", "said"),
    [
        (torch.tensor([1, 2]), [0.5, 1.0], "'c' has 0.5, but it is torch.int64"),
        (torch.tensor([True]), [2], "'c' has 2, but it is torch.bool"),
        (0.0, 1e39, "'c' has 1e.39, but it is torch.float32, which ends at"),
        (0.0, 1e-50, "'c' has at most 1e-50, but it is torch.float32, in which that is 0 and does nothing"),
        (0.0, torch.tensor(1j), "'c' has 0.1j, but it is torch.float32, which holds real numbers"),
    ],
)
def test_controls_lose_nothing(kept: Any, value: Any, said: str) -> None:
    controls = Controls()
    before = controls.add("c", kept).clone()
    with pytest.raises(InputError, match=said):
        controls["c"] = value
    with pytest.raises(InputError, match=said):
        controls.update_({"c": value})
    assert torch.equal(controls["c"], before)
    assert int(controls.version("c")) == 0
    if isinstance(value, float):
        with pytest.raises(InputError, match=r"'other' has"):
            controls.add("other", value)


@pytest.mark.parametrize("dtype", [*WHOLE, torch.float16, torch.bfloat16])
def test_causal_tests_of_whole_numbers(dtype: torch.dtype) -> None:
    """Parts and means of whole numbers are none: once these came out as zero, with an interval."""
    numbers = torch.Generator().manual_seed(0)
    head = nn.Linear(4, 1)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 0.5, -1.0, 2.0]]))
    net = nn.Sequential(Emit(dtype), Emit(torch.float32), head)
    critic = TensorDictModule(net, ["observation"], ["state_value"])
    clean, corrupt = (
        TensorDict({"observation": torch.randint(0, 9, (8, 4), generator=numbers).float()}, [8]) for _ in range(2)
    )
    options = {"metric": "state_value"}
    whole = dtype in WHOLE
    for tried in (
        lambda: patch_sites(
            critic, clean, corrupt, "module.0", direction=torch.tensor([1.0, 1.0, 0.0, 0.0]), **options
        ),
        lambda: patch_sites(critic, clean, corrupt, "module.0", rank=2, **options),
        lambda: ablate_units(critic, clean, "module.0", by="mean"),
    ):
        if whole:
            with pytest.raises(InputError, match=f"at 'module.0' has .* but the output of the module is {dtype}"):
                tried()
        else:
            assert str(tried())
    ablate_units(critic, clean, "module.0", by="zero")
    data = TensorDict(
        {("positive", "observation"): clean["observation"], ("negative", "observation"): torch.zeros(8, 4)}
    )
    with ActivationAddition("module.0").prepare(critic) as hooked:
        found = hooked(data)["steer", "module.0"]
    wanted = clean["observation"].to(dtype).double().mean(0)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-2, atol=1e-6)


def test_random_directions_beside_one_of_whole_numbers() -> None:
    found = directions_of({"one": {"0": torch.tensor([3, 0, 4, 0])}}, 3, 0)["one"]
    norms = found.controls["random"]["0"].norm(dim=-1)
    torch.testing.assert_close(norms, torch.full((3,), 5.0))


def test_weights_of_another_kind() -> None:
    net = nn.Linear(2, 2).half()
    large = {name: torch.full_like(one, 1e6, dtype=torch.float32) for name, one in net.state_dict().items()}
    with TaskVectors().prepare(net) as hooked:
        with pytest.raises(
            InputError, match=r"'weight' has 1e.06, but the policy's weight is torch.float16, which ends"
        ):
            hooked.get_task_vector(large)
        with pytest.raises(InputError, match=r"which holds real numbers"):
            hooked.get_task_vector({name: one * 1j for name, one in large.items()})


def test_compiled_calls_of_whole_numbers() -> None:
    """What has to be looked at is not traced."""
    net, data = nn.Sequential(Emit(torch.uint8)), TensorDict({"input": VALUES}, [2])
    with SteeringVectors({"0": torch.tensor([1, 2, 0, 0])}).prepare(net) as hooked:
        found = torch.compile(hooked, backend="eager")(data.clone())["output"]
        assert torch.equal(found, VALUES.to(torch.uint8) + torch.tensor([1, 2, 0, 0], dtype=torch.uint8))
        hooked.controls["steering.alpha"] = 0.5
        with pytest.raises(InputError, match=r"alpha at '0' has 0.5, but the output of the module is torch.uint8"):
            torch.compile(hooked, backend="eager")(data.clone())
    torch._dynamo.reset()

"""Steps over TensorDicts that are none plainly: lazy stacks, also of rows with entries of other shapes, and views."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import PersistentTensorDict, TensorDict, TensorDictBase, lazy_stack
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torch.distributions import Categorical
from torchrl.modules import ProbabilisticActor

from tdhook_rl import ActivationCaching, Compose, IntegratedGradients, Saliency, targets
from tdhook_rl.attribution import Occlusion
from tdhook_rl.calls.provenance import is_stamp
from tdhook_rl.errors import InputError
from tdhook_rl.latent import ActivationPatching
from tdhook_rl.method import Method

F64 = torch.float64


def rows(*batch: int) -> TensorDict:
    seen = torch.randn(*batch, 4, dtype=F64)
    other = torch.randn(*batch, 4, dtype=F64)
    return TensorDict({"seen": {"observation": seen}, "patched": {"seen": {"observation": other}}}, batch)


def ragged(*batch: int) -> TensorDictBase:
    parts = [rows(*batch[1:]) for _ in range(batch[0])]
    for width, part in enumerate(parts):
        part["task"] = torch.zeros(*batch[1:], width + 1)
        part["seen", "others"] = torch.zeros(*batch[1:], 3 - width % 2)
    return lazy_stack(parts, 0)


def stacked_inside(*batch: int) -> TensorDictBase:
    return lazy_stack([rows(*batch[:-1]) for _ in range(batch[-1])], len(batch) - 1)


KINDS: dict[str, Callable[..., TensorDictBase]] = {
    "ragged": ragged,
    "stacked inside": stacked_inside,
    "view": lambda *batch: rows(*batch)._get_sub_tensordict(slice(None)),
    "view of a part": lambda *batch: rows(2 * batch[0], *batch[1:])._get_sub_tensordict(slice(0, None, 2)),
    "named": lambda *batch: rows(*batch).refine_names(*"abc"[: len(batch)]),
}

KEY = ("seen", "observation")
TARGET = targets.logit(1)


def by_gradient(net: nn.Module, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(net(leaf)[..., 1].sum(), leaf)[0]


def by_path(net: nn.Module, x: Tensor) -> Tensor:
    points = (torch.arange(200, dtype=F64) + 0.5) / 200
    return torch.stack([by_gradient(net, point * x) for point in points]).mean(0) * x


def by_loop(net: nn.Module, x: Tensor) -> Tensor:
    there = net(x)[..., 1]
    return torch.stack([there - net(x * (torch.arange(4) != i))[..., 1] for i in range(4)], -1).detach()


METHODS: dict[str, tuple[Callable[[], Method], Callable[[nn.Module, Tensor], Tensor]]] = {
    "saliency": (lambda: Saliency(target=TARGET, when="step"), by_gradient),
    "two": (
        lambda: Compose(
            Occlusion(target=TARGET, baseline=0.0, when="step", attribution_key="other"),
            Saliency(target=TARGET, when="step"),
        ),
        by_gradient,
    ),
    "path": (lambda: IntegratedGradients(target=TARGET, baseline=0.0, when="step", n_steps=64), by_path),
    "loop": (lambda: Occlusion(target=TARGET, baseline=0.0, when="step"), by_loop),
}


def policies() -> dict[str, TensorDictModule]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3)).to(F64)
    module = TensorDictModule(net, [KEY], ["logits"])
    return {"module": module, "actor": ProbabilisticActor(module, ["logits"], distribution_class=Categorical)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("policy", ["module", "actor"])
@pytest.mark.parametrize("batch", [(3,), (2, 3)])
def test_steps_over_them_are_explained(kind: str, method: str, policy: str, batch: tuple[int, ...]) -> None:
    plain = policies()
    data = KINDS[kind](*batch)
    x = data[KEY].clone()
    make, right = METHODS[method]
    with make().prepare(plain[policy]) as hooked:
        found = hooked(data)
    torch.testing.assert_close(found["attr", *KEY], right(plain["module"].module, x), rtol=1e-4, atol=1e-6)
    assert bool(found["computed", "attr"].all())
    assert torch.equal(found[KEY], x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [(3,), (2, 3)])
def test_they_are_patched(kind: str, batch: tuple[int, ...]) -> None:
    plain = policies()["module"]
    data = KINDS[kind](*batch)
    with ActivationPatching(["module.1"]).prepare(plain) as hooked:
        found = hooked(data)
    torch.testing.assert_close(found["patched", "logits"], plain.module(found[KEY]))


def loaded(data: TensorDict, folder: Path) -> TensorDictBase:
    data.memmap(str(folder))
    return TensorDict.load_memmap(folder)


def in_a_file(data: TensorDict, folder: Path) -> TensorDictBase:
    pytest.importorskip("h5py")
    return PersistentTensorDict.from_dict(data, str(folder / "rows.h5"))


#: Where a batch may lie, with whether results of a step go there.
STORED: dict[str, tuple[Callable[[TensorDict, Path], TensorDictBase], bool]] = {
    "memory-mapped": (lambda data, folder: data.memmap(str(folder)), False),
    "loaded": (loaded, False),
    "in a file": (in_a_file, True),
}


@pytest.mark.filterwarnings("ignore:Replacing an array")  # which the policy does in its file
@pytest.mark.parametrize("where", STORED)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("acted", [False, True])
def test_batches_on_disk_are_annotated_and_left_as_they_are(
    where: str, method: str, acted: bool, tmp_path: Path
) -> None:
    plain = policies()["module"]
    given = rows(2, 3)
    with torch.no_grad():
        given = plain(given) if acted else given
    store, takes = STORED[where]
    data = store(given, tmp_path)
    make, right = METHODS[method]
    expected = right(plain.module, given[KEY])
    with Compose(make(), ActivationCaching("module.1")).prepare(plain) as hooked:
        found = hooked.annotate(data)
        torch.testing.assert_close(found["attr", *KEY], expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found["cache", "module.1"], plain.module[:2](given[KEY]))
        assert set(data.keys(True, True)) == set(given.keys(True, True))
        if takes:
            with torch.no_grad():
                torch.testing.assert_close(hooked(data)["attr", *KEY], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("when", ["features", "rows"])
def test_lazy_stacks_of_other_shapes_are_refused_with_what_to_do(when: str, method: str) -> None:
    parts = [rows(2), rows(2) if when == "features" else rows(3)]
    if when == "features":
        parts[1][KEY] = torch.randn(2, 5, dtype=F64)
    plain = policies()["module"]
    with METHODS[method][0]().prepare(plain) as hooked:
        with pytest.raises(InputError, match=r"other shapes in other parts of a lazy stack \(\(2, 4\), .*one by one"):
            hooked.annotate(lazy_stack(parts, 0))
        if when == "rows":
            found = lazy_stack([hooked.annotate(one) for one in parts], 0)
            for one, part in zip(found.tensordicts, parts, strict=True):
                torch.testing.assert_close(
                    one["attr", *KEY], METHODS[method][1](plain.module, part[KEY]), rtol=1e-4, atol=1e-6
                )


def own_dict(inplace: Any, whole: bool) -> ProbabilisticActor:
    """An actor whose network, or the sequence around it, writes into a TensorDict of its own."""
    torch.manual_seed(0)
    first = TensorDictModule(nn.Linear(4, 5), [KEY], ["hidden"], inplace=inplace if not whole else True)
    last = TensorDictModule(nn.Linear(5, 3), ["hidden"], ["logits"], inplace=inplace if not whole else True)
    net = TensorDictSequential(first, last, inplace=inplace if whole else None).to(F64)
    return ProbabilisticActor(net, in_keys=["logits"], distribution_class=Categorical, return_log_prob=True)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("inplace", [False, "empty"])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_what_a_policy_writes_into_a_tensordict_of_its_own_is_of_the_rows(
    whole: bool, inplace: Any, batch: tuple[int, ...]
) -> None:
    method = Compose(
        ActivationCaching("module.0.module.0.module"),
        Saliency(when="step"),
        IntegratedGradients(baseline=0.0, compute_convergence_delta=True, when="step", attribution_key="path"),
        Occlusion(when="step", attribution_key="occluded"),
    )
    data, found = rows(*batch), []
    for policy in (own_dict(True, whole), own_dict(inplace, whole)):
        torch.manual_seed(1)
        plain = policy(data.clone())
        with method.prepare(policy) as hooked:
            torch.manual_seed(1)
            found.append(hooked(data.clone()))
            later = hooked.annotate(data.clone().update(plain))
        assert found[-1].batch_size == plain.batch_size
        assert all(torch.equal(found[-1][key], plain[key]) for key in plain.keys(True, True))
        for key in [(root, *KEY) for root in ("attr", "path", "occluded")] + ["convergence_delta"]:
            torch.testing.assert_close(later[key], found[-1][key])
    for key in found[1].keys(True, True):
        if not is_stamp(key):
            torch.testing.assert_close(found[1][key], found[0][key])

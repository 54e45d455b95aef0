"""Steps over TensorDicts that are none plainly: lazy stacks, also of rows with entries of other shapes, and views."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict, TensorDictBase, lazy_stack
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.distributions import Categorical
from torchrl.modules import ProbabilisticActor

from tdhook_rl import Compose, IntegratedGradients, Saliency, targets
from tdhook_rl.attribution import Occlusion
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

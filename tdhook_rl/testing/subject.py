"""What the conformance checks try: a method, the policy that it is put on, and what that reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torch import Tensor, nn
from torch.distributions import Categorical
from torchrl.modules import ProbabilisticActor

from tdhook_rl.calls.provenance import is_stamp
from tdhook_rl.errors import ConformanceError
from tdhook_rl.method import Method

FEATURES, HIDDEN, ACTIONS = 6, 16, 4

#: The modules of :func:`sample_policy` whose output a method may be placed on; each has 16 features.
SITES = ("module.0.module.1", "module.0.module.3")


def sample_policy() -> ProbabilisticActor:
    """A categorical actor, 6-16-16-4 with tanh; it reads ``"observation"``."""
    layers = (nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, ACTIONS))
    net = TensorDictModule(nn.Sequential(*layers), in_keys=["observation"], out_keys=["logits"])
    return ProbabilisticActor(net, in_keys=["logits"], distribution_class=Categorical, return_log_prob=True)


def sample_data(*batch: int) -> TensorDict:
    """What :func:`sample_policy` reads, of a batch shape."""
    return TensorDict({"observation": torch.randn(*batch, FEATURES)}, batch_size=batch)


@dataclass(frozen=True)
class Subject:
    """A method under test.

    Args:
        make: gives the method; called anew for each check.
        policy: gives a policy to put it on.
        data: gives what the policy and the method read, of a batch shape: ``data(5)``, ``data(3, 2)``, ``data()``.
    """

    make: Callable[[], Method]
    policy: Callable[[], TensorDictModuleBase] = sample_policy
    data: Callable[..., TensorDict] = sample_data

    def method(self) -> Method:
        torch.manual_seed(8)  # a factory may draw a vector
        method = self.make()
        require(isinstance(method, Method), f"the factory gave {method!r}, which is no Method")
        return method

    @property
    def observes(self) -> bool:
        """Whether the method says that it leaves the policy's outputs as they are."""
        return self.method().observes

    @property
    def by_row(self) -> bool:
        """Whether the method says that what it writes for a row comes from this row alone."""
        return self.method().by_row

    def new_policy(self, seed: int = 0) -> TensorDictModuleBase:
        torch.manual_seed(seed)
        return self.policy()

    def rows(self, *batch: int, seed: int = 1) -> TensorDict:
        torch.manual_seed(seed)
        return self.data(*batch)

    def takes(self, *batch: int) -> bool:
        """Whether the policy itself, without hooks, can be called with such a batch."""
        try:
            with torch.no_grad():
                self.new_policy()(self.rows(*batch))
        except Exception:  # whatever a policy raises, it is no fault of the method's
            return False
        return True

    @contextmanager
    def hooked(self, seed: int = 0) -> Iterator[Any]:
        """The method on a fresh policy."""
        policy = self.new_policy(seed)
        with self.method().prepare(policy) as hooked:
            yield hooked


def require(condition: bool, message: str) -> None:
    """Raise :class:`ConformanceError` unless a condition holds."""
    if not condition:
        raise ConformanceError(message)


def entries(data: TensorDictBase) -> dict[tuple[str, ...], Tensor]:
    """Every tensor of a TensorDict by its key as a tuple."""
    return {(key,) if isinstance(key, str) else key: data.get(key) for key in data.keys(True, True)}


def as_tuples(keys: Any) -> set[tuple[str, ...]]:
    return {(key,) if isinstance(key, str) else tuple(key) for key in keys}


def annotated_keys(hooked: Any) -> set[tuple[str, ...]]:
    """The results that annotate() writes: all but those that only a forward can show."""
    shown = {key for one in hooked._hooked.bound if one.only_in_forward for key in one.result_keys}
    masks = {("computed", key[0]) for key in shown}
    return as_tuples(hooked.result_keys) - shown - masks


def same_bits(found: TensorDictBase, expected: TensorDictBase, what: str, keys: list[NestedKey] | None = None) -> None:
    """Raise unless two TensorDicts have the same bits under these keys (all by default).

    Stamps are left out: they tell one prepared policy from another.
    """
    for key in list(expected.keys(True, True)) if keys is None else keys:
        if is_stamp(key):
            continue
        value = found.get(key, None)
        require(value is not None, f"{what}: the entry {key!r} is gone")
        other = expected.get(key)
        equal = value.shape == other.shape and torch.equal(value.nan_to_num(), other.nan_to_num())
        require(equal and torch.equal(value.isnan(), other.isnan()), f"{what}: {key!r} differs")


def snapshot(module: nn.Module) -> dict[str, Any]:
    """All of a module that hooking might change, by what it is called in messages."""
    stores = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "hooks": {name: [len(getattr(child, store)) for store in stores] for name, child in module.named_modules()},
        "classes": {name: type(child) for name, child in module.named_modules()},
        "attributes": {name: sorted(vars(child)) for name, child in module.named_modules()},
        "training mode": {name: child.training for name, child in module.named_modules()},
        "parameters": {
            name: (id(value), value.requires_grad, value._version, value.detach().clone().tolist())
            for name, value in module.named_parameters()
        },
        "gradients": {name: None if p.grad is None else id(p.grad) for name, p in module.named_parameters()},
        "buffers": {name: (id(b), b._version, b.tolist()) for name, b in module.named_buffers()},
        "keys": (list(module.in_keys), list(module.out_keys)),  # type: ignore[arg-type]
    }


def require_untouched(module: nn.Module, before: dict[str, Any], when: str) -> None:
    after = snapshot(module)
    changed = [name for name in before if before[name] != after[name]]
    require(not changed, f"{when}, the {' and '.join(changed)} of the user's policy are not what they were")


class Switch(nn.Module):
    """Passes its input on, and raises ``ZeroDivisionError`` while it is broken."""

    broken = False

    def forward(self, x: Any) -> Any:
        if Switch.broken:
            raise ZeroDivisionError("the model raises, as the check wants it to")
        return x

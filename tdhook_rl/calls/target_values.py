"""What each target computes of a pass, one number for each row, and its derivative where that is known.

:mod:`tdhook_rl.targets` has the functions that users choose by.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import NestedKey
from torch import Tensor

from tdhook_rl.arguments.keys import get_entry
from tdhook_rl.calls.decisions import (
    Keys,
    action_of,
    as_one_hot,
    choose,
    has_slope,
    outputs_named,
    require_choice,
    require_drawn_choice,
    warn_left_out,
)
from tdhook_rl.calls.drawable import as_drawn
from tdhook_rl.calls.open_choices import closed_choices
from tdhook_rl.calls.passes import Pass, Slope
from tdhook_rl.calls.several_choices import chosen_entries, several_choices
from tdhook_rl.errors import TargetError
from tdhook_rl.replaying.batching import row_vectors


@dataclass(frozen=True)
class LogProb:
    key: Keys

    def head_slope(self, head: Any) -> Tensor | None:
        return head.log_prob_slope(self.key if self.key is None or isinstance(self.key, list) else [self.key])

    def __call__(self, run: Pass) -> Tensor:
        name = "taken_action_log_prob"
        terms = []
        chosen = choose(run, self.key, name)
        for one in chosen:
            key, distribution, action = one
            if action is None:
                raise TargetError(
                    f"{name} explains the stored action {key!r}, which the data lacks: annotate data that a policy has "
                    "collected, or choose another target"
                )
            require_drawn_choice(run, one)
            found = distribution.log_prob(as_drawn(distribution, action))
            if found.numel() != distribution.batch_shape.numel():
                raise TargetError(
                    f"the stored action {key!r} of shape {tuple(action.shape)} is broadcast against the policy's "
                    f"{type(distribution).__name__} over {tuple(distribution.batch_shape)}: store it in the shape in "
                    "which the policy gives it"
                )
            terms.append(per_row(found, run.outputs.batch_size, name))
        if self.key is None:
            warn_left_out(run, chosen, name)
        return _total(run, terms)


@dataclass(frozen=True)
class Entropy:
    key: Keys

    def __call__(self, run: Pass) -> Tensor:
        terms = []
        chosen = choose(run, self.key, "entropy")
        for _, distribution, _ in chosen:
            try:
                terms.append(per_row(distribution.entropy(), run.outputs.batch_size, "entropy"))
            except NotImplementedError:
                raise TargetError(
                    f"{type(distribution).__name__} has no closed-form entropy: choose another target"
                ) from None
        if self.key is None:
            warn_left_out(run, chosen, "entropy")
        return _total(run, terms)


@dataclass(frozen=True)
class Entry:
    key: NestedKey
    name: str = ""

    def __call__(self, run: Pass) -> Tensor:
        return _total(run, [value for _, value in outputs_named(run, self.key, self.name)])

    def slope(self, run: Pass) -> Slope | None:
        (key, value), *others = outputs_named(run, self.key, self.name)
        return None if others or key not in run.out_keys else Slope(key, torch.ones_like(value))


@dataclass(frozen=True)
class Sum:
    keys: tuple[NestedKey, ...]

    def __call__(self, run: Pass) -> Tensor:
        return _total(run, [run.outputs.get(key) for key in self.keys])


@dataclass(frozen=True)
class Indexed:
    key: NestedKey
    index: int

    def __call__(self, run: Pass) -> Tensor:
        return self._of(_expected(run, *self._one(run)))

    def slope(self, run: Pass) -> Slope | None:
        key, logits = self._one(run)
        if key not in run.out_keys:
            return None
        slope = torch.zeros_like(logits)
        self._of(slope).fill_(1)
        return Slope(key, slope)

    def _one(self, run: Pass) -> tuple[NestedKey, Tensor]:
        found = outputs_named(run, self.key, "logits")
        if len(found) > 1:
            names = ", ".join(repr(key) for key, _ in found)
            raise TargetError(f"logit({self.index}) is of one decision, but there are several: name one of {names}")
        return found[0]

    def _of(self, logits: Tensor) -> Tensor:
        if not -logits.shape[-1] <= self.index < logits.shape[-1]:
            raise TargetError(
                f"logit({self.index}) was asked, but {self.key!r} has {logits.shape[-1]} entries in its last dimension"
            )
        return logits.select(-1, self.index)


@dataclass(frozen=True)
class Chosen:
    key: NestedKey
    name: str

    def __call__(self, run: Pass) -> Tensor:
        found = [(key, _expected(run, key, value)) for key, value in outputs_named(run, self.key, self.name)]
        return _total(run, [self._of(value, chosen_entries(run, value, key)) for key, value in found])

    def slope(self, run: Pass) -> Slope | None:
        (key, values), *others = outputs_named(run, self.key, self.name)
        return None if others or key not in run.out_keys else Slope(key, chosen_entries(run, values, key))

    def head_slope(self, head: Any) -> Tensor | None:
        key, run = self.key, head.values
        if run is None or run.out_keys != [key] or (action := action_of(run, key)) is None:
            return None
        return head.weighted(as_one_hot(run, action, get_entry(run.outputs, key), key))

    @staticmethod
    def _of(values: Tensor, chosen: Tensor) -> Tensor:
        # Zero times the minus infinity of a closed choice would be no number; a relaxed choice has shares of several.
        return torch.where(chosen == 0, 0.0, values * chosen).sum(-1)


@dataclass(frozen=True)
class Margin:
    key: NestedKey

    def __call__(self, run: Pass) -> Tensor:
        terms = []
        for key, value in outputs_named(run, self.key, "logits"):
            values, closed = _expected(run, key, value), closed_choices(run, key, value)
            several, chosen = several_choices(run, key, values), chosen_entries(run, values, key).bool()
            if several is not None and several.bits:  # of each the log-odds, for or against
                terms.append(torch.where(chosen, values, -values).sum(-1))
                continue
            values = values.masked_fill(closed if closed.shape == values.shape else closed.all(-2), -torch.inf)
            # Several choices at once, one after the other in one vector: each has a margin.
            sizes = [values.shape[-1]] if several is None else list(several.sizes)
            for part, choice in zip(values.split(sizes, -1), chosen.split(sizes, -1), strict=True):
                require_choice(run, choice, choice, key, one=True)
                terms.append(self._of(part, choice))
        return _total(run, terms)

    @staticmethod
    def _of(values: Tensor, chosen: Tensor) -> Tensor:
        best = values.masked_fill(~chosen, -torch.inf).amax(-1)
        return best - values.masked_fill(chosen, -torch.inf).amax(-1)


@dataclass(frozen=True)
class OutputSum:
    def __call__(self, run: Pass) -> Tensor:
        batch = run.outputs.batch_size
        return torch.stack([row_vectors(value, batch).sum(-1) for value in self._terms(run).values()]).sum(0)

    def slope(self, run: Pass) -> Slope | None:
        (key, value), *others = self._terms(run).items()
        return None if others else Slope(key, torch.ones_like(value))

    @staticmethod
    def _terms(run: Pass) -> dict[NestedKey, Tensor]:
        outputs = {key: run.outputs.get(key, None) for key in run.out_keys}
        terms = {key: value for key, value in outputs.items() if has_slope(value)}
        if not terms:
            raise TargetError(
                f"none of the outputs {run.out_keys} depends on the explained input through a gradient: "
                "they are integers, detached or constant; give a target="
            )
        return terms


def _total(run: Pass, terms: list[Tensor]) -> Tensor:
    if len(terms) == 1:
        return terms[0]
    return torch.stack([per_row(term, run.outputs.batch_size, "of several decisions") for term in terms]).sum(0)


def _expected(run: Pass, key: NestedKey, values: Tensor) -> Tensor:
    """Logits or values of the actions; of a distributional Q-network the expectations over its atoms."""
    support = run.supports.get(key)
    return values if support is None else (values.exp() * support.to(values).unsqueeze(-1)).sum(-2)


def per_row(value: Tensor, batch: torch.Size, name: str) -> Tensor:
    """A target value as one number for each row; trailing dimensions (action dimensions) are summed.

    Raises:
        TargetError: if the value does not start with the batch shape, or is an integer.
    """
    if not isinstance(value, Tensor):
        raise TargetError(f"target {name} is a {type(value).__name__}, not a tensor")
    if value.is_complex():
        raise TargetError(
            f"target {name} is a complex tensor ({value.dtype}), which has no gradient as one number: explain its real "
            "part, its imaginary part or its size"
        )
    if not value.is_floating_point():
        raise TargetError(
            f"target {name} is an integer tensor ({value.dtype}), which has no gradient: explain what it was "
            "computed from, such as the logits"
        )
    if value.shape[: len(batch)] != batch:
        raise TargetError(
            f"target {name} has shape {tuple(value.shape)}; it must start with the batch shape {tuple(batch)}"
        )
    return row_vectors(value, batch).sum(-1) if value.ndim > len(batch) else value

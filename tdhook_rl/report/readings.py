"""What the results in a batch say, as numbers and histograms under names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.utils import unravel_key
from torch import Tensor

from tdhook_rl.arguments.keys import key_parts
from tdhook_rl.attribution.base import BoundAttribution
from tdhook_rl.calls.bound import observers
from tdhook_rl.errors import InputError, nearest
from tdhook_rl.report.media import Histogram
from tdhook_rl.rollout.summary import ResultRows, result_rows, summary_of

__all__ = ["Features", "Readings", "input_of"]

#: Of how many values a histogram is made.
SAMPLE = 4096


@dataclass
class Features:
    """What the entries of an input are called, and which belong together.

    Args:
        names: of one input, or of each by key.
        groups: names of groups; each a list of indices into the flattened features, or a boolean mask. Of one input,
            or of each by key.
        most: inputs with more features than this, and without names, are not listed one by one.
        known: names as the environment has them, by key; they give way where a transform has changed the number.
    """

    names: Any = None
    groups: Any = None
    most: int = 64
    known: Mapping[NestedKey, Sequence[str]] = field(default_factory=dict)
    _masks: dict[tuple[Any, torch.Size], dict[str, Tensor]] = field(default_factory=dict)

    def require_inputs(self, policy: Any) -> None:
        """Refuse names and groups given by key for what is no input of a policy: nothing would be called so.

        Raises:
            InputError: that names the first.
        """
        inputs = [unravel_key(key) for key in policy.policy_in_keys]
        by_key = isinstance(self.groups, Mapping) and any(isinstance(one, Mapping) for one in self.groups.values())
        for option, given in (("feature_names", self.names), ("groups", self.groups if by_key else None)):
            for name in given if isinstance(given, Mapping) else ():
                if not isinstance(name, str | tuple) or unravel_key(name) not in inputs:
                    raise InputError(
                        f"{option}= names {name!r}, which is no input of this policy; "
                        f"{nearest(str(name), map(str, inputs))}"
                    )

    def of(self, key: NestedKey, shape: torch.Size) -> list[str] | None:
        """The names of the features of an input; their numbers where there are few and none are given.

        Raises:
            InputError: for another number of names than features.
        """
        names = _for_key(self.names, key)
        if names is None and len(self.known.get(key, ())) == shape.numel():
            return [*self.known[key]]
        if names is None:
            return [str(number) for number in range(shape.numel())] if 1 < shape.numel() <= self.most else None
        if isinstance(names, str) or not isinstance(names, Iterable):
            raise InputError(
                f"feature_names= is a list of names, one for each of {shape.numel()} features; got {names!r}"
            )
        names = [str(name) for name in names]
        if len(names) != shape.numel() or len(set(names)) != len(names):
            raise InputError(
                f"feature_names= has {len(names)} names ({len(set(names))} different) for {key!r}, which has "
                f"{shape.numel()} features ({tuple(shape)}): one for each, all different"
            )
        return names

    def groups_of(self, key: NestedKey, shape: torch.Size) -> dict[str, Tensor]:
        """The groups of an input, as masks of its shape.

        Raises:
            InputError: for a group that is neither a mask of the features nor indices of them.
        """
        if (key, shape) not in self._masks:
            found = {}
            for name, members in (_for_key(self.groups, key, deep=True) or {}).items():
                try:
                    one = torch.as_tensor(members)
                except (TypeError, ValueError, RuntimeError):
                    one = torch.empty(0)  # refused below
                if one.dtype == torch.bool and one.numel() == shape.numel():
                    mask = one.reshape(-1)
                elif one.numel() and not one.is_floating_point() and one.dtype != torch.bool:
                    beyond = one[(one < 0) | (one >= shape.numel())]
                    if len(beyond):
                        raise InputError(
                            f"the group {name!r} names feature {int(beyond[0])} of {key!r}, which has "
                            f"{shape.numel()}: 0 to {shape.numel() - 1}, counted in the flattened input"
                        )
                    mask = torch.zeros(shape.numel(), dtype=torch.bool)
                    mask[one.reshape(-1).long()] = True
                else:
                    raise InputError(
                        f"the group {name!r} of {key!r} is a list of indices, or a mask of shape {tuple(shape)}; got "
                        f"{members!r}"
                    )
                found[str(name)] = mask.reshape(shape)
            self._masks[key, shape] = found
        return self._masks[key, shape]


def _for_key(given: Any, key: NestedKey, deep: bool = False) -> Any:
    """What was given for one input: by its key, or for all of them."""
    if not isinstance(given, Mapping):
        return given
    for name, one in given.items():
        if isinstance(name, str | tuple) and unravel_key(name) == key and (not deep or isinstance(one, Mapping)):
            return one
    return given if deep and not any(isinstance(one, Mapping) for one in given.values()) else None


def input_of(policy: Any, key: tuple[str, ...]) -> NestedKey | None:
    """The input that an attribution is about: the end of its key is that input's, the longest that there is."""
    inputs = sorted(map(key_parts, policy.policy_in_keys), key=len, reverse=True)
    return next((unravel_key(one) for one in inputs if len(key) > len(one) and key[-len(one) :] == one), None)


def spread_out(values: Tensor, most: int) -> Tensor:
    """So many of the entries along the first dimension, drawn by chance, the same each time; all where there are fewer.

    Every so-many-th would be of the same few features, or steps, again and again: both come in powers of two.

    Example:
        >>> spread_out(torch.arange(4096).repeat(2), 1024).unique().numel() > 800
        True
    """
    if len(values) <= most:
        return values
    own = torch.Generator().manual_seed(0)  # training draws from the global one
    return values[torch.randint(len(values), (most,), generator=own)]


class Readings:
    """The results of one batch.

    Args:
        policy: the hooked policy.
        data: a batch with results.
        features: names and groups.
    """

    def __init__(self, policy: Any, data: TensorDictBase, features: Features) -> None:
        self.policy, self.data, self.features = policy, data, features
        attributions = {
            key for one in observers(policy._hooked.bound) if isinstance(one.bound or one, BoundAttribution)
            for key in one.result_keys
        }  # fmt: skip
        self._rows: dict[tuple[str, ...], ResultRows] = {}
        self.attributions: list[tuple[str, ...]] = []
        self.activations: list[tuple[str, ...]] = []
        for key in policy.result_keys:
            parts = key_parts(key)
            if parts[0] == "computed" or not isinstance(data.get(parts, None), Tensor):
                continue
            if key in attributions:
                self.attributions.append(parts)
            elif parts[0] not in ("probe", "control", "steered"):
                self.activations.append(parts)

    def rows(self, key: tuple[str, ...]) -> ResultRows:
        """The usable rows of a result."""
        if key not in self._rows:
            self._rows[key] = result_rows(self.data, key)
        return self._rows[key]

    def of_input(self, key: tuple[str, ...]) -> str:
        """What an attribution is called by what it explains; with its root where several methods explain the same."""
        alike = sum(one[1:] == key[1:] for one in self.attributions)
        return ".".join(key if alike > 1 else key[1:])

    def numbers(self) -> dict[str, float]:
        """One for each result, feature, group and statistic."""
        found = summary_of(self.data, self.policy.result_keys, self.rows)
        for key in self.attributions:
            values, name = self.rows(key).values, ".".join(key)
            source = input_of(self.policy, key)
            if source is None or not len(values) or values.ndim < 2:
                continue
            names = self.features.of(source, values.shape[1:])
            if names is not None:
                means = values.abs().flatten(1).mean(0).tolist()
                found |= {f"{name}.{one}": mean for one, mean in zip(names, means, strict=True)}
            shares = {one: float(share.nanmean()) for one, share in self.masses(source, values).items()}
            found |= {f"mass.{self.of_input(key)}.{group}": share for group, share in shares.items()}
        for key in self.activations:
            values, name = self.rows(key).values, ".".join(key)
            if values.numel() and values.is_floating_point():
                found |= {
                    f"{name}.mean": float(values.mean()),
                    f"{name}.std": float(values.std(correction=0)),
                    f"{name}.zero": float((values == 0).float().mean()),
                    f"{name}.max": float(values.max()),
                }
        for key in self._of("probe"):
            values = self.rows(key).values
            if values.ndim == 2 and 1 < values.shape[1] <= 10 and len(values):
                found |= {f"{'.'.join(key)}.{number}": float(one) for number, one in enumerate(values.mean(0))}
        return found | self._controls(found)

    def histograms(self) -> dict[str, Histogram]:
        """Of activations, and of attributions."""
        found = {}
        for key in (*self.activations, *self.attributions):
            values = self.rows(key).values.reshape(-1)
            if values.numel():
                found[f"hist.{'.'.join(key)}"] = Histogram.of(spread_out(values, SAMPLE))
        return found

    def by_row(self) -> dict[str, Tensor]:
        """One number for each row of the batch, NaN where there is none: for tables of episodes."""
        found = {}
        for key in (*self.attributions, *self._of("probe")):
            rows = self.rows(key)
            if not len(rows.values):
                continue
            flat = rows.values.flatten(1) if rows.values.ndim > 1 else rows.values[:, None]
            explains = key in self.attributions
            found[".".join(key)] = self._spread(flat.abs().mean(1) if explains else flat[:, -1], rows)
            source = input_of(self.policy, key) if explains else None
            if source is not None and rows.values.ndim > 1:
                for group, mass in self.masses(source, rows.values).items():
                    found[f"mass.{self.of_input(key)}.{group}"] = self._spread(mass, rows)
        return found

    # ------------------------------------------------------------------ inner

    def masses(self, source: NestedKey, values: Tensor) -> dict[str, Tensor]:
        """As :func:`tdhook_rl.metrics.relevance_mass`, of all groups at once: it is asked for with every batch."""
        groups = self.features.groups_of(source, values.shape[1:])
        if not groups:
            return {}
        sizes = values.flatten(1).abs().float()
        masks = torch.stack([mask.reshape(-1) for mask in groups.values()]).float()
        return dict(zip(groups, (sizes @ masks.T / sizes.sum(-1, keepdim=True)).unbind(-1), strict=True))

    def _spread(self, values: Tensor, rows: ResultRows) -> Tensor:
        return torch.full((self.data.numel(),), math.nan).index_put((rows.places,), values.float())

    def _of(self, root: str) -> list[tuple[str, ...]]:
        keys = [key_parts(key) for key in self.policy.result_keys]
        return [key for key in keys if key[0] == root and isinstance(self.data.get(key, None), Tensor)]

    def _controls(self, known: Mapping[str, float]) -> dict[str, float]:
        """What controls are set to now, where no record in the batch says what they were."""
        found = {}
        for name, value in self.policy.controls.items():
            if value.numel() == 1 and not name.startswith("probe.") and f"control.{name}" not in known:
                found[f"control.{name}"] = float(value)
        return found

"""The callbacks of the seed, ``init_attr_targets`` and ``init_attr_grads``, as a target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor

from tdhook_rl.arguments.callbacks import asked
from tdhook_rl.arguments.keys import get_entry
from tdhook_rl.calls.passes import Pass
from tdhook_rl.calls.target_values import per_row
from tdhook_rl.calls.writing import tensors_as_entries
from tdhook_rl.errors import TargetError
from tdhook_rl.replaying.batching import repeat_rows

#: What to do where a callback reads what is not there.
ADDITIONAL = "Other entries of the data are given to it beside, under additional_init_keys="


class InitTargets:
    """The callbacks of the seed as one function from a replay to one number for each row.

    Attributes:
        of_outputs: it is given outputs of the policy and nothing else of a replay, so that it may be given some whose
            graph begins at them.
    """

    name = "init_attr_targets"

    def __init__(
        self,
        targets: Callable[..., Any],
        grads: Callable[..., Any] | None,
        additional: TensorDict,
        watched: dict[str, str],
        shows_outputs: bool,
    ) -> None:
        self.shows_outputs = shows_outputs
        self.of_outputs = shows_outputs and not watched
        self.targets = targets
        self.grads = grads
        self.additional = additional
        self.watched = watched

    def __call__(self, run: Pass) -> Tensor:
        batch = run.outputs.batch_size
        outputs = _selected(run.outputs, run.out_keys if self.shows_outputs else ())
        for slot, site in self.watched.items():
            if slot not in run.watched:
                raise TargetError(f"target_modules names {site!r}, which did not run")
            outputs.set(site, run.watched[slot])
        additional = self.additional
        if additional.batch_size != batch:  # a path of several points: each point has the rows of the call
            points = batch.numel() // max(additional.batch_size.numel(), 1)
            additional = repeat_rows(additional, points)
            additional = additional if additional.batch_size == batch else additional.reshape(batch)
        given = {"reads_only": [additional], "remedy": ADDITIONAL}
        values = asked(self.targets, outputs, additional, what="init_attr_targets=", **given)
        require_tensordict(values, "init_attr_targets")
        keys = list(values.keys(True, True))
        if not keys:
            raise TargetError("init_attr_targets returned an empty TensorDict: it holds the values to explain")
        weights = None
        if self.grads is not None:
            # On a copy: what it sets there is not what is weighted.
            weights = asked(self.grads, values.copy(), additional, what="init_attr_grads=", **given)
            require_tensordict(weights, "init_attr_grads")
            if set(weights.keys(True, True)) != set(keys):
                raise TargetError(
                    f"init_attr_grads returned {sorted(map(str, weights.keys(True, True)))}, "
                    f"but the targets are {sorted(map(str, keys))}"
                )
        terms = []
        for key in keys:
            value = values.get(key)
            value = value if weights is None else value * _weight(weights, key, value, batch)
            terms.append(per_row(value, batch, f"init_attr_targets[{key!r}]"))
        return terms[0] if len(terms) == 1 else torch.stack(terms).sum(0)


def _weight(weights: TensorDictBase, key: NestedKey, value: Tensor, batch: torch.Size) -> Tensor:
    """The weight of each entry of a target: a TensorDict of rows says that its first dimensions are these.

    Raises:
        TargetError: if it has more, or others, than the target.
    """
    weight = weights.get(key).detach()
    given = weight.shape
    while weight.ndim > value.ndim and weight.shape[-1] == 1:  # as TorchRL has numbers of rows
        weight = weight.squeeze(-1)
    if batch and weights.batch_size == batch:
        weight = weight.reshape((*weight.shape, *(1,) * (value.ndim - weight.ndim)))
    try:
        fits = torch.broadcast_shapes(weight.shape, value.shape) == value.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise TargetError(
            f"init_attr_grads[{key!r}] has shape {tuple(given)}, but the targets that it weighs have "
            f"{tuple(value.shape)}: give a weight for each of them, or one for each row, in a TensorDict of the batch "
            f"{tuple(batch)}"
        )
    return weight


def _selected(data: TensorDictBase, keys: Sequence[NestedKey]) -> TensorDictBase:
    """The entries under some keys, of those that there are."""
    found = {key: get_entry(data, key) for key in keys if type(key) is str}
    if len(found) < len(keys) or not all(value is None or type(value) is Tensor for value in found.values()):
        return data.select(*keys, strict=False)
    return tensors_as_entries({key: value for key, value in found.items() if value is not None}, data.batch_size)


def require_tensordict(value: Any, name: str) -> None:
    """Raise if a callback has returned no TensorDict."""
    if not isinstance(value, TensorDictBase):
        raise TargetError(f"{name} must return a TensorDict, got a {type(value).__name__}")

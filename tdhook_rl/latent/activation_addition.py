"""Activation addition: the difference between what modules compute on two sets of inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from tdhook_rl.arguments.keys import key_parts, missing
from tdhook_rl.calls.bound import BoundMethod
from tdhook_rl.calls.passes import Call
from tdhook_rl.calls.real_rows import surely_finite
from tdhook_rl.errors import InputError
from tdhook_rl.method import Binder, Method
from tdhook_rl.sites.numbers import is_whole
from tdhook_rl.sites.runtime import vmap_level


@dataclass(frozen=True)
class ActivationAddition(Method):
    """Extract a steering vector: mean activation on positive inputs minus mean on negative ones (Turner et al. 2023).

    Args:
        modules_to_steer: module paths or patterns.
        positive_key: the root of the positive inputs.
        negative_key: the root of the negative inputs.
        steer_key: the root of the result keys.

    Reads ``(positive_key, in_key)`` and ``(negative_key, in_key)``; the policy's own inputs may be absent, then the
    policy itself is not run. Writes ``(steer_key, path)``: the mean over the batch, expanded to batch + features;
    for a TensorDict without batch size the mean over the first dimension, of the shape of the features. The two
    sets may differ in their number of samples where the TensorDict has no batch size.

    Raises:
        MissingKeyError: if the positive or negative inputs are absent.
        InputError: if there are no samples, or their activations are not finite.

    Example:
        >>> from tensordict import TensorDict
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh())
        >>> pos, neg = torch.ones(5, 4), torch.zeros(5, 4)
        >>> with ActivationAddition(["1"]).prepare(net) as hooked:
        ...     steer = hooked(TensorDict({("positive", "input"): pos, ("negative", "input"): neg})).get(("steer", "1"))
        >>> steer.shape
        torch.Size([8])
    """

    by_row = False

    modules_to_steer: str | Sequence[str]
    positive_key: str = "positive"
    negative_key: str = "negative"
    steer_key: str = "steer"

    def bind(self, binder: Binder) -> _BoundAddition:
        slots = {binder.capture(site): site.name for site in binder.sites(self.modules_to_steer, runs=True)}
        return _BoundAddition(self, slots, *binder.second_inputs())


def _require_numbers(value: Tensor, samples: int, root: str, site: str) -> None:
    if torch.compiler.is_compiling() or vmap_level() >= 0 or surely_finite(value):
        return
    finite = value.isfinite().reshape(value.shape[:samples].numel(), -1).all(-1)
    if not bool(finite.all()):
        raise InputError(
            f"the activations of {site!r} are not finite in {int((~finite).sum())} of {len(finite)} rows of the "
            f"{root} inputs, so that there is no mean: leave such rows out, or name a module before"
        )


class _BoundAddition(BoundMethod):
    replays = True
    without_forward = True  # runs where the policy's own inputs are absent
    whole_batch = True  # its mean is over all rows

    def __init__(
        self, config: ActivationAddition, slots: dict[str, str], in_keys: list[NestedKey], spare: list[NestedKey]
    ) -> None:
        self._roots = (config.positive_key, config.negative_key)
        self._slots = slots
        self._in_keys = [key for key in in_keys if key not in spare]
        self.reads = [(root, *key_parts(key)) for root in self._roots for key in in_keys]
        self.result_keys = tuple((config.steer_key, site) for site in slots.values())

    def compute(self, call: Call) -> dict[tuple[str, ...], Tensor]:
        positive, negative = (self._means(call, root) for root in self._roots)
        found: dict[tuple[str, ...], Tensor] = {}
        for key, slot in zip(self.result_keys, self._slots, strict=True):
            vector = positive[slot] - negative[slot]
            found[key] = vector.expand((*call.batch_size, *vector.shape))
        return found

    def _means(self, call: Call, root: str) -> dict[str, Tensor]:
        inputs = call.data.get(root, None)
        absent = [
            key for key in self._in_keys if not isinstance(inputs, TensorDictBase) or inputs.get(key, None) is None
        ]
        if absent:
            raise missing(call.data, (root, absent[0]), "ActivationAddition reads")
        slots = dict(call.slots)
        call.slots.clear()
        with torch.no_grad():
            call.replay(stored=inputs, record=True)
        means = {}
        for slot, site in self._slots.items():
            value = call.captured(slot, site)
            samples = max(len(call.batch_size), 1)
            if value.ndim < samples or value.shape[:samples].numel() == 0:
                raise InputError(
                    f"the {root} inputs give {site!r} the shape {tuple(value.shape)}: no row to average over"
                )
            # Without a batch size a flat activation is one sample.
            one = not call.batch_size and value.ndim == 1
            value = value.to(torch.get_default_dtype()) if is_whole(value) else value  # a mean has fractions
            _require_numbers(value, samples, root, site)
            means[slot] = value if one else value.flatten(0, samples - 1).mean(0)
        call.slots.clear()
        call.slots.update(slots)
        return means

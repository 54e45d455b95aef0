"""What the metrics share: which attribution and target is scored, evaluated at inputs of the metric's choice.

A metric replays the hooked policy with its interventions and the stored samples, as the attribution does. Nothing
is sampled, and neither the data nor the global generators change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor

from tdhook_rl.arguments.keys import key_parts, required
from tdhook_rl.attribution.base import BoundAttribution
from tdhook_rl.attribution.baselines import filled
from tdhook_rl.calls.inputs import rows_read, stored_inputs
from tdhook_rl.calls.passes import Call, effects_of
from tdhook_rl.calls.preconditions import require_hooked, require_rows
from tdhook_rl.calls.repeatable import require_rows_apart
from tdhook_rl.errors import InputError, TargetError, nearest
from tdhook_rl.policies.draws import action_keys
from tdhook_rl.replaying.batching import (
    PassNoise,
    conv_chunk,
    frozen_statistics,
    in_recurrent_mode,
    map_chunks,
    shallow_copy,
)
from tdhook_rl.sites.runtime import vmap_level


class ScoreDirection(Enum):
    """Which values of a metric are good."""

    LOWER = "lower"
    HIGHER = "higher"


class Scorer:
    """One chunk of rows: its inputs and attributions, and the explained target as a function of the inputs.

    Attributes:
        inputs: the explained inputs by key, ``(rows, *features)``, or ``features`` without a batch: as floats, or in
            their own dtype where the method perturbs them.
        rows: their places in what is scored.
    """

    def __init__(
        self, hooked: Any, bound: BoundAttribution, name: str | None, data: TensorDictBase, rows: range
    ) -> None:
        self.rows = rows
        self._hooked = hooked
        self._bound = bound
        self._name = name
        self._data = data
        self._call = Call(hooked, type(hooked)._base.forward, data, stored_inputs(hooked, data))
        if data.ndim:
            require_rows_apart(self._call, "a metric changes each row by itself")
        self.inputs: dict[NestedKey, Tensor] = bound._explained_inputs(self._call)
        self._target = bound._function(bound._chosen[bound.names.index(name)], self._call)

    @property
    def batch_size(self) -> torch.Size:
        return self._data.batch_size

    @property
    def is_product(self) -> bool:
        """Whether the attributions are products with input minus baseline, not gradients."""
        return self._bound.is_product

    def value(self, inputs: Mapping[NestedKey, Tensor]) -> Tensor:
        """The target at these inputs, the batch shape; at least float32, as narrower ones do not hold its squares."""
        # With a graph: the default target of a plain module adds up the outputs that a gradient reaches.
        with torch.enable_grad():
            given = {
                key: value.detach().clone().requires_grad_(value.is_floating_point()) for key, value in inputs.items()
            }
            return wide(self._target(self._call.replay(given)).detach())

    def stored(self) -> dict[NestedKey, Tensor]:
        """The attributions that the data holds, by input.

        Raises:
            MissingKeyError: if the data lacks one.
            InputError: if one has another shape than its input.
        """
        return self._read(self._data)

    def unexplained(self) -> Tensor:
        """The rows that have no attribution, by its mask or by a NaN in it, the batch shape."""
        computed = self._data.get(("computed", self._bound.root), None)
        unknown = torch.zeros(self.batch_size, dtype=torch.bool, device=next(iter(self.inputs.values())).device)
        if computed is not None and computed.shape == unknown.shape:
            unknown = ~computed.to(unknown.device)
        return unknown | flat(self.stored(), self.batch_size).isnan().any(-1)

    def attribute(self, inputs: Mapping[NestedKey, Tensor]) -> dict[NestedKey, Tensor]:
        """The attributions that the method computes at other inputs."""
        data = shallow_copy(self._data)
        for key, value in inputs.items():
            baseline = self._bound.baselines and self._bound.baselines.key_of(key)
            if baseline is not None and data.get(baseline, None) is not None:
                data.set(baseline, data.get(baseline).to(value.dtype))  # of integers that are explained as floats
            data.set(key, value)
        call = self._call_on(data)
        if self._bound.reads_forward:
            with torch.no_grad():
                call.replay(record=True)
        found = TensorDict({}, batch_size=self.batch_size)
        for name, value in self._bound.compute(call).items():
            found.set(name, value.detach())
        return self._read(found)

    def baseline(self, number: float | None) -> dict[NestedKey, Tensor]:
        """The baseline of each explained input: a number, else the method's (zero for LRP and gradient times input),
        else the data's, else zeros."""
        return {key: self._baseline_of(key, value, number) for key, value in self.inputs.items()}

    def _baseline_of(self, key: NestedKey, value: Tensor, number: float | None) -> Tensor:
        if number is not None:
            return filled(number, key, value, self.batch_size)
        if self._bound.baselines is not None:
            return self._bound.baselines.of(self._call, key, value)
        name = ("baseline", *key_parts(key))
        # Gradient times input and LRP share out what is above zero.
        found = None if self.is_product else self._data.get(name, None)
        if found is None:
            return torch.zeros_like(value)
        if found.shape != value.shape:
            raise InputError(
                f"the baseline {name!r} has shape {tuple(found.shape)}; it must match {key!r}, which has shape "
                f"{tuple(value.shape)}"
            )
        return found.to(value.dtype)

    def _call_on(self, data: TensorDictBase) -> Call:
        # From the same start: both sides of a difference see the same noise.
        inputs = stored_inputs(self._hooked, data)
        return Call(self._hooked, self._call._forward, data, inputs, start=self._call.start)

    def _read(self, data: TensorDictBase) -> dict[NestedKey, Tensor]:
        found = {}
        for key, value in self.inputs.items():
            name = (self._bound.root, *([self._name] if self._name else []), *key_parts(key))
            remedy = ". Give it what the hooked policy or its annotate() returned"
            attribution = required(data, name, "the metric scores the attribution", remedy)
            if attribution.shape != value.shape:
                raise InputError(
                    f"the attribution {name!r} has shape {tuple(attribution.shape)}; to be scored it must match the "
                    f"input {key!r}, which has shape {tuple(value.shape)}"
                )
            attribution = attribution.detach()
            found[key] = wide(attribution.to(value.dtype) if value.is_floating_point() else attribution)
        return found


def wide(value: Tensor) -> Tensor:
    """In a dtype that holds sums and squares of the numbers."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def score(
    hooked: Any,
    data: TensorDictBase,
    function: Callable[[Scorer], dict[str, Tensor]],
    attribution_key: str | None,
    target: str | None,
    chunk_size: int | None = None,
) -> dict[str, Tensor]:
    """Score rows chunk by chunk; each score gets the batch shape of the data before its own dimensions.

    Rows that have no attribution have NaN for a score.

    Raises:
        InputError: for something that is not a hooked policy with an attribution of inputs, or an empty batch; if the
            policy reads rows together.
        TargetError: if the method explains several targets and none is named.
    """
    bound = find_attribution(hooked, attribution_key)
    name = target_name(bound, target)
    if bound.inputs == [] and bound._init["inputs"] is None:
        raise InputError(
            f"the attribution {bound.root!r} explains inner activations only, but this metric changes inputs: "
            "explain inputs too, with inputs=[...]"
        )
    if data.batch_size.numel() == 0:
        raise InputError(f"there is nothing to score: the batch has shape {tuple(data.batch_size)}")
    if in_recurrent_mode(hooked):
        raise InputError(
            "metrics merge rows into chunks, which would mix trajectories in recurrent mode: leave "
            "set_recurrent_mode off, so that each row is scored at its stored hidden state"
        )
    runtime, tie = hooked._hooked.runtime, hooked._hooked.tie
    if tie is not None:
        tie.check(hooked)

    effects = effects_of(hooked)
    noise = PassNoise(data.device or effects.device, others=not effects.watch.idle)

    require_rows(chunk_size, "chunk_size")

    scored = 0

    def analyse(chunk: TensorDictBase) -> TensorDict:
        nonlocal scored
        rows = range(scored, scored + chunk.batch_size.numel())
        scored = rows.stop
        with runtime.lock, runtime.held, frozen_statistics(hooked), noise.under_way():
            runtime.level = vmap_level()
            try:
                scorer = Scorer(hooked, bound, name, chunk, rows)
                found = function(scorer)
                unknown = scorer.unexplained()
                return TensorDict(
                    {key: _blank(value, unknown) for key, value in found.items()}, batch_size=chunk.batch_size
                )
            finally:
                runtime.slots.clear()
                hooked._close_routes()

    if chunk_size is None and hooked._hooked.traits.convolutional:
        chunk_size = conv_chunk((data.get(key, None) for key in hooked.policy_in_keys), data.batch_size)
    keys = [*hooked.in_keys, *hooked.policy_out_keys, *bound.reads, *(key[:1] for key in bound.result_keys)]
    keys += ["baseline", ("computed", bound.root), *action_keys(hooked.policy_out_keys)]
    # Out of inference mode, whose tensors have no gradients: those that come from it are copied.
    with torch.inference_mode(False), torch.no_grad():
        chosen = rows_read(hooked, data, keys)
        if any(value.is_inference() for value in chosen.values(True, True) if isinstance(value, Tensor)):
            chosen = chosen.clone()
        results = map_chunks(chosen, analyse, chunk_size)
    return {str(key): value for key, value in results.items()}


def _blank(score: Tensor, rows: Tensor) -> Tensor:
    """NaN in the rows that have no attribution."""
    return score.masked_fill(rows.reshape((*rows.shape, *(1,) * (score.ndim - rows.ndim))), torch.nan)


def require_floats(scorer: Scorer, metric: str) -> None:
    """Refuse integers and booleans, which cannot be changed a little."""
    for key, value in scorer.inputs.items():
        if not value.is_floating_point():
            raise InputError(
                f"{metric} changes inputs a little, which {key!r} ({value.dtype}) cannot be: use deletion_insertion, "
                "or explain other inputs with inputs=[...]"
            )


def flat(parts: Mapping[Any, Tensor], batch: torch.Size) -> Tensor:
    """All parts of each row as one vector, ``(*batch, features)``."""
    return torch.cat([value.reshape(*batch, -1) for value in parts.values()], -1)


def find_attribution(hooked: Any, attribution_key: str | None) -> BoundAttribution:
    """The attribution method of a hooked policy.

    Raises:
        PreparationError: for a policy that is not hooked.
        InputError: if there is none, or several and none is named.
    """
    require_hooked(hooked, "a metric")
    hooked._hooked.runtime.require_open()
    inner = [one.bound or one for one in hooked._hooked.bound]  # what is scheduled, too
    found: list[Any] = [one for one in inner if isinstance(one, BoundAttribution)]
    if not found:
        raise InputError(
            "a metric scores an attribution, and this policy is hooked without one: prepare it with "
            "Compose(..., Saliency()), say"
        )
    roots = [one.root for one in found]
    if attribution_key is None:
        if len(found) > 1:
            raise InputError(
                f"this policy is hooked with {len(found)} attributions, under {roots}: say which is scored with "
                "attribution_key="
            )
        return found[0]
    if roots.count(attribution_key) == 1:
        return found[roots.index(attribution_key)]
    if attribution_key in roots:
        raise InputError(
            f"several attributions write under {attribution_key!r}: give each an attribution_key= of its own"
        )
    raise InputError(
        f"no attribution of this policy writes under {attribution_key!r}; {nearest(attribution_key, roots)}"
    )


def target_name(bound: BoundAttribution, target: str | None) -> str | None:
    """The name of the scored target, ``None`` where the method explains a single one.

    Raises:
        TargetError: if there are several and none is named, or there is none of that name.
    """
    names = [name for name in bound.names if name is not None]
    if not names:
        if target is not None:
            raise TargetError(
                f"target={target!r} was asked, but the attribution {bound.root!r} has one, unnamed target"
            )
        return None
    if target is None and len(names) == 1:
        return names[0]
    if target is None:
        raise TargetError(
            f"the attribution {bound.root!r} explains {len(names)} targets: say which with target=, of {names}"
        )
    if target not in names:
        raise TargetError(f"no target of the attribution {bound.root!r} is named {target!r}; {nearest(target, names)}")
    return target

"""The record of one replay, and the samples that it hands on where the policy draws: those of the explained call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import CompositeDistribution, InteractionType
from tensordict.nn.probabilistic import interaction_type
from tensordict.utils import unravel_key
from torch import Tensor, nn
from torch import distributions as D

from tdhook_rl.errors import InputError
from tdhook_rl.internals.functorch_names import in_transform
from tdhook_rl.internals.torchrl_names import is_sparse
from tdhook_rl.policies.draws import Draw, sample_keys
from tdhook_rl.policies.inversion import choices, invert, is_one_hot, noise_of, one_hot_choices, sample_with


class Drawn(NamedTuple):
    """A distribution that a replay met, and what was drawn from it in the call that is explained."""

    module: nn.Module
    distribution: torch.distributions.Distribution
    samples: Mapping[NestedKey, Tensor | None]

    def again(self, outputs: TensorDictBase) -> Drawn:
        """The same of other outputs."""
        return Drawn(self.module, self.module.get_dist(outputs), self.samples)  # type: ignore[operator]


@dataclass
class Replay:
    """What a replay takes from the stored data, and the distributions that it met."""

    stored: TensorDictBase
    in_step: bool = False  # of the forward that has just run, in the mode in which it ran
    learning: bool = False  # whether it is to find what the data does not hold as it was drawn
    distributions: list[Drawn] = field(default_factory=list)
    watched: dict[str, Tensor] = field(default_factory=dict)
    runs: dict[str, int] = field(default_factory=dict)  # how often the hooks that count ran
    # What a deterministic policy decided before exploration noise was added.
    decided: dict[NestedKey, Tensor] = field(default_factory=dict)
    is_forward: bool = False  # the policy's own forward is explained, without a second pass
    # What was found, by slot.
    learned: dict[str, Tensor] = field(default_factory=dict)


#: How far a latent that is made again from its noise may be from the one that is stored.
RELATIVE, ABSOLUTE = 1e-3, 1e-4


def components(module: Any, distribution: D.Distribution) -> dict[NestedKey, D.Distribution]:
    """The distribution of each sample that a module draws, by key."""
    if isinstance(distribution, CompositeDistribution):
        return {unravel_key(key): one for key, one in distribution.dists.items()}
    return {unravel_key(sample_keys(module)[0]): distribution}


def parameter_names(module: Any) -> dict[NestedKey, NestedKey]:
    """Of the parts of a composite distribution, by the key of the sample: the name that its parameters are under."""
    given = {**getattr(module.distribution_class, "keywords", {}), **module.distribution_kwargs}
    names = map(unravel_key, given.get("distribution_map", ()))
    written = {unravel_key(name): unravel_key(key) for name, key in (given.get("name_map") or {}).items()}
    return {written.get(name, name): name for name in names}


def is_point(distribution: D.Distribution) -> bool:
    """Whether a distribution is a single point, which has no log-probability to explain."""
    from torchrl.modules import Delta

    while hasattr(distribution, "base_dist"):  # a transformed point is one
        distribution = distribution.base_dist
    if isinstance(distribution, CompositeDistribution):
        return all(is_point(one) for one in distribution.dists.values())
    return isinstance(distribution, Delta)


def samples(
    module: Any, draw: Draw, distribution: D.Distribution, data: TensorDictBase, replay: Replay
) -> dict[NestedKey, Tensor | None]:
    """What a module drew in the call that is explained, by key; ``None`` where the data does not hold it.

    Raises:
        InputError: if a later module has changed what is stored, and what was drawn cannot be told from it.
    """
    parts = components(module, distribution)
    found: dict[NestedKey, Tensor | None] = {}
    for key in map(unravel_key, sample_keys(module)):
        part = parts.get(key, distribution)
        slot = draw.slots.get(key)
        value = None if slot is None else replay.stored.get(slot, None)
        if draw.opaque and value is not None and replay.stored.get(key, value).shape != value.shape:
            value = None  # only a part of what was drawn was taken: refused by its shape
        if is_point(part):  # it draws nothing, and gradients pass through what it decides
            value = part.mode if isinstance(distribution, CompositeDistribution) else None
        elif value is None:
            value = replay.stored.get(draw.kept_under.get(key, key), None)
            if value is not None and key in draw.rewriters:
                value = _as_drawn(key, value, part, draw, data)
                replay.learned[slot] = value  # type: ignore[index]
            elif value is not None and len(parts) == 1:
                value = _in_own_form(key, value, part)
        found[key] = value
    return found


def latent_samples(
    module: Any,
    draw: Draw,
    parts: Mapping[NestedKey, D.Distribution],
    drawn: dict[NestedKey, Tensor | None],
    replay: Replay,
) -> dict[NestedKey, Tensor | None] | None:
    """Latents with the gradient that their draw hands on; ``None`` where the policy decides them without drawing.

    Raises:
        InputError: if a latent is not stored, or its noise cannot be told from it.
    """
    kind = interaction_type() or module.default_interaction_type
    if all(map(is_point, parts.values())) or (replay.in_step and kind is not InteractionType.RANDOM):
        return None
    found: dict[NestedKey, Tensor | None] = {}
    for key, value in drawn.items():
        part, slot = parts[key], f"{draw.slots[key]}:noise"
        if is_point(part):
            found[key] = value
            continue
        noise = replay.stored.get(slot, None)
        if noise is None:
            if value is None:
                raise InputError(
                    f"the policy draws the latent {key!r} before it decides, and the data does not hold it, so what "
                    "was drawn is not known: let the policy put it out, or explain it while it acts, with when='step'"
                )
            noise = noise_of(part, value)
            if noise is None:
                raise InputError(
                    f"the latent {key!r} is drawn from a {type(part).__name__}, whose noise cannot be told from a "
                    "sample, so no gradient can be taken through the draw: explain what follows it with "
                    f"input_modules=[...], or draw it from a family such as Normal"
                )
            replay.learned[slot] = noise
        found[key] = again = sample_with(part, noise)
        if replay.learning and value is not None and not _near(again, value):
            raise InputError(
                f"the latent {key!r}, drawn from a {type(part).__name__}, cannot be made again from its noise: explain "
                "what follows it with input_modules=[...], or draw it from a family such as Normal"
            )
    return found


def decided_action(module: Any, draw: Draw, data: TensorDictBase, replay: Replay) -> None:
    """Find the choice of a module that decides without drawing, which later modules have written over."""
    values = data.get(getattr(module, "action_value_key", None) or module.in_keys[0], None)
    for key, rewriters in draw.rewriters.items():
        slot, stored, own = draw.slots[key], replay.stored.get(key, None), data.get(key, None)
        known = isinstance(stored, Tensor) and isinstance(own, Tensor) and isinstance(values, Tensor)
        if (
            not known
            or replay.stored.get(slot, None) is not None
            or (own.is_floating_point() and own.shape != values.shape)
        ):
            continue
        if own.shape == values.shape:
            choose = one_hot_choices(own), own.ndim - 1
        else:
            choose = [torch.full_like(own, index) for index in range(values.shape[-1])], own.ndim
        found = invert(data, key, stored, rewriters, own, choose)
        if found is not None:
            replay.learned[slot] = found


def require_unchanged(draw: Draw, stored: TensorDictBase, outputs: TensorDictBase) -> None:
    """Refuse a sample that the forward around its draw changes: replayed on what is stored, it would change again.

    Raises:
        InputError: if it does.
    """
    for key in draw.slots:
        value, again = stored.get(key, None), outputs.get(key, None)
        if not isinstance(value, Tensor) or not isinstance(again, Tensor):
            continue
        if value.shape != again.shape or not _near(again.to(torch.float64), value.to(torch.float64)):
            raise InputError(
                f"the stored {key!r} is not what the policy drew: a module around the draw changes it in its own "
                "forward. Explain it while the policy acts, with when='step', or write the changed action under a key "
                "of its own"
            )


def _as_drawn(key: NestedKey, stored: Tensor, part: D.Distribution, draw: Draw, data: TensorDictBase) -> Tensor:
    dtype = stored.dtype if stored.is_floating_point() else None  # the default
    like = torch.empty(part.batch_shape + part.event_shape, dtype=dtype, device=stored.device)
    found = invert(data, key, stored, draw.rewriters[key], like, choices(part))
    if found is None:
        names = ", ".join(_name(module) for module in draw.rewriters[key])
        raise InputError(
            f"the stored {key!r} is not what the policy drew from its {type(part).__name__}: {names} writes over it "
            "afterwards, and what was drawn cannot be told from what is stored. Explain it while the policy acts, with "
            "when='step', or write the changed action under a key of its own"
        )
    return found


def _in_own_form(key: NestedKey, value: Tensor, part: D.Distribution) -> Tensor:
    """A stored choice, an index or one-hot, in the form in which the distribution draws it; of one shape both ways."""
    if not isinstance(part, (D.Categorical, D.OneHotCategorical)) or is_sparse(part):
        return value
    rows, number = part.batch_shape, part.param_shape[-1]
    if is_one_hot(part):
        if value.shape == rows and not value.is_floating_point():
            return torch.nn.functional.one_hot(value.long(), number)
        return value.long() if value.dtype == torch.bool else value
    if value.shape == (*rows, number) and value.shape != rows:
        if bool(((value != 0).sum(-1) == 1).all()):
            return value.to(torch.float32).argmax(-1)
        raise InputError(
            f"the stored {key!r} has shape {tuple(value.shape)} and is not one-hot, but the policy draws it from a "
            f"{type(part).__name__} over {tuple(rows)}: store the action as it was drawn"
        )
    return value


def _near(one: Tensor, two: Tensor) -> bool:
    if torch.compiler.is_compiling() or in_transform() is not None:
        return True
    return torch.allclose(one.detach(), two.to(one.dtype), RELATIVE, ABSOLUTE, equal_nan=True)


def _name(module: Any) -> str:
    inner = getattr(module, "module", None)
    kind = getattr(type(inner), "__name__", "") if inner is not None else ""
    name = getattr(inner, "__name__", kind)
    return f"{name} ({module.in_keys} -> {module.out_keys})"

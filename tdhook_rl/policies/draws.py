"""What a policy draws, and what the rest of it makes of that.

A sample is a decision, or a latent on the way to one; and what is stored is what was drawn, unless a later module
writes over it. Both are read off the policy once, from what its modules read and write, in the order in which they run.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tensordict import NestedKey, TensorDictBase
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModuleBase,
    TensorDictParams,
    TensorDictSequential,
)
from tensordict.utils import unravel_key
from torch import Tensor, nn

from tdhook_rl.arguments.keys import key_parts
from tdhook_rl.policies.actors import cached_samples
from tdhook_rl.sites.listed import modules, named_modules

#: What names with "action" in them stand for otherwise.
_NOT_ACTIONS = ("value", "prob", "logit", "param", "loc", "scale", "mask", "mean", "std", "entropy", "spec", "orig")


@dataclass(frozen=True)
class Draw:
    """What becomes of the samples of one module.

    Attributes:
        latent: whether they are latents on the way to a decision.
        slots: by key, where a call keeps samples that its data may not hold as they were drawn.
        rewriters: by key, the later modules that write over a sample, in order.
        kept_under: by key, where the policy itself keeps samples as they were drawn.
        opaque: the module runs inside one whose forward is its own, which may change samples unseen.
        becomes: the actions that later modules make of a sample alone, as where it is clipped or scaled to bounds.
    """

    latent: bool = False
    slots: Mapping[NestedKey, str] = field(default_factory=dict)
    rewriters: Mapping[NestedKey, tuple[nn.Module, ...]] = field(default_factory=dict)
    opaque: bool = False
    kept_under: Mapping[NestedKey, NestedKey] = field(default_factory=dict)
    becomes: tuple[NestedKey, ...] = ()

    @property
    def wanted(self) -> set[str]:
        """The entries of a call that have to be found before it is explained."""
        slots = set(self.slots.values())
        return slots | {f"{slot}:noise" for slot in slots} if self.latent else slots


@dataclass(frozen=True)
class _Step:
    module: TensorDictModuleBase
    reads: list[NestedKey]
    writes: list[NestedKey]
    opaque: bool


def draws(module: nn.Module) -> bool:
    """Whether a module adds randomness of its own to the action."""
    return isinstance(module, _drawing())


@functools.cache
def _drawing() -> tuple[type, ...]:
    from torchrl.modules import AdditiveGaussianModule, EGreedyModule, OrnsteinUhlenbeckProcessModule

    return ProbabilisticTensorDictModule, EGreedyModule, AdditiveGaussianModule, OrnsteinUhlenbeckProcessModule


def sample_keys(module: nn.Module) -> list[NestedKey]:
    """The keys a drawing module writes its samples under."""
    if isinstance(module, ProbabilisticTensorDictModule):
        return list(module.dist_sample_keys)
    from torchrl.modules import OrnsteinUhlenbeckProcessModule

    return [module.ou.key if isinstance(module, OrnsteinUhlenbeckProcessModule) else module.action_key]  # type: ignore[union-attr, list-item]


def survey_draws(policy: nn.Module) -> dict[nn.Module, Draw]:
    """What becomes of what each module draws or decides; without those of which nothing is to be said."""
    if not isinstance(policy, TensorDictModuleBase):
        return {}
    steps = list(_steps(policy))
    kept = cached_samples(policy)
    actors = _last_draws_of_actors(policy)
    found = {}
    for place, step in enumerate(steps):
        later = steps[place + 1 :]
        keys = _decided(step)
        if not draws(step.module):  # what is drawn under the same key is the decision
            keys = [key for key in keys if not any(_samples(key, one) for one in later)]
        if not keys:
            continue
        latent = isinstance(step.module, ProbabilisticTensorDictModule) and _is_latent(step, later, actors)
        rewriters = {key: over for key in keys if (over := _rewriters(key, later))}
        if kept.keys() & set(keys) and draws(step.module):
            found[step.module] = Draw(kept_under={key: kept[key] for key in keys if key in kept})
            continue
        opaque = step.opaque and draws(step.module)
        becomes = () if latent or not draws(step.module) else _becomes(keys, later)
        if not latent and not rewriters and not opaque and not becomes:
            continue
        slots = {key: _slot(key, later) for key in keys if latent or opaque or key in rewriters}
        found[step.module] = Draw(latent, slots, rewriters, opaque, becomes=becomes)
    return found


def made_inside(policy: nn.Module) -> list[NestedKey]:
    """The ``in_keys`` that name a node whose entries the policy writes itself before it reads the node.

    ``TensorDictSequential`` counts ``"params"`` among its inputs though it writes ``("params", "logits")`` before.
    """
    if not isinstance(policy, TensorDictModuleBase):
        return []
    written: list[NestedKey] = []
    read: set[NestedKey] = set()
    found = []
    for step in _steps(policy):
        for key in step.reads:
            below = any(meets(key, one) and len(key_parts(one)) > len(key_parts(key)) for one in written)
            if below and key not in read and key in policy.in_keys and key not in found:
                found.append(key)
            read.add(key)
        written += step.writes
    return found


def given_beside(own: Sequence[NestedKey], key: NestedKey, node: Any) -> dict[NestedKey, Tensor]:
    """The entries of a node that are not the policy's own outputs."""
    if not isinstance(node, TensorDictBase):
        return {}
    entries = {(*key_parts(key), *key_parts(name)): value for name, value in node.items(True, True)}
    return {name: value for name, value in entries.items() if name not in own}


def noise_keys(policy: nn.Module) -> list[NestedKey]:
    """The inputs that hold noise, which the module that reads them draws where it is absent, and keeps in the data.

    The mask of a ``ConsistentDropoutModule``, the matrix of a ``gSDEModule``.
    """
    from torchrl.modules import ConsistentDropoutModule
    from torchrl.modules.models.exploration import gSDEModule

    found = []
    for child in modules(policy):
        if isinstance(child, ConsistentDropoutModule):
            found.append(unravel_key(child.in_keys[1]))
        elif isinstance(child, TensorDictModuleBase) and isinstance(getattr(child, "module", None), gSDEModule):
            found.append(unravel_key(child.in_keys[2]))
    own = getattr(policy, "in_keys", ())
    return [key for key in dict.fromkeys(found) if key in own]


def noisy_while_exploring(policy: nn.Module) -> str | None:
    """The path of a ``NoisyLinear``, if the policy has one and does not explore now, as its collector does."""
    from torchrl.envs.utils import ExplorationType, exploration_type
    from torchrl.modules import NoisyLinear

    if exploration_type() is ExplorationType.RANDOM:
        return None
    return next((path for path, child in named_modules(policy) if isinstance(child, NoisyLinear)), None)


def masks_needed(policy: nn.Module) -> list[NestedKey]:
    """Those of :func:`noise_keys` without which the policy would draw other noise than its rows have seen."""
    from torchrl.modules import ConsistentDropoutModule

    drawing = [child for child in modules(policy) if isinstance(child, ConsistentDropoutModule)]
    return [unravel_key(child.in_keys[1]) for child in drawing if child.consistent_dropout.training]


def _is_action(key: NestedKey) -> bool:
    """Whether a key is that of an action by its name."""
    parts = key_parts(key)
    if "action" in parts[-1]:
        return not any(word in parts[-1] for word in _NOT_ACTIONS)
    return parts[-2:-1] in (("action",), ("actions",))


def action_keys(out_keys: Sequence[NestedKey]) -> list[NestedKey]:
    """Where the stored action of a network may be that has none of its own: at the top, or beside nested outputs."""
    nested = [(*key[:-1], "action") for key in out_keys if isinstance(key, tuple)]
    return list(dict.fromkeys(["action", *nested])) if nested else ["action"]


def meets(key: NestedKey, other: NestedKey) -> bool:
    """Whether two keys are the same, or one is inside the other."""
    one, two = key_parts(key), key_parts(other)
    return one == two[: len(one)] or two == one[: len(two)]


def _steps(module: nn.Module, opaque: bool = False) -> Iterator[_Step]:
    """The modules that read and write entries, in the order in which they run as far as that is known."""
    inner = [] if isinstance(module, ProbabilisticTensorDictModule) else list(_inner(module))
    if not inner:
        reads, writes = ([unravel_key(key) for key in getattr(module, name)] for name in ("in_keys", "out_keys"))
        yield _Step(module, reads, writes, opaque)  # type: ignore[arg-type]
        return
    usual = (TensorDictSequential.forward, ProbabilisticTensorDictSequential.forward)
    opaque = opaque or not isinstance(module, TensorDictSequential) or type(module).forward not in usual
    for child in inner:
        yield from _steps(child, opaque)


def _inner(module: nn.Module) -> Iterator[TensorDictModuleBase]:
    """The nearest TensorDict modules below one."""
    for child in module.children():
        if isinstance(child, TensorDictParams):
            continue
        if isinstance(child, TensorDictModuleBase):
            yield child
        else:
            yield from _inner(child)


def _decided(step: _Step) -> list[NestedKey]:
    """The keys under which a module draws, or, without drawing, writes an action that it does not read."""
    if draws(step.module):
        return [key for key in map(unravel_key, sample_keys(step.module)) if key != "_"]
    return [key for key in step.writes if _is_action(key) and not any(meets(key, read) for read in step.reads)]


def _samples(key: NestedKey, step: _Step) -> bool:
    drawing = isinstance(step.module, ProbabilisticTensorDictModule)
    return drawing and any(meets(key, other) for other in step.writes)


def _rewriters(key: NestedKey, later: list[_Step]) -> tuple[nn.Module, ...]:
    found: list[nn.Module] = []
    for step in later:
        if not any(meets(key, other) for other in step.writes):
            continue
        if _samples(key, step):
            break  # another sample takes its place
        if not draws(step.module):
            found.append(step.module)
    return tuple(found)


def _becomes(keys: list[NestedKey], later: list[_Step]) -> tuple[NestedKey, ...]:
    """The actions under other keys that are computed from samples and from nothing else."""
    made = list(keys)
    for step in later:
        if not draws(step.module) and step.reads and all(read in made for read in step.reads):
            made += step.writes
    return tuple(key for key in dict.fromkeys(made) if key not in keys and _is_action(key))


def _slot(key: NestedKey, later: list[_Step]) -> str:
    """One place for all that write a key before it is written over: noise added to a sample is part of the action."""
    name = key if isinstance(key, str) else ".".join(key)
    over = [step for step in later if not draws(step.module) and any(meets(key, other) for other in step.writes)]
    return f"_drawn:{name}:{len(over)}"


def _is_latent(step: _Step, later: list[_Step], actors: set[int]) -> bool:
    """Whether what a module draws is on the way to what the policy decides, by names, actors and what reads it."""
    if _is_decision(step, actors):
        return False
    reached = list(_decided(step))
    drawn, decided, others = False, False, False
    for one in later:
        if not any(meets(read, key) for read in one.reads for key in reached):
            continue
        reached += one.writes
        if draws(one.module):
            drawn = True
            decided = decided or _is_decision(one, actors)
        decided = decided or any(_is_action(key) for key in one.writes)
        # The value of an action reads a decision; any other output reads a latent.
        others = others or any(key_parts(key)[-1] != "state_action_value" for key in one.writes)
    return decided or (others and not drawn)


def _is_decision(step: _Step, actors: set[int]) -> bool:
    return id(step.module) in actors or any(map(_is_action, _decided(step)))


def _last_draws_of_actors(policy: nn.Module) -> set[int]:
    from torchrl.modules import ProbabilisticActor

    found = set()
    for child in modules(policy):
        if isinstance(child, ProbabilisticActor):
            drawing = [one for one in modules(child) if isinstance(one, ProbabilisticTensorDictModule)]
            found |= {id(one) for one in drawing[-1:]}
    return found

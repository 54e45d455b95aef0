"""A steering vector: a direction at one module, what it was extracted from, and its file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from tdhook_rl.arguments.checked import Checked
from tdhook_rl.artifacts import load_artifact, save_artifact
from tdhook_rl.errors import ArtifactError, InputError
from tdhook_rl.files.stored import module_path, tensors_named
from tdhook_rl.latent.activation_caching import ActivationCaching
from tdhook_rl.latent.vectors.dealing import random_signs


@dataclass(frozen=True, eq=False, kw_only=True)
class SteeringVector(metaclass=Checked):
    """A direction to add to the output of a module.

    Args:
        vector: of the shape of the module's features.
        path: the module.
        facts: where it comes from, saved with it.
        shuffled: what the same extraction finds when labels are shuffled, ``(k, *features)``: the control beside
            random directions.

    Raises:
        InputError: if a tensor is not finite, or the shuffled ones have other features.

    Example:
        >>> from tensordict import TensorDict
        >>> net = nn.Linear(2, 3)
        >>> pair = [TensorDict({"input": x}, batch_size=1) for x in (torch.ones(1, 2), torch.zeros(1, 2))]
        >>> found = SteeringVector.from_pairs(nn.Sequential(net), "0", *pair)
        >>> torch.allclose(found.vector, net.weight.sum(1))
        True
    """

    vector: Tensor
    path: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    shuffled: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "vector", _floats(self.vector, "vector"))
        if self.vector.ndim == 0 or self.vector.numel() == 0:
            raise InputError(f"vector= has the shape of a module's features, got {tuple(self.vector.shape)}")
        if self.shuffled is None:
            return
        object.__setattr__(self, "shuffled", _floats(self.shuffled, "shuffled"))
        if self.shuffled.shape[1:] != self.vector.shape or not len(self.shuffled):
            raise InputError(
                f"shuffled= is (k, *features) beside a vector of {tuple(self.vector.shape)}, got "
                f"{tuple(self.shuffled.shape)}"
            )

    @classmethod
    def from_pairs(
        cls,
        policy: nn.Module,
        path: str,
        positive: TensorDictBase,
        negative: TensorDictBase,
        *,
        shuffles: int = 10,
        seed: int = 0,
    ) -> SteeringVector:
        """The mean activation of some states minus the mean of others (Turner et al. 2023; Rimsky et al. 2024).

        Args:
            policy: the policy, not hooked.
            path: the module whose output is compared.
            positive: states with the concept; paired states differ in nothing else.
            negative: states without it.
            shuffles: how often to extract it again with the two of each pair exchanged by chance.
            seed: of these.

        Raises:
            InputError: if there are no states or the activations are not finite.
        """
        found = []
        for name, states in (("positive", positive), ("negative", negative)):
            if states.batch_size.numel() == 0 or not states.batch_size:
                raise InputError(f"the {name} states have batch shape {tuple(states.batch_size)}: give at least one")
            with ActivationCaching(path).prepare(policy) as hooked:
                values = hooked.annotate(states)["cache"][path]
            found.append(values.flatten(0, states.ndim - 1))
        vector = (found[0].double().mean(0) - found[1].double().mean(0)).to(found[0].dtype)
        if not bool(torch.isfinite(vector).all()):
            raise InputError(f"the activations of {path!r} on these states are not finite")
        counts = {"positive_states": positive.batch_size.numel(), "negative_states": negative.batch_size.numel()}
        shuffled = None
        if shuffles and len(found[0]) == len(found[1]):
            apart = (found[0].double() - found[1].double()).flatten(1)
            signs = random_signs(shuffles, len(apart), seed).to(apart)
            shuffled = (signs @ apart / len(apart)).reshape(shuffles, *vector.shape).to(vector.dtype)
        return cls(vector=vector, path=path, facts=counts | {"norm": float(vector.norm())}, shuffled=shuffled)

    def random_like(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Random directions of equal norm, ``(count, *features)``: the control of a steering experiment."""
        noise = torch.randn(count, *self.vector.shape, generator=generator)
        norms = noise.reshape(count, -1).norm(dim=1).reshape(count, *(1,) * self.vector.ndim)
        return noise / norms * self.vector.norm()

    def shuffled_like(self, count: int | None = None) -> Tensor:
        """What the extraction finds with shuffled labels, at equal norm, ``(count, *features)``: the other control.

        Unlike random directions these lie where the activations vary.

        Args:
            count: how many; all that there are unless given.

        Raises:
            InputError: if there are none, or fewer.
        """
        if self.shuffled is None or (count or 0) > len(self.shuffled):
            there = 0 if self.shuffled is None else len(self.shuffled)
            raise InputError(
                f"{count} shuffled extractions were asked for and this vector has {there}: extract it with "
                "SteeringVector.from_pairs(..., shuffles=...), or use random_like"
            )
        found = self.shuffled[:count].to(self.vector)
        norms = found.flatten(1).norm(dim=1).clamp_min(torch.finfo(found.dtype).tiny)
        return found / norms.reshape(-1, *(1,) * self.vector.ndim) * self.vector.norm()

    def save(self, path: str | Path) -> Path:
        """Write safetensors and JSON (see :func:`tdhook_rl.artifacts.save_artifact`)."""
        tensors = {"vector": self.vector} | ({} if self.shuffled is None else {"shuffled": self.shuffled})
        return save_artifact(path, "steering_vector", tensors, {**self.facts, "module_path": self.path})

    @classmethod
    def load(cls, path: str | Path) -> SteeringVector:
        """Read a saved vector.

        Raises:
            ArtifactError: if the file is absent, corrupt or not a steering vector.
        """
        tensors, facts = load_artifact(path, "steering_vector")
        both = "shuffled" in tensors
        vector, *shuffled = tensors_named(path, tensors, vector=0, **({"shuffled": 0} if both else {}))
        module = module_path(path, facts)
        if not module:
            raise ArtifactError(f"{path} does not say at which module its vector acts")
        facts = {name: facts[name] for name in facts if name != "module_path"}
        try:
            return cls(vector=vector, path=module, facts=facts, shuffled=shuffled[0] if both else None)
        except InputError as error:
            raise ArtifactError(f"{path} is no steering vector: {error}") from None


def _floats(given: Any, name: str) -> Tensor:
    """A finite tensor of floats that needs no gradient."""
    try:
        found = torch.as_tensor(given).detach()
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"{name}= is a tensor of numbers, got {given!r:.80}") from None
    if found.is_complex():
        raise InputError(f"{name}= is of real numbers, got {found.dtype}")
    found = found if found.is_floating_point() else found.to(torch.get_default_dtype())
    if not bool(torch.isfinite(found).all()):
        raise InputError(f"{name}= has NaN or infinite entries")
    return found


def as_vectors(given: Any, what: str) -> dict[Any, Any]:
    """Vectors by path, from a mapping, of which the values may be steering vectors, or from these alone.

    Raises:
        InputError: for what is none of these, an empty mapping, or two vectors for one module.
    """
    if isinstance(given, SteeringVector):
        given = [given]
    if isinstance(given, Sequence) and given and all(isinstance(one, SteeringVector) for one in given):
        paths = [one.path for one in given]
        twice = next((path for path in paths if paths.count(path) > 1), None)
        if twice is not None:
            raise InputError(f"{what}= has two vectors for {twice!r}: add them up, or use one method for each")
        given = dict(zip(paths, given, strict=True))
    if not isinstance(given, Mapping) or len(given) == 0:
        raise InputError(f"{what}= is {{path: vector}}, one SteeringVector or a list of them, got {given!r:.80}")
    return {path: one.vector if isinstance(one, SteeringVector) else one for path, one in given.items()}

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


@dataclass(frozen=True, eq=False, kw_only=True)
class SteeringVector(metaclass=Checked):
    """A direction to add to the output of a module.

    Args:
        vector: of the shape of the module's features.
        path: the module.
        facts: where it comes from, saved with it.

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

    @classmethod
    def from_pairs(
        cls, policy: nn.Module, path: str, positive: TensorDictBase, negative: TensorDictBase
    ) -> SteeringVector:
        """The mean activation of some states minus the mean of others (Turner et al. 2023; Rimsky et al. 2024).

        Args:
            policy: the policy, not hooked.
            path: the module whose output is compared.
            positive: states with the concept; paired states differ in nothing else.
            negative: states without it.

        Raises:
            InputError: if there are no states or the activations are not finite.
        """
        means = []
        for name, states in (("positive", positive), ("negative", negative)):
            if states.batch_size.numel() == 0 or not states.batch_size:
                raise InputError(f"the {name} states have batch shape {tuple(states.batch_size)}: give at least one")
            with ActivationCaching(path).prepare(policy) as hooked:
                values = hooked.annotate(states)["cache"][path]
            means.append(values.flatten(0, states.ndim - 1).mean(0))
        vector = means[0] - means[1]
        if not bool(torch.isfinite(vector).all()):
            raise InputError(f"the activations of {path!r} on these states are not finite")
        counts = {"positive_states": positive.batch_size.numel(), "negative_states": negative.batch_size.numel()}
        return cls(vector=vector, path=path, facts=counts | {"norm": float(vector.norm())})

    def random_like(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Random directions of equal norm, ``(count, *features)``: the control of a steering experiment."""
        noise = torch.randn(count, *self.vector.shape, generator=generator)
        norms = noise.reshape(count, -1).norm(dim=1).reshape(count, *(1,) * self.vector.ndim)
        return noise / norms * self.vector.norm()

    def save(self, path: str | Path) -> Path:
        """Write safetensors and JSON (see :func:`tdhook_rl.artifacts.save_artifact`)."""
        return save_artifact(path, "steering_vector", {"vector": self.vector}, {**self.facts, "module_path": self.path})

    @classmethod
    def load(cls, path: str | Path) -> SteeringVector:
        """Read a saved vector.

        Raises:
            ArtifactError: if the file is absent, corrupt or not a steering vector.
        """
        tensors, facts = load_artifact(path, "steering_vector")
        (vector,) = tensors_named(path, tensors, vector=0)
        module = module_path(path, facts)
        if not module:
            raise ArtifactError(f"{path} does not say at which module its vector acts")
        return cls(vector=vector, path=module, facts={name: facts[name] for name in facts if name != "module_path"})


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

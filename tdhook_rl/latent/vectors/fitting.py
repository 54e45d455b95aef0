"""Whether a direction fits a policy that it is put on: its module, its features, the weights that it was found in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from tensordict import NestedKey
from tensordict.nn import TensorDictModule
from torch import nn

from tdhook_rl.errors import InputError, listed
from tdhook_rl.latent.vectors.combining import terms_of
from tdhook_rl.latent.vectors.origins import weights_of
from tdhook_rl.latent.vectors.places import written_entry
from tdhook_rl.sites.paths import find_sites

Weights = Literal["same", "others", "unknown"]

#: Modules that say how many features they give, and how many dimensions follow these.
_SAYS: dict[type[nn.Module], Callable[[Any], tuple[int, int]]] = {
    **dict.fromkeys((nn.Linear, nn.Bilinear), lambda module: (module.out_features, 0)),
    **dict.fromkeys(
        (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        lambda module: (module.out_channels, len(module.kernel_size)),
    ),
    **dict.fromkeys((nn.LayerNorm, nn.RMSNorm), lambda module: (module.normalized_shape[-1], 0)),
    nn.Embedding: lambda module: (module.embedding_dim, 0),
}
#: Modules that give as many as they are given.
_KEEPS = (nn.ReLU, nn.Tanh, nn.ELU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.LeakyReLU, nn.Mish, nn.Dropout, nn.Identity)
#: Modules that are named as nearest.
_NEAREST = 4


def require_fit(root: nn.Module, path: str, entry: NestedKey | None, shape: torch.Size) -> None:
    """Check that there is such a module, and that it has such features where it says so itself.

    Args:
        root: the module that paths start from.
        path, entry: the place.
        shape: of the direction.

    Raises:
        SiteError: if there is no such module, or it writes no such entry.
        InputError: if it has other features.
    """
    for site in find_sites(root, path, runs=True):
        if entry is not None:
            written_entry(site, entry)
        elif not _may_fit(said := features_said(root, site.module), shape):
            assert said is not None
            alike = [
                name
                for name, module in root.named_modules()
                if name and (found := features_said(root, module)) is not None and _may_fit(found, shape)
            ]
            near = f"of such features are {listed(map(repr, alike), _NEAREST)}" if alike else "no module has such"
            raise InputError(
                f"the direction has the features {tuple(shape)}, and {site.name!r} of {type(root).__name__} gives "
                f"{said[0]}{' channels' if said[1] else ''}: it was found in another network, or at another module; "
                f"{near}"
            )


def features_said(root: nn.Module, module: nn.Module) -> tuple[int, int] | None:
    """How many features (or channels) a module gives, and how many dimensions follow them; ``None`` if nothing says it.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4), nn.Tanh())
        >>> [features_said(net, module) for module in net]
        [(8, 2), (8, 2), None, (4, 0), (4, 0)]
    """
    if type(module) is TensorDictModule and isinstance(module.module, nn.Module) and len(module.out_keys) == 1:
        return features_said(root, module.module)
    if type(module) is nn.Sequential:
        return features_said(module, module[-1]) if len(module) else None
    for kind, said in _SAYS.items():
        # A class of the user's that computes something else says nothing.
        if isinstance(module, kind) and type(module).forward is kind.forward:
            return said(module)
    return _before(root, module) if type(module) in _KEEPS else None


def _before(root: nn.Module, module: nn.Module) -> tuple[int, int] | None:
    """What the modules say that come before one in chains; ``None`` unless they agree."""
    # Where a module stands twice in a chain, children() gives it once.
    chains = [list(one._modules.values()) for one in root.modules() if _is_chain(one)]
    found = {
        features_said(root, chain[place - 1]) if place else None  # type: ignore[arg-type]
        for chain in chains
        for place, one in enumerate(chain)
        if one is module
    }
    return found.pop() if len(found) == 1 else None


def _is_chain(module: nn.Module) -> bool:
    """Whether children run one after the other; TorchRL's networks reshape what goes in and comes out."""
    known = type(module).forward is nn.Sequential.forward or type(module).__module__.startswith("torchrl.")
    return isinstance(module, nn.Sequential) and known


def _may_fit(said: tuple[int, int] | None, shape: torch.Size) -> bool:
    """Whether a direction of this shape may stand for so many features with so many dimensions behind them."""
    if said is None:
        return True
    count, behind = said
    if len(shape) <= behind:  # one number for each channel, or what a call will tell
        return len(shape) > 1 or shape[0] == count
    return shape[len(shape) - 1 - behind] in (count, 1)


def weights_against(facts: Mapping[str, Any], policy: nn.Module) -> Weights:
    """Whether a policy has the weights that a direction was found in; of a sum, that all of its parts were found in."""
    known = [one["of"].get("weights") for one in terms_of(facts)]
    if not all(isinstance(one, str) for one in known):
        return "unknown"
    return "same" if set(known) == {weights_of(policy)} else "others"

"""Pruning: set the least important weights of the hooked policy to zero."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tdhook_rl.arguments.callbacks import takes_keywords
from tdhook_rl.arguments.tensors import plain_number
from tdhook_rl.errors import InputError, SiteError, listed, nearest
from tdhook_rl.method import Binder, Method
from tdhook_rl.weights.computed import ComputedWeight, computed_weights

_ARGUMENTS = ("module_key", "parameter_name", "parameter")


def magnitude(module_key: str, parameter_name: str, parameter: nn.Parameter) -> Tensor | None:
    """The default importance: the absolute value of a weight (Han et al. 2015).

    Biases and one-dimensional scales of normalisation layers are left alone.

    Example:
        >>> magnitude("0", "weight", nn.Parameter(torch.tensor([[-2.0, 0.5]]))).tolist()
        [[2.0, 0.5]]
    """
    return parameter.abs() if "weight" in parameter_name and parameter.ndim > 1 else None


@dataclass(frozen=True, eq=False)
class Pruning(Method):
    """Set the least important weights of the hooked policy to zero (Han et al. 2015).

    Args:
        importance_callback: ``importance_callback(module_key, parameter_name, parameter)``, called once for each
            parameter with keywords where it has those parameters; it returns scores of the parameter's shape, of
            which the size counts and not the sign, or ``None`` to leave the parameter alone. By default
            :func:`magnitude`.
        amount_to_prune: how many of the scored weights become zero, lowest scores first and over all modules
            together: a share (float from 0 to 1, rounded to a count) or a count (int). Of equal scores the
            first goes first. With slices, the amount where a module has none.
        modules_to_prune: paths or patterns that restrict the pruning to these modules and what they contain;
            or ``{path: (dim, amount)}`` to prune whole slices along ``dim`` (rows of a Linear's weight are its
            outputs, ``dim=0``), as many as ``amount`` says, those of lowest norm first (Li et al. 2017). An amount
            of ``None`` is ``amount_to_prune``.
        skip_modules: paths or patterns of modules to leave alone with what they contain, or
            ``skip_modules(name, module) -> bool``.
        norm: the order of the norm of the scores of a slice: 1 for the sum of their sizes.

    The policy is pruned as it is when the context is entered: the hooked policy gets its own copy of each pruned
    parameter, and the user's policy keeps its tensors. Training the user's policy afterwards does not reach the
    copies, and warns; enter the context again to prune the new weights. Weights that are loaded or synchronised
    into the hooked policy replace the pruned ones, zeros included; a collector that synchronises from the hooked
    policy (``update_policy_weights_()`` without arguments) sends the pruned weights.

    A module of several paths (a trunk that actor and critic share) is inside of all that hold it, and a weight that
    modules share is left alone if one of them is.

    Weights under a mask of ``torch.nn.utils.prune`` are scored as the layer uses them. Of noisy layers (``weight_mu``
    and ``weight_sigma``, as in TorchRL's ``NoisyLinear``) means are scored, and the noise of a pruned one goes with it.

    Raises:
        SiteError: if a path matches nothing, or names a module without a weight.
        InputError: if a weight that is to be pruned is computed by a norm or a parametrisation, if the amount
            is absent or out of range, or scores are not finite or of another shape.

    Example:
        >>> from tensordict import TensorDict
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> with Pruning(amount_to_prune=0.5).prepare(net) as hooked:
        ...     data = hooked(TensorDict({"input": torch.randn(3, 4)}, batch_size=3))
        ...     zeros = sum(int((weight == 0).sum()) for weight in hooked.parameters())
        >>> zeros, sum(int((weight == 0).sum()) for weight in net.parameters())
        (24, 0)
        >>> with Pruning(modules_to_prune={"0": (0, 3)}).prepare(net) as hooked:
        ...     int((hooked.module[0].weight == 0).all(1).sum())
        3
    """

    observes = False

    importance_callback: Callable[..., Tensor | None] | None = None
    amount_to_prune: float | int | None = None
    modules_to_prune: str | Sequence[str] | Mapping[str, tuple[int, float | int | None]] | None = None
    skip_modules: str | Sequence[str] | Callable[[str, nn.Module], bool] | None = None
    norm: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "amount_to_prune", plain_number(self.amount_to_prune))
        if not isinstance(self.modules_to_prune, Mapping):
            if self.amount_to_prune is None:
                raise InputError(
                    "Pruning() needs amount_to_prune=, a share such as 0.3 or a count of weights; or "
                    "modules_to_prune={path: (dim, amount)} to prune whole slices"
                )
            _check_amount(self.amount_to_prune, "amount_to_prune")
            return
        slices = {
            path: tuple(map(plain_number, value)) if isinstance(value, (tuple, list)) else value
            for path, value in self.modules_to_prune.items()
        }
        object.__setattr__(self, "modules_to_prune", slices)
        if self.amount_to_prune is not None:
            _check_amount(self.amount_to_prune, "amount_to_prune")
        for path, value in self.modules_to_prune.items():
            if not isinstance(value, (tuple, list)) or len(value) != 2 or not _is_int(value[0]):
                raise InputError(f"modules_to_prune[{path!r}] must be (dim, amount), got {value!r}")
            if value[1] is not None or self.amount_to_prune is None:
                _check_amount(value[1], f"the amount of modules_to_prune[{path!r}]")

    def bind(self, binder: Binder) -> None:
        # Scores may be computed with a graph by the user's callback; none is needed.
        with torch.no_grad():
            masks = self._slices(binder) if isinstance(self.modules_to_prune, Mapping) else self._entries(binder)
            noises = {id(mean): noise for mean, noise in _noises(binder.root)}
            masks += [(noises[id(one)], mask) for one, mask in masks if id(one) in noises]
            binder.own_parameters(
                [(one, one.detach().clone().masked_fill_(mask.to(one.device), 0)) for one, mask in masks]
            )

    def _entries(self, binder: Binder) -> list[tuple[nn.Parameter, Tensor]]:
        """The single weights of lowest score, over all modules together."""
        places = _places(binder.root)
        if self.modules_to_prune is not None:
            paths = [site.path for site in binder.changed_sites(self.modules_to_prune, runs=False, nested=True)]
            places = [place for place in places if _inside(place.paths, paths)]
        scored = self._scored(binder, places)
        if not scored:
            raise SiteError(
                f"there is nothing to prune in {self.modules_to_prune or type(binder.root).__name__!r}: no parameter "
                f"was scored among {[place.name for place in places][:6]}"
            )
        flat = torch.cat([scores.flatten() for _, scores in scored])
        chosen = torch.zeros(flat.numel(), dtype=torch.bool)
        count = _count(self.amount_to_prune, flat.numel(), "amount_to_prune", "weights")
        chosen[torch.argsort(flat, stable=True)[:count]] = True
        parts = chosen.split([scores.numel() for _, scores in scored])
        return [
            (place.parameter, part.reshape(scores.shape)) for (place, scores), part in zip(scored, parts, strict=True)
        ]

    def _slices(self, binder: Binder) -> list[tuple[nn.Parameter, Tensor]]:
        """The slices of lowest norm, in each named module."""
        masks: dict[int, tuple[nn.Parameter, Tensor]] = {}
        every, skip, paths = _places(binder.root), self._skips(binder), _paths(binder.root)
        for path, (dim, amount) in self.modules_to_prune.items():
            named = {id(site.module): site for site in binder.changed_sites(path, runs=False, nested=True)}
            sites = [site for site in named.values() if not skip(paths[id(site.module)], site.module)]
            found = [self._scored(binder, [place for place in every if place.module is site.module]) for site in sites]
            # Of the modules that a pattern matches, one with a weight is enough.
            empty = [site for site, scored in zip(sites, found, strict=True) if not scored]
            if empty and (empty[0].explicit or len(empty) == len(sites)):
                inner = [key for key in dict.fromkeys(place.module_key for place in every) if key]
                kept = [place for place in every if place.module is empty[0].module and self.skip_modules is not None]
                told = " but what skip_modules= leaves alone" if kept else ""
                raise SiteError(
                    f"{empty[0].name!r} ({type(empty[0].module).__name__}) has no weight of its own to prune{told}; "
                    f"{nearest(empty[0].path, inner)}"
                )
            amount = self.amount_to_prune if amount is None else amount
            for place, scores in (pair for scored in found for pair in scored):
                mask = self._slice_mask(place, scores, dim, amount)
                previous = masks.get(id(place.parameter))
                masks[id(place.parameter)] = place.parameter, mask if previous is None else mask | previous[1]
        if not masks:
            raise SiteError(
                f"there is nothing to prune in {listed(map(repr, self.modules_to_prune), 6)}: skip_modules= leaves all "
                "of it alone; of a module or a weight that has several paths each counts"
            )
        return list(masks.values())

    def _slice_mask(self, place: _Place, scores: Tensor, dim: int, amount: float | int) -> Tensor:
        if not -scores.ndim <= dim < scores.ndim:
            raise InputError(f"{place.name!r} of shape {tuple(scores.shape)} has no dimension {dim} to prune slices of")
        rows = scores.movedim(dim, 0)
        norms = torch.linalg.vector_norm(rows.flatten(1) if rows.ndim > 1 else rows[:, None], ord=self.norm, dim=1)
        count = _count(amount, len(norms), f"the amount for {place.name!r}", f"slices along dimension {dim}")
        mask = torch.zeros(rows.shape, dtype=torch.bool)
        mask[torch.argsort(norms, stable=True)[:count]] = True
        return mask.movedim(0, dim)

    def _scored(self, binder: Binder, places: list[_Place]) -> list[tuple[_Place, Tensor]]:
        """The parameters that have scores, each once, with the sizes of the scores in float64 on the CPU."""
        importance = self.importance_callback or magnitude
        keywords, skip = takes_keywords(importance, _ARGUMENTS, "importance_callback"), self._skips(binder)
        scored: dict[int, tuple[_Place, Tensor]] = {}
        alone = {id(place.parameter) for place in _places(binder.root) if skip(place.paths, place.module)}
        for place in places:
            if id(place.parameter) in scored or id(place.parameter) in alone or skip(place.paths, place.module):
                continue
            seen = place.parameter if place.computed is None else nn.Parameter(place.computed.effective(), False)
            arguments = (place.module_key, place.parameter_name, seen)
            scores = importance(**dict(zip(_ARGUMENTS, arguments, strict=True))) if keywords else importance(*arguments)
            if scores is None:
                continue
            if place.computed is not None and not place.computed.is_mask:
                raise InputError(
                    f"{place.name!r} is computed by {place.computed.kind} when {type(place.module).__name__} runs, so "
                    "that zeros in what it is computed from are none in the weight: make it a plain weight first "
                    "(torch.nn.utils.parametrize.remove_parametrizations, remove_spectral_norm, remove_weight_norm), "
                    "or leave the layer alone with skip_modules="
                )
            scored[id(place.parameter)] = place, _checked(scores, place)
        return list(scored.values())

    def _skips(self, binder: Binder) -> Callable[[Sequence[str], nn.Module], bool]:
        """Whether a module is left alone, from all of its paths."""
        if callable(asked := self.skip_modules):
            return lambda paths, module: any(asked(path, module) for path in paths)
        left_alone = (
            []
            if self.skip_modules is None
            else [site.path for site in binder.changed_sites(self.skip_modules, runs=False, nested=True)]
        )
        return lambda paths, module: _inside(paths, left_alone)


class _Place(NamedTuple):
    paths: list[str]  # of the module: several where it is in several places
    module: nn.Module
    parameter_name: str
    parameter: nn.Parameter
    computed: ComputedWeight | None = None  # the weight that a mask or norm makes of the parameter

    @property
    def module_key(self) -> str:
        return self.paths[0]

    @property
    def name(self) -> str:
        return f"{self.module_key}.{self.parameter_name}" if self.module_key else self.parameter_name


def _noises(root: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """The parameters of noisy layers that are a mean, and how large the noise about each is."""
    found = []
    for module in root.modules():
        own = module._parameters
        for name, noise in own.items():
            stem, _, kind = name.rpartition("_")
            mean = own.get(f"{stem}_mu") if kind == "sigma" else None
            if noise is not None and mean is not None and mean.shape == noise.shape:
                found.append((mean, noise))
    return found


def _places(root: nn.Module) -> list[_Place]:
    """The weights that layers compute with, in the place of what these are computed from."""
    places, noises, paths = [], {id(noise) for _, noise in _noises(root)}, _paths(root)
    for path, module in root.named_modules():
        if "parametrizations" in path.split("."):
            continue
        computed = computed_weights(module)
        originals = {name: one for one in computed.values() for name in one.originals}
        for name, parameter in module._parameters.items():
            if parameter is not None and name not in originals and id(parameter) not in noises:
                places.append(_Place(paths[id(module)], module, name, parameter))
        for name, one in computed.items():
            own = one.originals[0] if one.originals else None
            parameter = nn.Parameter(one.effective(), False) if own is None else module._parameters[own]
            places.append(_Place(paths[id(module)], module, name, parameter, one))
    return places


def _paths(root: nn.Module) -> dict[int, list[str]]:
    """All paths of each module, by its id: a trunk that actor and critic share has two."""
    found: dict[int, list[str]] = {}
    for path, module in root.named_modules(remove_duplicate=False):
        found.setdefault(id(module), []).append(path)
    return found


def _inside(paths: Sequence[str], holders: Sequence[str]) -> bool:
    return any(path == holder or path.startswith(f"{holder}.") for path in paths for holder in holders)


def _checked(scores: Any, place: _Place) -> Tensor:
    if not isinstance(scores, Tensor) or scores.shape != place.parameter.shape:
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise InputError(
            f"importance_callback must return scores of shape {tuple(place.parameter.shape)} for {place.name!r}, "
            f"or None to leave it alone, got {got}"
        )
    if not bool(torch.isfinite(scores).all()):
        raise InputError(f"importance_callback returned NaN or infinite scores for {place.name!r}")
    return scores.detach().to("cpu", torch.float64).abs()


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_amount(amount: Any, what: str) -> None:
    if _is_int(amount):
        valid = amount >= 0
    else:
        valid = isinstance(amount, float) and 0 <= amount <= 1
    if not valid:
        raise InputError(f"{what} is a share from 0.0 to 1.0 or a count of at least 0, got {amount!r}")


def _count(amount: Any, total: int, what: str, of: str) -> int:
    count = amount if _is_int(amount) else round(amount * total)
    if count > total:
        raise InputError(f"{what} is {count}, but there are {total} {of}")
    return count

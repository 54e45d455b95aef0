"""Cascading randomisation: an attribution that explains what was learnt must change when it is unlearnt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor, nn

from tdhook_rl.arguments.checked import checked
from tdhook_rl.errors import InputError
from tdhook_rl.method import Method
from tdhook_rl.metrics.scoring import find_attribution, flat, target_name, wide
from tdhook_rl.metrics.untrained import has_parameters, initialise_layer, is_drawn, own_generators
from tdhook_rl.policies.tying import whole_copy
from tdhook_rl.sites.paths import find_sites


@checked
def cascading_randomisation(
    method: Method,
    module: nn.Module,
    data: TensorDictBase,
    *,
    layers: Sequence[str] | None = None,
    initialise: Callable[[nn.Module], Any] | None = None,
    absolute: bool = False,
    in_keys: Sequence[NestedKey] | None = None,
    out_keys: Sequence[NestedKey] | None = None,
    attribution_key: str | None = None,
    target: str | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Correlate attributions with themselves as layers lose what they learnt, one more each step (Adebayo et al. 2018).

    A copy of the module is randomised from the output downwards; the module is not touched. Weights that are computed
    when they are used (norms of weights, ``prune`` masks, parametrisations) are drawn anew with what they are computed
    from, and masks are lifted. The stored actions stay the explained ones. An attribution that depends on the weights
    falls from 1 towards 0; one that stays near 1 shows the input, not the policy. Lower is better.

    Args:
        method: an attribution method, or a ``Compose`` that has one.
        module: the policy or network, trained, not hooked.
        data: a batch that the policy has acted on, of any batch shape; attributions in it are not used.
        layers: paths or patterns of the layers, the first to be randomised first; by default every layer with
            parameters that runs, the last that runs first.
        initialise: what is done to a layer; by default what :func:`~tdhook_rl.metrics.untrained_copy` does.
        absolute: compare absolute values, so that a change of sign alone counts as none.
        in_keys: for a plain module, as in ``prepare``.
        out_keys: likewise.
        attribution_key: which attribution is compared, by its root; not needed where there is one.
        target: which target is compared, where the method explains several.
        seed: of the new weights, which are not those of ``torch.manual_seed(seed)``, by which the module itself may
            have been made; the global generators are as before afterwards.

    Returns:
        by step, ``"original"`` and then the path of the layer randomised last, Spearman's rank correlation with
        the original for each row, the batch shape, over all that is explained; NaN where an attribution is constant or
        has NaN.

    Raises:
        InputError: for a batch that is empty, a method without attribution, or a layer that cannot be initialised or
            has the same weights afterwards.
        SiteError: if a pattern matches no layer.

    Example:
        >>> from tensordict import TensorDict
        >>> from tdhook_rl.attribution import Saliency
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> data = TensorDict({"input": torch.randn(3, 4)}, batch_size=3)
        >>> found = cascading_randomisation(Saliency(), net, data)
        >>> list(found), found["original"]
        (['original', '2', '0'], tensor([1., 1., 1.]))
    """
    if data.batch_size.numel() == 0:
        raise InputError(f"there is nothing to score: the batch has shape {tuple(data.batch_size)}")
    own = whole_copy(module, "cascading_randomisation changes")
    keys = {"in_keys": in_keys, "out_keys": out_keys}

    def attributions() -> Tensor:
        with method.prepare(own, **keys) as hooked:
            bound = find_attribution(hooked, attribution_key)
            name = target_name(bound, target)
            prefix = (bound.root, *([name] if name else []))
            found = hooked.annotate(
                data.exclude(*{key[0] for key in hooked.result_keys}, "computed"), on_mismatch="ignore"
            )
            wanted = [key for key in bound.result_keys if key[: len(prefix)] == prefix]
            values = flat({key: found.get(key).detach() for key in wanted}, data.batch_size)
            return values.abs() if absolute else values

    original = attributions()
    if layers is None:
        paths = _running_layers(own, method, data, keys, all_of_them=initialise is not None)
    else:
        paths = [site.path for pattern in layers for site in find_sites(own, pattern)]
    results = {"original": spearman(original, original)}
    with own_generators(seed):
        for path in dict.fromkeys(paths):
            initialise_layer(own, path, initialise)
            results[path or "(root)"] = spearman(original, attributions())
    return results


def spearman(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's rank correlation over the last dimension, ties with their mean rank; NaN for constants, and where one
    has NaN.

    Example:
        >>> spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 40.0, 9.0]))
        tensor(0.5000)
    """
    x, y = (_mean_ranks(values) for values in (first, second))
    x, y = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
    found = (x * y).sum(-1) / (x.square().sum(-1) * y.square().sum(-1)).sqrt()
    return wide(found.masked_fill((first.isnan() | second.isnan()).any(-1), torch.nan).to(first.dtype))


def _mean_ranks(values: Tensor) -> Tensor:
    values = values.contiguous()
    ordered = values.sort(-1).values
    below = torch.searchsorted(ordered, values, right=False)
    up_to = torch.searchsorted(ordered, values, right=True)
    return (below + up_to + 1).double() / 2


def _running_layers(
    own: nn.Module, method: Method, data: TensorDictBase, keys: dict[str, Any], all_of_them: bool
) -> list[str]:
    """The layers with parameters of their own, the last that runs first; without vectors that nothing initialises,
    unless all are asked for."""
    ran: list[str] = []
    handles = []
    for path, child in own.named_modules():
        if has_parameters(path, child) and (all_of_them or is_drawn(own, path)):
            handles.append(child.register_forward_hook(lambda *_, path=path: ran.append(path)))
    try:
        # The hooked clone of a module has copies of the module's hooks: these call the same list.
        with method.prepare(own, **keys) as hooked:
            hooked.annotate(data.exclude(*{key[0] for key in hooked.result_keys}, "computed"), on_mismatch="ignore")
    finally:
        for handle in handles:
            handle.remove()
    order = list(dict.fromkeys(ran))[::-1]
    if not order:
        raise InputError(
            f"no layer of {type(own).__name__} that runs has parameters: there is nothing to randomise; name layers="
        )
    return order

"""What has no attribution is NaN: rows without a finite target, and, with a warning, what no gradient reaches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from tensordict import NestedKey
from torch import Tensor, nn

from tdhook_rl.calls.passes import Call
from tdhook_rl.errors import TargetError, warn
from tdhook_rl.sites.numbers import is_whole
from tdhook_rl.targets import no_path

#: Modules that are looked up by integers.
TABLES = (nn.Embedding, nn.EmbeddingBag)


def defined_rows(call: Call, reached: Tensor) -> Tensor:
    """The rows whose target is finite; in recurrent mode those from whose step on it is, up to the trajectory's end."""
    return through_time(call, torch.isfinite(reached))


def through_time(call: Call, defined: Tensor) -> Tensor:
    """In recurrent mode the rows from whose step on there is a number, up to the trajectory's end; else those given."""
    policy = call.policy
    if not policy._hooked.traits.read_trajectories(policy) or defined.shape != call.batch_size:
        return defined
    starts = call.data.get("is_init", torch.zeros_like(defined)).reshape(defined.shape)
    steps = list(defined.unbind(-1))
    for step in range(len(steps) - 2, -1, -1):
        steps[step] = steps[step] & (steps[step + 1] | starts[..., step + 1])
    return torch.stack(steps, -1)


def nan_undefined_rows(defined: Tensor, gradient: Tensor) -> Tensor:
    """NaN in the rows whose target is NaN or infinite: a number there would say something that is not so."""
    if gradient.shape[: defined.ndim] != defined.shape:
        if not gradient.ndim or gradient.shape[0] != defined.numel():
            return gradient
        defined = defined.reshape(-1)  # convolutional nets flatten the leading dimensions
    return torch.where(defined.reshape((*defined.shape, *(1,) * (gradient.ndim - defined.ndim))), gradient, torch.nan)


def with_nan(gradients: Sequence[Tensor | None], points: Sequence[Tensor], defined: Tensor | None) -> list[Tensor]:
    """The gradients, NaN where there is none; ``defined`` says for which rows there is one, if not for all.

    What no gradient reaches is NaN: zero would say that it does not matter.
    """
    filled = [
        torch.full_like(point, torch.nan) if one is None else one for one, point in zip(gradients, points, strict=True)
    ]
    return filled if defined is None else [nan_undefined_rows(defined, one) for one in filled]


def unreached_integers(call: Call, keys: Iterable[NestedKey]) -> str:
    """What to do where no gradient reaches integers, such as the numbers of objects that a table is looked up by."""
    found = {key: call.inputs.get(key) for key in keys}
    whole = [repr(key) for key, one in found.items() if one is not None and is_whole(one) and one.dtype != torch.bool]
    if not whole:
        return ""
    tables = [path for path, module in call.policy.hooked_root.named_modules() if isinstance(module, TABLES)]
    return (
        f". Of integers ({', '.join(whole)}) that a table is looked up by, or that are compared, there is none: "
        f"explain what the module that reads them gives, input_modules={tables or '[path]'}, or use Occlusion, which "
        "needs none"
    )


def warn_unreached(
    call: Call,
    target: Callable[..., Any],
    gradients: Sequence[Tensor | None],
    inputs: Iterable[NestedKey],
    sites: Iterable[str],
) -> None:
    """Warn, once, of what has no gradient at all; other than a gradient of zero, that says nothing about its effect.

    The gradients are those of the inputs and then of the sites, ``None`` where there is no path.

    Raises:
        TargetError: if nothing is reached.
    """
    if all(gradient is not None for gradient in gradients):
        return
    if all(gradient is None for gradient in gradients):
        raise TargetError(no_path(target, inputs, sites) + unreached_integers(call, inputs))
    runtime = call.policy._hooked.runtime
    unreached = [name for name, one in zip((*inputs, *sites), gradients, strict=True) if one is None]
    names = dict.fromkeys(map(repr, unreached))
    of = getattr(target, "name", "the target")
    message = (
        f"no gradient of {of} reaches {', '.join(names)}: it is cut off on the way (no_grad, detach, rounding), or "
        "nothing reads it of what is explained. NaN is written for it. Leave it out with inputs=[...], choose another "
        "target, or measure its effect with Occlusion, which needs no gradient"
    ) + unreached_integers(call, unreached)
    if message not in runtime.warned:
        runtime.warned.add(message)
        warn(message)

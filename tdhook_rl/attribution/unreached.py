"""A warning that names the inputs and activations that no gradient of a target reaches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tensordict import NestedKey
from torch import Tensor

from tdhook_rl.errors import TargetError, warn
from tdhook_rl.sites.runtime import Runtime
from tdhook_rl.targets import no_path

__all__ = ["warn_unreached"]


def warn_unreached(
    runtime: Runtime,
    target: Callable[..., Any],
    gradients: Sequence[Tensor | None],
    inputs: Iterable[NestedKey],
    sites: Iterable[str],
) -> None:
    """Warn, once, of what has no gradient at all; other than a gradient of zero, that says nothing about its effect.

    Args:
        runtime: of the policy.
        target: what is explained.
        gradients: of each input, then of each site; ``None`` where there is no path.
        inputs: the explained inputs.
        sites: the explained modules.

    Raises:
        TargetError: if nothing is reached.
    """
    if all(gradient is not None for gradient in gradients):
        return
    if all(gradient is None for gradient in gradients):
        raise TargetError(no_path(target, inputs, sites))
    unreached = [name for name, one in zip((*inputs, *sites), gradients, strict=True) if one is None]
    names = dict.fromkeys(map(repr, unreached))
    of = getattr(target, "name", "the target")
    message = (
        f"no gradient of {of} reaches {', '.join(names)}: it is cut off on the way (no_grad, detach, rounding), or "
        "nothing reads it of what is explained. NaN is written for it. Leave it out with inputs=[...], choose another "
        "target, or measure its effect with Occlusion, which needs no gradient"
    )
    if message not in runtime.warned:
        runtime.warned.add(message)
        warn(message)

"""Whether a policy's passes can be repeated: two on the same inputs, state and noise give the same outputs.

Where they do not, the forward writes, or reads, something that the policy does not hold: a file, the time, a server, an
object of C. Our passes would advance it, the policy would act by that, and what is explained would not be what ran.
"""

from __future__ import annotations

import torch
from tensordict import NestedKey
from torch import Tensor

from tdhook_rl.calls.passes import Call, effects_of
from tdhook_rl.errors import InputError
from tdhook_rl.sites.known import own_class

#: How far the outputs of two passes may differ: some kernels add up in another order each time.
RELATIVE, ABSOLUTE = 1e-3, 1e-5


def require_repeatable(call: Call) -> None:
    """Look at this, in the first calls of a policy that has modules of the user's own.

    Where passes differ, what the policy's code writes in classes, closures and globals is kept for them from then on.

    Raises:
        InputError: if they differ nevertheless.
    """
    effects, start = effects_of(call.policy), call.start
    if start is None or call.policy._hooked.runtime.level >= 0 or not effects.look_at_repeats():
        return
    with start.wide():
        differs = _differing(call)
    if differs is not None and start.look_wide():
        differs = _differing(call)
    if differs is not None:
        raise InputError(
            f"two passes of {own_class(call.policy).__name__} over the same inputs, state and noise give another "
            f"{differs!r}, so what is explained would not be what ran, and passes would change how it acts: "
            f"{_suspects(call)} reads or writes state that it does not hold (an iterator or counter of itertools, a "
            "file, the time, a variable elsewhere). Keep that state in a buffer or an attribute, or pass it in as an "
            "input"
        )


def _differing(call: Call) -> NestedKey | None:
    """The output in which two passes differ."""
    with torch.no_grad():
        first, again = (call.replay(as_it_was=True).outputs for _ in range(2))
    for key in call.policy.policy_out_keys:
        one, other = first.get(key, None), again.get(key, None)
        if isinstance(one, Tensor) and isinstance(other, Tensor) and not _alike(one, other):
            return key
    return None


def _alike(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.is_meta:  # which has no numbers
        return one.shape == other.shape
    if one.is_floating_point() or one.is_complex():
        return torch.allclose(one, other, rtol=RELATIVE, atol=ABSOLUTE, equal_nan=True)
    return torch.equal(one, other)


def _suspects(call: Call) -> str:
    """The modules whose forward is the user's own, by path and class."""
    modules = effects_of(call.policy).watch.modules
    own = [(path, module) for path, module in modules if not type(module).__module__.startswith("torch.")]
    named = ((path, own_class(module).__name__) for path, module in own or modules)
    names = [f"{path!r} ({name})" if path else name for path, name in named]
    return ", ".join(names[:3]) + (f" or one of {len(names) - 3} more" if len(names) > 3 else "")

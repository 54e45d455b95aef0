"""One step of TorchRL's recurrent modules over the entries that they read.

``GRUModule`` and ``LSTMModule`` put the whole TensorDict into the shape of a sequence, and write all of it back: in a
step that takes longer than what they compute.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook_rl.arguments.keys import get_entry
from tdhook_rl.calls.writing import set_tensor
from tdhook_rl.internals.torchrl_names import recurrent_step
from tdhook_rl.sites.classes import Swapped


class OneStepMixin(Swapped):
    """A recurrent module below the root of a hooked policy, which reads and writes its own entries only."""

    @classmethod
    def _namespace(cls, base: type[nn.Module]) -> dict[str, Any]:
        usual = base.forward

        @functools.wraps(usual)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            data = args[0] if len(args) == 1 and not kwargs else None
            in_steps = type(data) is TensorDict and not torch.compiler.is_compiling() and not self.recurrent_mode
            if in_steps and _step(self, data):  # type: ignore[arg-type]
                return data
            return usual(self, *args, **kwargs)

        return {"forward": forward}


@functools.cache
def steps_alone() -> frozenset[type]:
    """The classes whose steps are known."""
    from torchrl.modules import GRUModule, LSTMModule

    return frozenset((GRUModule, LSTMModule))


def _step(module: Any, data: TensorDict) -> bool:
    """Write the outputs of a step; ``False`` where the data is not what it reads, which the module says itself."""
    batch, number = data.batch_size, len(module.out_keys) - 1
    value, *states = [get_entry(data, key) for key in module.in_keys[: number + 1]]
    is_init = get_entry(data, "is_init")
    if type(value) is not Tensor or type(is_init) is not Tensor or is_init.shape != (*batch, 1) or not is_init.numel():
        return False
    known = [type(state) is Tensor for state in states]
    if any(known) != all(known) or (not any(known) and any(state is not None for state in states)):
        return False
    rows = batch.numel()
    if any(known):
        states = [state.reshape(rows, 1, *state.shape[len(batch) :]) for state in states]
        if bool(is_init.any()):
            begins = is_init.reshape(rows, 1, 1, 1)
            states = [torch.where(begins, 0, state) for state in states]
    found = recurrent_step(module, value.reshape(rows, 1, *value.shape[len(batch) :]), states)
    for key, one in zip(module.out_keys, found, strict=True):
        set_tensor(data, key, one.reshape((*batch, *one.shape[2:])))
    return True

"""What is used of the insides of ``torch.func``: it hides batched dimensions, and no public call takes them out."""

from __future__ import annotations

import torch
from torch._functorch import vmap

# All of these are aliases, not functions around: `torch.compile` knows them by identity.

#: Whether a ``vmap`` hides a dimension of a tensor.
is_batchedtensor = torch._C._functorch.is_batchedtensor
#: Whether any transform (``vmap``, ``grad``, ...) has wrapped a tensor.
is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
#: The tensor in a wrapped one, one level further out.
get_unwrapped = torch._C._functorch.get_unwrapped
#: The level of the transform that has wrapped a tensor, from 1; -1 for others.
maybe_get_level = torch._C._functorch.maybe_get_level
#: The dimension of the unwrapped tensor that its ``vmap`` hides; -1 for others.
maybe_get_bdim = torch._C._functorch.maybe_get_bdim
#: ``(tensor, dim, level)``: let the ``vmap`` of a level hide a dimension.
add_batch_dim = vmap._add_batch_dim
#: ``(tensor, level, size, dim)``: what the ``vmap`` of a level hides, in the place of a dimension; traced, where
#: :data:`get_unwrapped` is not.
remove_batch_dim = vmap._remove_batch_dim
#: The transforms around the caller, the innermost last, each with ``level()``; ``None`` outside.
transform_stack = torch._C._functorch.get_interpreter_stack
#: The innermost transform around the caller, ``None`` outside.
in_transform = torch._C._functorch.peek_interpreter_stack
#: Whether a transform is around the caller, also where ``torch.compile`` traces, which cannot read the stack.
are_transforms_active = torch._C._are_functorch_transforms_active
#: ``(size, randomness)``: enter a ``vmap`` and say its level; the way to ask for a level that ``torch.compile`` traces.
increment_nesting = vmap._vmap_increment_nesting
#: Leave the ``vmap`` that :data:`increment_nesting` has entered.
decrement_nesting = vmap._vmap_decrement_nesting

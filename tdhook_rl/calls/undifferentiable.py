"""What policies, or targets, do of which torch takes no gradient, by how torch says so, and what to do about it."""

from __future__ import annotations

import re

from tdhook_rl.calls.chains import MODIFIED
from tdhook_rl.errors import InPlaceError, InputError, TdhookError

#: What torch says where a tensor is written over in place, or into ``out=``, which it records nothing of.
_IN_PLACE = re.compile(
    r"is a view and is being modified inplace|leaf Variable .* in-place operation|functions with out=\.\.\. arguments|"
    r"cannot resize variables|derivative for (set_|resize_)"
)
#: What it says of anything else, what the policy does then, and what would do instead.
_OTHERWISE = (
    (re.compile(r"Can't call numpy\(\) on Tensor that requires grad"),
     "leaves torch for NumPy, which no gradient goes through", "write .detach().numpy() where it does"),
    (re.compile(r"[Ii]nference tensor"),
     "works on tensors that were made under inference_mode, which no gradient goes through", "make them under no_grad"),
    (re.compile(r"use_reentrant=True"),
     "runs checkpoint(use_reentrant=True), which gives no gradient of inputs", "write use_reentrant=False"),
    (re.compile(r"must override the setup_context|Attempted to (call|compute) .*setup_context"),
     "runs a torch.autograd.Function without setup_context (checkpoint(use_reentrant=True) is one)",
     "call it outside of inference_mode, or write checkpoint(use_reentrant=False)"),
    (re.compile(r"derivative for '?(?P<name>[\w.:]+)'? is not implemented|(?P<other>[\w.:]+) is not differentiable"),
     "calls what torch has no derivative of", "write it otherwise"),
)  # fmt: skip


def in_words(error: RuntimeError) -> TdhookError | None:
    """What an error of torch says of the policy, or of a target; ``None`` where it is something else, as their own.

    Example:
        >>> import torch
        >>> x = torch.ones(2, requires_grad=True)
        >>> try:
        ...     torch.mul(x, 2, out=torch.empty(2))
        ... except RuntimeError as error:
        ...     print(type(in_words(error)).__name__)
        InPlaceError
    """
    if isinstance(error, TdhookError):
        return None
    said = str(error)
    short = re.split(r"\. (?:Hint|This view|To resolve|To work around|For more)", said)[0]
    if MODIFIED in said:
        return InPlaceError(
            "what a derivative of the policy needs is changed in place: by its own forward, such as an in-place ReLU "
            "over the output of a Tanh, which no gradient can be taken of (write the layer with inplace=False), or by "
            f"a learner that changes the weights all the time. torch says: {short}"
        )
    if _IN_PLACE.search(said):
        return InPlaceError(
            "the policy, or a target of one's own, works in place in a way of which no gradient can be taken: write "
            "the statement as one that makes a new tensor, or use Occlusion, which needs no gradient. torch says: "
            f"{short}"
        )
    for pattern, what, remedy in _OTHERWISE:
        if pattern.search(said):
            return InputError(
                f"the policy, or a target of one's own, {what}: {remedy}, explain what follows with "
                f"input_modules=[path], or use Occlusion, which needs no gradient. torch says: {short}"
            )
    return None

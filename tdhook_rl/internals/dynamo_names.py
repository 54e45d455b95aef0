"""What is used of the insides of ``torch.compile``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._dynamo import OptimizedModule
from torch._dynamo.eval_frame import skip_code
from torch._dynamo.exc import TorchDynamoException

__all__ = ["TorchDynamoException", "compiled_from", "get_eval_frame_callback", "is_compiled", "skip_code"]

# `TorchDynamoException` is what a call with fullgraph=True raises where its graph breaks: `torch.compiler` names no
# class for it. `skip_code(code)` lets no graph begin in a function, which stays a part of its caller's: the public
# `disable` would break that graph. `get_eval_frame_callback()` is None where nothing that is called would be compiled:
# no public call says so inside of a frame that itself is run as Python.


def compiled_from(function: Callable[..., Any]) -> Callable[..., Any] | None:
    """The function that ``torch.compile`` made this one of; ``None`` for one that it did not make.

    The public ``torch.compiler`` has no question, and ``__wrapped__`` is that of any decorator.
    """
    own = getattr(function, "__dict__", {})
    return own.get("_torchdynamo_orig_callable") if own.get("_is_torch_compile") else None


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is one of ``torch.compile(module)`` or was told ``module.compile()``; torch has no question."""
    return isinstance(module, OptimizedModule) or module._compiled_call_impl is not None

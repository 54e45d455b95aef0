"""What is used of the insides of ``torch.compile``."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._dynamo import OptimizedModule
from torch._dynamo.eval_frame import skip_code
from torch._dynamo.exc import TorchDynamoException

__all__ = [
    "TorchDynamoException",
    "compiled_from",
    "get_eval_frame_callback",
    "is_compiled",
    "is_of_library_code",
    "skip_code",
]

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


#: What a compiled graph asks of functions, classes and modules: whether a name still means the same one.
_IDENTITIES = frozenset(["CLOSURE_MATCH", "FUNCTION_MATCH", "BUILTIN_MATCH", "CLASS_MATCH", "MODULE_MATCH"])
#: How it calls a name in a module that it has traced: of one of these libraries, the same all along. What is inside of
#: it is still asked, such as the forward of a class, in whose place somebody may put another.
_LIBRARY_NAME = re.compile(r"G\['__import_(torch|tensordict|torchrl|tdhook_rl)(_dot_\w+)?'\]\.\w+")


def is_of_library_code(guard: Any) -> bool:
    """Whether a guard of a compiled graph asks only whether a name in a module of a library means what it meant.

    Dynamo has a public filter for guards, and no public words for what they ask.
    """
    return guard.guard_type in _IDENTITIES and _LIBRARY_NAME.fullmatch(guard.name) is not None

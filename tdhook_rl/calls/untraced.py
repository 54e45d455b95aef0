"""A call that ``torch.compile`` cannot trace as one graph runs uncompiled, with all that it calls.

Where a graph breaks, the compiler runs the frame it broke in as Python, and compiles the functions that this calls one
by one. The parts of a hooked call would then disagree on whether they are traced: one has kept the state that a pass
starts from, another takes it that there is none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from tdhook_rl.internals.dynamo_names import get_eval_frame_callback, skip_code

Function = TypeVar("Function", bound=Callable[..., Any])


def traced_whole(function: Function) -> Function:
    """A decorator: the function is traced as a part of its caller's graph, but no graph begins in it.

    So ``torch.compiler.is_compiling()`` says, inside, whether the whole of its call is in a graph.
    """
    skip_code(function.__code__)
    return function


def uncompiled(function: Callable[..., Any], *args: Any) -> Any:
    """What the function returns, where neither it nor anything that it calls is compiled on the way.

    What was compiled before, by itself, and is called in it runs compiled.
    """
    if get_eval_frame_callback() is None:
        return function(*args)
    return torch.compiler.disable(function)(*args)

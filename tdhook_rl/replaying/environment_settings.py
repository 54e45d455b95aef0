"""What an environment was made with: the arguments that it, its transforms and what it wraps keep under their names."""

from __future__ import annotations

import argparse
import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchrl.data import TensorSpec
from torchrl.envs import EnvBase

from tdhook_rl.files.functions import in_words
from tdhook_rl.internals.torchrl_names import wrapped_env
from tdhook_rl.replaying.environment_state import holders

#: How an environment is run, and not what it is; a seed is given to each play.
_RUNNING = frozenset({
    "allow_done_after_reset", "allow_step_when_done", "consolidate", "daemon", "device", "memmap",
    "metadata_from_workers", "mp_start_method", "non_blocking", "num_sub_threads", "num_threads", "pin_memory",
    "policy_proof", "render_mode", "run_type_checks", "seed", "serial_for_single", "share_individual_td",
    "shared_memory", "shutdown_timeout", "use_buffers",
})  # fmt: skip
#: Arguments that TorchRL takes before the class sees them.
_ALSO = ("frame_skip", "wrapper_frame_skip")
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, Tensor, np.ndarray, np.generic)


def settings_of(env: EnvBase) -> dict[str, str]:
    """By name, in words that are the same in every process, and others where an environment was made otherwise.

    Example:
        >>> from torchrl.envs import StepCounter, TransformedEnv
        >>> from tdhook_rl.envs import CueCorners
        >>> settings_of(TransformedEnv(CueCorners(), StepCounter(max_steps=5)))["StepCounter.max_steps"]
        '5'
    """
    found: dict[str, str] = {}
    for holder in _all(env):
        for name, value in _arguments(holder).items():
            named = f"{type(holder).__name__}.{name}"
            again = sum(one == named or one.startswith(f"{named}, ") for one in found)
            found[f"{named}, {again + 1}" if again else named] = in_words(value)
    return found


def _all(env: EnvBase) -> list[Any]:
    found = holders(env)
    inside = wrapped_env(found[-1])
    while inside is not None and not any(inside is one for one in found):
        found.append(inside)
        inside = getattr(inside, "env", None)
    return found


def _arguments(holder: Any) -> dict[str, Any]:
    """Arguments of its class that are kept as attributes, and what Gymnasium says that it was made with."""
    kept: Mapping[str, Any] = getattr(holder, "__dict__", {})
    found = {name: kept[name] for name in _ALSO if name in kept}
    for kind in reversed(type(holder).__mro__):
        made = vars(kind).get("__init__")
        for name in inspect.signature(made).parameters if inspect.isfunction(made) else ():
            for one in (name, f"_{name}"):
                value = _unwrapped(kept[one]) if one in kept and _says(kind, name) else holder
                if is_setting(value):
                    found[name] = value
    spec = kept.get("spec")
    for name in ("id", "kwargs", "max_episode_steps"):
        value = getattr(spec, name, None)
        if is_setting(value) and value is not None:
            found[name] = {key: one for key, one in value.items() if key not in _RUNNING} if name == "kwargs" else value
    return found


def _says(kind: type, name: str) -> bool:
    """Whether an argument of a class says what an environment is. Keys and specs TorchRL's transforms look up late."""
    looked_up = kind.__module__.startswith("torchrl.") and name.endswith(("_key", "_keys", "keys_inv", "_spec"))
    return name not in _RUNNING and not looked_up


def _unwrapped(value: Any) -> Any:
    """Functions that make environments, of what TorchRL makes of them."""
    if isinstance(value, list):
        return [_unwrapped(one) for one in value]
    for name in ("create_env_fn", "fn"):
        value = getattr(value, name, value)
    return value


def is_setting(value: Any) -> bool:
    """Whether something can be told in words, and is no state of what runs."""
    if isinstance(value, (*_PLAIN, functools.partial, type)) or inspect.isroutine(value):
        return True
    if isinstance(value, TensorSpec):  # it follows from the others
        return False
    if is_dataclass(value):
        return all(is_setting(getattr(value, one.name, None)) for one in fields(value))
    if isinstance(value, SimpleNamespace | argparse.Namespace):
        return is_setting(vars(value))
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and is_setting(one) for key, one in value.items())
    return isinstance(value, Sequence) and all(map(is_setting, value))

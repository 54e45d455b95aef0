"""Policies that come from elsewhere, as TorchRL policies over their own tensors.

Everything of this library then works on them. The other libraries are imported when their agents are handed in, and
nothing below this room knows of them.
"""

from typing import TYPE_CHECKING, Any

from tdhook_rl.adapters.modules import from_module
from tdhook_rl.adapters.rsl_rl import from_rsl_rl
from tdhook_rl.adapters.sb3 import from_sb3
from tdhook_rl.adapters.sb3_data import sb3_data, vec_env_rollout

if TYPE_CHECKING:
    from tdhook_rl.adapters.sb3_callback import ExplainCallback

__all__ = ["ExplainCallback", "from_module", "from_rsl_rl", "from_sb3", "sb3_data", "vec_env_rollout"]


def __getattr__(name: str) -> Any:
    if name == "ExplainCallback":  # a class of Stable-Baselines3's, which is imported with it
        try:
            from tdhook_rl.adapters.sb3_callback import ExplainCallback
        except ModuleNotFoundError as error:
            if error.name != "stable_baselines3":
                raise
            raise ImportError(
                "ExplainCallback is a callback of Stable-Baselines3, which is not installed: pip install "
                "'tdhook_rl[sb3]'"
            ) from None
        return ExplainCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

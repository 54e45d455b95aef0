"""What is known of a policy by the classes of its modules: which ones write nothing, draw nothing, keep rows apart.

The forward of torch's own layers without buffers writes nothing, and that of TensorDict's and TorchRL's common wrappers
neither; a policy made of them needs no watching. Everything else is looked at while it runs.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from tensordict.nn import ProbabilisticTensorDictModule, TensorDictModule, TensorDictModuleBase, TensorDictParams
from torch import nn

from tdhook_rl.internals.torch_names import BatchNorm, DropoutNd
from tdhook_rl.sites.classes import Swapped
from tdhook_rl.sites.listed import named_modules
from tdhook_rl.sites.root_hooks import hooks_of

#: By this attribute, ``True``, a class of modules says that its forward writes nothing and draws nothing, whatever the
#: modules do that it calls; a subclass, which may have a forward of its own, does not.
WRITES_NOTHING = "writes_nothing"


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class that the user gave a module, where the clone's is one of ours."""
    kind = type(module)
    while issubclass(kind, Swapped) and hasattr(kind, "_base"):
        kind = kind._base
    return kind


@cache
def _wrappers() -> frozenset[type]:
    import tensordict.nn as td
    import torchrl.modules as rl
    from tensordict.nn.utils import biased_softplus

    names = (
        (td, ("TensorDictModule", "TensorDictSequential", "ProbabilisticTensorDictSequential", "NormalParamExtractor",
              "ProbabilisticTensorDictModule", "AddStateIndependentNormalScale")),
        (rl, ("ProbabilisticActor", "Actor", "ValueOperator", "QValueActor", "QValueModule", "MLP", "ConvNet",
              "SafeModule", "SafeSequential", "SafeProbabilisticModule", "SafeProbabilisticTensorDictSequential",
              "ActorCriticWrapper", "ActorValueOperator", "NormalParamExtractor", "DistributionalQValueModule",
              "DistributionalQValueActor", "MultiAgentMLP", "MultiAgentConvNet", "LSTMModule", "GRUModule",
              "DuelingCnnDQNet", "DdpgMlpActor", "DdpgMlpQNet", "DdpgCnnActor", "DdpgCnnQNet", "Squeeze2dLayer")),
    )  # fmt: skip
    found = {getattr(home, name) for home, listed in names for name in listed if hasattr(home, name)}
    return frozenset(found | {biased_softplus})  # what NormalParamExtractor makes scales by


def _writes_nothing(module: nn.Module) -> bool:
    kind, own = own_class(module), module.__dict__
    if "forward" in own or not all(map(_is_known, hooks_of(module))):
        return False
    if kind in _wrappers():
        if isinstance(module, ProbabilisticTensorDictModule):
            return not getattr(module, "cache_dist", False)
        return not isinstance(module, TensorDictModule) or "module" not in own  # it calls no function of the user's
    if vars(kind).get(WRITES_NOTHING) is True:
        return True
    return kind.__module__.startswith("torch.nn.modules.") and not module._buffers


def _is_known(hook: object) -> bool:
    """Whether a hook is one of ours, and runs no function of the user's; adapters are looked at as modules."""
    ours = type(getattr(hook, "__self__", hook)).__module__.startswith("tdhook_rl.")
    code = user_code(hook)
    return ours and (code is None or isinstance(code, nn.Module))


def user_code(hook: object) -> Any:
    """What an intervention runs in its hook that is the user's: an adapter, a function; ``None`` of other hooks."""
    return getattr(hook, "user_code", None) if type(hook).__module__.startswith("tdhook_rl.") else None


def all_modules(policy: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules of a policy with their paths, and those of the adapters on them, which are none of its own."""
    found = named_modules(policy)
    for path, module in list(found):
        for hook in hooks_of(module):
            if isinstance(adapter := user_code(hook), nn.Module):
                name = f"the adapter at {path}"
                found += [(f"{name}.{inner}" if inner else name, child) for inner, child in named_modules(adapter)]
    return found


def unknown_modules(policy: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules of a policy, with their paths, whose forward may write something that the policy holds."""
    return [
        (path, module)
        for path, module in all_modules(policy)
        if not isinstance(module, TensorDictParams) and not _writes_nothing(module)
    ]


def writes_input(module: nn.Module) -> bool:
    """Whether a known layer was told to work in place; ``inplace`` of a TensorDictModule says where entries go."""
    return getattr(module, "inplace", False) is True and not isinstance(module, TensorDictModuleBase)


def is_vmapped(module: nn.Module) -> bool:
    """Whether a module of TorchRL runs copies of a network, one for each agent, inside ``vmap``."""
    from torchrl.modules.models.multiagent import MultiAgentNetBase

    return isinstance(module, MultiAgentNetBase) and not module.share_params


def may_draw(module: nn.Module) -> bool:
    """Whether :func:`draws_noise` may be true of a module in some mode."""
    return isinstance(module, (DropoutNd, nn.RNNBase, nn.MultiheadAttention, nn.RReLU))


def draws_noise(module: nn.Module) -> bool:
    """Whether a layer of torch draws in its forward, in the mode that it is in."""
    if isinstance(module, DropoutNd):
        return module.training and module.p > 0
    if isinstance(module, nn.RNNBase):
        return module.training and module.dropout > 0
    if isinstance(module, (nn.MultiheadAttention, nn.RReLU)):
        return module.training and getattr(module, "dropout", 1.0) > 0
    return False


def may_meet(module: nn.Module) -> bool:
    """Whether :func:`batch_statistics` may be true of a module in some mode."""
    return isinstance(module, BatchNorm) or own_class(module).__name__ == "BatchRenorm1d"


def batch_statistics(module: nn.Module) -> bool:
    """Whether rows meet in a layer, in the mode that it is in: it normalises by the statistics of its batch."""
    if isinstance(module, BatchNorm):
        return module.training or module.running_mean is None
    return module.training and own_class(module).__name__ == "BatchRenorm1d"

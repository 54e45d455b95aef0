"""The hooked policy that a TorchRL ``Trainer`` works with: it acts in the collector, or stands in the loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from tdhook_rl.errors import PreparationError
from tdhook_rl.hooking.hooked import HookedMixin
from tdhook_rl.internals.torchrl_names import modules_of, sent_policy

if TYPE_CHECKING:
    from torchrl.trainers import Trainer

__all__ = ["policy_of_trainer"]


def policy_of_trainer(trainer: Trainer, whose: str) -> Any:
    """The hooked policy of a trainer: what its collector acts with comes first, then what its loss and hooks hold.

    A policy that is a part of another, such as one before an exploration module, is found as well.

    Args:
        trainer: the trainer.
        whose: who asks, for messages.

    Raises:
        PreparationError: where nothing is hooked; it names what was found.
    """
    found = []
    for place, module in _places(trainer):
        for part in module.modules() if isinstance(module, nn.Module) else (module,):
            if isinstance(part, HookedMixin):
                return part
        found.append(f"{place} is a plain {type(module).__name__}")
    raise PreparationError(
        f"{whose} was made without a policy, and the trainer has no hooked one ({'; '.join(found) or 'no policy'}): "
        "give its collector the hooked policy, with Saliency().prepare(actor) as policy: ..., or in YAML "
        "_target_: tdhook_rl.method.Method.prepare with self, module and return_context: false; or give it to "
        f"{whose}(policy)"
    )


def _places(trainer: Trainer) -> Iterator[tuple[str, Any]]:
    """What may be a policy or hold one, the first choice first."""
    collector = getattr(trainer, "collector", None)
    for one in (getattr(collector, "policy", None), sent_policy(collector)):
        if one is not None:
            yield "the collector's policy", one
    loss = getattr(trainer, "loss_module", None)
    # Losses keep their networks beside the parameters, as no modules of theirs.
    named = {**vars(loss), **dict(loss.named_children())} if isinstance(loss, nn.Module) else {}
    for name, one in named.items():
        if name.endswith("_network") and isinstance(one, nn.Module):
            yield f"the loss's {name}", one
    for name, hook in modules_of(trainer).items():
        policy = getattr(hook, "policy", None)
        if isinstance(policy, HookedMixin):
            yield f"the policy of {name}", policy

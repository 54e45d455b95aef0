"""States that a network is asked about again and again, and the pass that asks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import set_recurrent_mode
from torchrl.modules.models.multiagent import MultiAgentNetBase

from tdhook_rl.arguments.checked import require_counts
from tdhook_rl.arguments.keys import required
from tdhook_rl.calls.inputs import require_as_seen, state_keys, stored_inputs
from tdhook_rl.calls.passes import Call, effects_of
from tdhook_rl.calls.real_rows import defined_values, real_rows
from tdhook_rl.calls.repeatable import require_rows_apart
from tdhook_rl.errors import InputError
from tdhook_rl.hooking.hooked import HookedMixin
from tdhook_rl.latent.activation_caching import ActivationCaching
from tdhook_rl.probes.splits import EPISODE
from tdhook_rl.replaying.batching import GeneratorState, in_recurrent_mode, row_vectors


class FixedStates:
    """A network, hooked over its own weights, and the states that it is asked about.

    Args:
        policy: the network; it is kept, as the hooked copy knows it by a weak reference only.
        sites: the layers to cache: paths or patterns.
        rows: how many states are kept.
        groups: the key of the group of each state; the episode, where there is one, unless given.
        trajectories: whether whole trajectories are kept, and recurrent layers run along them from the state that the
            first step has; unless given, whether the network is in recurrent mode when the states are kept.

    Attributes:
        states: what was kept: ``(states,)``, or ``(trajectories, steps)``.
        groups: the group of each state that counts, ``None`` where nothing tells.
        distinct: where each state is for the first time, if some recur, as cells of a grid do: compared with itself it
            is as alike in two layers that have nothing in common. ``None`` if none does, and along trajectories.
        real: ``(trajectories, steps)``, which of them count; ``None`` for all.
    """

    def __init__(
        self,
        policy: nn.Module,
        sites: Sequence[str] | str,
        *,
        rows: int,
        groups: NestedKey | None = None,
        trajectories: bool | None = None,
    ) -> None:
        require_counts(rows=rows)
        self.policy = policy
        self.hooked: Any = ActivationCaching([sites] if isinstance(sites, str) else list(sites)).prepare(
            policy, return_context=False
        )
        assert isinstance(self.hooked, HookedMixin)
        for child in self.hooked.modules():
            child.training = False  # dropout would count as churn
        self.sites: list[str] = [key[-1] for key in self.hooked.result_keys if key[0] == "cache"]
        self.rows = rows
        self.along = trajectories
        self._group_key = groups
        self.states: TensorDict | None = None
        self._laid_out = ""
        self.groups: Tensor | None = None
        self.distinct: Tensor | None = None
        self.real: Tensor | None = None

    def keep(self, data: TensorDictBase) -> None:
        """Take states from a batch, evenly spread over it.

        Raises:
            MissingKeyError: if the batch lacks an input of the network, or the group that was named.
            InputError: if it has no states.
        """
        keys = state_keys(self.hooked, data)
        for key in keys:
            required(data, key, "the network reads")
        require_as_seen(self.hooked, data, "give states= with what it reads, and nothing that it writes", states=True)
        # What is seen in padding, or was not seen (NaN), is no state.
        real, seen = real_rows(data), defined_values((data.get(key) for key in keys), data.batch_size)
        real = seen if real is None else real if seen is None else real & seen.to(real.device)
        count = data.batch_size.numel() if real is None else int(real.sum())
        if not count:
            padding = ", all of it padding or NaN" if data.batch_size.numel() else ""
            raise InputError(f"there are no states to look at: the batch has shape {tuple(data.batch_size)}{padding}")
        groups = self._groups(data)
        if self.along is None:
            self.along = in_recurrent_mode(self.policy)
        chosen = data.select(*keys)
        if self.along:
            self._keep_trajectories(chosen, real, groups)
            return
        chosen = chosen.reshape(-1)
        if real is not None:
            chosen, groups = chosen[real.reshape(-1)], None if groups is None else groups[real.reshape(-1)]
        spread = _spread(len(chosen), self.rows)
        if data.ndim > 1 or len(spread) < data.batch_size.numel():
            self._laid_out = "states are taken out of a batch, by themselves (trajectories=True takes whole ones)"
        self.states = chosen[spread].detach().clone()
        self.groups = None if groups is None else groups[spread]
        self.distinct = _distinct(self.states)

    def _keep_trajectories(self, chosen: TensorDictBase, real: Tensor | None, groups: Tensor | None) -> None:
        if not chosen.batch_dims:
            raise InputError("trajectories are asked for, and the batch has no dimension of time")
        steps = chosen.batch_size[-1]
        own = chosen.reshape(-1, steps)
        spread = _spread(len(own), max(1, self.rows // steps))
        self.states = own[spread].detach().clone()
        self.real = None if real is None else real.reshape(-1, steps)[spread]
        if groups is not None:
            groups = groups.reshape(-1, steps)[spread].reshape(-1)
            self.groups = groups if self.real is None else groups[self.real.reshape(-1)]

    def _groups(self, data: TensorDictBase) -> Tensor | None:
        if self._group_key is None:
            found = data.get(EPISODE, data.get("traj_ids", None))
        else:
            found = required(data, self._group_key, "intervals are grouped by")
        if not isinstance(found, Tensor):
            return None
        columns = row_vectors(found, data.batch_size).reshape(data.batch_size.numel(), -1)
        return columns[:, 0] if columns.shape[1] == 1 else torch.unique(columns, dim=0, return_inverse=True)[1]

    def apart(self, site: str) -> bool:
        """Whether agents have weights of their own there."""
        parts = site.split(".")
        above = (self.policy.get_submodule(".".join(parts[:end])) for end in range(len(parts)))
        return any(isinstance(one, MultiAgentNetBase) and not one.share_params for one in above)

    def recurrent(self) -> Any:
        """A block in which recurrent layers run as they do over these states."""
        return set_recurrent_mode(True) if self.along else nullcontext()

    def run(self) -> TensorDictBase:
        """One pass without exploration, in eval mode, which moves no random generator.

        Returns:
            ``(states,)``: what the network puts out, and the activations under ``("cache", site)``.

        Raises:
            InputError: if the network reads states together that were taken out of their trajectories.
        """
        assert self.states is not None
        with self.hooked.disable_context() as original:
            self.hooked.training = original.training  # or it would warn that the two differ
        effects = effects_of(self.hooked)
        before = GeneratorState(self.states.device, others=not effects.watch.idle)
        try:
            with (
                torch.no_grad(),
                set_exploration_type(ExplorationType.DETERMINISTIC),
                self.recurrent(),
                effects.watch.scratch(),
            ):
                if self._laid_out:
                    inputs = stored_inputs(self.hooked, self.states)
                    call = Call(self.hooked, type(self.hooked)._base.forward, self.states, inputs)
                    require_rows_apart(call, self._laid_out)
                found = self.hooked(self.states.clone() if effects.watch.may_write_input else self.states.copy())
        finally:
            before.restore()
        found = found.reshape(-1)
        return found if self.real is None else found[self.real.reshape(-1)]


def _spread(length: int, most: int) -> Tensor:
    return torch.linspace(0, length - 1, min(most, length)).round().long()


def _distinct(states: TensorDict) -> Tensor | None:
    values = [one.reshape(len(states), -1).cpu() for one in states.values(True, True) if isinstance(one, Tensor)]
    first: dict[tuple[bytes, ...], int] = {}
    for place, row in enumerate(zip(*values, strict=True)):
        first.setdefault(tuple(one.contiguous().view(torch.uint8).numpy().tobytes() for one in row), place)
    return None if len(first) == len(states) else torch.tensor(list(first.values()), device=values[0].device)

"""Trajectories that lie one after the other in time, of which the policy itself is not told where they begin."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdhook_rl.arguments.keys import get_entry, key_parts
from tdhook_rl.calls.policy import HookedPolicy
from tdhook_rl.calls.real_rows import real_rows, row_mask
from tdhook_rl.reading.going_on import GoingOn

#: Where collectors number trajectories.
NUMBER = ("collector", "traj_ids")


def pieces(policy: HookedPolicy, data: TensorDictBase) -> list[Tensor] | None:
    """The rows of a batch ``(lines, time)`` by trajectory, where lines hold several of which the policy is not told.

    A recurrent policy begins anew where ``is_init`` says so. Behind a batch of another environment, as in
    ``batch.reshape(-1)``, it would go on with the state of that one; the numbers of trajectories tell, or else states.

    Returns:
        numbers of rows, ``(trajectories, steps)`` for each length that occurs; ``None`` where each line is a whole.
    """
    lines, steps = data.batch_size
    if steps < 2:
        return None
    begins = torch.zeros(lines, steps, dtype=torch.bool)
    begins[:, 1:] = _others(data)
    for key in policy.policy_in_keys:
        told = row_mask(data, key) if key_parts(key)[-1] == "is_init" else None
        begins &= ~told.cpu() if told is not None else True
    real = real_rows(data)
    begins &= True if real is None else real.cpu()
    if not bool(begins.any()):
        return None
    begins[:, 0] = True
    starts = begins.reshape(-1).nonzero().squeeze(-1)
    lengths = torch.diff(starts, append=torch.tensor([lines * steps]))
    return [starts[lengths == one][:, None] + torch.arange(int(one)) for one in lengths.unique()]


def _others(data: TensorDictBase) -> Tensor:
    """Which rows of each line, from its second on, do not go on from the row before: by ends, numbers, or states."""
    lines, steps = data.batch_size
    number, done = get_entry(data, NUMBER), row_mask(data, ("next", "done"))
    ended = torch.zeros(lines, steps, dtype=torch.bool) if done is None else done.cpu().clone()
    if isinstance(number, Tensor) and number.numel() == data.batch_size.numel():
        number = number.reshape(data.batch_size).cpu()
        ended[:, :-1] |= number[:, 1:] != number[:, :-1]
    ended[:, -1] = True  # lines need not go on with each other
    states, rows = GoingOn(lines * steps), torch.arange(lines * steps)
    states.add(rows, data.reshape(-1))
    apart = states.breaks(rows, ended.reshape(-1))[0].reshape(lines, steps)
    return ended[:, :-1] | apart[:, 1:]

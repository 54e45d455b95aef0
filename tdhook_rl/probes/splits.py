"""Splitting rows into training and held-out rows by groups: episodes, positions, levels.

Rows of one episode resemble each other, so a split by row measures memory. A row counts as training only
if all of its groups are training groups, as held out only if all are held out; the rest is left unused.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.utils import unravel_key
from torch import Tensor

from tdhook_rl.arguments.checked import checked
from tdhook_rl.arguments.keys import required
from tdhook_rl.arguments.plain import with_keys
from tdhook_rl.errors import InputError
from tdhook_rl.replaying.batching import row_vectors

#: The key under which TorchRL's collectors number the episodes.
EPISODE = ("collector", "traj_ids")
_COLLECTED = (
    ". Collectors write it, env.rollout does not: collect the rows, or give each the number of its episode and name "
    "that key, split=GroupSplit('episode')"
)


class GroupSplit:
    """A split that depends on names and numbers of groups only, so that it is the same in every batch and process.

    The groupings are drawn independently, also where their numbers agree: with two, a share of ``held_out`` squared of
    the rows is held out.

    Args:
        groupings: each a key, or a list of keys that name a group together; integers or booleans.
        held_out: the share of the groups of each grouping that is held out.
        seed: another seed holds out other groups.

    Example:
        >>> from tensordict import TensorDict
        >>> data = TensorDict({"episode": torch.arange(1000), "cell": torch.arange(1000) % 7}, batch_size=1000)
        >>> train, held = GroupSplit("episode", held_out=0.25)(data)
        >>> bool((train ^ held).all()), 200 < int(held.sum()) < 300
        (True, True)
    """

    @checked
    def __init__(self, *groupings: NestedKey | Sequence[NestedKey], held_out: float = 0.25, seed: int = 0) -> None:
        if not 0 < held_out < 1:
            raise InputError(f"held_out is a share between 0 and 1, got {held_out}")
        self.groupings = [_keys(one) for one in groupings or (EPISODE,)]
        self.held_out = held_out
        self.seed = seed

    @checked
    def __call__(self, data: TensorDictBase) -> tuple[Tensor, Tensor]:
        """The training mask and the held-out mask, each of the batch shape."""
        return self.masks(self.groups(data))

    def masks(self, groups: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The same, of groups that are known: those of :meth:`groups`."""
        # 31 bits are exact in float64 and plenty for a share.
        shares = torch.stack([(code & 0x7FFFFFFF).double() / 0x80000000 for code in groups])
        held = shares < self.held_out
        return ~held.any(0), held.all(0)

    def groups(self, data: TensorDictBase) -> list[Tensor]:
        """For each grouping the number of the group of each row: int64 of the batch shape, the same in every process.

        Raises:
            MissingKeyError: if a key is absent.
            InputError: if a group is no integer.
        """
        return [self._code(data, keys) for keys in self.groupings]

    def _code(self, data: TensorDictBase, keys: list[NestedKey]) -> Tensor:
        # The name of the grouping takes part: without it, an episode and a cell of one number would share their fate.
        name = zlib.crc32(repr(keys).encode())
        code = torch.full(data.batch_size, self.seed + 1, dtype=torch.long, device=data.device)
        code = _mix(code ^ (name << 24))
        for key in keys:
            value = required(data, key, "the split groups rows by", _COLLECTED if key == EPISODE else "")
            if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex():
                found = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise InputError(f"the split groups rows by {key!r}, which is {found}: groups are integers")
            if value.shape[: len(data.batch_size)] != data.batch_size:
                raise InputError(f"the split groups rows by {key!r}, {tuple(value.shape)}: give each row its group")
            columns = row_vectors(value, data.batch_size).long().to(code.device)
            for column in _mix(columns + 1).unbind(-1):
                code = _mix(code ^ column)
        return code


def _keys(grouping: NestedKey | Iterable[NestedKey]) -> list[NestedKey]:
    keys = [grouping] if isinstance(grouping, (str, tuple)) or not isinstance(grouping, Iterable) else [*grouping]
    keys = with_keys(keys)
    if not keys or not all(isinstance(key, NestedKey) and len(key) for key in keys):
        raise InputError(f"a grouping of GroupSplit is a key, or a list of keys, got {grouping!r:.80}")
    return [unravel_key(key) for key in keys]


def _mix(code: Tensor) -> Tensor:
    """A fixed 64-bit mixing of integers (shifts and odd multipliers, wrapping around)."""
    code = (code ^ (code >> 31)) * 0x2545F4914F6CDD1D
    code = (code ^ (code >> 29)) * 0x27D4EB2F165667C5
    return code ^ (code >> 32)

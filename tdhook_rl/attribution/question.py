"""What an attribution asks of one call: how much do targets depend on inputs and inner activations?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from tdhook_rl.calls.passes import Call, Pass

#: A target, or a function of the user's: from a replay to one number for each row.
TargetFunction = Callable[[Pass], Tensor]
#: For one target: of each input by key, of each inner activation by slot.
Attributed = tuple[dict[NestedKey, Tensor], dict[str, Tensor]]
_NOTHING: Mapping[str, Tensor] = {}


class Question(NamedTuple):
    """What is explained in one call, with respect to what.

    Args:
        call: the call that is explained.
        inputs: the explained inputs; floating point where they are differentiated.
        sites: the names of the modules whose activations are explained, by slot.
        targets: what is explained.
        placed: values to put in the place of all these activations; by default they are what the policy computes.
        stored: where the other inputs and the samples come from; the call's data by default.
        weights: a weight for each row; ones by default.
        shares: the pass may be one that other methods explain as well.
        own: so many of its last rows are those of the call as they are: what the policy puts out for them is kept.
        defined: where it is written, by the index of a target, which rows have a number, if not all have.
    """

    call: Call
    inputs: Mapping[NestedKey, Tensor]
    sites: Mapping[str, str]
    targets: Sequence[TargetFunction]
    placed: Mapping[str, Tensor] = _NOTHING
    stored: TensorDictBase | None = None
    weights: Tensor | None = None
    shares: bool = False
    own: int = 0
    defined: dict[int, Tensor] | None = None

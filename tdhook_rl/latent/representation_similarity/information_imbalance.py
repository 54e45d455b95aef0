"""Which of two representations predicts the neighbourhoods of the other."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook_rl.arguments.checked import checked
from tdhook_rl.errors import InputError
from tdhook_rl.latent.dimension_estimation.neighbours import check_keys, distances, write_results
from tdhook_rl.latent.representation_similarity.cka import read_pair


class InformationImbalanceEstimator(TensorDictModuleBase):
    """The mean rank, in one representation, of the nearest neighbour in the other, times 2 / N.

    a to b near 0: who is near in a is near in b, so a holds what b holds; near 1: a says nothing about b. The two
    directions differ where one representation keeps less than the other (Glielmo, Zeni, Cheng, Csanyi & Laio
    2022, PNAS Nexus 1). The least value, for identical neighbourhoods, is 2 / N.

    Ties are shared: points equally far from a point have the mean of their ranks, and several nearest neighbours
    count equally. So duplicates are allowed, and where either representation is constant over its points both
    directions are 1.

    Reads ``in_key_a``: ``(..., N, D_a)`` and ``in_key_b``: ``(..., N, D_b)``, N >= 3, with the same leading
    dimensions and N; time and memory grow with N^2. Writes ``out_key_a_to_b`` and ``out_key_b_to_a``: ``(...)``.
    A locked TensorDict is not changed: the results are in the returned shallow copy.

    Args:
        in_key_a: where the first representation is.
        in_key_b: where the second one is.
        out_key_a_to_b: where the imbalance from a to b goes.
        out_key_b_to_a: where the imbalance from b to a goes.
        p: the norm of the distances, at least 1, ``float("inf")`` included.

    Raises:
        MissingKeyError: if the TensorDict lacks a key.
        KeyCollisionError: if a result would replace a representation or the other result.
        InputError: for another shape or dtype, fewer than 3 points, NaN, a and b that do not pair up, p below 1.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> a = torch.rand(200, 2, generator=torch.Generator().manual_seed(0))
        >>> found = InformationImbalanceEstimator()(TensorDict({"data_a": a, "data_b": a[:, :1]}))
        >>> bool(found["information_imbalance_a_to_b"] < 0.2 < found["information_imbalance_b_to_a"])
        True
    """

    @checked
    def __init__(
        self,
        *,
        in_key_a: NestedKey = "data_a",
        in_key_b: NestedKey = "data_b",
        out_key_a_to_b: NestedKey = "information_imbalance_a_to_b",
        out_key_b_to_a: NestedKey = "information_imbalance_b_to_a",
        p: float = 2.0,
    ) -> None:
        super().__init__()
        if not p >= 1:
            raise InputError(f"p is the order of a norm, at least 1, got {p}")
        self.in_key_a, self.in_key_b = in_key_a, in_key_b
        self.out_key_a_to_b, self.out_key_b_to_a = out_key_a_to_b, out_key_b_to_a
        self.p = float(p)
        self.in_keys, self.out_keys = [in_key_a, in_key_b], [out_key_a_to_b, out_key_b_to_a]
        check_keys(self.in_keys, self.out_keys)

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write both directions for each pair of clouds."""
        a, b = read_pair(tensordict, self.in_key_a, self.in_key_b, rows=3)
        apart_a, apart_b = distances(a, self.p), distances(b, self.p)
        return write_results(
            tensordict,
            {self.out_key_a_to_b: _imbalance(apart_a, apart_b), self.out_key_b_to_a: _imbalance(apart_b, apart_a)},
        )


def _imbalance(source: Tensor, target: Tensor) -> Tensor:
    """2 / N times the mean rank in ``target`` of the nearest neighbours in ``source``; both ``(..., N, N)``."""
    ordered = target.sort(-1).values
    first = torch.searchsorted(ordered, target)
    last = torch.searchsorted(ordered, target, right=True)
    ranks = (first + 1 + last).to(source.dtype) / 2
    chosen = (source == source.amin(-1, keepdim=True)).to(source.dtype)
    return (chosen * ranks).sum(-1).div(chosen.sum(-1)).mean(-1) * (2 / source.shape[-1])

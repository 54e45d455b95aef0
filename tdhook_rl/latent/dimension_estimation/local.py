"""What the estimators share that answer around each point."""

from __future__ import annotations

from typing import ClassVar, Literal

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook_rl.arguments.checked import checked
from tdhook_rl.latent.dimension_estimation.neighbours import check_k, check_keys, read_points, resolve_k, write_results

__all__ = ["LocalDimensionEstimator"]


class LocalDimensionEstimator(TensorDictModuleBase):
    """Base of these estimators: from the k nearest neighbours of each point to a number.

    Args:
        in_key: where the points are.
        out_key: where the dimensions go.
        k: how many neighbours; ``"auto"`` takes the square root of N.
    """

    #: The fewest neighbours that are enough, and the points of a cloud that are no neighbours.
    least: ClassVar[int]
    reserve: ClassVar[int] = 1

    @checked
    def __init__(
        self, *, in_key: NestedKey = "data", out_key: NestedKey = "dimension", k: int | Literal["auto"] = "auto"
    ) -> None:
        super().__init__()
        check_k(k, least=self.least)
        self.in_key, self.out_key, self.k = in_key, out_key, k
        self.in_keys, self.out_keys = [in_key], [out_key]
        check_keys(self.in_keys, self.out_keys)

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the dimension around each point."""
        points = read_points(tensordict, self.in_key, rows=self.least + self.reserve)
        k = resolve_k(self.k, points, self.in_key, least=self.least, reserve=self.reserve)
        return write_results(tensordict, {self.out_key: self._dimensions(points, k)})

    def _dimensions(self, points: Tensor, k: int) -> Tensor:
        """From ``(..., N, D)`` to ``(..., N)``."""
        raise NotImplementedError

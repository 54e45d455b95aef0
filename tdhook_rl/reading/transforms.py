"""The transforms of a replay buffer: which work row by row, which look at neighbours, and which must be tried."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tensordict import TensorDictBase
from torch import Tensor, nn
from torchrl.data import ReplayBuffer
from torchrl.envs import transforms as of_torchrl

from tdhook_rl.arguments.near import near
from tdhook_rl.errors import InputError, TdhookError
from tdhook_rl.internals.torchrl_names import collate_fn

#: What a row is in other company may differ by, of the largest.
OF_LARGEST = 1e-5


@dataclass(frozen=True)
class Window:
    """How many rows of its trajectory, before and after a row, a transform reads."""

    before: int = 0
    after: int = 0

    @staticmethod
    def sum(windows: Sequence[Window]) -> Window:
        """The window of several transforms, one after the other."""
        return Window(sum(one.before for one in windows), sum(one.after for one in windows))

    def wider(self, by: int) -> Window:
        """The same with more rows on both sides."""
        return Window(self.before + by, self.after + by)


#: Transforms of TorchRL's that give each row a value of its own, and subclasses of which are not listed.
_ROW_BY_ROW = frozenset(
    getattr(of_torchrl, name)
    for name in (
        "ObservationNorm", "ToTensorImage", "Resize", "Crop", "CenterCrop", "FlattenObservation", "UnsqueezeTransform",
        "SqueezeTransform", "PermuteTransform", "GrayScale", "DTypeCastTransform", "DoubleToFloat", "RewardScaling",
        "DeviceCastTransform", "RenameTransform", "SelectTransform", "ExcludeTransform", "RewardClipping",
        "BinarizeReward", "SignTransform", "CatTensors", "ClipTransform", "FiniteTensorDictCheck",
        "Reward2GoTransform", "MultiStepTransform",
    )
    if hasattr(of_torchrl, name)
)  # fmt: skip


def applied_transforms(transform: Any) -> list[nn.Module]:
    """The transforms that a buffer applies one after the other when it is read."""
    if transform is None:
        return []
    if type(transform) is of_torchrl.Compose:
        return [piece for one in transform.transforms for piece in applied_transforms(one)]
    return [transform]


def window_of(transform: nn.Module) -> Window | None:
    """The rows of its trajectory that a transform reads, where it is known that it reads no others."""
    if type(transform) is of_torchrl.CatFrames and not transform.as_inverse:
        others = int(transform.N) - 1  # type: ignore[arg-type]
        return Window(after=others) if transform.future else Window(before=others)
    if type(transform) is getattr(of_torchrl, "NextStateReconstructor", None):
        return Window(after=1)
    return None


def rows_are_known(buffer: ReplayBuffer, transforms: Sequence[nn.Module]) -> bool:
    """Whether it is known of everything that the buffer applies which rows it reads."""
    collate = collate_fn(buffer)
    ours = (getattr(collate, "__module__", None) or "").split(".")[0] in ("torchrl", "tensordict")
    return ours and all(map(_trusted, transforms))


def _trusted(transform: nn.Module) -> bool:
    # As an inverse it does its work when rows are written.
    inverse = type(transform) is of_torchrl.CatFrames and bool(transform.as_inverse)
    return inverse or type(transform) in _ROW_BY_ROW or window_of(transform) is not None


def transform_name(transform: nn.Module) -> str:
    """A transform in words: its class, or the function that it calls."""
    function = getattr(transform, "func", None)
    name = getattr(function, "__qualname__", None)
    return f"{type(transform).__name__.lstrip('_')}({name})" if name else type(transform).__name__


def require_at_rest(transforms: Sequence[nn.Module]) -> None:
    """Raise if reading would change a transform, and with it what it does to the rows that follow.

    Raises:
        InputError: that names it.
    """
    for one in transforms:
        if isinstance(one, (of_torchrl.VecNorm, of_torchrl.VecNormV2)) and not getattr(one, "frozen", False):
            raise InputError(
                f"the transform {transform_name(one)} of the buffer goes on counting when rows are read, so that they "
                "would depend on what was read before: freeze it (freeze(), to_observation_norm()), or take it out"
            )


def followed_by(data: Any, transform: nn.Module) -> Any:
    """Data after a transform; an error of the transform's names it."""
    try:
        with warnings.catch_warnings():
            # The rows that are given to it are consecutive steps.
            warnings.filterwarnings("ignore", message="The last dimension of the tensordict should be marked as 'time'")
            if not isinstance(data, TensorDictBase) or not data.is_locked:
                return transform(data)
            return transform(data.copy().unlock_())
    except TdhookError:
        raise
    except Exception as error:
        raise InputError(
            f"the transform {transform_name(transform)} of the buffer does not work on rows in storage "
            f"order ({type(error).__name__}: {error}): analyse a buffer without it"
        ) from error


def require_alike(
    read: Callable[[Tensor], TensorDictBase],
    raw: Callable[[Tensor], TensorDictBase],
    transforms: Sequence[nn.Module],
    index: Tensor,
    found: TensorDictBase,
    company: Tensor,
) -> None:
    """Raise if rows are something else when other rows are read with them.

    ``found`` is what the entries at ``index`` were when they were read together; ``company`` is these and some others.
    """
    if len(company) < 2:
        return
    place = {int(entry): at for at, entry in enumerate(index)}
    for part in (company[::2], company[1::2]):
        here = [at for at, entry in enumerate(part) if int(entry) in place]
        there = [place[int(part[at])] for at in here]
        if here and (key := _unlike(read(part)[here], found[there])) is not None:
            raise InputError(
                f"{_culprit(raw, transforms, company)} gives {key!r} of a row other values when other rows are read "
                "with it, so what an analysis finds would depend on batch_size: analyse a buffer without it (what it "
                "computes can be stored in the rows beforehand)"
            )


def _culprit(raw: Callable[[Tensor], Any], transforms: Sequence[nn.Module], company: Tensor) -> str:
    """The first transform that does not work row by row."""
    whole = raw(company)
    for transform in transforms:
        after = followed_by(whole.clone(), transform)
        for start in () if _trusted(transform) else (0, 1):
            part = followed_by(whole[start::2].clone(), transform)
            if len(part) != len(company[start::2]) or _unlike(part, after[start::2]) is not None:
                return f"the transform {transform_name(transform)} of the buffer"
        whole = after
    return "the collate_fn or a transform of the buffer"


def _unlike(one: TensorDictBase, other: TensorDictBase) -> Any:
    """The first key whose values differ."""
    for key, value in other.items(True, True):
        again = one.get(key, None)
        if isinstance(value, Tensor) and isinstance(again, Tensor) and not near(again, value, OF_LARGEST):
            return key
    return None

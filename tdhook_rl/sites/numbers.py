"""What is put into a site is put there in its own dtype: rounded where that has fractions, refused where it has none.

An output keeps its dtype: what comes behind, weights of the same precision or a buffer of TorchRL's, takes no other.
Conversions of torch lose without a word what a dtype does not hold: fractions that are added to integers do nothing.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from tdhook_rl.errors import InputError
from tdhook_rl.internals.functorch_names import is_batchedtensor


def in_dtype(given: Tensor, value: Tensor, what: str, site: str, *, factor: bool = False) -> Tensor:
    """What is put into a site, in the dtype and on the device of what the site computed.

    Args:
        given: the numbers.
        value: what the site computed.
        what, site: how messages call the two.
        factor: the numbers are added or multiplied with: zeros in their place would do nothing, and of whole numbers
            the sum is to be looked at, not they (they come as int64, in which it does not wrap around).

    Raises:
        InputError: if the dtype does not hold them: fractions or negative numbers among whole ones, imaginary ones
            among real ones, what is beyond its largest number, or (of a factor) none that is not below its smallest.
    """
    dtype = value.dtype
    if factor and not dtype.is_floating_point and is_whole(value):
        dtype = torch.int64
    if given.dtype is dtype:
        return given if given.is_cpu and value.is_cpu else given.to(value.device)
    what, remedy = f"{what} at {site!r}", "name a module that gives numbers of that kind, or give such as it holds"
    where = f"the output of the module is {value.dtype}"
    if value.is_quantized or given.is_quantized:
        raise InputError(f"{what} is {given.dtype}, but {where}: what is quantised takes no other numbers; {remedy}")
    return holding(given, dtype, what, where, remedy, factor=factor).to(value.device)


def holding(given: Tensor, dtype: torch.dtype, what: str, where: str, remedy: str, *, factor: bool = False) -> Tensor:
    """Numbers in another dtype, as :func:`in_dtype`.

    Raises:
        InputError: if the dtype does not hold them.

    Example:
        >>> holding(torch.tensor([1.0, 2.0]), torch.int64, "it", "they are int64", "give whole numbers")
        tensor([1, 2])
    """
    exact, narrow = _lost(given.dtype, dtype)
    found = (given.real if exact and given.is_complex() else given).to(dtype)
    if not (exact or narrow) or given.numel() == 0:
        return found
    if torch.compiler.is_compiling() or given.is_meta or is_batchedtensor(given):
        if exact:
            raise InputError(
                f"{what} is {given.dtype}, but {where}, and in a compiled call it is not seen whether this holds it: "
                f"{remedy}"
            )
        return found
    if exact:
        back = found.to(given.dtype)
        if not torch.equal(back, given):
            wrong = given[back != given].reshape(-1)[0].item()
            raise InputError(f"{what} has {wrong:g}, but {where}, which {_holds(dtype, wrong)}: {remedy}")
        return found
    largest, before = (float(one.detach().abs().amax().item()) for one in (found, given))
    if largest == float("inf") and before < largest:
        raise InputError(f"{what} has {before:g}, but {where}, which ends at {torch.finfo(dtype).max:g}: {remedy}")
    if factor and largest == 0 and before > 0:
        raise InputError(f"{what} has at most {before:g}, but {where}, in which that is 0 and does nothing: {remedy}")
    return found


def is_whole(value: Tensor) -> bool:
    """Whether it holds whole numbers only."""
    return not (value.is_floating_point() or value.is_complex() or value.is_quantized)


def difference(one: Tensor, other: Tensor) -> Tensor:
    """One activation minus another; of two entries that are the same infinity, such as logits of a closed action, 0."""
    found = one - other
    return found.masked_fill((one == other) & one.isinf(), 0)


def first_order(slope: Tensor, change: Tensor) -> Tensor:
    """What a change of activations adds, to first order, to what the slope is of.

    At a complex number torch's slope holds those by its real and by its imaginary part, and what a change adds is real.
    """
    return (slope.conj() * change).real if slope.is_complex() else slope * change


@functools.cache
def _lost(given: torch.dtype, dtype: torch.dtype) -> tuple[bool, bool]:
    """Whether numbers of a dtype may be others in the second one, and whether they may be beyond it."""
    if given is torch.bool or given is dtype:
        return False, False
    real = dtype.is_floating_point or dtype.is_complex
    if not real or (given.is_complex and not dtype.is_complex):
        return True, False
    most = float(torch.finfo(given).max if given.is_floating_point or given.is_complex else torch.iinfo(given).max)
    return False, most > 1.01 * torch.finfo(dtype).max  # of bfloat16 it is as good as that of float32


def _holds(dtype: torch.dtype, wrong: complex) -> str:
    """What numbers a dtype has, as far as that is what is wrong."""
    if dtype.is_floating_point:
        return "holds real numbers"
    if dtype is torch.bool:
        return "holds 0 and 1"
    if isinstance(wrong, complex) or wrong != wrong or float(wrong) % 1:
        return "holds whole numbers"
    return f"holds whole numbers from {torch.iinfo(dtype).min} to {torch.iinfo(dtype).max}"

"""A direction from two sets of states: paired ones, or two of different sizes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from tdhook_rl.errors import InputError
from tdhook_rl.latent.vectors.activations import Activations, reading
from tdhook_rl.latent.vectors.dealing import Dealer, check_dealing, random_signs
from tdhook_rl.latent.vectors.extracted import ContrastSums, Extracted, PairSums
from tdhook_rl.latent.vectors.origins import DataDigest


def check_sets(positive: TensorDictBase, negative: TensorDictBase) -> tuple[int, int]:
    """How many states the two sets have.

    Raises:
        InputError: if one has none.
    """
    for name, states in (("positive", positive), ("negative", negative)):
        if states.batch_size.numel() == 0 or not states.batch_size:
            remedy = (
                "say how many there are, TensorDict(..., batch_size=[n])"
                if not states.batch_size
                else "give at least one"
            )
            raise InputError(f"the {name} states have the batch shape {tuple(states.batch_size)}: {remedy}")
    return positive.batch_size.numel(), negative.batch_size.numel()


def mean_difference(
    policy: nn.Module, place: Any, positive: TensorDictBase, negative: TensorDictBase, shuffles: int, seed: int
) -> Extracted:
    """The mean activation of some states minus the mean of others.

    Where there are as many of one as of the other they are pairs: shuffled, the two of a pair are exchanged by chance.
    Otherwise all states change sides.
    """
    check_dealing(shuffles, seed)
    count, others = check_sets(positive, negative)
    digest = DataDigest()
    with reading(policy, place) as site:
        if count == others:
            found = _of_pairs(site, positive, negative, shuffles, seed, digest)
        else:
            found = _of_sets(site, positive, negative, shuffles, seed, digest)
    found.facts = {
        "source": "pairs" if count == others else "two sets",
        "positive_states": count,
        "negative_states": others,
        "data": digest.hexdigest(),
    }
    return found


def _of_pairs(
    site: Activations, positive: TensorDictBase, negative: TensorDictBase, shuffles: int, seed: int, digest: DataDigest
) -> Extracted:
    signs = random_signs(shuffles, positive.batch_size.numel(), seed)
    sums, first = PairSums(shuffles), 0
    for one, other in paired(site, positive, negative, digest):
        sums.add(one, other, signs[:, first : first + len(one)])
        first += len(one)
    return sums.found()


def _of_sets(
    site: Activations, positive: TensorDictBase, negative: TensorDictBase, shuffles: int, seed: int, digest: DataDigest
) -> Extracted:
    count = positive.batch_size.numel()
    dealer = Dealer(draws=shuffles, positive=count, rows=count + negative.batch_size.numel(), seed=seed)
    sums = ContrastSums()
    for side, states in (("positive", positive), ("negative", negative)):
        for values in _values(site, states, side, digest):
            sums.add(values, torch.full((len(values),), side == "positive"), dealer.next(len(values)))
    return sums.found()


def paired(
    site: Activations, positive: TensorDictBase, negative: TensorDictBase, digest: DataDigest
) -> Iterator[tuple[Tensor, Tensor]]:
    """What the module computes for the two states of each pair, some pairs at a time.

    Raises:
        InputError: for activations that are not finite, or differ in shape.
    """
    flat = [one if one.ndim == 1 else one.flatten(0, -1) for one in (positive, negative)]
    first = 0
    for values in _values(site, flat[0], "positive", digest, positive.ndim > 1):
        partners = flat[1][first : first + len(values)]
        chosen = negative.ndim > 1 or len(partners) < len(flat[1])
        others = torch.cat(list(_values(site, partners, "negative", digest, chosen)))
        first += len(values)
        if others.shape != values.shape:
            raise InputError(
                f"the activations of {site.name!r} have the features {tuple(values.shape[1:])} on the positive states "
                f"and {tuple(others.shape[1:])} on the negative ones: pairs differ in the concept alone"
            )
        yield values, others


def _values(
    site: Activations, states: TensorDictBase, side: str, digest: DataDigest, chosen: bool = False
) -> Iterator[Tensor]:
    for rows, values, usable in site.pieces(states, chosen):
        if not bool(usable.all()):
            raise InputError(
                f"the activations of {site.name!r} are not finite in {int((~usable).sum())} of {len(usable)} {side} "
                "states, or these are padding: leave such states out"
            )
        add_inputs(digest, side, rows, site)
        yield values


def add_inputs(digest: DataDigest, prefix: str, rows: TensorDictBase, site: Activations) -> None:
    """Add what the policy reads of rows to a digest."""
    for key in site.in_keys:
        value = rows.get(key, None)
        if isinstance(value, Tensor):
            digest.add(f"{prefix} {key if isinstance(key, str) else '.'.join(key)}", value)

"""A direction from a buffer of which some rows have a concept and others do not: read for labels, then for sums."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from tdhook_rl.errors import InputError, warn
from tdhook_rl.latent.vectors.activations import reading
from tdhook_rl.latent.vectors.dealing import Dealer, GroupDealer, check_dealing
from tdhook_rl.latent.vectors.extracted import ContrastSums, Extracted
from tdhook_rl.latent.vectors.labels import Asked, Labelled
from tdhook_rl.latent.vectors.origins import DataDigest
from tdhook_rl.latent.vectors.pairs import add_inputs


def contrast(
    policy: nn.Module,
    place: Any,
    data: Any,
    where: Asked,
    *,
    positive: float,
    negative: float | None,
    groups: Asked | None,
    shuffles: int,
    seed: int,
    batch_size: int | None,
) -> Extracted:
    """The mean activation of positive rows minus that of negative ones; see ``SteeringVector.from_contrast``."""
    from tdhook_rl.reading.reader import Reader  # imports TorchRL's collectors

    check_dealing(shuffles, seed)
    if positive == negative:
        raise InputError(f"positive= and negative= name one class, {positive!r}: a direction leads from one to another")
    labelled = Labelled(Reader(data), where, positive, negative, groups, batch_size)
    numbers, of_group = labelled.counted()
    wanted = numbers["positive"]
    dealer: Dealer | GroupDealer
    if groups is None:
        dealer = Dealer(draws=shuffles, positive=wanted, rows=wanted + numbers["negative"], seed=seed)
    else:
        dealer = GroupDealer(draws=shuffles, positive=wanted, rows=of_group, seed=seed)
    found = _summed(policy, place, labelled, numbers, dealer)
    dealt = {} if groups is None else {"shuffled_by": labelled.groups, "groups": len(of_group)}
    found.facts = {
        "source": "contrast", "where": labelled.name, "positive": labelled.positive, "negative": labelled.negative,
        **found.facts, **dealt,
    }  # fmt: skip
    return found


def _summed(
    policy: nn.Module, place: Any, labelled: Labelled, numbers: Counter[str], dealer: Dealer | GroupDealer
) -> Extracted:
    sums, digest, lacking, seen = ContrastSums(), DataDigest(), 0, 0
    with reading(policy, place) as site:
        for part in labelled.parts():
            rows, side, _, groups = part.on_a_side()
            seen += int((side == 1).sum())
            first = 0
            for piece, values, usable in site.pieces(rows, chosen=True):
                here = slice(first, first + len(piece))
                first += len(piece)
                positive = side[here] == 1
                add_inputs(digest, "rows", piece, site)
                digest.add("side", positive)
                dealt = dealer.next(len(piece)) if groups is None else dealer.of(groups[here])  # type: ignore[union-attr]
                if not bool(usable.all()):
                    kept = usable.cpu()
                    lacking += int((~kept).sum())
                    values, positive, dealt = values[usable], positive[kept], dealt[:, kept]
                if len(values):
                    sums.add(values, positive, dealt)
        name = site.name
    counts, chosen = sums.counts(), numbers["positive"] + numbers["negative"]
    if seen != numbers["positive"] or sum(counts) + lacking != chosen:
        raise InputError(
            f"where= gave other labels the second time ({seen} positive rows, and {numbers['positive']} before): it is "
            "asked twice, and its answer may depend on nothing but the rows"
        )
    if not all(counts):
        raise InputError(
            f"the activations of {name!r} are finite in {counts[0]} positive and {counts[1]} negative rows, of "
            f"{numbers['positive']} and {numbers['negative']}: there is no difference of means"
        )
    if lacking:
        warn(f"{lacking} of {chosen} rows are left out: the activation of {name!r} is not finite there")
    found = sums.found()
    found.facts = {
        "positive_rows": counts[0], "negative_rows": counts[1], "not_finite_rows": lacking,
        "other_rows": numbers["all"] - chosen, "data": digest.hexdigest(),
    }  # fmt: skip
    return found

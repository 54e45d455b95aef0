"""The directions in which the states of pairs differ most: principal components of paired differences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import nn

from tdhook_rl.arguments.checked import checked
from tdhook_rl.errors import InputError
from tdhook_rl.latent.steering_vector import SteeringVector
from tdhook_rl.latent.vectors.activations import reading, unhooked
from tdhook_rl.latent.vectors.origins import DataDigest, facts_given, origin_of
from tdhook_rl.latent.vectors.pairs import check_sets, paired
from tdhook_rl.latent.vectors.places import Place

#: What the norm of such a direction is, in words.
_SCALE = "the root mean square of the component of the differences along the direction"


@checked
def principal_directions(
    policy: nn.Module,
    path: Place,
    positive: TensorDictBase,
    negative: TensorDictBase,
    *,
    rank: int = 1,
    facts: Mapping[str, Any] | None = None,
) -> list[SteeringVector]:
    """The orthogonal directions that hold most of what changes between the two states of a pair (Zou et al. 2023).

    Differences are taken as they are, not about their mean, which is the concept itself. Each direction points to where
    the mean of the positive states lies, and is as long as a typical difference reaches along it (root mean square).

    Args:
        policy: the policy; of a hooked one its methods do not act.
        path: the module, or a pair of it and the key of an entry that it writes.
        positive: states with the concept.
        negative: as many states without it, their partners, in order.
        rank: how many directions.
        facts: more that is to be known of them.

    Returns:
        the directions, that of the largest share first; ``facts["explained"]`` is its share of the squared differences,
        ``facts["explained_by_chance"]`` what a random direction has on the average.

    Raises:
        SiteError: if there is no such module, or it writes no such entry.
        InputError: if the states are not pairs, all alike, or too few for so many directions.

    Reference: Zou et al. 2023.

    Example:
        >>> from tensordict import TensorDict
        >>> net = nn.Sequential(nn.Linear(4, 8))
        >>> here = TensorDict({"input": torch.randn(20, 4)}, batch_size=20)
        >>> there = TensorDict({"input": here["input"] + torch.tensor([2.0, 0.0, 0.0, 0.0])}, batch_size=20)
        >>> (found,) = principal_directions(net, "0", there, here)
        >>> round(found.facts["explained"], 3), torch.allclose(found.vector, 2 * net[0].weight[:, 0], atol=1e-5)
        (1.0, True)
    """
    count, others = check_sets(positive, negative)
    if count != others:
        raise InputError(f"{count} positive and {others} negative states are not pairs: each has its partner, in order")
    digest, parts = DataDigest(), []
    with reading(policy, path) as site:
        for one, other in paired(site, positive, negative, digest):
            parts.append((one.double() - other.double()).cpu())
            like = one
    apart = torch.cat(parts)
    features, flat = apart.shape[1:], apart.flatten(1)
    if isinstance(rank, bool) or not 1 <= rank <= min(flat.shape):
        raise InputError(
            f"rank= is from 1 to {min(flat.shape)} ({count} pairs, {flat.shape[1]} features), got {rank!r:.80}"
        )
    values, directions = torch.linalg.svd(flat, full_matrices=False)[1:]
    squares = values.square()
    # What is left of rounding is no direction.
    there = int((values > values[0] * 1e-10).sum()) if float(values[0]) > 0 else 0
    if there < rank:
        raise InputError(
            f"the differences of these {count} pairs have {there} directions, and rank={rank} are asked for"
        )
    towards = torch.where(flat.mean(0) @ directions.T < 0, -1.0, 1.0)
    dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
    common = {
        "source": "principal directions", "pairs": count, "data": digest.hexdigest(), "scale": _SCALE,
        "explained_by_chance": 1 / flat.shape[1], **origin_of(unhooked(policy)),
    }  # fmt: skip
    made = []
    for place in range(rank):
        norm = float(values[place]) / count**0.5
        vector = (directions[place] * towards[place] * norm).reshape(features)
        own = {"component": place + 1, "explained": float(squares[place] / squares.sum()), "norm": norm}
        made.append(
            SteeringVector(
                vector=vector.to(like.device, dtype), path=path, facts={**common, **own, **facts_given(facts)}
            )
        )
    return made

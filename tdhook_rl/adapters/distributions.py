"""The action distributions of other libraries, with the same numbers, as distributions of torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributions as D

from tdhook_rl.calls.drawable import within
from tdhook_rl.calls.known_slopes import slopes_of_normal
from tdhook_rl.calls.real_rows import surely_finite
from tdhook_rl.errors import InputError

#: What Stable-Baselines3 and CleanRL add to the square in the density of a squashed action.
USUAL_EPSILON = 1e-6


def _slopes(head: Any, drawn: Tensor, loc: Tensor, scale: Tensor) -> tuple[Tensor, ...] | None:
    finite = not head.distribution_kwargs and surely_finite(drawn)  # what is no number it would refuse
    return slopes_of_normal(drawn, loc, scale) if finite else None


def _squashed_slopes(head: Any, drawn: Tensor, loc: Tensor, scale: Tensor) -> tuple[Tensor, ...] | None:
    known = surely_finite(drawn) and within(drawn, -1.0, 1.0)
    return slopes_of_normal(_before_tanh(drawn), loc, scale) if known else None


def _before_tanh(action: Tensor) -> Tensor:
    edge = 1.0 - torch.finfo(action.dtype).eps
    inner = action.clamp(-edge, edge)
    return 0.5 * (inner.log1p() - (-inner).log1p())


class DiagonalNormal(D.Independent):
    """Independent normal distributions of the dimensions of an action, ``loc`` and ``scale`` of ``(*batch, actions)``.

    Example:
        >>> DiagonalNormal(torch.zeros(3, 2), torch.ones(3, 2)).log_prob(torch.zeros(3, 2)).shape
        torch.Size([3])
    """

    known_slopes = ["loc", "scale"], _slopes

    def __init__(self, loc: Tensor, scale: Tensor, validate_args: bool | None = None) -> None:
        super().__init__(D.Normal(loc, scale, validate_args=validate_args), 1, validate_args=validate_args)

    @property
    def deterministic_sample(self) -> Tensor:
        return self.mean


class SquashedNormal(D.Distribution):
    """A :class:`DiagonalNormal` behind a ``tanh``, with the density of Stable-Baselines3.

    Its logarithm is that of the normal density less ``log(1 - action**2 + epsilon)``, by which actions at the bounds
    stay finite.

    Args:
        loc: of ``(*batch, actions)``, before the ``tanh``.
        scale: likewise.
        epsilon: what keeps the logarithm finite.
        width: what the action is scaled by afterwards, where its density is to be that of the scaled one (CleanRL):
            less ``log(width * (1 - action**2) + epsilon)`` then.

    Example:
        >>> squashed = SquashedNormal(torch.zeros(3, 2), torch.ones(3, 2))
        >>> squashed.log_prob(squashed.sample()).shape, squashed.deterministic_sample.abs().max().item()
        (torch.Size([3]), 0.0)
    """

    has_rsample = True
    arg_constraints: dict[str, Any] = {}  # noqa: RUF012  (as torch declares it)
    known_slopes = ["loc", "scale"], _squashed_slopes

    def __init__(
        self,
        loc: Tensor,
        scale: Tensor,
        epsilon: float = USUAL_EPSILON,
        width: Tensor | float = 1.0,
        validate_args: bool | None = None,
    ) -> None:
        self.base = DiagonalNormal(loc, scale, validate_args=validate_args)
        self.epsilon = epsilon
        self.width = width.to(loc.device) if isinstance(width, Tensor) else width
        super().__init__(self.base.batch_shape, self.base.event_shape, validate_args=False)

    @property
    def loc(self) -> Tensor:
        return self.base.base_dist.loc

    @property
    def scale(self) -> Tensor:
        return self.base.base_dist.scale

    @property
    def mode(self) -> Tensor:
        """The action at the mode of the normal distribution, which is what these libraries call deterministic."""
        return self.loc.tanh()

    @property
    def deterministic_sample(self) -> Tensor:
        return self.mode

    @property
    def support(self) -> D.constraints.Constraint:
        return D.constraints.independent(D.constraints.interval(-1.0, 1.0), 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> SquashedNormal:
        shape = (*batch_shape, *self.event_shape)
        return SquashedNormal(self.loc.expand(shape), self.scale.expand(shape), self.epsilon, self.width)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.base.rsample(torch.Size(sample_shape)).tanh()

    def log_prob(self, value: Tensor) -> Tensor:
        return self.base.log_prob(_before_tanh(value)) - torch.log(self.width * (1 - value**2) + self.epsilon).sum(-1)


class MultiCategorical(D.Distribution):
    """Several choices at once: logits one after the other, and an index for each choice.

    Args:
        logits: of ``(*batch, sum of sizes)``.
        sizes: among how many each choice is.

    Attributes:
        choice_sizes: the same, by which targets know which logits are of one choice.

    Raises:
        InputError: if there are more logits or fewer.

    Example:
        >>> several = MultiCategorical(torch.zeros(5, 7), sizes=(3, 4))
        >>> several.sample().shape, several.log_prob(several.sample()).shape
        (torch.Size([5, 2]), torch.Size([5]))
    """

    has_rsample = False
    arg_constraints: dict[str, Any] = {}  # noqa: RUF012  (as torch declares it)

    def __init__(self, logits: Tensor, sizes: tuple[int, ...], validate_args: bool | None = None) -> None:
        self.sizes = self.choice_sizes = tuple(sizes)
        if logits.shape[-1] != sum(self.sizes):
            raise InputError(
                f"choices among {', '.join(map(str, self.sizes))} have {sum(self.sizes)} logits, one after the other; "
                f"got {tuple(logits.shape)}, batch included"
            )
        self.logits = logits
        self.parts = [
            D.Categorical(logits=one, validate_args=validate_args) for one in logits.split(list(self.sizes), -1)
        ]
        super().__init__(logits.shape[:-1], torch.Size([len(self.sizes)]), validate_args=False)

    @property
    def mode(self) -> Tensor:
        return torch.stack([one.probs.argmax(-1) for one in self.parts], -1)

    @property
    def deterministic_sample(self) -> Tensor:
        return self.mode

    @property
    def support(self) -> D.constraints.Constraint:
        last = torch.tensor(self.sizes, device=self.logits.device) - 1
        return D.constraints.independent(D.constraints.integer_interval(torch.zeros_like(last), last), 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> MultiCategorical:
        return MultiCategorical(self.logits.expand(*batch_shape, self.logits.shape[-1]), self.sizes)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return torch.stack([one.sample(torch.Size(sample_shape)) for one in self.parts], -1)

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.stack([one.log_prob(taken) for one, taken in zip(self.parts, value.unbind(-1), strict=True)]).sum(
            0
        )

    def entropy(self) -> Tensor:
        return torch.stack([one.entropy() for one in self.parts]).sum(0)


class Bits(D.Independent):
    """Independent choices between 0 and 1, by logits of ``(*batch, bits)``.

    Example:
        >>> Bits(torch.tensor([[2.0, -1.0]])).deterministic_sample
        tensor([[1., 0.]])
    """

    def __init__(self, logits: Tensor, validate_args: bool | None = None) -> None:
        super().__init__(D.Bernoulli(logits=logits, validate_args=validate_args), 1, validate_args=validate_args)

    @property
    def deterministic_sample(self) -> Tensor:
        return self.base_dist.probs.round()


@D.register_kl(SquashedNormal, SquashedNormal)
def _of_squashed(one: SquashedNormal, other: SquashedNormal) -> Tensor:
    """That of the normal distributions: one mapping of both changes nothing."""
    return D.kl_divergence(one.base, other.base)


@D.register_kl(MultiCategorical, MultiCategorical)
def _of_several(one: MultiCategorical, other: MultiCategorical) -> Tensor:
    """The sum over the choices, which are independent."""
    if one.sizes != other.sizes:
        raise InputError(f"one distribution is of choices among {one.sizes}, the other among {other.sizes}")
    return torch.stack([D.kl_divergence(*both) for both in zip(one.parts, other.parts, strict=True)]).sum(0)

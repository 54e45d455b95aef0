"""Attribution by perturbation: replace or blur a part of what the policy sees, and look what changes.

No gradient is needed: only replays of the policy, in passes of bounded size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from tensordict import NestedKey
from tensordict.utils import unravel_key
from torch import Tensor

from tdhook_rl.arguments.keys import missing
from tdhook_rl.attribution.base import BoundAttribution
from tdhook_rl.attribution.baselines import Baseline, Baselines, check_baseline
from tdhook_rl.attribution.explainable import require_inputs
from tdhook_rl.attribution.groups import Groups, each_feature, group_features, groups_of_rows
from tdhook_rl.attribution.perturbation_base import (
    Blurred,
    BoundPerturbation,
    Changes,
    ChosenFirst,
    Measure,
    Occluded,
    OpenOutput,
    Output,
    Perturbation,
)
from tdhook_rl.calls.passes import Call
from tdhook_rl.errors import InputError, nearest
from tdhook_rl.method import Binder

FeatureGroups = Any  # a sequence of groups (indices or masks), or a TensorDict key


class _BoundOcclusion(BoundPerturbation):
    is_product = True  # a change from the baseline

    def __init__(self, config: Occlusion, binder: Binder) -> None:
        super().__init__(config, binder)
        self._name = type(config).__name__
        known = binder.policy.in_keys
        self.baselines = Baselines(self._name, config.baseline, config.baseline_key, as_input=False, known=known)
        self._groups = config.groups
        if isinstance(self._groups, Mapping):
            self._groups = {unravel_key(key): groups for key, groups in self._groups.items()}
            require_inputs("groups= names", self._groups, self.declared, "an explained input")
        if config.baseline is None:
            self.reads = [*self.reads, *(self.baselines.key_of(key) for key in binder.policy.in_keys)]
        listed = self._groups.values() if isinstance(self._groups, Mapping) else [self._groups]
        self.reads = [*self.reads, *(unravel_key(one) for one in listed if _is_key(one))]

    def _changes(self, call: Call, key: NestedKey, value: Tensor, inputs: Mapping[NestedKey, Tensor]) -> Changes:
        shape = value.shape[len(call.batch_size) :]
        groups = self._groups
        if groups is not None and not isinstance(groups, Mapping) and len(inputs) > 1:
            raise InputError(
                f"groups= is for one input, but several inputs are explained ({', '.join(map(repr, inputs))}): give "
                "groups={input: [...]}, or name one input with inputs=[...]"
            )
        of_key = groups.get(key) if isinstance(groups, Mapping) else groups
        if of_key is None:
            found: Groups = each_feature(shape)
        elif _is_key(of_key):
            found = groups_of_rows(self._read_groups(call, of_key), value, key, of_key)
        else:
            found = group_features(of_key, shape, key)
        return Occluded(found, value, self.baselines.of(call, key, value))

    def _read_groups(self, call: Call, name: NestedKey) -> Tensor:
        found = call.data.get(name, None)
        if not isinstance(found, Tensor):
            raise missing(call.data, name, f"{self._name}(groups=...) reads the groups of each row under")
        return found


class _BoundSARFA(_BoundOcclusion):
    def __init__(self, config: SARFA, binder: Binder) -> None:
        super().__init__(config, binder)
        self._keys = _keys(config.key, ("logits", "action_value", "probs"))

    def _measures(self, targets: Sequence[Measure]) -> Sequence[Measure]:
        return [ChosenFirst(Output(self._keys, self._name))]

    def _compare(self, before: Tensor, after: Tensor) -> Tensor:
        drop = before.softmax(-1)[..., 0] - after.softmax(-1)[..., 0]
        old, new = before[..., 1:].log_softmax(-1), after[..., 1:].log_softmax(-1)
        rest = old.exp()
        # Masked actions have a logit of -inf on both sides, and no part in the divergence.
        divergence = torch.where(rest == 0, 0.0, rest * (old - new)).sum(-1)
        relevant = 1 / (1 + divergence)
        # Asked this way round, what is NaN stays NaN.
        return torch.where(drop <= 0, 0.0, 2 * relevant * drop / (relevant + drop))


class _BoundPerturbationSaliency(BoundPerturbation):
    def __init__(self, config: PerturbationSaliency, binder: Binder) -> None:
        super().__init__(config, binder)
        self._config = (config.stride, config.sigma, config.blur_sigma)
        self._mode = config.mode
        self._output: Output | None = None
        if config.mode != "target":
            names = ("logits", "action_value") if config.mode == "policy" else ("state_value",)
            self._output = Output(_keys(config.key, names), f"PerturbationSaliency(mode={config.mode!r})")

    def _changes(self, call: Call, key: NestedKey, value: Tensor, inputs: Mapping[NestedKey, Tensor]) -> Changes:
        shape = value.shape[len(call.batch_size) :]
        if len(shape) != 3:
            raise InputError(
                f"PerturbationSaliency blurs images of (channels, rows, columns), but {key!r} has shape {tuple(shape)} "
                f"after the batch size {tuple(call.batch_size)}: name the images with inputs=[...], or use Occlusion"
            )
        return Blurred(value, *self._config)

    def _explained_inputs(self, call: Call) -> dict[NestedKey, Tensor]:
        """Bytes as numbers where the policy computes the same from them: blurring makes fractions."""
        try:
            return BoundAttribution._explained_inputs(self, call)
        except InputError:
            return super()._explained_inputs(call)

    def _measures(self, targets: Sequence[Measure]) -> Sequence[Measure]:
        if self._output is None:
            return targets
        return [OpenOutput(self._output) if self._mode == "policy" else self._output]

    def _compare(self, before: Tensor, after: Tensor) -> Tensor:
        if self._output is None:
            return before - after
        return 0.5 * (before - after).square()


@dataclass(frozen=True, eq=False, kw_only=True)
class Occlusion(Perturbation):
    """Occlusion (Zeiler & Fergus 2014): how much the target drops when features are replaced.

    Args:
        groups: which features are replaced together: a list of groups, each a list of indices into the flattened
            features of the one explained input or a boolean mask of their shape (see :func:`windows`); or, for groups
            that differ between rows, a TensorDict key of their numbers, integers of the shape of the input (-1 for
            no group); or a mapping of input keys to these. By default, and for inputs that the mapping leaves out,
            every feature by itself.
        baseline: what replaces them: a number, a tensor of the shape of a row's features, or a mapping of input keys
            to these; with ``None`` the replacement of input ``k`` is read from the data under ``(baseline_key, k)``,
            of the shape of the input. Integers, bytes and booleans are replaced by values of their own dtype.
        baseline_key: the root of the baselines in the data.
        chunk_size: rows (groups times batch) of one pass; by default at most 4096, fewer for convolutional nets.

    The other arguments are those of :class:`tdhook_rl.attribution.base.GradientAttribution`, without
    ``input_modules``.

    Writes ``(attribution_key, in_key)``: batch + the shape of the input. Each feature holds the target at the input
    minus the target with the feature's group replaced, the mean where it is in several groups, and 0 where it is in
    none.

    Raises:
        InputError: for an unknown input, an index out of range, or a baseline of another shape, or that the dtype of
            the input cannot hold.
        MissingKeyError: if a baseline is absent, or groups that are read from the data.

    Example:
        >>> from tensordict import TensorDict
        >>> net = torch.nn.Linear(4, 1)
        >>> x = torch.randn(3, 4)
        >>> with Occlusion(groups=[[0, 1], [2, 3]]).prepare(net) as hooked:
        ...     data = hooked(TensorDict({"input": x}, batch_size=3))
        >>> torch.allclose(data["attr", "input"][:, 0], (x * net.weight)[:, :2].sum(-1), atol=1e-6)
        True
    """

    groups: FeatureGroups | Mapping[NestedKey, FeatureGroups] | None = None
    baseline: Baseline | None = 0.0
    baseline_key: str = "baseline"

    bound_class: ClassVar[type[BoundAttribution]] = _BoundOcclusion

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "baseline", check_baseline(self.baseline))


@dataclass(frozen=True, eq=False, kw_only=True)
class SARFA(Occlusion):
    """Specific and relevant feature attribution (Puri et al. 2020) of the stored discrete action.

    With ``P`` the softmax of the logits or Q values, or an output called ``"probs"`` as it is, a group of features
    scores ``2 K dP / (K + dP)``: ``dP`` is the drop of ``P(action)`` when the group is replaced (specific), and
    ``K = 1 / (1 + KL)``, with the divergence from the renormalised probabilities of the other actions before to those
    after (relevant: what moves all actions alike scores less). Where ``dP <= 0`` the score is 0; it lies in [0, 1].

    Args:
        key: the output with one number for each action; by default ``"logits"``, else ``"action_value"``, else
            ``"probs"``.

    The other arguments are those of :class:`Occlusion`, without targets.

    Writes ``(attribution_key, in_key)``: batch + the shape of the input.

    Raises:
        TargetError: if the policy outputs no such values, or the stored action is not one of two or more.
        InputError, MissingKeyError: as :class:`Occlusion`.

    Example:
        >>> from tensordict import TensorDict
        >>> net = torch.nn.Linear(4, 3)
        >>> data = TensorDict({"input": torch.randn(5, 4), "action": torch.randint(3, (5,))}, batch_size=5)
        >>> with SARFA().prepare(net, in_keys=["input"], out_keys=["logits"]) as hooked:
        ...     data = hooked(data)
        >>> data["attr", "input"].shape, bool((data["attr", "input"] >= 0).all())
        (torch.Size([5, 4]), True)
    """

    key: NestedKey | None = None

    bound_class: ClassVar[type[BoundAttribution]] = _BoundSARFA

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_targets("explains the probability of the stored action")


@dataclass(frozen=True, eq=False, kw_only=True)
class PerturbationSaliency(Perturbation):
    """Perturbation saliency of images (Greydanus et al. 2018): what changes when a place is blurred.

    At each place of a grid the image is blended with a blurred copy through a Gaussian mask, in all channels; the
    map of scores is interpolated (bilinear) to the size of the image.

    Args:
        mode: ``"target"`` scores how much the target drops, which is specific to the action and signed (Huber et al.
            2022 found the score of the paper to depend little on the output layer); ``"policy"`` and ``"value"``
            score half the squared change of the logits or of the state value, as in the paper.
        stride: pixels between places: ``ceil(rows / stride)`` by ``ceil(columns / stride)`` evenly spread places.
        sigma: the width of the mask in pixels, 1 at the place.
        blur_sigma: the width of the Gaussian that blurs the image, in pixels.
        key: what is read in place of the target: by default ``"logits"``, else ``"action_value"``, or
            ``"state_value"``.
        chunk_size: rows (places times batch) of one pass; by default at most 4096, fewer for convolutional nets.

    The other arguments are those of :class:`tdhook_rl.attribution.base.GradientAttribution`, without
    ``input_modules``. Inputs that are not images are left out by ``inputs=[...]``.

    Writes ``(attribution_key, in_key)``: batch + (rows, columns), one map for all channels.

    Raises:
        InputError: for an input that is not ``(channels, rows, columns)``.
        TargetError: if the policy does not output what the mode reads.

    Example:
        >>> from tensordict import TensorDict
        >>> net = torch.nn.Sequential(torch.nn.Flatten(-3), torch.nn.Linear(2 * 8 * 8, 3))
        >>> with PerturbationSaliency(stride=4, sigma=2.0).prepare(net) as hooked:
        ...     data = hooked(TensorDict({"input": torch.rand(5, 2, 8, 8)}, batch_size=5))
        >>> data["attr", "input"].shape
        torch.Size([5, 8, 8])
    """

    mode: Literal["target", "policy", "value"] = "target"
    stride: int = 5
    sigma: float = 5.0
    blur_sigma: float = 3.0
    key: NestedKey | None = None

    bound_class: ClassVar[type[BoundAttribution]] = _BoundPerturbationSaliency

    def __post_init__(self) -> None:
        super().__post_init__()
        modes = ("target", "policy", "value")
        if self.mode not in modes:
            raise InputError(f"no mode is named {self.mode!r}; {nearest(self.mode, modes)}")
        if self.mode != "target":
            self._refuse_targets(f"with mode={self.mode!r} scores an output")
        elif self.key is not None:
            raise InputError("key= belongs to the modes 'policy' and 'value'; mode='target' explains target=")
        if not isinstance(self.stride, int) or self.stride < 1:
            raise InputError(f"stride is a positive number of pixels, got {self.stride!r}")
        for name in ("sigma", "blur_sigma"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name} is a positive number of pixels, got {getattr(self, name)!r}")


def _is_key(groups: Any) -> bool:
    """Whether groups are read from the data: a string, or a tuple of strings."""
    if isinstance(groups, tuple):
        return bool(groups) and all(_is_key(part) for part in groups)
    return isinstance(groups, str)


def _keys(key: NestedKey | None, default: tuple[str, ...]) -> tuple[NestedKey, ...]:
    return default if key is None else (unravel_key(key),)

"""Activation maximisation: the input that a unit, a layer or a decision responds to most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from tensordict import NestedKey
from torch import Tensor

from tdhook_rl.arguments.checked import require_counts
from tdhook_rl.attribution.base import BoundAttribution, GradientAttribution
from tdhook_rl.attribution.gradients import gradients
from tdhook_rl.attribution.question import Attributed, Question, TargetFunction
from tdhook_rl.calls.passes import Call, Pass, with_batch
from tdhook_rl.calls.target_values import per_row
from tdhook_rl.errors import InputError, SiteError, TargetError
from tdhook_rl.method import Binder
from tdhook_rl.targets import Target


@dataclass(frozen=True)
class _Activations:
    """The sum of the outputs of modules, by slot with the name of their site."""

    sites: dict[str, str]
    name: ClassVar[str] = "modules_to_maximise"

    def __call__(self, run: Pass) -> Tensor:
        batch = run.outputs.batch_size
        terms = []
        for slot, site in self.sites.items():
            if slot not in run.watched:
                raise SiteError(f"modules_to_maximise names {site!r}, which did not run")
            terms.append(per_row(with_batch(run.watched[slot], batch, site), batch, site))
        return torch.stack(terms).sum(0)


class _BoundActivationMaximisation(BoundAttribution):
    def __init__(self, config: ActivationMaximisation, binder: Binder) -> None:
        super().__init__(config, binder)
        self._of_modules = config.target is None and config.init_attr_targets is None
        self.shows_outputs = not config.paths
        if self._of_modules:
            sites = [site for path in config.paths for site in binder.sites(path, runs=True)]
            self.watched = {binder.watch(site): site.name for site in sites}
        self._alpha = config.alpha
        self._steps = config.n_steps
        self._bounds = (config.min_value, config.max_value)

    def attribute(self, question: Question) -> list[Attributed]:
        return [(self._ascend(question._replace(targets=[target])), {}) for target in question.targets]

    def _ascend(self, question: Question) -> dict[NestedKey, Tensor]:
        points = {key: self._bounded(value.detach()) for key, value in question.inputs.items()}
        for _ in range(self._steps):
            [(slopes, _leaves)], _values = gradients(question._replace(inputs=points))
            points = {
                # An input that no gradient reaches stays where it is.
                key: self._bounded(torch.where(slopes[key].isnan().all(), value, value + self._alpha * slopes[key]))
                for key, value in points.items()
            }
        return points

    def _bounded(self, value: Tensor) -> Tensor:
        return value if self._bounds == (None, None) else value.clamp(*self._bounds)

    def _function(self, target: Target | None, call: Call) -> TargetFunction:
        return _Activations(self.watched) if self._of_modules else super()._function(target, call)


@dataclass(frozen=True, eq=False, kw_only=True)
class ActivationMaximisation(GradientAttribution):
    """Activation maximisation (Erhan et al. 2009): gradient ascent on the inputs, from those that are given.

    Args:
        modules_to_maximise: path or paths of the modules whose outputs, summed over features, are maximised; with
            ``init_attr_targets``, the modules whose outputs that function is given, and not the policy's.
        alpha: the step size; negative to minimise.
        n_steps: gradient steps.
        min_value: the least value of an input; what starts below is moved there.
        max_value: the largest value of an input.

    ``target=`` maximises a target instead of modules. The other arguments are those of
    :class:`tdhook_rl.attribution.base.GradientAttribution`, without ``input_modules``.

    Writes ``(attribution_key, in_key)``: the optimised input, batch + the shape of the input. Rows are optimised
    each by itself; the policy's own inputs and outputs stay as they are.

    Raises:
        TargetError: without anything to maximise, or with both modules and a target; if no gradient reaches it.
        SiteError: if a module does not exist or does not run.
        InputError: for settings out of range, and for index inputs (tokens), which have no gradient.

    Example:
        >>> from tensordict import TensorDict
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh())
        >>> with ActivationMaximisation("1", alpha=0.5, min_value=-1.0, max_value=1.0).prepare(net) as hooked:
        ...     data = hooked(TensorDict({"input": torch.zeros(3, 4)}, batch_size=3))
        >>> best = data["attr", "input"]
        >>> bool(net(best).sum() > net(torch.zeros(3, 4)).sum()), bool((best.abs() <= 1).all())
        (True, True)
    """

    modules_to_maximise: str | Sequence[str] = field(default=(), kw_only=False)
    alpha: float = 0.1
    n_steps: int = 10
    min_value: float | None = None
    max_value: float | None = None

    bound_class: ClassVar[type[BoundAttribution]] = _BoundActivationMaximisation

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.input_modules:
            raise InputError("ActivationMaximisation moves inputs: input_modules= belongs to Saliency")
        if self.init_attr_targets is not None:
            object.__setattr__(self, "target_modules", (*self.target_modules, *self.paths))
        elif bool(self.paths) == (self.target is not None):
            raise TargetError("ActivationMaximisation needs one of modules_to_maximise=[path, ...] and target=")
        require_counts(n_steps=self.n_steps)
        if self.min_value is not None and self.max_value is not None and self.min_value > self.max_value:
            raise InputError(f"min_value={self.min_value} is larger than max_value={self.max_value}")

    @property
    def paths(self) -> tuple[str, ...]:
        """The modules to maximise, as a tuple."""
        modules = self.modules_to_maximise
        return (modules,) if isinstance(modules, str) else tuple(modules)

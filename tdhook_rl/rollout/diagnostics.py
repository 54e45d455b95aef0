"""The health of a network while it trains: the same states, looked at again and again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torch import Tensor, nn

from tdhook_rl.arguments.callbacks import asked
from tdhook_rl.arguments.checked import Checked, checked
from tdhook_rl.errors import InputError, SiteError, nearest
from tdhook_rl.metrics.norms import gradient_norms, spectral_norms, weight_norms
from tdhook_rl.metrics.refitting import random_target_loss
from tdhook_rl.metrics.untrained import untrained_copy
from tdhook_rl.rollout.decision_drift import DecisionDrift, ratio_by_state
from tdhook_rl.rollout.fixed_states import FixedStates
from tdhook_rl.rollout.site_health import SiteHealth
from tdhook_rl.sites.unit_axes import UnitAxes, given_axis, require_looked_at
from tdhook_rl.statistics.interval import Interval
from tdhook_rl.statistics.means import grouped_mean


@dataclass(frozen=True, kw_only=True)
class Plasticity(metaclass=Checked):
    """How :class:`NetworkDiagnostics` measures plasticity: see :func:`tdhook_rl.metrics.random_target_loss`.

    Args:
        every: every how many updates; the network is run forward and backward ``steps`` times in each of them.
        steps, lr, seed, out_key: as there.
        untrained: the new network that it is compared with, which is fitted once; ``untrained_copy`` unless given.
    """

    every: int = 10
    steps: int = 20
    lr: float = 1e-3
    seed: int = 0
    out_key: Any = None
    untrained: Any = None

    def __post_init__(self) -> None:
        if self.every < 1 or self.steps < 1 or self.lr <= 0:
            raise InputError(
                f"every= and steps= are at least 1 and lr= positive, got {self.every}, {self.steps} and {self.lr}"
            )


class NetworkDiagnostics:
    """Dormant units, ranks, norms, drift, churn and plasticity of a policy or value network, on a fixed set of states.

    What a network does in the states of the day changes with the states; so it is asked about the same ones at each
    :meth:`update`, in one forward pass without exploration, in eval mode, which moves no random generator. The network
    itself is not touched: a hooked copy over the same weights is run.

    Args:
        policy: the network, a TensorDict module; not a hooked one. It is kept.
        sites: the layers to look at: paths or patterns, as of :class:`ActivationCaching`. Layers after their activation
            are meant (a unit before its ReLU is seldom dormant).
        states: the states to look at, of any batch shape; by default those of the first batch that :meth:`update` is
            given.
        rows: how many states are kept, evenly spread over what was given.
        tau: see :func:`tdhook_rl.metrics.dormant_units`.
        delta: see :func:`tdhook_rl.metrics.effective_rank`.
        action_key: the key of the action, for churn; by default the network's ``"action"``, also beside nested outputs;
            of groups of agents those of all: any may change, and their divergences add up.
        value_key: the key of the value, for its drift; by default ``"state_value"`` or ``"action_value"``;
            of groups all of that name.
        units: which axis of an activation holds its units, by site or one for all; unless given, the modules tell
            (channels of ``Conv1d`` to ``Conv3d``, also where agents or time come first; the last axis of ``Linear``).
            Agents that share a network share its units; where TorchRL's multi-agent networks do not share, each agent
            has units of its own.
        groups: the key of the group of each state, which intervals are by; unless given the episode, where the states
            have one, and otherwise each state by itself.
        trajectories: whether whole trajectories are kept (the last dimension is time) and recurrent layers run along
            them; otherwise they start from the memory that is stored with each state, which an older network wrote.
            Unless given, whether the network is in recurrent mode.
        norms: whether weights and gradients are measured.
        loss: of the states kept a scalar, whose gradients are measured; unless given, those that training left in
            ``.grad``.
        plasticity: how to measure it; not at all unless given.

    Attributes:
        states: the states that are looked at, one batch dimension (two for trajectories); ``None`` before the first
            update.
        last: what the last update returned.

    Raises:
        SiteError: if a path names no module.
        MissingKeyError: if the network has no such action or value, or the states lack an input.
        InputError: for ``rows`` below 1, or no states; at an update, if nothing tells where the units of a site are.

    Example:
        >>> from tdhook_rl.envs import CueCorners
        >>> from tdhook_rl.examples.agent import make_actor
        >>> actor = make_actor()
        >>> diagnostics = NetworkDiagnostics(actor, sites=["module.0.module.3"])
        >>> found = diagnostics.update(CueCorners(batch_size=[8]).rollout(20, actor, break_when_any_done=False))
        >>> sorted(found)[:2]
        ['churn', 'cka_first/module.0.module.3']
    """

    @checked
    def __init__(
        self,
        policy: nn.Module,
        *,
        sites: Sequence[str] | str,
        states: TensorDictBase | None = None,
        rows: int = 512,
        tau: float = 0.025,
        delta: float = 0.01,
        action_key: NestedKey | None = None,
        value_key: NestedKey | None = None,
        units: int | Mapping[str, int] | None = None,
        groups: NestedKey | None = None,
        trajectories: bool | None = None,
        norms: bool = True,
        loss: Callable[..., Any] | None = None,
        plasticity: Plasticity | None = None,
    ) -> None:
        self._fixed = FixedStates(policy, sites, rows=rows, groups=groups, trajectories=trajectories)
        known = self._fixed.sites
        self.rows, self.tau, self.delta = rows, tau, delta
        self._drift = DecisionDrift(policy, self._fixed.hooked.policy_out_keys, action_key, value_key)
        self._units = dict(units) if isinstance(units, Mapping) else units
        require_looked_at(known, units=units)
        self._axes: dict[str, int | tuple[int, int]] = {}
        self._health = {site: SiteHealth(tau, delta) for site in known}
        self._norms, self._loss, self._plasticity = norms, loss, plasticity
        self._fresh: Tensor | None = None
        self._refitted: dict[str, Tensor] = {}
        self._updates = 0
        self.last: dict[str, float] = {}
        if states is not None:
            self._fixed.keep(states)

    @property
    def states(self) -> TensorDict | None:
        return self._fixed.states

    @checked
    def update(self, data: TensorDictBase | None = None) -> dict[str, float]:
        """Look at the network as it is now.

        Args:
            data: a batch to take the states from at the first update, if none were given; not read afterwards.

        Returns:
            for each site ``dormant/`` and ``dead/`` (the shares of its units that hardly or never act),
            ``overlap_first/`` and ``overlap_last/`` (of the units that were dormant at the first update, and at the one
            before, the share that is dormant now; by chance it is what ``dormant/`` is; NaN where none was),
            ``effective_rank/``, ``entropy_rank/``, ``stable_rank/``, ``norm/`` (mean Euclidean norm of the features),
            ``cka_first/`` and ``cka_last/`` (linear CKA, debiased, of states of different groups where there are four,
            with the first update in which the site was finite, and with the one before: 1 where nothing has moved,
            about 0 where nothing is in common; a state that recurs counts once; NaN for fewer than 4 states). Where an
            activation is NaN or infinite, its site has NaN, and ``nonfinite/`` is the share of such states.

            Of the network, against the update before (NaN at the first): ``churn`` (the share of states whose greedy
            action has changed), ``kl_churn`` (KL(before || now) of its action distribution, in nats, where it has one),
            ``value_drift`` and ``value_drift_relative`` (mean absolute change of its values, and over their mean
            size), as far as it has these. ``weight_norm``, ``gradient_norm``, and with ``/`` and the path of a module
            those of its parameters, and ``spectral_norm/`` (see :mod:`tdhook_rl.metrics`); without gradients there are
            no norms of them. Where it is due, ``plasticity_loss``, ``plasticity_loss_fresh`` of a new network, and
            ``plasticity_ratio``, above 1 where this one is harder to fit. ``states``: how many were looked at.

        Raises:
            InputError: at a first update without states, or for an empty batch.
            MissingKeyError: if the states lack an input of the network.
        """
        if self.states is None:
            if data is None:
                raise InputError("the first update needs a batch to take states from, or give states= beforehand")
            self._fixed.keep(data)
        follower = None if self._axes else UnitAxes(self._fixed.hooked)
        with nullcontext() if follower is None else follower.following():
            outputs = self._fixed.run()
        activations = {site: outputs.get(("cache", site)) for site in self._fixed.sites}
        if follower is not None:
            self._axes = {site: self._axis(follower, site, value) for site, value in activations.items()}
        found: dict[str, float] = {}
        for site, value in activations.items():
            measured = self._health[site].look(value, self._axes[site], self._fixed.groups, self._fixed.distinct)
            found |= {f"{name}/{site}": one for name, one in measured.items()}
        found |= self._drift.look(outputs)
        if self._norms:
            found |= self._measured_norms()
        self._refitted = {}
        if self._plasticity is not None and self._updates % self._plasticity.every == 0:
            found |= self._refit(self._plasticity)
        self._updates += 1
        self.last = found | {"states": float(len(outputs))}
        return self.stats()

    def stats(self) -> dict[str, float]:
        """The last findings, as TorchRL's ``LoggerMonitor`` asks for them."""
        return dict(self.last)

    @property
    def intervals(self) -> dict[str, Interval]:
        """Of the last churn, KL churn, value drift and plasticity: means over states, with intervals by group.

        With the site: of the similarities, ``cka_first/`` and ``cka_last/``, as of ``CkaEstimator.interval``; of
        ``effective_rank/``, ``entropy_rank/``, ``stable_rank/`` and ``norm/``, for as many other states. Shares of
        units have none, as there are no other units.

        Example:
            >>> from tdhook_rl.envs import CueCorners
            >>> from tdhook_rl.examples.agent import FC2, make_actor
            >>> actor = make_actor()
            >>> diagnostics = NetworkDiagnostics(actor, sites=[FC2])
            >>> batch = CueCorners(batch_size=[8]).rollout(20, actor, break_when_any_done=False)
            >>> found = diagnostics.update(batch), diagnostics.update(batch)
            >>> diagnostics.intervals["churn"].high < 0.05
            True
        """
        found = self._drift.intervals(self._fixed.groups)
        for site, health in self._health.items():
            found |= {
                f"{name}/{site}": one
                for name, one in health.intervals(self._fixed.groups, self._fixed.distinct).items()
            }
        return found | {name: grouped_mean(values, self._fixed.groups) for name, values in self._refitted.items()}

    @property
    def kl_samples(self) -> int:
        """How many actions were drawn in each state for the last ``kl_churn``: 0 where it is in closed form."""
        return self._drift.samples

    def scores(self, site: str) -> Tensor | None:
        """How active each unit was at the last update, ``(units,)``, 1 on average: a histogram of them is a figure.

        Raises:
            SiteError: if the site is not looked at.
        """
        return self._of(site).scores

    def dormancy(self, site: str) -> Tensor:
        """Which units were dormant, ``(updates, units)``: of the last 1000 updates in which the site was finite.

        Raises:
            SiteError: if the site is not looked at.
        """
        return self._of(site).dormancy()

    # ------------------------------------------------------------------ inner

    def _of(self, site: str) -> SiteHealth:
        if site not in self._health:
            raise SiteError(f"{site!r} is not looked at; {nearest(site, list(self._health))}")
        return self._health[site]

    def _axis(self, follower: UnitAxes, site: str, value: Tensor) -> int | tuple[int, int]:
        given = given_axis(self._units, site, value)
        axis = follower.of(site, value, rows=1) if given is None else given
        if given is None and value.ndim > 2 and self._fixed.apart(site):
            return 1 - value.ndim, axis
        return axis

    def _measured_norms(self) -> dict[str, float]:
        policy, loss = self._fixed.policy, self._loss
        assert self.states is not None
        states = self.states
        with self._fixed.recurrent():
            of_states = None if loss is None else lambda: asked(loss, states.clone(), what="loss=")
            gradients = gradient_norms(policy, of_states)
        norms = (
            ("weight_norm", weight_norms(policy)),
            ("gradient_norm", gradients),
            ("spectral_norm", spectral_norms(policy)),
        )
        return {f"{name}/{path}".rstrip("/"): value for name, by_path in norms for path, value in by_path.items()}

    def _refit(self, how: Plasticity) -> dict[str, float]:
        if self._fresh is None:
            fresh = untrained_copy(self._fixed.policy, seed=how.seed) if how.untrained is None else how.untrained
            self._fresh = self._loss_of(fresh, how)
        loss = self._loss_of(self._fixed.policy, how)
        self._refitted = {"plasticity_loss": loss, "plasticity_loss_fresh": self._fresh}
        ratio = ratio_by_state(loss, self._fresh)
        if ratio is not None:
            self._refitted["plasticity_ratio"] = ratio
        return {name: float(values.mean()) for name, values in self._refitted.items()}

    def _loss_of(self, network: nn.Module, how: Plasticity) -> Tensor:
        hooked = self._fixed.hooked
        if not isinstance(network, TensorDictModuleBase):
            network = TensorDictModule(network, hooked.policy_in_keys, hooked.policy_out_keys)
        assert self.states is not None
        with self._fixed.recurrent(), torch.inference_mode(False):
            return random_target_loss(
                network, self.states, out_key=how.out_key, steps=how.steps, lr=how.lr, seed=how.seed,
                rows=self._fixed.real,
            )  # fmt: skip

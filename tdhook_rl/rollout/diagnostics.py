"""The health of a network while it trains: the same states, looked at again and again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.utils import unravel_key
from torch import Tensor, nn
from torchrl.envs.utils import ExplorationType, set_exploration_type

from tdhook_rl.arguments.checked import checked
from tdhook_rl.arguments.keys import required
from tdhook_rl.calls.passes import effects_of
from tdhook_rl.calls.real_rows import defined_values, real_rows
from tdhook_rl.errors import InputError, MissingKeyError, SiteError, nearest
from tdhook_rl.latent.activation_caching import ActivationCaching
from tdhook_rl.latent.representation_similarity import CkaEstimator
from tdhook_rl.metrics.plasticity import action_churn, dormant_units, effective_rank, entropy_rank
from tdhook_rl.replaying.batching import GeneratorState
from tdhook_rl.sites.unit_axes import UnitAxes, given_axis


class NetworkDiagnostics:
    """Dormant units, ranks, drift and churn of a policy or value network, on a fixed set of states.

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
        action_key: the key of the action, for churn; by default ``"action"``, where the network has it.
        units: which axis of an activation holds its units, by site or one for all; unless given, the modules tell
            (channels of ``Conv1d`` to ``Conv3d``, also where agents or time come first; the last axis of ``Linear``).

    Attributes:
        states: the states that are looked at, one batch dimension; ``None`` before the first update.
        last: what the last update returned.

    Raises:
        SiteError: if a path names no module.
        MissingKeyError: if the network has no such action, or the states lack an input.
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
        sites: Sequence[str],
        states: TensorDictBase | None = None,
        rows: int = 512,
        tau: float = 0.025,
        delta: float = 0.01,
        action_key: NestedKey | None = None,
        units: int | Mapping[str, int] | None = None,
    ) -> None:
        if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
            raise InputError(f"rows= is a positive integer, got {rows!r}")
        pattern = [sites] if isinstance(sites, str) else list(sites)
        self._policy = policy  # the hooked copy knows the original by a weak reference only
        self._hooked = ActivationCaching(pattern).prepare(policy, return_context=False)
        for child in self._hooked.modules():
            child.training = False  # dropout would count as churn
        self._sites = [key[-1] for key in self._hooked.result_keys if key[0] == "cache"]
        self.rows, self.tau, self.delta = rows, tau, delta
        known = self._hooked.policy_out_keys
        if action_key is not None and unravel_key(action_key) not in known:
            raise MissingKeyError(
                f"churn compares the network's {action_key!r}, which it does not output; {nearest(action_key, known)}"
            )
        self._action_key = "action" if action_key is None else unravel_key(action_key)
        self._units = dict(units) if isinstance(units, Mapping) else units
        if isinstance(self._units, dict) and not set(self._units) <= set(self._sites):
            unknown = sorted(set(self._units) - set(self._sites))[0]
            raise SiteError(f"units= names {unknown!r}, which is not looked at; {nearest(unknown, self._sites)}")
        self._axes: dict[str, int] = {}
        self._first: dict[str, Tensor] = {}
        self._actions: Tensor | None = None
        self.states: TensorDict | None = None
        self.last: dict[str, float] = {}
        if states is not None:
            self._keep(states)

    @checked
    def update(self, data: TensorDictBase | None = None) -> dict[str, float]:
        """Look at the network as it is now.

        Args:
            data: a batch to take the states from at the first update, if none were given; not read afterwards.

        Returns:
            for each site ``dormant/`` and ``dead/`` (the shares of its units that hardly or never act),
            ``effective_rank/``, ``entropy_rank/``, ``norm/`` (mean Euclidean norm of the features) and ``cka_first/``
            (linear CKA, debiased, with the first update in which the site was finite: 1 where nothing has moved, about
            0 where nothing is in common; NaN for fewer than 4 states); ``churn`` (the
            share of states whose greedy action has changed since the last update; NaN at the first) and ``states``,
            how many were looked at.
            Where an activation is NaN or infinite, its site has NaN, and ``nonfinite/`` is the share of such rows.

        Raises:
            InputError: at a first update without states, or for an empty batch.
            MissingKeyError: if the states lack an input of the network.
        """
        if self.states is None:
            if data is None:
                raise InputError("the first update needs a batch to take states from, or give states= beforehand")
            self._keep(data)
        follower = None if self._axes else UnitAxes(self._hooked)
        with nullcontext() if follower is None else follower.following():
            outputs = self._run()
        activations = {site: outputs.get(("cache", site)) for site in self._sites}
        if follower is not None:
            self._axes = {site: self._axis(follower, site, value) for site, value in activations.items()}
        found: dict[str, float] = {}
        for site, value in activations.items():
            found |= self._look(site, value)
        actions = outputs.get(self._action_key, None)
        if isinstance(actions, Tensor):
            found["churn"] = float("nan") if self._actions is None else action_churn(self._actions, actions)
            self._actions = actions.clone()
        self.last = found | {"states": float(len(outputs))}
        return self.stats()

    def stats(self) -> dict[str, float]:
        """The last findings, as TorchRL's ``LoggerMonitor`` asks for them."""
        return dict(self.last)

    def _keep(self, data: TensorDictBase) -> None:
        keys = self._hooked.policy_in_keys
        for key in keys:
            required(data, key, "the network reads")
        # What is seen in padding, or was not seen (NaN), is no state.
        real, seen = real_rows(data), defined_values((data.get(key) for key in keys), data.batch_size)
        real = seen if real is None else real if seen is None else real & seen.to(real.device)
        count = data.batch_size.numel() if real is None else int(real.sum())
        if not count:
            padding = ", all of it padding or NaN" if data.batch_size.numel() else ""
            raise InputError(f"there are no states to look at: the batch has shape {tuple(data.batch_size)}{padding}")
        chosen = data.select(*keys).reshape(-1)
        if real is not None:
            chosen = chosen[real.reshape(-1)]
        spread = torch.linspace(0, len(chosen) - 1, min(self.rows, len(chosen))).round().long()
        self.states = chosen[spread].detach().clone()

    def _run(self) -> TensorDictBase:
        assert self.states is not None
        with self._hooked.disable_context() as original:
            self._hooked.training = original.training  # or it would warn that the two differ
        effects = effects_of(self._hooked)
        before = GeneratorState(self.states.device, others=not effects.watch.idle)
        try:
            with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC), effects.watch.scratch():
                return self._hooked(self.states.clone() if effects.watch.may_write_input else self.states.copy())
        finally:
            before.restore()

    def _axis(self, follower: UnitAxes, site: str, value: Tensor) -> int:
        given = given_axis(self._units, site, value)
        return follower.of(site, value, rows=1) if given is None else given

    def _look(self, site: str, activations: Tensor) -> dict[str, float]:
        usable = torch.isfinite(activations.flatten(1)).all(-1)
        if not bool(usable.all()):
            names = ("dormant", "dead", "effective_rank", "entropy_rank", "norm", "cka_first")
            share = float((~usable).double().mean())
            return {f"{name}/{site}": float("nan") for name in names} | {f"nonfinite/{site}": share}
        first = self._first.setdefault(site, activations.clone())
        measured: dict[str, Any] = {
            "dormant": dormant_units(activations, self.tau, axis=self._axes[site]).double().mean(),
            "dead": dormant_units(activations, 0.0, axis=self._axes[site]).double().mean(),
            "effective_rank": effective_rank(activations, self.delta),
            "entropy_rank": entropy_rank(activations),
            "norm": activations.flatten(1).norm(dim=-1).mean(),
            "cka_first": _similarity(first, activations),
        }
        return {f"{name}/{site}": float(value) for name, value in measured.items()}


def _similarity(first: Tensor, now: Tensor) -> float:
    """Debiased linear CKA; NaN where it is not defined: too few states, or features that are the same in all."""
    if len(now) < 4:
        return float("nan")
    pair = TensorDict({"data_a": first.flatten(1).double(), "data_b": now.flatten(1).double()})
    return float(CkaEstimator(debiased=True)(pair)["cka"])

"""The features that probes read: activations of the network and of an untrained one, and the raw observation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor, nn

from tdhook_rl.arguments.keys import key_parts
from tdhook_rl.batches.annotation import computed
from tdhook_rl.errors import InputError, MissingKeyError, nearest, warn
from tdhook_rl.hooking.hooked import HookedMixin
from tdhook_rl.latent.activation_caching import ActivationCaching
from tdhook_rl.latent.probing.moments import MOST
from tdhook_rl.metrics.untrained import untrained_copy
from tdhook_rl.probes.board import Source
from tdhook_rl.sites.unit_axes import UnitAxes, given_axis, require_looked_at

Layout = Literal["flat", "pooled", "each"]


class SiteFeatures:
    """Reads features of a batch.

    Args:
        policy: the network. Of a hooked one that caches all sites, the activations in batches are read where they are.
        sites: paths or patterns.
        untrained: the untrained network; ``None``: a copy that is initialised anew; ``False``: none.
        layout: how an activation with squares or agents is read, by site or for all.
        units: which axis holds the units, by site or for all.
        input_key: of the observation, or a list of keys; what the policy observes unless given, as of
            :func:`observed_by`.
        seed: of the untrained copy.
    """

    def __init__(
        self,
        policy: nn.Module,
        sites: Sequence[str],
        *,
        untrained: Any,
        layout: Layout | Mapping[str, Layout],
        units: int | Mapping[str, int] | None,
        input_key: NestedKey | list[NestedKey] | None,
        seed: int,
    ) -> None:
        pattern = [sites] if isinstance(sites, str) else list(sites)
        written: set[Any] = set()
        if isinstance(policy, HookedMixin):
            written = set(policy.result_keys)
            with policy.disable_context() as original:
                policy = original
        self._policy = policy  # the hooked copy knows the original by a weak reference only
        self._trained = ActivationCaching(pattern).prepare(policy, return_context=False)
        self.sites = [key[-1] for key in self._trained.result_keys if key[0] == "cache"]
        # What lies under these keys otherwise may be of other weights, or of another network.
        self._reads_batch = all(("cache", site) in written for site in self.sites)
        self._untrained: Any = None
        if untrained is not False:
            own = untrained_copy(policy, seed=seed) if untrained is None else untrained
            self._own = own
            self._untrained = ActivationCaching(pattern).prepare(own, return_context=False)
            if self._untrained.result_keys != self._trained.result_keys:
                raise InputError("the untrained network has other sites than the policy: give one of the same layers")
        self._named = input_key is not None
        named = input_key if isinstance(input_key, list) else [input_key]
        self._inputs: list[Any] = named if self._named else observed_by(self._trained)
        self._layout = {
            site: layout.get(site, "flat") if isinstance(layout, Mapping) else layout for site in self.sites
        }
        require_looked_at(self.sites, layout=layout, units=units)
        for kind in self._layout.values():
            if kind not in ("flat", "pooled", "each"):
                raise InputError(f"layout= is 'flat', 'pooled' or 'each', got {kind!r}")
        self._units = dict(units) if isinstance(units, Mapping) else units
        self._axes: dict[str, int] = {}
        self.inputs: dict[str, Any] = {}
        self._said: set[str] = set()

    def of(self, data: TensorDictBase, rows: Tensor, laid_out: str = "") -> dict[Source, Tensor]:
        """For each source ``(rows, places, features)`` on the CPU.

        Args:
            data: a batch.
            rows: which of its rows, flattened, are wanted.
            laid_out: where the batch is some of the rows of a whole, how these come, for the message.

        Raises:
            InputError: if the policy reads rows together that come apart.
        """
        whole = len(rows) == data.batch_size.numel()
        found: dict[Source, Tensor] = {}
        for network, policy in (("trained", self._trained), ("untrained", self._untrained)):
            if policy is None:
                continue
            seen = self._seen(policy, data, network, laid_out)
            for site in self.sites:
                flat = _rows(seen[site], data, None if whole else rows)
                if network == "trained":
                    self._find_axis(data, site, flat)
                found[Source(network, site)] = self._laid_out(site, flat)
        for site in self.sites:
            places = found[Source("trained", site)].shape[1]
            self.inputs[site] = places
            if Source("input", places) not in found:
                own = self._observed(data, None if whole else rows, places)
                if own is not None:
                    found[Source("input", places)] = own
        return found

    def _seen(self, policy: Any, data: TensorDictBase, network: str, laid_out: str) -> dict[str, Tensor]:
        if network == "trained" and self._reads_batch:
            held = {site: data.get(("cache", site), None) for site in self.sites}
            if all(isinstance(value, Tensor) for value in held.values()):
                return held
        found = computed(policy, data, laid_out)
        return {site: found["cache", site] for site in self.sites}

    def _laid_out(self, site: str, value: Tensor) -> Tensor:
        kind = self._layout[site]
        if kind == "flat" or value.ndim <= 2:
            found = value.reshape(len(value), 1, -1)
        else:
            moved = value.movedim(self._axes[site], -1).flatten(1, -2)
            found = moved.double().mean(1, keepdim=True).to(moved.dtype) if kind == "pooled" else moved
        if found.shape[2] > MOST:
            raise InputError(
                f"the activation of {site!r} has {found.shape[2]} features a row, and a probe keeps their square: "
                f"up to {MOST}; layout='pooled' takes the mean over squares, 'each' reads every square by itself"
            )
        return found

    def _find_axis(self, data: TensorDictBase, site: str, value: Tensor) -> None:
        if self._layout[site] == "flat" or value.ndim <= 2 or site in self._axes:
            return
        axis = given_axis(self._units, site, value)
        if axis is None:
            follower = UnitAxes(self._trained)
            rows = data.select(*self._trained.policy_in_keys, strict=False).reshape(-1)[:2].clone()
            with follower.following(), torch.no_grad():
                seen = self._trained(rows)
            axis = follower.of(site, seen["cache", site], rows=1)
        self._axes[site] = axis

    def _observed(self, data: TensorDictBase, rows: Tensor | None, places: int) -> Tensor | None:
        there = {key: data.get(key, None) for key in self._inputs}
        absent = [key for key, value in there.items() if not isinstance(value, Tensor)]
        if absent and (self._named or len(absent) == len(there)):
            raise MissingKeyError(
                f"the raw observation is {absent[0]!r}, which the batch lacks; "
                f"{nearest(str(absent[0]), map(str, data.keys(True, True)))}"
            )
        values = [_placed(_rows(value, data, rows), places) for value in there.values() if isinstance(value, Tensor)]
        if not values:
            return None
        width = sum(one.shape[2] for one in values)
        if width > MOST:
            if "input" not in self._said:
                self._said.add("input")
                what = ", ".join(map(repr, self._inputs))
                warn(
                    f"the raw observation {what} has {width} features, more than the {MOST} that a probe of it could "
                    "keep: the column is left out; input_key= may name something smaller"
                )
            return None
        return values[0] if len(values) == 1 else torch.cat(values, 2)


def observed_by(policy: Any) -> list[NestedKey]:
    """The inputs that a hooked policy observes: all but its memory, which it has written itself, and ``is_init``.

    What is in any of them was not computed by the network.
    """
    written = {key_parts(key) for key in policy.policy_out_keys}
    found = [key for key in policy.policy_in_keys
             if ("next", *key_parts(key)) not in written and key_parts(key)[-1] != "is_init"]  # fmt: skip
    return found or list(policy.policy_in_keys)


def _placed(value: Tensor, places: int) -> Tensor:
    """Rows of an input as ``(rows, places, features)``."""
    if places > 1 and value.ndim > 2:
        # A map of as many squares, or an observation for each agent: each is compared with its own.
        if value.shape[1] == places:
            return value.reshape(len(value), places, -1)
        if value.ndim == 4 and value.shape[2:].numel() == places:
            return value.flatten(2).transpose(1, 2)
    return value.reshape(len(value), 1, -1).expand(-1, places, -1)


def _rows(value: Tensor, data: TensorDictBase, rows: Tensor | None) -> Tensor:
    """Rows of an entry, flattened, on the CPU; all of them unless given."""
    flat = value.detach().reshape(-1, *value.shape[len(data.batch_size) :])
    return (flat if rows is None else flat[rows]).cpu()

"""Activation patching: run on other inputs, with some activations as they were on the data's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from tensordict import NestedKey
from tensordict.nn import ProbabilisticTensorDictModule
from torch import Tensor

from tdhook_rl.arguments.callbacks import has_parameter, takes_keywords
from tdhook_rl.arguments.keys import get_entry, key_parts, required
from tdhook_rl.calls.bound import BoundMethod
from tdhook_rl.calls.passes import Call
from tdhook_rl.errors import InputError, SiteError, warn
from tdhook_rl.latent.patch_hooks import KeepHook, PatchHook, other_count, runs_kept
from tdhook_rl.method import Binder, Method
from tdhook_rl.policies.draws import draws, sample_keys
from tdhook_rl.sites.hooks import Portable
from tdhook_rl.sites.paths import Site

PatchFunction = Callable[..., Tensor | None]
_ARGUMENTS, _BESIDE = ("module_key", "output", "output_to_patch"), ("rows",)


@dataclass(frozen=True, eq=False)
class ActivationPatching(Method):
    """Put activations of one run into another (Vig et al. 2020; Meng et al. 2022).

    The policy runs on its inputs as always, and a second time on the inputs under ``patch_key``, in which the
    output of each named module is replaced by what it was in the first run.

    Args:
        modules_to_patch: module paths or patterns. Of a module that runs several times in a call say which run:
            ``"act@0"``, ``"act@-1"``, or ``"act@all"`` to put each run's own activation into it.
        patch_key: the root of the second inputs, which are read, and of the outputs of the second run, which are
            written. In the second run nothing is sampled, and the sampled keys (the action, also one that a module
            of exploration may have drawn, its log-probability) are not written.
        patch_fn: ``patch_fn(module_key, output, output_to_patch)`` returns the value to put in: ``output`` is what the
            module computes in the second run, the one that is patched, and ``output_to_patch`` what it computed in
            the first. ``None``, as no function at all, puts all of ``output_to_patch`` in. Called with keywords where
            it has these parameters, else by position. Where it has a parameter ``rows`` it is also given the TensorDict
            of the rows, locked, with the second inputs in the place of the data's own. Of a module that gives several
            tensors it decides on the first; without a function all are put in.

    Reads ``(patch_key, in_key)``, of the shape of the input. Writes ``(patch_key, out_key)``.

    Raises:
        MissingKeyError: if the second inputs are absent.
        SiteError: if a module does not run in both runs, runs several times and no run is named, or does not run
            equally often where all runs are named.
        InputError: if ``patch_fn`` returns something of another shape.

    Warns:
        FutureWarning: for a ``patch_fn`` with the parameters ``output`` and ``output_to_patch``, which were the other
            way round in tdhook_rl 0.1.0. One whose parameters have other names is called by position, and without a
            warning.

    Example:
        >>> from tensordict import TensorDict
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> x, other = torch.randn(3, 4), torch.randn(3, 4)
        >>> with ActivationPatching(["1"]).prepare(net) as hooked:
        ...     data = hooked(TensorDict({"input": x, ("patched", "input"): other}, batch_size=3))
        >>> torch.equal(data["patched", "output"], data["output"])  # everything passes through module 1
        True
    """

    modules_to_patch: str | Sequence[str]
    patch_fn: PatchFunction | None = None
    patch_key: str = "patched"

    def __post_init__(self) -> None:
        if self.patch_fn is not None and takes_keywords(self.patch_fn, _ARGUMENTS, "patch_fn", _BESIDE):
            warn(
                "patch_fn(module_key, output, output_to_patch): as in tdhook, `output` is of the run that is patched, "
                "`output_to_patch` is of the first run (the data's own inputs), and None puts the latter in. In "
                "tdhook_rl 0.1.0 the two were the other way round, and None left the run as it was. With other names "
                "the parameters are filled in this order, and this warning is not given",
                FutureWarning,
            )

    def bind(self, binder: Binder) -> _BoundPatching:
        owner = binder.owner()
        function, keywords, beside = None, False, False
        if self.patch_fn is not None:
            keywords = takes_keywords(self.patch_fn, _ARGUMENTS, "patch_fn", _BESIDE)
            function, beside = Portable(self.patch_fn), has_parameter(self.patch_fn, "rows")
        slots = {}
        for site in binder.changed_sites(self.modules_to_patch):
            slot = binder.slot(site)
            binder.on_output(site, KeepHook(binder.runtime, slot))
            binder.on_output(site, PatchHook(binder.runtime, owner, slot, site, function, keywords, beside))
            slots[slot] = replace(site, module=None)  # the clone owns the module
        drawn: set[NestedKey] = set()
        for child in binder.policy.modules():
            if draws(child):
                drawn.update(sample_keys(child))
            if isinstance(child, ProbabilisticTensorDictModule) and child.return_log_prob:
                drawn.update(child.log_prob_keys)
        # Neither samples nor what a module keeps for itself, which collectors drop.
        own = [key for key in binder.policy.out_keys if any(part.startswith("_") for part in key_parts(key))]
        kept = [key for key in binder.policy.out_keys if key not in drawn and key not in own]
        return _BoundPatching(self.patch_key, owner, slots, kept, *binder.second_inputs())


class _BoundPatching(BoundMethod):
    reads_forward = True
    replays = True

    def __init__(
        self,
        root: str,
        owner: str,
        slots: dict[str, Site],
        out_keys: list[NestedKey],
        in_keys: list[NestedKey],
        spare: list[NestedKey],
    ) -> None:
        self._root = root
        self._owner = owner
        self._slots = slots
        self._out_keys = out_keys
        self._in_keys = in_keys
        self._spare = spare
        self.reads = [(root, *key_parts(key)) for key in in_keys]
        self.result_keys = tuple((root, *key_parts(key)) for key in out_keys)

    def compute(self, call: Call) -> dict[tuple[str, ...], Tensor]:
        times = {slot: runs_kept(call, slot, site) for slot, site in self._slots.items()}
        others = {}
        for key, read in zip(self._in_keys, self.reads, strict=True):
            if key in self._spare and (key not in call.inputs or get_entry(call.data, read) is None):
                continue  # left out of both runs, or as in the first: its noise
            value = required(call.data, read, "ActivationPatching reads the second input")
            if value.shape != call.inputs[key].shape:
                raise InputError(
                    f"the second input {read!r} has shape {tuple(value.shape)}, but {key!r} has "
                    f"{tuple(call.inputs[key].shape)}"
                )
            others[key] = value
        with torch.no_grad(), call.policy._hooked.runtime.explained_by(self._owner):
            run = call.replay(others)
        for slot, site in self._slots.items():
            patched = run.runs.get(slot, 0)
            if not patched:
                raise SiteError(f"the module {site.name!r} did not run on the patched inputs, so nothing was patched")
            if times[slot] not in (None, patched):
                raise other_count(site.name, times[slot], patched)
        outputs, found = run.outputs, {}
        for key in self._out_keys:
            value = outputs.get(key, None)
            if isinstance(value, Tensor):
                found[self._root, *key_parts(key)] = value.detach()
        return found

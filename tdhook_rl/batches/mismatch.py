"""Whether a batch is explained by the policy that collected it.

Results that are computed later equal those of the rollout only where the weights, the interventions and the noise
are the same. A replay computes the policy's outputs anyway, so they are compared with the stored ones.
"""

from __future__ import annotations

from typing import Literal

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from tdhook_rl.arguments.keys import get_entry
from tdhook_rl.calls.chunks import deciding_rows
from tdhook_rl.calls.passes import Call, effects_of
from tdhook_rl.calls.policy import HookedPolicy
from tdhook_rl.calls.real_rows import FEW
from tdhook_rl.errors import MismatchError, warn
from tdhook_rl.policies.draws import noisy_while_exploring

#: How far outputs may differ: batched and single rows differ in the last bits of the format.
RELATIVE, ABSOLUTE = 1e-3, 1e-4


class Mismatch:
    """Collects, chunk by chunk, the rows whose stored outputs are not what the policy computes now."""

    def __init__(self, policy: HookedPolicy, how: Literal["warn", "raise", "ignore"]) -> None:
        self._policy = policy
        self._how = how
        #: Whether anybody would be told.
        self.wanted = how == "raise" or (how == "warn" and not policy._hooked.runtime.mismatch_warned)
        self._rows = 0
        self._different = 0
        self._largest = 0.0
        self._key: NestedKey | None = None
        self._compared = False

    def can_compare(self, data: TensorDictBase) -> bool:
        """Whether anybody would be told, and the data holds outputs to compare with."""
        if not self.wanted:
            return False
        for key in self._policy._hooked_own_out_keys():
            if isinstance(get_entry(data, key), Tensor):
                return True
        return False

    def compare(self, call: Call) -> None:
        """Compare the outputs of the call's own replay, if there was one, with the stored ones."""
        outputs = call.replayed
        if outputs is None or not (call.compares or self.can_compare(call.data)):
            return
        batch = call.batch_size
        self._compared = True
        self._rows += batch.numel()
        pairs = self._pairs(call.data, outputs)
        for _, stored, found in pairs:
            if not _surely_near(found, stored):
                break
        else:
            return
        different = torch.zeros(batch, dtype=torch.bool, device=call.data.device)
        written = torch.zeros_like(different)
        numbers = any(stored.is_floating_point() for _, stored, _ in pairs)
        # Choices last: whether the policy has acted in a row is seen from its numbers, if it puts any out.
        for key, stored, found in sorted(pairs, key=lambda pair: not pair[1].is_floating_point()):
            if stored.is_floating_point():
                near = torch.isclose(found, stored, rtol=RELATIVE, atol=ABSOLUTE, equal_nan=True)
            else:
                near = found == stored
            rows = ~near.reshape(*batch, -1).all(-1)
            # Collectors leave zeros where random frames were taken instead of the policy's actions.
            acted = written
            if stored.is_floating_point() or not numbers:
                acted = (stored != 0).reshape(*batch, -1).any(-1)
                written = written | acted
            if bool((rows & acted).any()):
                gap = (found.double() - stored.double())[rows & acted].abs().nan_to_num(torch.inf)
                if float(gap.max()) > self._largest:
                    self._largest, self._key = float(gap.max()), key
                different |= rows
        if self._policy._hooked.chunks is not None:
            different &= deciding_rows(self._policy, call.data)
        self._different += int((different & written).sum())

    def _pairs(self, data: TensorDictBase, outputs: TensorDictBase) -> list[tuple[NestedKey, Tensor, Tensor]]:
        """What is stored and what was computed, where they can be compared."""
        keys = self._policy._hooked_own_out_keys()
        if self._policy._hooked.traits.read_trajectories(self._policy):
            # Of carried states TorchRL writes the last of each trajectory only, and zeros before it.
            keys = [key for key in keys if not (isinstance(key, tuple) and key[0] == "next")]
        pairs, recorded = [], True
        for key in keys:
            stored = get_entry(data, key)
            if stored is None:
                recorded = False
                continue
            found = get_entry(outputs, key)
            if not isinstance(stored, Tensor) or not isinstance(found, Tensor) or stored is found:
                continue
            number = stored.is_floating_point()
            if stored.shape == found.shape and number == found.is_floating_point():
                found = found.detach() if found.requires_grad else found
                stored = stored.detach() if stored.requires_grad else stored
                pairs.append((key, stored, found if found.dtype == stored.dtype else found.to(stored.dtype)))
        if recorded:
            return pairs
        # An action beside which no other output is stored is what is asked about, and no record of what was chosen.
        return [pair for pair in pairs if pair[1].is_floating_point()]

    def report(self, data: TensorDictBase) -> None:
        """Say so, if rows differ: an error, or a warning once for each hooked policy."""
        if not self._different:
            self._report_state()
            return
        message = (
            f"the stored {self._key!r} of {self._different} of {self._rows} rows is not what the policy computes now "
            f"(largest difference {self._largest:.2g}), so these rows are explained by another policy than the one "
            f"that acted{self._causes(data)}. The weights may have changed since, noise such as dropout or random "
            "frames may differ, interventions, or exploration outside of the policy; on_mismatch='ignore' accepts that"
        )
        if self._how == "raise":
            raise MismatchError(message)
        self._policy._hooked.runtime.mismatch_warned = True
        warn(message)

    def _report_state(self) -> None:
        """Say so, if rows may differ because the policy's state has moved on, and there was nothing to compare."""
        state = None if self._compared or not self.wanted else effects_of(self._policy).state()
        if state is None:
            return
        message = (
            f"{state}; the data has no outputs of the policy to compare with, so whether its rows are explained by "
            "what the policy computed for them is not known. Explain it while it acts with when='step', store its "
            "outputs with the rows, or accept it with on_mismatch='ignore'"
        )
        if self._how == "raise":
            raise MismatchError(message)
        self._policy._hooked.runtime.mismatch_warned = True
        warn(message)

    def _causes(self, data: TensorDictBase) -> str:
        state = effects_of(self._policy).state()
        causes = [] if state is None else [state]
        for key in (("next", "policy_version"), "policy_version"):
            version = data.get(key, None)
            if isinstance(version, Tensor) and version.numel():
                low, high = version.min().item(), version.max().item()
                causes.append(f"collected under policy version {low:g}" + (f" to {high:g}" if high > low else ""))
                break
        if (noisy := noisy_while_exploring(self._policy)) is not None:
            causes.append(
                f"{noisy!r} adds its noise under ExplorationType.RANDOM, as in collectors, and is explained without: "
                "annotate under set_exploration_type(ExplorationType.RANDOM)"
            )
        for name, value in self._policy.controls.items():
            recorded = data.get(("control", name), None)
            if value.numel() == 1 and isinstance(recorded, Tensor) and recorded.is_floating_point():
                other = recorded[recorded != value.to(recorded)]
                if other.numel():
                    causes.append(f"{name!r} was {other.reshape(-1)[0].item():g} and is {value.item():g}")
        return f" ({'; '.join(causes)})" if causes else ""


def _surely_near(found: Tensor, stored: Tensor) -> bool:
    """Whether a look at the largest difference, a fifth of the cost of one at each entry, shows that no row differs."""
    if torch.equal(found, stored):
        return True
    number = stored.numel()
    if not stored.is_floating_point() or not number:
        return False
    if number <= FEW and found.is_cpu and stored.is_cpu:
        pairs = zip(found.reshape(-1).tolist(), stored.reshape(-1).tolist(), strict=True)
        return all(abs(one - other) <= ABSOLUTE for one, other in pairs)
    return (found - stored).abs().max().item() <= ABSOLUTE  # not where it is NaN

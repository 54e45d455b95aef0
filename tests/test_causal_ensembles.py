"""Causal tests of ensembles, which put their copies before the states: what is measured is of all copies together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import EnsembleModule, ProbabilisticTensorDictModule, TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torch.distributions import Categorical, kl_divergence
from torchrl.modules import QValueModule

from tdhook_rl import targets
from tdhook_rl.errors import InputError
from tdhook_rl.sweeps import ablate_units, attribution_patching, faithfulness, find_circuit, patch_sites, patch_units

COPIES, STATES, F64 = 3, 5, torch.float64


def policy_of(kind: str) -> TensorDictSequential:
    """A trunk and an ensemble that reads it; of as many copies as states where it is easiest to mix the two up."""
    torch.manual_seed(0)
    trunk = TensorDictModule(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), ["seen"], ["hidden"])
    copies = STATES if kind == "as many copies as states" else COPIES
    width, key = {"actions": (2, "action"), "values": (4, "action_value"), "choices": (4, "logits")}.get(
        kind, (1, "state_value")
    )
    head: Any = TensorDictModule(nn.Sequential(nn.Tanh(), nn.Linear(4, width)), ["hidden"], [key])
    if kind == "values":
        head = TensorDictSequential(head, QValueModule(action_space="categorical"))
    if kind == "choices":
        draw = ProbabilisticTensorDictModule(["logits"], ["action"], distribution_class=Categorical)
        return TensorDictSequential(trunk, EnsembleModule(head, copies), draw).double()
    return TensorDictSequential(trunk, EnsembleModule(head, copies)).double()


def states(seed: int) -> TensorDict:
    draws = torch.Generator().manual_seed(seed)
    return TensorDict({"seen": torch.randn(STATES, 3, generator=draws, dtype=F64)}, STATES)


TRUNK = "module.0.module.1"
KINDS = ["critics", "as many copies as states", "values", "actions", "choices"]


def outputs(policy: TensorDictSequential, hidden: Tensor) -> TensorDict:
    with torch.no_grad():
        found = TensorDict({"hidden": hidden}, STATES)
        for one in policy.module[1:]:
            found = one(found) if not isinstance(one, ProbabilisticTensorDictModule) else found
        return found


def hidden(policy: TensorDictSequential, seed: int) -> Tensor:
    with torch.no_grad():
        return policy.module[0].module(states(seed)["seen"])


@pytest.mark.parametrize("kind", KINDS)
def test_units_are_measured_in_all_copies_together(kind: str) -> None:
    policy = policy_of(kind)
    inside = "module.1.module.0.module.0" if kind == "values" else "module.1.module.0"
    here, there = hidden(policy, 2), hidden(policy, 1)
    key = {"actions": "action", "values": "action_value", "choices": "logits"}.get(kind, "state_value")
    metrics: list[Any] = [key, lambda out: out[key], lambda out: out[key].sum(0)]
    metrics += [targets.state_value()] if key == "state_value" else []
    for metric in metrics:
        table = patch_units(policy, states(1), states(2), TRUNK, metric=metric)
        exact = attribution_patching(policy, states(1), states(2), inside, metric=metric, compare="all")
        start = outputs(policy, here)[key].sum((0, -1))
        for unit in range(4):
            moved = here.clone()
            moved[:, unit] = there[:, unit]
            torch.testing.assert_close(table.changes[unit], outputs(policy, moved)[key].sum((0, -1)) - start)
        torch.testing.assert_close(exact.estimates, exact.changes)  # linear behind the site
    whole = patch_sites(policy, states(1), states(2), [TRUNK, inside])
    assert [cell.pooled for cell in whole] == pytest.approx([1.0, 1.0]) or whole[0].left_out == STATES
    assert f"the sum of {STATES if 'many' in kind else COPIES} copies" in whole.metric
    assert faithfulness(policy, states(1), states(2), {TRUNK: range(4)}, metric=key).estimate == pytest.approx(1.0)
    assert find_circuit(policy, states(1), states(2), inside, metric=key).size > 0


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_taken_out_changes_decisions_and_values_as_by_hand(kind: str) -> None:
    policy = policy_of(kind)
    table = ablate_units(policy, states(1), TRUNK, by="mean", chunk_size=2 * STATES)
    whole = hidden(policy, 1)
    before = outputs(policy, whole)
    for unit in range(4):
        moved = whole.clone()
        moved[:, unit] = whole[:, unit].mean()
        after = outputs(policy, moved)
        found = {name: one[unit] for name, one in table.changes.items()}
        expected: dict[str, Tensor] = {}
        if kind in ("critics", "as many copies as states"):
            expected["value"] = (after["state_value"] - before["state_value"]).sum((0, -1))
        elif kind == "actions":
            expected["moved"] = (after["action"] - before["action"]).movedim(1, 0).flatten(1).norm(dim=-1)
        elif kind == "values":
            choice = before["action_value"].argmax(-1, keepdim=True)
            expected["value"] = (after["action_value"] - before["action_value"]).gather(-1, choice).sum((0, -1))
            expected["changed"] = after["action_value"].argmax(-1).ne(choice.squeeze(-1)).any(0).double()
        else:
            sides = [Categorical(logits=one["logits"]) for one in (before, after)]
            expected["kl"] = kl_divergence(*sides).sum(0)
            changed = after["logits"].argmax(-1).ne(before["logits"].argmax(-1))
            expected["changed"] = changed.any(0).double()
        assert found.keys() == expected.keys()
        for name, one in expected.items():
            torch.testing.assert_close(found[name], one)


def test_numbers_of_other_rows_are_told_how_many_states_there_are() -> None:
    wrong: Callable[[Any], Tensor] = lambda out: out["state_value"].mean()  # noqa: E731
    with pytest.raises(InputError, match=r"a number for each of 5 states, got \(\)"):
        patch_sites(policy_of("critics"), states(1), states(2), TRUNK, metric=wrong)

"""Observations that are nested or sparse tensors, of whose rows there is no result of one shape."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from tdhook_rl import ActivationCaching, IntegratedGradients, Saliency, targets
from tdhook_rl.attribution import Occlusion
from tdhook_rl.errors import InputError
from tdhook_rl.method import Method


def jagged(*widths: int) -> Tensor:
    return torch.nested.nested_tensor([torch.randn(width, 4) for width in widths], layout=torch.jagged)


RAGGED: dict[str, tuple[Callable[[], Tensor], str]] = {
    "jagged": (lambda: jagged(2, 3), "a nested tensor .*: a result has one shape for all rows. Pad it"),
    "nested": (
        lambda: torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)]),
        "a nested tensor .*: a result has one shape for all rows. Pad it",
    ),
    "sparse": (lambda: torch.eye(2, 4).to_sparse(), r"a sparse tensor .* Give it as \.to_dense\(\)"),
}
EACH: dict[str, Callable[[str], Method]] = {
    "saliency": lambda when: Saliency(target=targets.logit(0), when=when),  # type: ignore[arg-type]
    "path": lambda when: IntegratedGradients(target=targets.logit(0), baseline=0.0, when=when),  # type: ignore[arg-type]
    "occlusion": lambda when: Occlusion(target=targets.logit(0), when=when),  # type: ignore[arg-type]
    "activations": lambda when: ActivationCaching("module.0"),
}


@pytest.mark.parametrize("when", ["step", "batch"])
@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("kind", RAGGED)
def test_rows_of_several_shapes_are_refused_by_name(kind: str, name: str, when: str) -> None:
    make, said = RAGGED[kind]
    policy = TensorDictModule(nn.Sequential(nn.Linear(4, 3), nn.Tanh()), ["seen"], ["logits"])
    data = TensorDict({"seen": make()}, [2])
    with EACH[name](when).prepare(policy) as hooked, pytest.raises(InputError, match=f"reads 'seen', which is {said}"):
        hooked.annotate(data) if when == "batch" else hooked(data)


@pytest.mark.parametrize("when", ["step", "batch"])
@pytest.mark.parametrize("name", EACH)
def test_beside_what_the_policy_reads_they_stay_as_they_are(name: str, when: str) -> None:
    policy = TensorDictModule(nn.Sequential(nn.Linear(4, 3), nn.Tanh()), ["seen"], ["logits"])
    seen, other = torch.randn(2, 4), jagged(2, 3)
    found = []
    with EACH[name](when).prepare(policy) as hooked:
        for more in ({}, {"words": other}):
            data = TensorDict({"seen": seen, **more}, [2])
            found.append(hooked.annotate(data) if when == "batch" else hooked(data))
        for key in hooked.result_keys:
            if key in found[0].keys(True):
                assert torch.equal(found[0][key], found[1][key])
    assert found[1]["words"] is other

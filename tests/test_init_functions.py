"""The functions of the seed (``init_attr_inputs``, ``..._targets``, ``..._grads``): what they set in what they are
given, and return, in which shapes and dtypes. The oracle is a call of the inputs, or a target, that they stand for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from tdhook_rl import LRP, IntegratedGradients, Saliency
from tdhook_rl.attribution import ActivationMaximisation, Occlusion
from tdhook_rl.errors import InputError, TargetError
from tdhook_rl.targets import logit

F64 = torch.float64


class Net(nn.Module):
    """Features, and counts of what was picked up; three logits."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 3, dtype=F64), nn.Linear(6, 3, dtype=F64)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        return self.head(torch.cat([self.body(x).relu(), counts.to(F64)], -1))


def policy() -> TensorDictModule:
    torch.manual_seed(0)
    return TensorDictModule(Net(), in_keys=["x", "counts"], out_keys=["logits"])


def rows(*batch: int) -> TensorDict:
    torch.manual_seed(1)
    entries = {"x": torch.randn(*batch, 4, dtype=F64), "counts": torch.randint(0, 9, (*batch, 3))}
    return TensorDict({**entries, "advantage": torch.randn(*batch, 1, dtype=F64)}, batch)


METHODS: dict[str, Callable[..., Any]] = {
    "saliency": Saliency,
    "path": lambda **options: IntegratedGradients(baseline=0.0, n_steps=3, **options),
    "relevance": LRP,
    "ascent": lambda **options: ActivationMaximisation(n_steps=2, **options),
    "occlusion": Occlusion,
}


def explained(method: str, data: TensorDict, **options: Any) -> TensorDict:
    with METHODS[method](when="step", **options).prepare(policy()) as hooked:
        return hooked(data.clone())


def halved(inputs: TensorDictBase) -> TensorDict:
    return TensorDict({"x": inputs["x"] / 2, "counts": inputs["counts"]}, inputs.batch_size)


INPUTS: dict[str, Callable[[TensorDictBase, TensorDictBase], TensorDictBase]] = {
    "set": lambda inputs, _: inputs.set("x", inputs["x"] / 2),
    "set and selected": lambda inputs, _: inputs.set("x", inputs["x"] / 2).select("x"),
    "new": lambda inputs, _: halved(inputs),
    "copied": lambda inputs, _: inputs.clone().set("x", inputs["x"] / 2),
}


@pytest.mark.parametrize("form", INPUTS)
@pytest.mark.parametrize("method", METHODS)
def test_inputs_are_those_that_are_returned(method: str, form: str) -> None:
    for batch in [(3,), (), (2, 3)]:
        data = rows(*batch)
        found = explained(method, data, target=logit(0), init_attr_inputs=INPUTS[form])
        expected = explained(method, data.clone().update(halved(data)), target=logit(0))
        torch.testing.assert_close(found["x"], data["x"])  # the policy's own input stays
        for key in ["x"] if "selected" in form else ["x", "counts"]:
            torch.testing.assert_close(found["attr", key], expected["attr", key])


@pytest.mark.parametrize("method", METHODS)
def test_inputs_that_are_none_are_refused(method: str) -> None:
    wrong = {
        r"returned an empty TensorDict": lambda inputs, _: inputs.select(),
        r"'x' of shape \(2, 4\).*batch \(3,\)": lambda inputs, _: TensorDict({"x": inputs["x"][:2]}, []),
    }
    for said, function in wrong.items():
        with pytest.raises(InputError, match=said):
            explained(method, rows(3), target=logit(0), init_attr_inputs=function)


def test_integers_that_the_network_reads_as_such_are_named() -> None:
    torch.manual_seed(0)
    net = TensorDictModule(nn.Sequential(nn.Embedding(9, 4), nn.Flatten(-2), nn.Linear(12, 3)), ["counts"], ["logits"])
    with Saliency(target=logit(0), when="step", init_attr_inputs=lambda inputs, _: inputs).prepare(net) as hooked:
        with pytest.raises(InputError, match=r"the integer input 'counts' .*cannot be explained as numbers"):
            hooked(rows(3))


def one(outputs: TensorDictBase, index: int, last: bool = False) -> Tensor:
    return outputs["logits"][..., index : index + 1] if last else outputs["logits"][..., index]


#: The weights of two logits by row, as TorchRL writes numbers of rows, and as they are without its last dimension.
WEIGHTED: dict[str, dict[str, Any]] = {
    "(B,) by (B, 1)": {
        "init_attr_targets": lambda out, _: TensorDict({"a": one(out, 0)}, out.batch_size),
        "init_attr_grads": lambda t, more: TensorDict({"a": more["advantage"]}, t.batch_size),
    },
    "(B, 1) by (B,)": {
        "init_attr_targets": lambda out, _: TensorDict({"a": one(out, 0, last=True)}, out.batch_size),
        "init_attr_grads": lambda t, more: TensorDict({"a": more["advantage"].squeeze(-1)}, t.batch_size),
    },
    "(B, F) by (B,)": {
        "init_attr_targets": lambda out, _: TensorDict({"a": out["logits"] * torch.eye(3)[0]}, out.batch_size),
        "init_attr_grads": lambda t, more: TensorDict({"a": more["advantage"].squeeze(-1)}, t.batch_size),
    },
    "set in the targets": {
        "init_attr_targets": lambda out, _: TensorDict({"a": one(out, 0)}, out.batch_size),
        "init_attr_grads": lambda t, more: t.set("a", more["advantage"].squeeze(-1)),
    },
    "set beside": {
        "init_attr_targets": lambda out, _: TensorDict({"advantage": one(out, 0, last=True)}, out.batch_size),
        "init_attr_grads": lambda _, more: more.set("advantage", more["advantage"] * 1.0),
    },
    "set beside as the target": {
        "init_attr_targets": lambda out, more: more.set("advantage", one(out, 0, last=True) * more["advantage"]),
    },
}


@pytest.mark.parametrize("form", WEIGHTED)
@pytest.mark.parametrize("method", ["saliency", "path"])
def test_weights_are_those_of_their_rows(method: str, form: str) -> None:
    for batch in [(3,), (), (2, 3), (3, 3)]:  # as many rows as logits
        data = rows(*batch)
        found = explained(method, data, inputs=["x"], additional_init_keys=["advantage"], **WEIGHTED[form])
        expected = explained(method, data, inputs=["x"], target=logit(0))["attr", "x"] * data["advantage"]
        torch.testing.assert_close(found["attr", "x"], expected)


def test_weights_that_fit_no_target_and_numbers_without_a_gradient_are_refused() -> None:
    options: dict[str, Any] = {"init_attr_targets": lambda out, _: out.select("logits"), "inputs": ["x"]}
    for shape in [(3, 5), (3, 3, 2), (4,), (3, 2)]:
        with pytest.raises(TargetError, match=r"init_attr_grads\['logits'\] has shape .* targets .*\(3, 3\)"):
            explained(
                "saliency",
                rows(3),
                init_attr_grads=lambda t, _, s=shape: TensorDict({"logits": torch.ones(s)}),
                **options,
            )
    # What is no number of a row weighs features.
    features = torch.tensor([2.0, 0.0, 0.0])
    found = explained("saliency", rows(3), init_attr_grads=lambda t, _: TensorDict({"logits": features}), **options)
    expected = explained("saliency", rows(3), inputs=["x"], target=logit(0))["attr", "x"] * 2
    torch.testing.assert_close(found["attr", "x"], expected)
    with pytest.raises(TargetError, match=r"complex tensor \(torch.complex128\)"):
        explained(
            "saliency", rows(3), target=lambda run: torch.complex(*run.outputs["logits"].split([1, 2], -1)[:1] * 2)
        )

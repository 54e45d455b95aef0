"""Every argument of every method, given something else than it takes: it works, or the error is tdhook_rl's."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdhook_rl import Compose, Saliency, targets
from tdhook_rl.arguments.checked import checked
from tdhook_rl.attribution import (
    LRP,
    ActivationMaximisation,
    GradCAM,
    IntegratedGradients,
    Occlusion,
)
from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import (
    ArgumentError,
    ContextError,
    InputError,
    KeyCollisionError,
    PreparationError,
    TargetError,
    TdhookError,
)
from tdhook_rl.latent import (
    ActivationCaching,
    ActivationPatching,
    SteeringVectors,
)
from tdhook_rl.method import Method
from tdhook_rl.metrics import InfidelityMetric
from tdhook_rl.replay import analyze
from tdhook_rl.report import Monitor
from tdhook_rl.rollout import AnnotatedMetrics, AnnotateHook, alike_episodes
from tests.method_table import METHODS
from tests.policies import Case
from tests.test_odd_tensors import ODD_TENSORS

FEATURES = 6
X = torch.randn(3, FEATURES)
HIDDEN = nn.Linear(FEATURES, 8), nn.ReLU()


WRONG = {
    "str": "nothing", "empty str": "", "int": 3, "negative": -1, "huge": 10**30, "NaN": float("nan"), "bytes": b"x",
    "None": None, "empty list": [], "list": [1, None], "nested list": [[1], ["a"]], "empty dict": {},
    "dict": {"1": None},    "tensor": torch.randn(2, 3), "scalar": torch.tensor(2.0), "empty tensor": torch.zeros(0),
    "module": nn.Linear(4, 4),
    "class": nn.Linear, "function": lambda: None, "object": object(), "set": {1}, "tuple": ("a", 3), "bool": True,
    "tensordict": TensorDict({"a": X}, [3]), "modules": [nn.Tanh()],
}  # fmt: skip


WRONG |= ODD_TENSORS
WRONG |= {f"{kind} at a site": {"1": one} for kind, one in ODD_TENSORS.items()}
WRONG |= {f"{kind} of an input": {"input": one} for kind, one in ODD_TENSORS.items()}
WRONG["one number at a site"] = {"1": torch.tensor(1.0)}


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, 2))


NET = Case(net, "1", features=(8,), key="input", shape=(FEATURES,), logits="output")
INFO = {info.cls: info for info in METHODS}


def data() -> TensorDict:
    roots = {(root, "input"): X for root in ("patched", "positive", "negative", "baseline")}
    return TensorDict({"input": X, "action": torch.tensor([0, 1, 0]), **roots}, [3])


def changed(method: type, /, **options: Any) -> Method:
    """The table's configuration of a method, with other options."""
    *before, last = INFO[method].sample.make(NET)._methods()
    return Compose(*before, replace(last, **options))


def works_or_is_told(run: Callable[[], Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with suppress(TdhookError):
            run()


def cases() -> list[Any]:
    return [
        pytest.param(method, name, id=f"{method.__name__}-{name}")
        for method in INFO
        for name in inspect.signature(method).parameters
    ]


@pytest.mark.parametrize(("method", "name"), cases())
def test_every_argument_of_every_method(method: type, name: str) -> None:
    for kind, wrong in WRONG.items():
        if name == "compile" and kind in ("bool", "empty dict"):
            continue  # which are right, take long, and have tests of their own

        def run(wrong: Any = wrong) -> None:
            with changed(method, **{name: wrong}).prepare(net()) as hooked:
                hooked(data())
                hooked.annotate(data(), on_mismatch="ignore")

        works_or_is_told(run)


@pytest.mark.parametrize("name", ["inputs", "baseline", "groups"])
@pytest.mark.parametrize("method", [cls for cls in INFO if "inputs" in inspect.signature(cls).parameters])
def test_inputs_are_known_when_a_policy_is_prepared(method: type, name: str) -> None:
    """What a batch is needed for to be found wrong is found after hours; what names nothing explains nothing."""
    if name not in inspect.signature(method).parameters or method is GradCAM:
        return
    wrong = {"inputs": ["input", "inptu"], "baseline": {"input": 0.0, "inptu": 0.0}, "groups": {"inptu": [[0]]}}
    with pytest.raises(InputError, match=f"{name}= names 'inptu', which is not .*; nearest: 'input'"):
        changed(method, **{name: wrong[name]}).prepare(net()).__enter__()


@pytest.mark.parametrize("method", [Saliency, IntegratedGradients, LRP])
def test_what_is_named_twice_is_explained_once_and_nothing_not_at_all(method: type) -> None:
    with pytest.raises(InputError, match=r"inputs=\[\] explains no input"):
        changed(method, inputs=[]).prepare(net()).__enter__()
    with changed(method, inputs=["input", ("input",)], input_modules=["0", r"0$"]).prepare(net()) as hooked:
        assert hooked.result_keys[:2] == [("attr", "input"), ("attr", "0")]


@pytest.mark.parametrize("method", list(INFO))
def test_roots_are_not_empty(method: type) -> None:
    for name in inspect.signature(method).parameters:
        if name in ("attribution_key", "cache_key", "probe_key"):
            with pytest.raises(KeyCollisionError, match="has an empty part"):
                changed(method, **{name: ""}).prepare(net()).__enter__()


@pytest.mark.parametrize("method", list(INFO))
def test_every_call_with_what_is_no_tensordict(method: type) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        context = changed(method).prepare(net())
        with context as hooked:
            for name, wrong in WRONG.items():
                if name != "tensordict" and not isinstance(wrong, torch.Tensor):  # a policy is called with tensors
                    with pytest.raises(InputError, match="takes a TensorDict"):
                        hooked(wrong)
                if name != "tensordict":
                    with pytest.raises(InputError, match="annotate takes a TensorDict"):
                        hooked.annotate(wrong)


@pytest.mark.parametrize("method", [Saliency, ActivationCaching, SteeringVectors])
@pytest.mark.parametrize("name", ["module", "in_keys", "out_keys"])
def test_every_argument_of_prepare(method: type, name: str) -> None:
    for wrong in WRONG.values():

        def run(wrong: Any = wrong) -> None:
            with changed(method).prepare(**{"module": net(), name: wrong}):
                pass

        works_or_is_told(run)


def test_iterators_are_read_once_and_kept() -> None:
    method = Saliency(input_modules=(path for path in ["0", "1"]))
    for _ in range(2):
        with method.prepare(net()) as hooked:
            assert set(hooked(data())["attr"].keys()) == {"0", "1"}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda: Saliency(absolut=True), "has no argument 'absolut'; nearest: 'absolute'"),
        (lambda: Saliency(clean_intermediate_keys=False), "nothing intermediate is written"),
        (lambda: ActivationPatching(), "missing a required argument: 'modules_to_patch'"),
        (lambda: Saliency(absolute="yes"), r"Saliency\(absolute=\.\.\.\) takes bool, got 'yes' \(str\)"),
        (lambda: Saliency(init_attr_targets=lambda x: x), r"takes a function of \(TensorDictBase, TensorDictBase\)"),
        (lambda: ActivationCaching(nn.Tanh()), "name a module by its path"),
        (lambda: ActivationCaching([nn.Linear]), "a class names no module"),
    ],
)
def test_what_is_said(given: Callable[[], Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        given()
    with pytest.raises(TypeError):
        given()


@pytest.mark.parametrize("function", [getattr(targets, name) for name in targets.__all__ if name != "Target"])
@pytest.mark.parametrize("method", [Saliency, IntegratedGradients, GradCAM, LRP, Occlusion, ActivationMaximisation])
def test_a_target_without_its_parentheses(function: Callable[..., Any], method: type) -> None:
    given = {"modules_to_maximise": ()} if method is ActivationMaximisation else {}
    for target in (function, {"a": function}):
        with pytest.raises(TargetError, match=f"targets.{function.__name__} makes a target when it is called"):
            changed(method, **given, target=target)


@pytest.mark.parametrize("target", [targets.Target, nn.Linear(4, 1), 3, "entropy", lambda: targets.entropy(), {}])
def test_what_is_no_target(target: Any) -> None:
    with pytest.raises(TargetError):
        Saliency(target=target)


def test_a_function_of_the_users_is_a_target() -> None:
    def first(run: Any) -> torch.Tensor:
        return run.outputs["output"][:, 0]

    model = net()
    with Saliency(target=first).prepare(model) as hooked:
        x = X.clone().requires_grad_()
        expected = torch.autograd.grad(model(x)[:, 0].sum(), x)[0]
        torch.testing.assert_close(hooked(data())["attr", "input"], expected)
    with Saliency(target=lambda run: targets.output_sum()).prepare(net()) as hooked:
        with pytest.raises(TargetError, match="is a LinearTarget, not a tensor"):
            hooked(data())


def test_a_context_is_not_the_hooked_policy() -> None:
    context = Compose(Saliency(), ActivationCaching("1")).prepare(net())
    with pytest.raises(ContextError, match="it was called: enter it"):
        context(data())
    for name in ("annotate", "run", "in_keys", "get_dist", "parameters", "controls"):
        assert not hasattr(context, name)
        with pytest.raises(ContextError, match=f"asked for '{name}': enter it"):
            getattr(context, name)
    with pytest.raises(PreparationError, match="not hooked"):
        context.disable_hooks()
    with context as hooked:
        hooked(data())
        with context.disable_hooks():
            assert "attr" not in hooked(data()).keys()


TAKE_A_POLICY: dict[str, Callable[[Any], Any]] = {
    "Monitor": lambda policy: Monitor(policy, folder="never made"),
    "Monitor(untrained=...)": lambda policy: Monitor(untrained=policy, folder="never made"),
    "AnnotateHook": AnnotateHook,
    "AnnotatedMetrics": AnnotatedMetrics,
    "alike_episodes": lambda policy: alike_episodes(policy, CueCorners(), episodes=1, max_steps=1),
    "analyze": lambda policy: analyze(policy, data(), "never made"),
    "a metric": lambda policy: InfidelityMetric()(policy, data()),
}


@pytest.mark.parametrize("name", TAKE_A_POLICY)
def test_what_takes_a_hooked_policy_says_what_it_got_and_how_one_is_made(name: str) -> None:
    wrong = {
        "a plain Sequential": net(),
        "a context that was not entered": Saliency().prepare(net()),
        "the class Sequential": nn.Sequential,
    }
    for got, policy in wrong.items():
        with pytest.raises(PreparationError) as found:
            TAKE_A_POLICY[name](policy)
        text = str(found.value)
        assert text.startswith(f"{name} takes a hooked policy, got {got}: ")
        assert "with Saliency().prepare(policy) as hooked" in text
        assert "return_context=False" in text


@pytest.mark.parametrize("annotate", [False, True])
def test_another_dtype_is_said(annotate: bool) -> None:
    with Saliency().prepare(net()) as hooked:
        with pytest.raises(InputError, match=r"weights of torch\.float32, but 'input' is torch\.float64"):
            (hooked.annotate if annotate else hooked)(data().double())


class Two(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, 2 * x


@pytest.mark.parametrize("annotate", [False, True])
@pytest.mark.parametrize("method", [Saliency, ActivationCaching, SteeringVectors])
@pytest.mark.parametrize(
    ("module", "keys", "words"),
    [
        (
            nn.Sequential(*HIDDEN),
            {"out_keys": ["a", "b"]},
            r"fewer tensors than out_keys=\['a', 'b'\]",
        ),
        (
            nn.Sequential(*HIDDEN, Two()),
            {"out_keys": ["a", "b", "c"]},
            "Sequential returns fewer",
        ),
        (
            nn.Sequential(*HIDDEN, Two()),
            {"out_keys": ["a"]},
            r"more tensors than out_keys=\['a'\]",
        ),
        (
            nn.Sequential(*HIDDEN),
            {"in_keys": ["input", "action"]},
            r"in_keys=\['input', 'action'\]",
        ),
    ],
)
def test_another_number_of_keys_is_said(
    module: nn.Module, keys: dict[str, list[str]], words: str, method: type, annotate: bool
) -> None:
    with changed(method).prepare(module, **keys) as hooked:
        if annotate and method is SteeringVectors:
            return  # nothing is computed
        with pytest.raises(InputError, match=words):
            (hooked.annotate if annotate else hooked)(data())


def test_functions_are_checked_where_they_are_given() -> None:
    @checked
    def double(x: int, *, of: str = "a") -> str:
        return of * x

    assert double(2) == "aa"
    with pytest.raises(ArgumentError, match=r"double\(of=\.\.\.\) takes str, got 3"):
        double(2, of=3)
    with pytest.raises(ArgumentError, match="nearest: 'of'"):
        double(2, off="b")


class Old(torch.autograd.Function):
    """A function of the old style, which functorch cannot differentiate."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * grad * (x > 0)


class OldNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Old.apply(self.layer(x))


@pytest.mark.parametrize(
    "method",
    [
        Saliency(),
        Saliency(input_modules=["layer"]),
        IntegratedGradients(baseline=0.0, n_steps=3),
        Saliency(
            init_attr_targets=lambda out, more: TensorDict(t=out["output"] * more["w"], batch_size=out.batch_size),
            additional_init_keys=["w"],
        ),
    ],
)
def test_old_functions_are_explained_in_inference_mode(method: Any) -> None:
    given = TensorDict({"input": X, "w": torch.rand(3, 3)}, [3])
    with method.prepare(OldNet()) as hooked:
        expected = hooked(given.clone())["attr"]
        with torch.inference_mode():
            for call in (hooked, hooked.annotate):
                torch.testing.assert_close(call(given.clone())["attr"], expected)

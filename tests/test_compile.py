"""Wherever a policy compiles as one graph, so does the hooked one; changing controls costs no recompilation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from torchrl.collectors import Collector

from tdhook_rl import ActivationCaching, Compose, ProbeReadout, Saliency, SteeringVectors
from tdhook_rl.calls.provenance import is_stamp
from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import PreparationError
from tdhook_rl.examples.agent import FC2, make_actor
from tdhook_rl.method import Method
from tests.method_table import probe
from tests.policies import CASES, Case, categorical

METHODS: dict[str, Callable[[Case], Method]] = {
    "caching": lambda case: ActivationCaching(case.site),
    "steering": lambda case: SteeringVectors({case.site: torch.randn(case.features)}, alpha=0.7),
    "probing": lambda case: ProbeReadout({"concept": probe(case)}),
    "saliency": lambda case: Saliency(when="step"),
}


@pytest.fixture(autouse=True)
def _fresh_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def all_of_them(case: Case) -> Compose:
    """A graph that one of them breaks is no whole graph beside the others either."""
    return Compose(*(make(case) for make in METHODS.values()))


#: Every policy with all methods at once, and one with each alone; each policy with each method alone is slow.
CELLS = [
    *((name, False, "all") for name in CASES if name != "relu"),
    ("categorical", True, "all"),
    ("value", True, "all"),
    *(("categorical", False, method) for method in METHODS),
    ("value", True, "saliency"),
]
ALONE = [
    (name, gradients, method)
    for name, gradients in (
        *((name, False) for name in CASES if name != "relu"),
        ("categorical", True),
        ("value", True),
    )
    for method in METHODS
    if (name, gradients, method) not in CELLS
]


@pytest.mark.parametrize(
    ("policy", "gradients", "method"), [*CELLS, *(pytest.param(*one, marks=pytest.mark.slow) for one in ALONE)]
)
def test_one_graph_with_the_same_numbers(policy: str, method: str, gradients: bool) -> None:
    case = CASES[policy]
    made = all_of_them if method == "all" else METHODS[method]
    with made(case).prepare(case.build()) as hooked, torch.set_grad_enabled(gradients):
        compiled = torch.compile(hooked, fullgraph=True, backend="aot_eager")
        # A policy that explores reads its step count, which compiles once more than the first call.
        for _ in range(2):
            data = case.data(5)
            torch.manual_seed(3)
            found = compiled(data.clone())
            torch.manual_seed(3)
            expected = hooked(data.clone())
            for key in expected.keys(True, True):
                if not is_stamp(key):  # a compiled graph cannot say whose its results are
                    torch.testing.assert_close(found[key], expected[key], atol=1e-5, rtol=1e-5)


def test_changing_controls_does_not_recompile() -> None:
    case = CASES["categorical"]
    method = Compose(
        SteeringVectors({case.site: torch.randn(case.features)}, alpha=0.0),
        ProbeReadout({"concept": probe(case)}),
        ActivationCaching(case.site),
    )
    with method.prepare(categorical()) as hooked, torch.no_grad():
        compiled = torch.compile(hooked, fullgraph=True, backend="aot_eager")
        data = case.data(5)
        before = compiled(data.clone())
        with torch._dynamo.config.patch(error_on_recompile=True):
            for alpha in (0.5, 1.0, 0.0):
                hooked.controls["steering.alpha"] = alpha
                found = compiled(data.clone())
                expected = hooked(data.clone())
                torch.testing.assert_close(found["logits"], expected["logits"])
                assert torch.equal(found["logits"], before["logits"]) == (alpha == 0.0)


def test_a_per_row_alpha_compiles() -> None:
    case = CASES["categorical"]
    method = SteeringVectors({case.site: torch.randn(case.features)}, alpha="alpha")
    with method.prepare(categorical()) as hooked, torch.no_grad():
        compiled = torch.compile(hooked, fullgraph=True, backend="aot_eager")
        data = case.data(5).set("alpha", torch.linspace(0, 1, 5))
        torch.testing.assert_close(compiled(data.clone())["logits"], hooked(data.clone())["logits"])


@pytest.mark.parametrize("method", METHODS)
def test_a_collector_that_compiles_its_policy(method: str) -> None:
    actor = make_actor()
    case = Case(make_actor, FC2, features=(64,))
    with METHODS[method](case).prepare(actor) as hooked:
        collector = Collector(
            CueCorners(batch_size=[4], seed=0),
            hooked,
            frames_per_batch=32,
            total_frames=96,
            compile_policy={"backend": "aot_eager", "fullgraph": True},
            auto_register_policy_transforms=False,
        )
        batches = [data.clone() for data in collector]
        collector.shutdown()
    results = [key for key in hooked._step_keys() if key[0] != "computed"]
    for first, second in pairwise(batches):
        for key in results:
            assert not torch.equal(first[key], second[key])
    last = batches[-1]
    with METHODS[method](case).prepare(make_actor()) as other:
        other.load_state_dict(actor.state_dict())
        if method in ("caching", "saliency"):
            again = other.annotate(last.exclude(*results, "computed"))
            for key in results:
                torch.testing.assert_close(again[key], last[key], atol=1e-5, rtol=1e-4)


def test_a_policy_compiled_before_it_was_prepared_is_refused() -> None:
    with pytest.raises(PreparationError, match="_orig_mod"):
        ActivationCaching("module").prepare(torch.compile(categorical())).__enter__()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_inductor(method: str) -> None:
    case = CASES["categorical"]
    with METHODS[method](case).prepare(case.build()) as hooked, torch.no_grad():
        compiled = torch.compile(hooked, fullgraph=True)
        data = case.data(5)
        torch.manual_seed(3)
        found = compiled(data.clone())
        data["action"] = found["action"]
        # Inductor has a random generator of its own, so the action differs: the rest is compared given the action.
        expected = hooked.annotate(data) if method in ("caching", "saliency") else hooked(data.clone())
        for key in ("logits", *(key for key in hooked._step_keys() if key[0] != "computed")):
            if key in expected.keys(True, True):
                torch.testing.assert_close(found[key], expected[key], atol=1e-5, rtol=1e-5)

"""Every method of the table: what the conformance kit promises of it, what it writes, what it refuses, the page."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict.utils import unravel_key

import tdhook_rl
from tdhook_rl.attribution.base import GradientAttribution
from tdhook_rl.attribution.perturbation_base import Perturbation
from tdhook_rl.errors import TdhookError
from tdhook_rl.method import Method
from tdhook_rl.testing import CHECKS, check_method
from tests.method_info import PAGE, MethodInfo, page
from tests.method_table import METHODS, SAMPLES, pairs
from tests.policies import POLICIES, Case
from tests.test_invariants import assert_at_rest, snapshot

every_method = pytest.mark.parametrize("info", METHODS, ids=lambda info: info.name)
OTHERS = [pair for pair in pairs(POLICIES) if pair[1] != SAMPLES[pair[0]].usual]

# What test_odd_networks says of batch statistics instead.
MOVING = dict.fromkeys(
    (
        "original_is_untouched", "restored_after_exit", "restored_after_an_exception", "annotate_equals_inline",
        "a_raising_model_leaves_nothing_behind", "second_use_equals_first", "composes_in_either_order",
        "observing_is_bit_neutral", "pickles", "deep_copies",
    ),
    "its own forward moves the statistics of its batches",
)  # fmt: skip


def conforms(name: str, policy: str, only: list[str] | None = None) -> None:
    sample, case = SAMPLES[name], POLICIES[policy]
    waive = {**sample.waive, **(MOVING if policy == "batch_norm" else {})}
    check_method(
        lambda: sample.make(case),
        policy=case.build,
        data=lambda *batch: sample.data(case, *batch),
        only=only,
        waive=waive,
    )


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", SAMPLES)
def test_every_configuration_conforms(name: str, check: str) -> None:
    if check in SAMPLES[name].waive:
        pytest.skip(SAMPLES[name].waive[check])
    conforms(name, SAMPLES[name].usual, [check])


@pytest.mark.parametrize(
    ("name", "policy"), [(name, policy) for name, policy in OTHERS if any(SAMPLES[name] is i.sample for i in METHODS)]
)
def test_on_every_policy_it_observes_and_takes_batches(name: str, policy: str) -> None:
    conforms(name, policy, ["observing_is_bit_neutral", "batch_equals_rows"])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "policy"), OTHERS)
def test_every_configuration_conforms_on_every_policy(name: str, policy: str) -> None:
    conforms(name, policy)


@every_method
def test_weights_are_shared(info: MethodInfo) -> None:
    case = POLICIES[info.sample.usual]
    plain = case.build()
    with info.sample.make(case).prepare(plain) as hooked:
        own = [name for name, p in hooked.named_parameters() if p is not dict(plain.named_parameters())[name]]
    assert bool(own) == (info.name == "Pruning")  # which is of weights of its own


def place(key: tuple[str, ...], hooked: Any) -> tuple[str, ...]:
    """What stands behind the root of a key."""
    if len(key) == 1:
        return key
    rest = unravel_key(key[1:])
    named = {"in_key": hooked.policy_in_keys, "out_key": hooked.policy_out_keys}
    for word, keys in named.items():
        if rest in [unravel_key(one) for one in keys]:
            return key[0], word
    paths = dict(hooked.named_modules())
    named_by_path = any(".".join(key[index:]) in paths for index in range(1, len(key)))
    return key[0], "path" if named_by_path else "name"


@pytest.mark.parametrize("name", SAMPLES)
def test_results_have_no_graph_where_an_encoder_before_the_policy_is_trained(name: str) -> None:
    sample, case = SAMPLES[name], POLICIES[SAMPLES[name].usual]
    with sample.make(case).prepare(case.build()) as hooked:
        data = sample.data(case, 3)
        for key, value in data.items(True, True):
            if value.is_floating_point():
                data.set(key, value * torch.ones((), requires_grad=True))
        found = hooked(data)
        found = hooked.annotate(found, on_mismatch="ignore")
        carry = [key for key in hooked.result_keys if (one := found.get(key, None)) is not None and one.requires_grad]
    assert not carry


@every_method
def test_it_writes_the_keys_of_the_table(info: MethodInfo) -> None:
    found = set()
    for sample in info.samples.values():
        case = POLICIES[sample.usual]
        with sample.make(case).prepare(case.build()) as hooked:
            found |= {place(key, hooked) for key in hooked.result_keys if key[0] != "computed"}
    assert found == set(info.writes) or info.name == "Scheduled"  # whose keys are those of another method


@pytest.mark.parametrize(
    ("info", "words", "make"),
    [pytest.param(info, *bad, id=f"{info.name}-{bad[0]}") for info in METHODS for bad in info.bad.items()],
)
def test_a_bad_configuration_is_told_and_leaves_nothing_behind(
    info: MethodInfo, words: str, make: Callable[[Case], Method]
) -> None:
    sample, case = info.sample, POLICIES[info.sample.usual]
    plain = case.build()
    before, data = snapshot(plain), sample.data(case, 3)
    keys = set(data.keys(True, True))
    entered = []

    def use() -> None:
        with make(case).prepare(plain) as hooked:
            entered.append(hooked)
            hooked.annotate(hooked(data))

    with pytest.raises(TdhookError, match=words):
        use()
    assert snapshot(plain) == before
    # A key that the policy's own forward has written may stay; none of the method may.
    assert set(data.keys(True, True)) <= keys | set(plain.out_keys)
    assert not data[case.key].requires_grad
    for hooked in entered:
        assert_at_rest(hooked)
    with sample.make(case).prepare(plain) as again:
        again(sample.data(case, 3))
    assert snapshot(plain) == before


def test_every_public_method_is_in_the_table() -> None:
    public = set()
    for info in pkgutil.walk_packages(tdhook_rl.__path__, "tdhook_rl."):
        if info.name.split(".")[1] in ("attribution", "latent", "weights", "scheduled"):
            module = importlib.import_module(info.name)
            named = [one for name, one in vars(module).items() if not name.startswith("_")]
            public |= {one for one in named if isinstance(one, type) and issubclass(one, Method)}
    assert {info.cls for info in METHODS} == public - {GradientAttribution, Perturbation, Method}  # bases
    assert all(info.bad and info.samples and info.oracles for info in METHODS)


def test_the_page_has_the_table() -> None:
    assert PAGE.read_text() == page(METHODS), "python -m tests.method_table writes it"

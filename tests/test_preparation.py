"""What cannot be hooked says why; what cannot be named, what there is."""

from __future__ import annotations

import threading
from functools import partial
from operator import attrgetter
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdhook_rl import ActivationCaching, Compose, DirectionalAblation, Saliency, SteeringVectors
from tdhook_rl.errors import KeyCollisionError, PreparationError, SiteError
from tests.policies import CASES, categorical, mlp


def test_a_policy_compiled_first_is_refused() -> None:
    for compiled in (torch.compile(mlp()), nn.Sequential(torch.compile(nn.Linear(6, 2)))):
        with pytest.raises(PreparationError, match="_orig_mod"):
            Saliency().prepare(compiled).__enter__()
    net = mlp()
    net.compile()
    with pytest.raises(PreparationError, match="compiled before it was prepared"):
        Saliency().prepare(net).__enter__()


def test_a_lazy_module_is_refused() -> None:
    net = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    with pytest.raises(PreparationError, match=r"'0' of the policy \(LazyLinear\) is lazy .* call the policy once"):
        Saliency().prepare(net).__enter__()
    net(torch.randn(2, 3))
    with Saliency().prepare(net) as hooked:
        hooked(TensorDict({"input": torch.randn(2, 3)}, batch_size=2))


def test_a_module_that_does_not_copy_is_refused() -> None:
    net = mlp()
    net.lock = threading.Lock()
    with pytest.raises(PreparationError, match=r"cannot be copied .*policy_factory"):
        Saliency().prepare(net).__enter__()


def test_a_module_that_unties_itself_is_noticed() -> None:
    class Own(nn.Linear):
        def __deepcopy__(self, memo):
            other = nn.Linear(self.in_features, self.out_features)
            other.load_state_dict(self.state_dict())
            return other

    from tdhook_rl.errors import TieError

    with pytest.raises(TieError, match=r"does not share '0\.weight'"):
        Saliency().prepare(nn.Sequential(Own(6, 2))).__enter__()


def test_weight_norm_is_tied() -> None:
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), nn.Tanh(), nn.Linear(4, 1))
    data = TensorDict({"input": torch.randn(3, 6)}, batch_size=3)
    with Compose(ActivationCaching("1"), Saliency()).prepare(net) as hooked:
        found = hooked(data.clone())
    assert torch.equal(found["output"], net(data["input"]))


def test_what_is_not_a_module_and_what_is_hooked_already_is_refused() -> None:
    with pytest.raises(PreparationError, match=r"is an nn\.Module, got a function"):
        Saliency().prepare(lambda x: x)
    with (
        ActivationCaching("1").prepare(mlp()) as hooked,
        pytest.raises(PreparationError, match=r"Compose\(first, second\)"),
    ):
        Saliency().prepare(hooked)

    class Taken(nn.Module):
        restore = 3

        def forward(self, x):
            return x

    module = TensorDictModule(Taken(), in_keys=["x"], out_keys=["y"])
    module.annotate = 1
    with pytest.raises(PreparationError, match="own attribute 'annotate'"):
        Saliency().prepare(module).__enter__()


def test_unknown_keys_are_refused() -> None:
    with pytest.raises(KeyCollisionError, match="nearest: 'observation'"):
        Saliency().prepare(categorical(), in_keys=["observations"])


def test_a_named_site_that_does_not_run_is_an_error_and_a_pattern_needs_one() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(6, 2), nn.Linear(6, 2)

        def forward(self, x):
            return self.used(x)

    data = TensorDict({"input": torch.randn(3, 6)}, batch_size=3)
    with (
        ActivationCaching("unused").prepare(Unused()) as hooked,
        pytest.raises(SiteError, match="'unused' did not run"),
    ):
        hooked(data.clone())
    for method in (
        SteeringVectors({"unused": torch.ones(2)}),
        SteeringVectors(modules_to_steer=["unused"], steer_fn=lambda k, o: o),
        DirectionalAblation({"un.*": torch.ones(2)}),
    ):
        with method.prepare(Unused()) as hooked, pytest.raises(SiteError, match="'unused', which did not run"):
            hooked(data.clone())
    with SteeringVectors({".*used$": torch.ones(2)}).prepare(Unused()) as hooked:
        hooked(data.clone())
    with ActivationCaching("un.*").prepare(Unused()) as hooked, pytest.raises(SiteError, match="none of the modules"):
        hooked(data.clone())
    with ActivationCaching(".*used$").prepare(Unused()) as hooked:
        assert ("cache", "unused") in hooked.out_keys
        found = hooked(data.clone())
        assert ("cache", "unused") not in hooked.out_keys
        assert list(found["cache"].keys()) == ["used"]
    with (
        Saliency(input_modules=["unused"]).prepare(Unused()) as hooked,
        pytest.raises(SiteError, match="cannot be explained"),
    ):
        hooked(data.clone())


def test_a_pickled_policy_registers_further_hooks_beside_its_own() -> None:
    import pickle

    case = CASES["categorical"]
    with ActivationCaching(case.site).prepare(categorical()) as hooked:
        twin = pickle.loads(pickle.dumps(hooked))
        calls = []
        for _ in range(3):
            twin.get_submodule(case.site).register_forward_hook(lambda *_: calls.append(1))
        assert ("cache", case.site) in twin(case.data(2)).keys(True, True)
    assert len(calls) == 3


def _listed(self: TensorDictModule) -> list[str]:
    return self.read


@pytest.mark.parametrize("getter", [_listed, attrgetter("read"), partial(_listed)], ids=lambda one: type(one).__name__)
def test_keys_that_a_class_computes(getter: Any) -> None:
    """By a property of whatever is called: a hooked policy asks it of itself."""

    class Computes(TensorDictModule):
        in_keys = property(getter, lambda self, keys: setattr(self, "read", list(keys)))

    policy = Computes(nn.Linear(3, 2), in_keys=["x"], out_keys=["y"])
    with Saliency(when="step").prepare(policy) as hooked:
        found = hooked(TensorDict({"x": torch.randn(4, 3)}, batch_size=4))
    assert hooked.policy_in_keys == ["x"]
    torch.testing.assert_close(found["attr", "x"], policy.module.weight.sum(0).expand(4, -1))

"""The invariants of a hooked policy that the conformance kit does not try with every method."""

from __future__ import annotations

import warnings

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdhook_rl import ActivationCaching, Compose, Saliency, SteeringVectors
from tdhook_rl.errors import InactiveError, PreparationError, TieError
from tdhook_rl.hooking.hooked import HookedMixin
from tests.policies import CASES, categorical, mlp, value


def hook_count(module: nn.Module) -> int:
    stores = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(child, store)) for child in module.modules() for store in stores)


def snapshot(module: nn.Module) -> tuple:
    """All of a module that hooking might change."""
    return (
        hook_count(module),
        [(name, type(child), child.training, sorted(vars(child))) for name, child in module.named_modules()],
        [(name, id(p), p.requires_grad, p.grad is None, p._version) for name, p in module.named_parameters()],
        [(name, id(b), b._version) for name, b in module.named_buffers()],
        module.in_keys,
        module.out_keys,
    )


def assert_at_rest(hooked: HookedMixin) -> None:
    """Nothing of a call is left."""
    runtime = hooked._hooked.runtime
    for name in ("slots", "leaves", "rows", "depth", "recording", "replay", "explaining"):
        assert not getattr(runtime, name), name


class Broken(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError


def test_a_raising_model_leaves_nothing_behind_in_get_dist_either() -> None:
    case, plain = CASES["categorical"], categorical()
    plain.module[0].module.append(Broken())
    with Compose(ActivationCaching(case.site), Saliency(when="step")).prepare(plain) as hooked:
        for call in (hooked, hooked.get_dist):
            with pytest.raises(ZeroDivisionError):
                call(case.data(3))
            assert_at_rest(hooked)


def test_a_raising_hook_leaves_nothing_behind() -> None:
    def fail(module_key: str, output: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError(module_key)

    case = CASES["categorical"]
    plain = categorical()
    before = snapshot(plain)
    method = Compose(
        ActivationCaching(case.site), SteeringVectors(modules_to_steer=["module.0.module.3"], steer_fn=fail)
    )
    with method.prepare(plain) as hooked:
        with pytest.raises(ZeroDivisionError, match=r"module\.0\.module\.3"):
            hooked(case.data(3))
        assert not hooked._hooked.runtime.slots
        with pytest.raises(ZeroDivisionError):
            hooked.get_dist(case.data(3))
        assert not hooked._hooked.runtime.slots
    assert snapshot(plain) == before
    plain(case.data(3))


def test_memory_mapped_data_is_annotated(tmp_path) -> None:
    case = CASES["categorical"]
    plain = case.build()
    data = plain(case.data(4)).detach().memmap_(tmp_path)
    method = Compose(ActivationCaching(case.site), Saliency())
    with method.prepare(plain) as hooked:
        found = hooked.annotate(data)
    assert found["attr", "observation"].shape == (4, 6)
    assert "attr" not in data.keys()


def test_after_the_context_calling_raises_and_says_what_to_do() -> None:
    case = CASES["categorical"]
    plain = categorical()
    context = ActivationCaching(case.site).prepare(plain)
    with context as hooked:
        inner = hooked.module[0]
    for call in (hooked, hooked.get_dist, hooked.annotate, inner):
        with pytest.raises(InactiveError, match="return_context=False"):
            call(case.data(2))
    with context as again, pytest.raises(PreparationError, match="entered already"):
        context.__enter__()
    kept = ActivationCaching(case.site).prepare(plain, return_context=False)
    kept(case.data(2))
    kept.restore()
    with pytest.raises(InactiveError):
        kept(case.data(2))
    with pytest.raises(InactiveError):
        again(case.data(2))


def test_training_flags_are_copied_and_divergence_warns() -> None:
    plain = categorical().eval()
    case = CASES["categorical"]
    with ActivationCaching(case.site).prepare(plain) as hooked:
        assert not hooked.training
        plain.train()
        assert not hooked.training
        with pytest.warns(UserWarning, match="train mode and the hooked one in eval"):
            hooked(case.data(2))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            hooked(case.data(2))  # once


def test_an_untied_original_is_noticed() -> None:
    case = CASES["categorical"]
    plain = categorical()
    with ActivationCaching(case.site).prepare(plain) as hooked:
        plain.load_state_dict({k: v.clone() for k, v in plain.state_dict().items()}, assign=True)
        with pytest.raises(TieError, match=r"module\.0\.module\.0\.weight"):
            hooked(case.data(2))
    with ActivationCaching(case.site).prepare(plain) as hooked:
        for refused in (hooked.double, lambda: hooked.to(torch.float64)):
            with pytest.raises(TieError, match="hooked policy"):
                refused()
        with pytest.raises(TieError, match="assign"):
            hooked.load_state_dict(plain.state_dict(), assign=True)
        assert hooked.to("cpu") is hooked


def test_an_optimiser_step_on_the_policy_is_seen_at_once() -> None:
    case = CASES["value"]
    plain = value()
    data = case.data(3)
    with ActivationCaching(case.site).prepare(plain) as hooked:
        first = hooked(data.clone())["state_value"]
        optimizer = torch.optim.SGD(plain.parameters(), lr=1.0)
        plain(data.clone())["state_value"].sum().backward()
        optimizer.step()
        second = hooked(data.clone())["state_value"]
        assert not torch.equal(first, second)
        assert torch.equal(second, plain(data.clone())["state_value"])


def test_a_plain_module_is_wrapped_and_paths_are_its_own() -> None:
    net = mlp()
    with ActivationCaching("1").prepare(net) as hooked:
        found = hooked(TensorDict({"input": torch.randn(3, 6)}, batch_size=3))
        assert found["cache", "1"].shape == (3, 16)
        assert torch.equal(found["output"], net(found["input"]))
    with ActivationCaching("1").prepare(net, in_keys=["x"], out_keys=["y"]) as hooked:
        assert hooked.in_keys == ["x"]
        assert torch.equal(hooked(x=torch.ones(2, 6)), net(torch.ones(2, 6)))


def test_called_with_tensors_it_answers_as_the_policy() -> None:
    case = CASES["categorical"]
    plain = categorical()
    x = torch.randn(3, 6)
    torch.manual_seed(1)
    expected = plain(observation=x)
    with ActivationCaching(case.site).prepare(plain) as hooked:
        torch.manual_seed(1)
        found = hooked(observation=x)
        torch.manual_seed(1)
        positional = hooked(x)
    assert len(found) == len(expected)
    for a, b, c in zip(found, expected, positional, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_in_place_activations_do_not_overwrite_what_was_captured() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 2))
    x = torch.randn(5, 6)
    with ActivationCaching(["0", "1"]).prepare(net) as hooked:
        found = hooked(TensorDict({"input": x}, batch_size=5))
    torch.testing.assert_close(found["cache", "0"], net[0](x))
    torch.testing.assert_close(found["cache", "1"], net[0](x).relu())


def test_every_result_key_has_a_mask() -> None:
    case = CASES["categorical"]
    with Compose(ActivationCaching(case.site), Saliency(when="step")).prepare(categorical()) as hooked:
        found = hooked(case.data(3, 2))
        for root in ("cache", "attr"):
            assert ("computed", root) in hooked.out_keys
            assert found["computed", root].dtype == torch.bool
            assert found["computed", root].shape == (3, 2)
            assert bool(found["computed", root].all())

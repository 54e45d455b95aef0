"""Activation caching: keys, callbacks, and where they run."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.collectors import MultiSyncCollector

from tdhook_rl import ActivationCaching, Compose, Saliency
from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import InactiveError, InputError, KeyCollisionError, SiteError
from tdhook_rl.examples.agent import FC2, make_actor
from tests.policies import CASES, FEATURES, HIDDEN, categorical, mlp

# ---------------------------------------------------------------------- keys


def marks(root: str) -> set[tuple[str, str]]:
    return {("computed", root), ("computed", f"{root}.stamp")}


def test_keys_of_each_scheme() -> None:
    net = nn.Sequential(mlp(), nn.Tanh())
    data = TensorDict({"input": torch.randn(3, FEATURES)}, batch_size=3)

    def keys(*pattern: str, **options) -> set:
        with ActivationCaching(list(pattern), **options).prepare(net) as hooked:
            found = set(hooked(data.clone()).keys(True, True)) - {"input", "output", *marks("cache")}
            assert found == set(hooked.result_keys) - marks("cache")
            return found

    assert keys("0.1") == {("cache", "0.1")}
    assert keys("0.1", directions=["fwd_pre"]) == {("cache", "0.1")}
    assert keys("0.1", directions=["fwd", "fwd_pre"]) == {("cache", "fwd", "0.1"), ("cache", "fwd_pre", "0.1")}
    assert keys("0.1", use_nested_keys=True) == {("cache", "fwd", "0", "1")}
    assert keys(r"0\.(1|3)$", use_nested_keys=True, cache_key="c") - marks("c") == {
        ("c", "fwd", "0", "1"),
        ("c", "fwd", "0", "3"),
    }
    assert keys("module.0.1", relative=False) == {("cache", "module.0.1")}
    with pytest.raises(SiteError, match="no submodule of Sequential"):
        keys(r"module\.0\.1$")
    with pytest.raises(SiteError, match="no submodule of TensorDictModule"):
        keys(r"0\.1$", relative=False)


def test_nested_keys_refuse_a_module_inside_another() -> None:
    net = nn.Sequential(mlp(), nn.Tanh())
    with pytest.raises(KeyCollisionError, match=r"\('cache', 'fwd', '0'\) would be a tensor .* a node"):
        ActivationCaching(["0", "0.1"], use_nested_keys=True).prepare(net).__enter__()
    inner, outer = (ActivationCaching(path, use_nested_keys=True) for path in ("0.1", "0"))
    for methods in ((inner, outer), (outer, inner)):
        with pytest.raises(KeyCollisionError, match="one writes a tensor where the other needs a node"):
            Compose(*methods).prepare(net).__enter__()


def test_directions_are_checked() -> None:
    with pytest.raises(InputError, match="pass cache=TensorDict"):
        ActivationCaching("1", directions=["fwd", "bwd"])
    with pytest.raises(InputError, match="no direction is named 'forward'; nearest"):
        ActivationCaching("1", directions=["forward"])
    for nothing in ("fwd", []):
        with pytest.raises(InputError, match="is no list of some of"):
            ActivationCaching("1", directions=nothing)
    with ActivationCaching("1", directions=["bwd"], cache=TensorDict()).prepare(mlp()) as hooked:
        inner = hooked.hooked_root[1]
    with pytest.raises(InactiveError):
        inner(torch.randn(2, HIDDEN))


# ---------------------------------------------------------------------- callbacks


def test_a_callback_is_passed_what_it_has_parameters_for() -> None:
    net, cache, seen = mlp(), TensorDict(), []

    def record(**offered) -> torch.Tensor:
        seen.append(offered)
        value = offered.get("output", offered.get("grad_output", offered.get("grad_input", offered["module"].weight)))
        return (
            value[0] if isinstance(value, tuple) else value.expand(3, *value.shape[-1:]) if value.ndim == 1 else value
        )

    data = TensorDict({"input": torch.randn(3, FEATURES)}, batch_size=3)
    with ActivationCaching("0", directions=["fwd", "bwd_pre"], cache=cache, callback=record).prepare(net) as hooked:
        found = hooked(data)
        found["output"].sum().backward()
        assert torch.equal(seen[0]["args"][0], data["input"])
        assert seen[0]["module"] is hooked.hooked_root[0]
    assert set(seen[0]) == {"module", "args", "kwargs", "output", "key", "direction"}
    assert set(seen[1]) == {"module", "grad_output", "key", "direction"}
    assert [(one["key"], one["direction"]) for one in seen] == [("0", "fwd"), ("0", "bwd_pre")]
    assert torch.equal(seen[1]["grad_output"][0], cache["bwd_pre", "0"])
    with ActivationCaching("1", directions=["fwd_pre"], callback=lambda args: args[0][..., :2]).prepare(net) as hooked:
        assert torch.equal(hooked(data.clone())["cache", "1"], net[0](data["input"])[:, :2])


@pytest.mark.parametrize("batch", [(4,), (4, 2)])
def test_a_callback_chooses_from_a_tuple(batch: tuple[int, ...]) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = nn.MultiheadAttention(FEATURES, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            flat = x.reshape(-1, *x.shape[-2:])
            return self.attend(flat, flat, value=flat)[0].reshape(x.shape)

    net, x = Attention(), torch.randn(*batch, 5, FEATURES)
    method = Compose(
        ActivationCaching("attend", callback=lambda output: output[1], cache_key="weights"),
        ActivationCaching("attend", callback=lambda kwargs: kwargs["value"], cache_key="values"),
        ActivationCaching("attend"),
    )
    with method.prepare(net) as hooked:
        data = hooked(TensorDict({"input": x}, batch_size=batch))
    flat = x.reshape(-1, 5, FEATURES)
    output, weights = net.attend(flat, flat, flat)
    torch.testing.assert_close(data["weights", "attend"], weights.reshape(*batch, 5, 5))
    torch.testing.assert_close(data["values", "attend"], x)
    torch.testing.assert_close(data["cache", "attend"], output.reshape(x.shape))
    assert not data["weights", "attend"].requires_grad


def test_a_callback_that_cannot_be_used_says_why() -> None:
    with pytest.raises(InputError, match=r"parameters \(x\), none of which is offered.*output, key, direction"):
        ActivationCaching("1", callback=lambda x: x)
    with pytest.raises(InputError, match=r"direction 'bwd_pre' there is no keyword 'output'"):
        ActivationCaching("1", callback=lambda output: output, directions=["fwd", "bwd_pre"], cache=TensorDict())
    with pytest.raises(InputError, match="no keyword 'extra'"):
        ActivationCaching("1", callback=lambda output, extra: output)
    with pytest.raises(InputError, match="none of which"):
        exec("from tdhook_rl import ActivationCaching\nActivationCaching('1', callback=lambda output, /: output)")
    with pytest.raises(InputError, match="no signature"):
        ActivationCaching("1", callback=torch.tanh)
    data = CASES["value"].data(3)
    for callback, message in (
        (lambda output: output.mean(0), r"what the callback kept for \('cache', '1'\) has shape \(16,\)"),
        (lambda output: None, "returned a NoneType for '1'"),
    ):
        with ActivationCaching("1", callback=callback).prepare(CASES["value"].build()) as hooked:
            with pytest.raises(InputError, match=message):
                hooked(data.clone())
            assert not hooked._hooked.runtime.slots


def test_a_callback_runs_only_where_something_is_captured() -> None:
    calls = []
    case = CASES["categorical"]
    method = Compose(
        ActivationCaching(case.site, callback=lambda output: (calls.append(1), output)[1]), Saliency(when="step")
    )
    with method.prepare(categorical()) as hooked:
        found = hooked(case.data(3))
        assert len(calls) == 1
        hooked.get_dist(case.data(3))
        hooked(observation=torch.randn(3, FEATURES))
        assert len(calls) == 1
        hooked.annotate(found.exclude("cache", "computed"))
        assert len(calls) == 2


def test_gradient_callbacks_may_reduce() -> None:
    cache = TensorDict()
    method = ActivationCaching(
        "1", directions=["bwd_pre"], cache=cache, callback=lambda grad_output: grad_output[0].norm()
    )
    with method.prepare(mlp()) as hooked:
        hooked(TensorDict({"input": torch.randn(3, FEATURES)}, batch_size=3))["output"].sum().backward()
    assert cache["1"].shape == ()
    assert float(cache["1"]) > 0


# ---------------------------------------------------------------------- workers


def test_spawned_workers_send_what_a_lambda_kept_and_leave_the_cache_alone() -> None:
    actor, cache = make_actor(), TensorDict()
    method = ActivationCaching(
        FC2,
        directions=["fwd", "fwd_pre"],
        callback=lambda args, output=None: (args[0] if output is None else output)[..., :3],
        cache=cache,
    )
    with method.prepare(actor) as policy:
        collector = MultiSyncCollector(
            [partial(CueCorners, batch_size=[2], seed=0)], policy, frames_per_batch=16, total_frames=16
        )
        try:
            (data,) = (batch.clone() for batch in collector)
        finally:
            collector.shutdown()
        assert cache.is_empty()
        net = actor.module[0].module
        with torch.no_grad():
            before = net[:3](data["observation"])
        torch.testing.assert_close(data["cache", "fwd_pre", FC2], before[..., :3])
        torch.testing.assert_close(data["cache", "fwd", FC2], net[3](before)[..., :3])
        policy(data.select("observation"))
        torch.testing.assert_close(cache["fwd", FC2], data["cache", "fwd", FC2])


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
def test_compiled_policies_fill_a_cache() -> None:
    net, cache = mlp(), TensorDict()
    data = TensorDict({"input": torch.randn(3, FEATURES)}, batch_size=3)
    with ActivationCaching("1", directions=["fwd", "bwd_pre"], cache=cache).prepare(net) as hooked:
        compiled = torch.compile(hooked, backend="eager")
        for _ in range(2):
            found = compiled(data.clone())
            torch.testing.assert_close(cache["fwd", "1"], net[:2](data["input"]))
            assert ("bwd_pre", "1") not in cache.keys(True)
            found["output"].sum().backward()
            assert cache["bwd_pre", "1"].shape == (3, HIDDEN)


@pytest.mark.parametrize("mine", [torch.ones(5), "a string"])
def test_what_the_user_has_under_the_root_is_not_written_over(mine: object) -> None:
    data = TensorDict({"observation": torch.randn(5, FEATURES), "cache": mine}, batch_size=5)
    with ActivationCaching("module.0.module.1").prepare(categorical()) as hooked:
        with pytest.raises(KeyCollisionError, match=r"under 'cache', where the data has a \w+ of its own"):
            hooked(data)
        with pytest.raises(KeyCollisionError, match="of its own"):
            hooked.annotate(data)
    assert torch.equal(data["cache"], mine) if isinstance(mine, torch.Tensor) else data["cache"] == mine


def test_results_keep_the_names_of_the_dimensions() -> None:
    data = TensorDict({"observation": torch.randn(2, 5, FEATURES)}, batch_size=[2, 5], names=["row", "time"])
    with ActivationCaching("module.0.module.1").prepare(categorical()) as hooked:
        assert hooked(data.clone())["cache"].names == ["row", "time"]
        assert hooked.annotate(data)["cache"].names == ["row", "time"]

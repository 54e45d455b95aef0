"""What a run asks for acts in its own forward: calls and runs inside its block or its callbacks are clean."""

from __future__ import annotations

import threading
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook_rl import ActivationCaching, HookedModule, SteeringVectors


def build() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), torch.randn(6, 4)


def data(x: Tensor) -> TensorDict:
    return TensorDict({"input": x}, [6])


def test_calls_in_the_block_are_clean_for_every_request() -> None:
    net, x = build()
    hooked, other = HookedModule.from_module(net), torch.randn(6, 4)
    with hooked.run(data(x)) as run:
        run.set("1", torch.zeros(6, 8))
        run.set_grad_output("0", torch.zeros(6, 8))
        got = run.get("2")
        inside = hooked(data(other))["output"]
        inside.sum().backward()
        assert net[0].weight.grad.abs().sum() > 0
        run.stop("2")
        stopped = hooked(data(other))["output"]
        run_inside = hooked.annotate(data(other))
    assert torch.equal(inside, net(other))
    assert torch.equal(stopped, net(other))
    assert "output" not in run_inside.keys() or torch.equal(run_inside["output"], net(other))
    assert run.stopped_at == "2"
    torch.testing.assert_close(got.resolve(), net[2].bias.expand(6, 1))


def test_runs_in_the_block_are_their_own() -> None:
    net, x = build()
    hooked, inner, deepest = HookedModule.from_module(net), data(x), data(x)
    with hooked.run(outer := data(x)) as first:
        first.set("1", torch.zeros(6, 8))
        with hooked.run(inner) as second:
            second.set("1", torch.ones(6, 8))
            got = second.get("1")
            with hooked.run(deepest):
                pass
    torch.testing.assert_close(outer["output"], net[2](torch.zeros(6, 8)))
    torch.testing.assert_close(inner["output"], net[2](torch.ones(6, 8)))
    torch.testing.assert_close(deepest["output"], net(x))
    assert torch.equal(got.resolve(), torch.ones(6, 8))


def test_calls_and_runs_in_callbacks_are_clean() -> None:
    net, x = build()
    hooked, other, seen = HookedModule.from_module(net), torch.randn(6, 4), {}

    def baseline(value: Any = None, output: Any = None) -> Tensor:
        seen["call"] = hooked(data(other))["output"]
        with hooked.run(found := data(other)) as inner:
            inner.set("0", torch.zeros(6, 8))
            seen["value"] = inner.get("1")
        seen["run"] = found["output"]
        return seen["value"].resolve()

    with hooked.run(found := data(x)) as run:
        run.set("1", None, callback=baseline)
        kept = run.get("2", callback=lambda output: output + hooked(data(other))["output"])
    torch.testing.assert_close(seen["call"], net(other))
    torch.testing.assert_close(seen["run"], net[1:](torch.zeros(6, 8)))
    torch.testing.assert_close(found["output"], net[1:](torch.zeros(6, 8)))
    torch.testing.assert_close(kept.resolve(), found["output"] + net(other))


def test_run_callbacks_may_call_several_times() -> None:
    net, x = build()
    hooked = HookedModule.from_module(net)

    def twice(module: Any, found: TensorDict) -> None:
        module(found)
        found["first"] = found["output"].clone()
        module(found)

    with hooked.run(found := data(x), run_callback=twice) as run:
        run.set("1@0", torch.zeros(6, 8))
    torch.testing.assert_close(found["first"], net[2](torch.zeros(6, 8)))
    torch.testing.assert_close(found["output"], found["first"])


def test_per_row_keys_of_a_run_survive_a_call_in_its_callback() -> None:
    net, x = build()
    rows = {"alpha": torch.tensor([1.0, 0, 0, 0, 0, 0])}
    method = SteeringVectors({"1": torch.ones(8), "2": torch.ones(1)}, alpha="alpha")
    with method.prepare(net) as hooked:
        expected = hooked(data(x).update(rows))["output"]
        with hooked.run(found := data(x).update(rows)) as run:
            run.get("0", callback=lambda output: hooked(data(x).set("alpha", torch.zeros(6)))["output"])
    torch.testing.assert_close(found["output"], expected)


def test_observers_write_in_calls_inside_the_block() -> None:
    net, x = build()
    with ActivationCaching("1").prepare(net) as hooked:
        with hooked.run(data(x)) as run:
            run.set("0", torch.zeros(6, 8))
            inside = hooked(data(x))
    torch.testing.assert_close(inside["cache", "1"], net[:2](x))


def test_calls_of_other_threads_are_clean() -> None:
    net, x = build()
    hooked, entered, found = HookedModule.from_module(net), threading.Event(), {}

    def elsewhere() -> None:
        entered.wait(10)
        found["output"] = hooked(data(x))["output"]

    thread = threading.Thread(target=elsewhere)
    thread.start()

    def wait(output: Tensor) -> Tensor:
        entered.set()
        thread.join(0.2)
        return output

    with hooked.run(mine := data(x)) as run:
        run.get("0", callback=wait)
        run.set("1", torch.zeros(6, 8))
    thread.join(10)
    torch.testing.assert_close(found["output"], net(x))
    torch.testing.assert_close(mine["output"], net[2](torch.zeros(6, 8)))

"""Every request of a run and of the hooked module itself: families, callbacks, order, caches, nested outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from tdhook_rl import HookedModule, Saliency, SteeringVectors, targets
from tdhook_rl.errors import InactiveError, InputError, SiteError
from tests.policies import CASES, FEATURES, HIDDEN, categorical, mlp

F64 = torch.float64
KINDS = {"": "output", "_input": "input", "_grad": "grad_input", "_grad_output": "grad_output"}
every_kind = pytest.mark.parametrize("suffix", KINDS)


def batch(rows: int = 3) -> TensorDict:
    return TensorDict({"input": torch.randn(rows, FEATURES, dtype=F64)}, batch_size=rows)


def first(data: TensorDict) -> Tensor:
    return data["output"][:, 0]


def by_hand(net: nn.Sequential, x: Tensor, given: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """All four kinds at module 2 of an MLP, and what came of the input, with some of them overridden."""
    given = given or {}
    hidden = net[:2](x).detach().requires_grad_()
    received = given.get("input", hidden)
    output = given.get("output", net[2](received))
    output = output if output.requires_grad else output.clone().requires_grad_()
    result = net[3:](output)
    grad_output = given.get("grad_output", torch.autograd.grad(result[:, 0].sum(), output)[0])
    grad_input = given.get("grad_input", grad_output @ net[2].weight)
    found = {"output": output, "input": received, "grad_output": grad_output, "grad_input": grad_input}
    return {name: value.detach() for name, value in (found | {"result": result}).items()}


@every_kind
@pytest.mark.parametrize("verb", ["get", "save"])
def test_every_kind_is_captured_in_a_run_and_directly(verb: str, suffix: str) -> None:
    net, data = mlp().double(), batch()
    expected = by_hand(net, data["input"])[KINDS[suffix]]
    hooked = HookedModule.from_module(net)
    with hooked.run(data, target=first) as run:
        proxy = getattr(run, verb + suffix)("2")
    torch.testing.assert_close(proxy.resolve().detach(), expected)
    assert getattr(run, verb + suffix)("2") is proxy
    prefix = "run." if verb == "save" else ""
    assert list(run.cache.keys()) == [f"{prefix}2_{KINDS[suffix]}"]
    cache = TensorDict()
    handle, proxy = getattr(hooked, verb + suffix)(cache, "2", cache_key="mine")
    first(hooked(batch().copy_(data.select("input")))).sum().backward()
    torch.testing.assert_close(cache["mine"].detach(), expected)
    assert proxy.resolve() is cache["mine"]
    handle.remove()
    hooked(batch())
    torch.testing.assert_close(cache["mine"].detach(), expected)


@every_kind
def test_every_kind_is_overridden_in_a_run_and_directly(suffix: str) -> None:
    net, data = mlp().double(), batch()
    value, kind = torch.randn(3, HIDDEN, dtype=F64), KINDS[suffix]
    expected = by_hand(net, data["input"], {kind: value})
    hooked = HookedModule.from_module(net)

    def check(request: Callable[[Any], None], expected: dict[str, Tensor]) -> None:
        again = data.clone()
        with hooked.run(again, target=first) as run:
            request(run)
            below = run.get_grad_output("1")  # what flows on below the module
        torch.testing.assert_close(again["output"].detach(), expected["result"])
        if suffix in ("_grad", "_grad_output"):
            torch.testing.assert_close(below.resolve(), expected["grad_input"])

    for form in (value, (value,)):  # a tuple is what torch's hooks take for inputs and gradients
        check(lambda run, form=form: getattr(run, "set" + suffix)("2", form), expected)
    handle = getattr(hooked, "set" + suffix)("2", value)
    check(lambda run: None, expected)
    handle.remove()
    check(lambda run: None, by_hand(net, data["input"]))


def test_the_caches_of_a_run() -> None:
    net, data, mine = mlp().double(), batch(), TensorDict()
    hooked = HookedModule.from_module(net)
    with hooked.run(data, mine, "clean", run_cache=TensorDict()) as run:
        saved, got = run.save("1"), run.get("1")
    assert saved.cache is mine
    assert got.cache is run.cache
    assert list(mine.keys()) == ["clean.1_output"]
    other = TensorDict()
    with hooked.run(data) as run:
        run.cache = other
        run.save("1")
        run.get("1", cache_key="before", prepend=True)
        run.set("1", torch.zeros(3, HIDDEN, dtype=F64))
        run.get("1", cache_key="after")
    assert set(other.keys()) == {"run.1_output", "before", "after"}
    assert run.get("1", cache_key="before").resolve().any()
    assert not run.get("1", cache_key="after").resolve().any()
    plain: dict[str, Tensor] = {}
    with hooked.run(data, run_cache=plain) as run:
        run.get("1")
    assert list(plain) == ["1_output"]


def test_a_memory_mapped_cache_is_written_in_place(tmp_path) -> None:
    net, data = mlp().double(), batch()
    cache = TensorDict({"run.1_output": torch.zeros(3, HIDDEN, dtype=F64)}, batch_size=3).memmap_(tmp_path)
    with HookedModule.from_module(net).run(data, cache=cache) as run:
        run.save("1")
    torch.testing.assert_close(TensorDict.load_memmap(tmp_path)["run.1_output"], net[:2](data["input"]).detach())


def test_prepended_requests_come_before_the_hooks_that_are_there() -> None:
    net, data, vector = mlp().double(), batch(), torch.randn(HIDDEN, dtype=F64)
    with SteeringVectors({"1": vector}).prepare(net) as hooked, hooked.run(data) as run:
        early, late = run.get("1", cache_key="early", prepend=True), run.get("1", cache_key="late")
    plain = net[:2](data["input"])
    torch.testing.assert_close(early.resolve(), plain)
    torch.testing.assert_close(late.resolve(), plain + vector)


class Recurrent(nn.Module):
    """A tuple of a tensor and a tuple, a mapping, a named tuple and ``None``, on the way to the output."""

    class Pair(NamedTuple):
        nothing: None
        value: Tensor

    class Nested(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"skipped": None, "inner": [Recurrent.Pair(None, 2 * x)], "other": x}

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(FEATURES, HIDDEN, batch_first=True)
        self.nested = Recurrent.Nested()
        self.named = nn.Bilinear(HIDDEN, HIDDEN, 1)

    def forward(self, x: Tensor) -> Tensor:
        output, _ = self.lstm(x[:, None])
        deep = self.nested(output[:, 0])
        return self.named(input1=deep["inner"][0].value, input2=deep["other"])


def test_tuples_mappings_and_named_inputs_are_unwrapped() -> None:
    net, data = Recurrent().double(), batch()
    x = data["input"]
    hooked = HookedModule.from_module(net)
    with hooked.run(data.clone(), target=first) as run:
        output = run.get("lstm")
        cell = run.get("lstm", cache_key="cell", callback=lambda **given: given["output"][1][1])
        deep, named, slope = run.get("nested"), run.get_input("named"), run.get_grad("named")
    hidden, (_, c) = net.lstm(x[:, None])
    torch.testing.assert_close(output.resolve(), hidden)
    torch.testing.assert_close(cell.resolve(), c)
    torch.testing.assert_close(deep.resolve(), 2 * hidden[:, 0])
    assert torch.equal(named.resolve(), deep.resolve())
    torch.testing.assert_close(slope.resolve(), (hidden[:, 0] @ net.named.weight[0].T))
    value = torch.randn(3, HIDDEN, dtype=F64)
    for request, site in (("set", "nested"), ("set_input", "named")):
        again = data.clone()
        with hooked.run(again) as run:
            getattr(run, request)(site, value)
        torch.testing.assert_close(again["output"], net.named(value, hidden[:, 0]))
    for method in (
        SteeringVectors({"nested": value[0]}),
        SteeringVectors(modules_to_steer=["nested"], steer_fn=lambda k, o: o + value[0]),
    ):
        with method.prepare(net) as steered:
            found = steered(data.clone())["output"]
        torch.testing.assert_close(found, net.named(2 * hidden[:, 0] + value[0], hidden[:, 0]))


def test_modules_that_read_the_callers_tensordict() -> None:
    actor, data = categorical().double(), CASES["categorical"].data(3).double()
    hooked = HookedModule.from_module(actor)
    with hooked.run(data.clone()) as run:
        given, logits = run.get_input("module.0"), run.get("module.0")
    assert torch.equal(given.resolve(), data["observation"])
    torch.testing.assert_close(logits.resolve(), actor.module[0].module(data["observation"]))
    for request in (
        lambda run: run.set_input("module.0", torch.zeros(3, FEATURES)),
        lambda run: run.get_grad("module.0"),
    ):
        again = data.clone()
        with pytest.raises(InputError, match=r"'module\.0'.*reads its input from the caller's TensorDict"):
            with hooked.run(again) as run:
                request(run)
        assert torch.equal(again["observation"], data["observation"])


@pytest.mark.parametrize(
    ("suffix", "names"),
    [
        ("", {"args", "kwargs", "output"}),
        ("_input", {"args", "kwargs"}),
        ("_grad", {"grad_input"}),
        ("_grad_output", {"grad_output"}),
    ],
)
def test_callbacks_are_given_what_torch_gives_to_hooks(suffix: str, names: set[str]) -> None:
    net, data, seen = mlp().double(), batch(), []

    def look(**given: Any) -> Tensor:
        seen.append(given)
        value = given[KINDS[suffix] if suffix != "_input" else "args"]
        return (value if isinstance(value, Tensor) else value[0]) * 2

    hooked = HookedModule.from_module(net)
    with hooked.run(data, target=first) as run:
        proxy = getattr(run, "get" + suffix)("2", callback=look)
    torch.testing.assert_close(proxy.resolve().detach(), 2 * by_hand(net, data["input"])[KINDS[suffix]])
    assert set(seen[0]) == {"module", "key", "direction"} | names
    assert isinstance(seen[0]["module"], nn.Linear)
    assert seen[0]["key"] == "2"
    with hooked.run(data, target=first) as run:
        getattr(run, "set" + suffix)("2", 7, callback=look)
    assert set(seen[1]) == {"module", "key", "direction", "value"} | names
    assert seen[1]["value"] == 7


@pytest.mark.parametrize("suffix", ["", "_input", "_grad", "_grad_output"])
def test_callbacks_that_capture_only_look(suffix: str) -> None:
    hooked, data = HookedModule.from_module(mlp().double()), batch()

    def writes(**given: Any) -> Tensor:
        value = given[KINDS[suffix] if suffix != "_input" else "args"]
        value = value if isinstance(value, Tensor) else value[0]
        with torch.no_grad():
            return value.mul_(2)

    with pytest.raises(InputError, match=r"the callback for '2' has written in place"):
        with hooked.run(data, target=first) as run:
            getattr(run, "get" + suffix)("2", callback=writes)


def test_what_callbacks_capture_is_kept_as_it_was() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    data = TensorDict({"input": torch.randn(5, 4)}, batch_size=5)
    with torch.no_grad(), HookedModule.from_module(net).run(data) as run:
        proxy = run.get("0", callback=lambda output: output)
    torch.testing.assert_close(proxy.resolve(), net[0](data["input"]).detach())


def test_callbacks_take_what_they_name_and_no_more() -> None:
    net, data = mlp().double(), batch()
    hooked = HookedModule.from_module(net)
    with hooked.run(data) as run:
        half = run.get("1", callback=lambda output: output[..., :8])
        run.set("1", None, callback=lambda module, output, value, direction, key: None)  # leaves it
        with pytest.raises(InputError, match="requires 'grad', but it is called with keywords among 'module', 'key'"):
            run.get("1", callback=lambda grad: grad)
        with pytest.raises(InputError, match="requires 'output'"):
            run.get("1", callback=lambda output, /: output)
    torch.testing.assert_close(half.resolve(), net[:2](data["input"])[:, :8])
    assert torch.equal(data["output"], net(data["input"]))
    with pytest.raises(InputError, match="must return a tensor or a TensorDict, got a tuple"):
        with hooked.run(data) as run:
            run.get("1", callback=lambda output: (output,))


def test_what_did_not_act_is_said() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = mlp(), mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    hooked, data = HookedModule.from_module(Idle().double()), batch()
    for request, match in (
        (lambda run: run.set("idle.1", torch.zeros(3, HIDDEN)), r"run\.set named 'idle\.1', which did not run"),
        (lambda run: run.set_input("idle.1", torch.zeros(3, HIDDEN)), r"run\.set named 'idle\.1'"),
        (lambda run: run.stop("idle.1"), r"run\.stop named 'idle\.1', which did not run, so nothing was stopped"),
    ):
        with pytest.raises(SiteError, match=match), hooked.run(data) as run:
            request(run)
    with hooked.run(data) as run:
        proxy = run.get("idle.1")
        with pytest.raises(SiteError, match=r"'used\[1:3\]' names 2 modules where one is captured"):
            run.get("used[1:3]")
    with pytest.raises(SiteError, match="the module did not run"):
        proxy.resolve()
    with hooked.run(data) as run:  # of what comes after a stop nothing is asked
        run.stop("used.0")
        run.set("used.1", torch.zeros(3, HIDDEN))
    with pytest.raises(SiteError, match="nothing was captured"), hooked.run(data) as run:
        run.set("used.0", run.get("used.1"))  # routed from a later module to an earlier one


def test_a_slice_is_overridden_as_a_whole() -> None:
    net, data = mlp().double(), batch()
    net[0] = nn.Linear(FEATURES, HIDDEN, dtype=F64)
    with HookedModule.from_module(net).run(data) as run:
        run.set("[1:4]", torch.ones(3, HIDDEN, dtype=F64))
    torch.testing.assert_close(data["output"], net[4](torch.ones(3, HIDDEN, dtype=F64)))


def test_gradients_flow_through_a_routed_capture_and_after_the_run() -> None:
    net, data = mlp().double(), batch()
    hooked = HookedModule.from_module(net)
    with hooked.run(data, grad_enabled=True) as run:
        slope = run.get_grad_output("1")
        run.set("3", run.get("1"))
    with pytest.raises(SiteError, match="no gradient reached it"):
        slope.resolve()
    first(data).sum().backward()
    torch.testing.assert_close(slope.resolve(), net[4].weight[0].detach().expand(3, -1))
    assert net[0].weight.grad is not None


def test_a_model_that_catches_exceptions_is_stopped_all_the_same() -> None:
    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.net(x)
            except Exception:
                return torch.zeros(len(x), 4)

    data = batch()
    with HookedModule.from_module(Careful().double()).run(data) as run:
        run.stop("net.1")
    assert run.stopped_at == "net.1"
    assert "output" not in data.keys()


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("categorical", targets.taken_action_log_prob()),
        ("tanh_normal", targets.taken_action_log_prob()),
        ("tanh_normal", targets.Target("second", lambda run: run.outputs["loc"][..., 1])),
        ("actor_value", targets.state_value()),
        ("q_value", targets.chosen_q()),
        ("pixels", targets.entropy()),
    ],
)
def test_the_targets_of_attributions_are_targets_of_runs(name: str, target: targets.Target) -> None:
    case = CASES[name]
    actor, data = case.build().double(), case.data(3).double()
    with HookedModule.from_module(actor).run(data, target=target) as run:
        found = run.get_grad_output(case.site)
    collected = data.detach()
    with Saliency(target=target, input_modules=[case.site]).prepare(actor) as hooked:
        torch.testing.assert_close(found.resolve(), hooked.annotate(collected)["attr", case.site])


def test_hooks_of_the_users_own() -> None:
    net, data, seen = mlp().double(), batch(), {}

    def note(name: str, count: int) -> Callable[..., None]:
        def hook(*given: Any) -> None:
            assert len(given) == count
            seen[name] = given

        return hook

    hooked = HookedModule.from_module(net)
    counts = {"fwd": 3, "fwd_pre": 2, "bwd": 3, "bwd_pre": 2, "fwd_kwargs": 4, "fwd_pre_kwargs": 3}
    handles = [hooked.register_submodule_hook("2", note(name, n), name) for name, n in counts.items()]
    double = hooked.register_submodule_hook("module.4", lambda m, a, o: 2 * o, relative=False)
    result = hooked(data)["output"]
    result[:, 0].sum().backward()
    torch.testing.assert_close(result, 2 * net(data["input"]))
    assert set(seen) == set(counts)
    torch.testing.assert_close(seen["bwd"][1][0], 2 * by_hand(net, data["input"])["grad_input"])
    for handle in (*handles, double):
        handle.remove()
    assert torch.equal(hooked(batch().copy_(data.select("input")))["output"], net(data["input"]))
    with pytest.raises(InputError, match="nearest: 'fwd"):
        hooked.register_submodule_hook("2", note("", 0), "forward")


def test_a_time_without_the_hooks_or_with_the_users_own_module() -> None:
    net, data = mlp().double(), batch()
    vector = torch.randn(HIDDEN, dtype=F64)
    with SteeringVectors({"1": vector}, alpha="alpha").prepare(net) as hooked:
        with hooked.disable_context_hooks() as bare:  # before any other call, and without the key that steering reads
            assert bare.in_keys == ["input"]
            assert torch.equal(bare(data.clone())["output"], net(data["input"]))
        assert hooked.in_keys == ["input", "alpha"]
        steered = hooked(data.clone().set("alpha", torch.ones(3, dtype=F64)))["output"]
        torch.testing.assert_close(steered, net[2:](net[:2](data["input"]) + vector))
        with hooked.disable_context() as original:
            assert original is net
            assert torch.equal(original(data["input"]), net(data["input"]))
    kept = SteeringVectors({"1": vector}).prepare(net, return_context=False)
    assert not torch.equal(kept(data.clone())["output"], net(data["input"]))
    kept.restore()
    for call in (lambda: kept(data), lambda: kept.run(data)):
        with pytest.raises(InactiveError):
            call()
    assert torch.equal(net(data["input"]), TensorDictModule(net, ["input"], ["output"])(data.clone())["output"])

"""A module that runs several times in one forward: a path says which run, in every mode and for every method."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.distributions import Categorical
from torchrl.modules import ActorCriticWrapper, ProbabilisticActor, ValueOperator

from tdhook_rl import (
    ActivationAddition,
    ActivationCaching,
    ActivationPatching,
    Compose,
    DirectionalAblation,
    HookedModule,
    IntegratedGradients,
    ProbeReadout,
    Pruning,
    Saliency,
    SteeringVectors,
)
from tdhook_rl.attribution import DimsConfig, GradCAM
from tdhook_rl.errors import SiteError
from tdhook_rl.latent.probing import LinearProbe, Probing
from tdhook_rl.weights import Adapters

RUNS = {"@0": 0, "@1": 1, "@-1": -1, "@-2": -2}


class Shared(nn.Module):
    """One activation after two layers, and a sum of what it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.act = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        first = self.act(self.one(x))
        return self.head(first + self.act(self.two(first)))


class Looped(nn.Module):
    """A recurrent cell over the steps in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(2, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.new_zeros(*x.shape[:-1], 8)
        for step in range(2):
            hidden = self.cell(x[..., 2 * step : 2 * step + 2], hidden)
        return self.head(hidden)


class Holder(nn.Module):
    def __init__(self, act: nn.Module, width: int) -> None:
        super().__init__()
        self.layer, self.act = nn.Linear(width, 8), act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.layer(x))


class TwoPaths(nn.Module):
    """The same activation under two paths."""

    def __init__(self) -> None:
        super().__init__()
        act = nn.Sigmoid()
        self.first, self.second, self.head = Holder(act, 4), Holder(act, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        return self.head(first * self.second(first))


NETS: dict[str, tuple[type[nn.Module], str]] = {
    "shared activation": (Shared, "act"),
    "recurrent cell": (Looped, "cell"),
    "two paths": (TwoPaths, "second.act"),
}
MODES = ("eager", "no_grad", "inference_mode", "vmap", "annotate")


@pytest.fixture(autouse=True)
def _fresh_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def build(name: str) -> tuple[nn.Module, str]:
    kind, site = NETS[name]
    return kind().double(), site


def batch(rows: tuple[int, ...] = (6,), **more: Any) -> TensorDict:
    return TensorDict({"input": torch.randn(*rows, 4, dtype=torch.float64), **more}, rows)


def truth(net: nn.Module, site: str, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """What each run gave, and the gradient of the summed output with respect to it, by plain torch."""
    values: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        output = output if output.requires_grad else output.detach().requires_grad_()
        values.append(output)
        return output

    handle = net.get_submodule(site).register_forward_hook(keep)
    total = net(x).sum()
    handle.remove()
    return [value.detach() for value in values], list(torch.autograd.grad(total, values))


def called(hooked: Any, data: TensorDict, mode: str) -> TensorDict:
    data = data.clone()
    if mode == "annotate":
        return hooked.annotate(data)
    if mode == "vmap":
        return torch.vmap(hooked)(data)
    if mode == "compiled":
        compiled = torch.compile(hooked, fullgraph=True, backend="aot_eager")
        compiled(data.clone())
        with torch._dynamo.config.patch(error_on_recompile=True):
            compiled(data.clone())
            return compiled(data)
    with {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(mode, torch.enable_grad)():
        return hooked(data)


def pick(values: list[Tensor], run: str, dim: int = 1) -> Tensor:
    return torch.stack(values, dim) if run == "@all" else values[RUNS[run]]


@pytest.mark.parametrize(
    ("name", "mode", "run"),
    [(name, mode, run) for name in NETS for mode in MODES for run in [*RUNS, "@all"]],
)
def test_caching_and_gradients_of_the_run_that_is_named(name: str, mode: str, run: str) -> None:
    net, site = build(name)
    data = batch()
    values, slopes = truth(net, site, data["input"])
    method = Compose(ActivationCaching(site + run), Saliency(input_modules=[site + run], when="step"))
    with method.prepare(net) as hooked:
        found = called(hooked, data, mode)
    torch.testing.assert_close(found["cache", site + run], pick(values, run))
    torch.testing.assert_close(found["attr", site + run], pick(slopes, run))


@pytest.mark.parametrize("mode", MODES)
def test_caching_shows_the_last_run_where_none_is_named(mode: str) -> None:
    net, site = build("shared activation")
    data = batch()
    with ActivationCaching(site).prepare(net) as hooked:
        found = called(hooked, data, mode)
    torch.testing.assert_close(found["cache", site], truth(net, site, data["input"])[0][-1])


def test_every_choice_in_one_graph_without_recompiling() -> None:
    net, site = build("recurrent cell")
    data, sites = batch(), [f"{site}{run}" for run in ("@0", "@-1", "@all")]
    values, slopes = truth(net, site, data["input"])
    with Compose(ActivationCaching(sites), Saliency(input_modules=sites, when="step")).prepare(net) as hooked:
        found = called(hooked, data, "compiled")
    for run in ("@0", "@-1", "@all"):
        torch.testing.assert_close(found["cache", site + run], pick(values, run))
        torch.testing.assert_close(found["attr", site + run], pick(slopes, run))


@pytest.mark.parametrize("rows", [(), (3,), (2, 3)])
def test_all_runs_stand_behind_the_batch(rows: tuple[int, ...]) -> None:
    net, site = build("recurrent cell")
    net = nn.Sequential(nn.Flatten(0, -2), net, nn.Unflatten(0, rows)) if len(rows) > 1 else net
    site = f"1.{site}" if len(rows) > 1 else site
    data = batch(rows)
    values, slopes = truth(net, site, data["input"])
    method = Compose(ActivationCaching(f"{site}@all"), Saliency(input_modules=[f"{site}@all"], when="step"))
    with method.prepare(net) as hooked:
        found = hooked(data)
    shape = (*rows, 8)
    expected = torch.stack([value.reshape(shape) for value in values], len(rows))
    torch.testing.assert_close(found["cache", f"{site}@all"], expected)
    expected = torch.stack([slope.reshape(shape) for slope in slopes], len(rows))
    torch.testing.assert_close(found["attr", f"{site}@all"], expected)


METHODS: dict[str, Callable[[str], Any]] = {
    "saliency": lambda site: Saliency(input_modules=[site]),
    "integrated gradients": lambda site: IntegratedGradients(input_modules=[site], baseline=0.0, n_steps=3),
    "grad cam": lambda site: GradCAM(modules_to_attribute={site: DimsConfig((), (-1,))}),
    "target modules": lambda site: Saliency(
        init_attr_targets=lambda outputs, additional: outputs.select(site), target_modules=[site]
    ),
    "patching": lambda site: ActivationPatching([site]),
}


@pytest.mark.parametrize("mode", ["eager", "no_grad", "inference_mode", "vmap", "annotate"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETS)
def test_what_needs_one_run_asks_which(name: str, method: str, mode: str) -> None:
    net, site = build(name)
    data = batch()
    data["patched", "input"] = torch.randn(6, 4, dtype=torch.float64)
    with METHODS[method](site).prepare(net) as hooked:
        with pytest.raises(SiteError, match=f"'{site}@0'.*'{site}@-1'.*'{site}@all'"):
            called(hooked, data, mode)
        assert not hooked._hooked.runtime.slots
        assert hooked._hooked.runtime.runs is None


@pytest.mark.parametrize("name", NETS)
def test_a_module_that_runs_once_needs_no_number(name: str) -> None:
    net, _ = build(name)
    data = batch()
    with Saliency(input_modules=["head", "head@0", "head@-1"]).prepare(net) as hooked:
        found = hooked(data)["attr"]
    assert torch.equal(found["head"], found["head@0"])
    assert torch.equal(found["head"], found["head@-1"])


@pytest.mark.parametrize("mode", ["eager", "inference_mode", "annotate"])
@pytest.mark.parametrize("run", ["@0", "@1", "@-1", "@all"])
def test_integrated_gradients_of_a_run_are_complete_along_it(run: str, mode: str) -> None:
    net, data = Shared().double(), batch()
    x = data["input"]
    with IntegratedGradients(input_modules=[f"act{run}"], baseline=0.0, n_steps=300).prepare(net) as hooked:
        found = called(hooked, data, mode)["attr", f"act{run}"]
    (low_first, low_last), (first, last) = (truth(net, "act", one)[0] for one in (0 * x, x))
    with torch.no_grad():
        drop = {
            "@0": net.head(first + last) - net.head(low_first + net.act(net.two(low_first))),
            "@1": net.head(first + last) - net.head(first + low_last),
            "@-1": net.head(first + last) - net.head(first + low_last),
            "@all": net.head(first + last) - net.head(low_first + low_last),
        }[run]
    torch.testing.assert_close(found.reshape(6, -1).sum(-1), drop.sum(-1), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "mode"), [*((name, mode) for name in NETS for mode in MODES), ("two paths", "compiled")]
)
def test_patching_every_run_restores_the_clean_output_bit_for_bit(name: str, mode: str) -> None:
    net, site = build(name)
    data = batch()
    data["patched", "input"] = torch.randn(6, 4, dtype=torch.float64)
    with ActivationPatching([f"{site}@all"]).prepare(net) as hooked:
        found = called(hooked, data, mode)
    assert torch.equal(found["patched", "output"], net(data["input"]) if mode == "annotate" else found["output"])


@pytest.mark.parametrize(("run", "number"), [("@0", 0), ("@1", 1), ("@-1", 1), ("@-2", 0)])
@pytest.mark.parametrize("name", NETS)
def test_patching_one_run_is_that_by_hand(name: str, run: str, number: int) -> None:
    net, site = build(name)
    data, other = batch(), torch.randn(6, 4, dtype=torch.float64)
    clean, count = truth(net, site, data["input"])[0], iter(range(9))
    handle = net.get_submodule(site).register_forward_hook(
        lambda module, args, output: clean[number] if next(count) == number else None
    )
    expected = net(other)
    handle.remove()
    data["patched", "input"] = other
    with ActivationPatching([site + run]).prepare(net) as hooked:
        assert torch.equal(hooked(data)["patched", "output"], expected)


@pytest.mark.parametrize(
    ("kind", "run", "runs", "mode"),
    [
        (kind, run, runs, mode)
        for kind in ("steering", "function", "ablation", "adapter")
        for run, runs in (("", (0, 1)), ("@all", (0, 1)), ("@0", (0,)), ("@1", (1,)))
        for mode in ("eager", "no_grad", "inference_mode", "vmap", "compiled")
        if (kind != "adapter" or run != "@all") and (mode != "compiled" or (kind, run) == ("steering", "@1"))
    ],
)
def test_interventions_act_in_the_runs_that_are_named(kind: str, run: str, runs: tuple[int, ...], mode: str) -> None:
    net, data = Shared().double(), batch()
    vector = torch.randn(8, dtype=torch.float64)
    unit = vector / vector.norm()
    change = {
        "steering": lambda h: h + vector,
        "ablation": lambda h: h - (h @ unit)[:, None] * unit,
    }.get(kind, lambda h: 2 * h)
    site = f"act{run}"
    method = {
        "steering": SteeringVectors({site: vector}),
        "function": SteeringVectors(modules_to_steer=[site], steer_fn=lambda module_key, output: 2 * output),
        "ablation": DirectionalAblation({site: vector}),
        "adapter": Adapters({"double": (lambda h: 2 * h, site, site)}),
    }[kind]
    count = iter(range(9))
    handle = net.act.register_forward_hook(lambda module, args, output: change(output) if next(count) in runs else None)
    expected = net(data["input"])
    handle.remove()
    with method.prepare(net) as hooked:
        torch.testing.assert_close(called(hooked, data, mode)["output"], expected)


def test_runs_that_do_not_take_place_are_errors() -> None:
    net, data = Shared(), TensorDict({"input": torch.randn(6, 4), ("patched", "input"): torch.randn(6, 4)}, [6])
    for method in (
        ActivationCaching("act@2"),
        ActivationCaching("act@-3"),
        Saliency(input_modules=["act@2"]),
        Saliency(input_modules=["act@-3"]),
        ActivationPatching(["act@2"]),
        ActivationPatching(["act@-3"]),
        SteeringVectors({"act@2": torch.ones(8)}),
    ):
        with method.prepare(net) as hooked, pytest.raises(SiteError, match=r"act@(2|-3)"):
            hooked(data.clone())
    with pytest.raises(SiteError, match="counted from the last"):
        SteeringVectors({"act@-1": torch.ones(8)}).prepare(net, return_context=False)
    with pytest.raises(SiteError, match="leave '@0' out"):
        Pruning(modules_to_prune=["one@0"], amount_to_prune=0.5).prepare(net, return_context=False)


def test_runs_of_several_shapes_cannot_stand_side_by_side() -> None:
    act = nn.Tanh()
    net = nn.Sequential(nn.Linear(4, 8), act, nn.Linear(8, 3), act)
    data = TensorDict({"input": torch.randn(6, 4)}, [6])
    with ActivationCaching("1@all").prepare(net) as hooked, pytest.raises(SiteError, match=r"\(6, 8\), \(6, 3\)"):
        hooked(data.clone())
    with ActivationCaching(["1@0", "1@1"]).prepare(net) as hooked:
        found = hooked(data)["cache"]
    assert found["1@0"].shape == (6, 8)
    assert found["1@1"].shape == (6, 3)


class Halting(nn.Module):
    """As many rounds as its input says."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.layer = nn.Tanh(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(x[0, 0].abs())):
            x = self.act(self.layer(x))
        return x


@pytest.mark.filterwarnings("ignore:each row's output depends")  # the first row says how many rounds there are
def test_runs_that_do_not_correspond_are_errors() -> None:
    few, many = torch.full((3, 4), 2.0), torch.full((3, 4), 4.0)
    data = TensorDict({"input": few, ("patched", "input"): many, ("baseline", "input"): many}, [3])
    swapped = TensorDict({"input": many, ("patched", "input"): few, ("baseline", "input"): few}, [3])
    for method in (ActivationPatching(["act@all"]), IntegratedGradients(input_modules=["act@all"], n_steps=2)):
        with method.prepare(Halting()) as hooked:
            for one in (data, swapped):
                with pytest.raises(SiteError, match="act@all"):
                    hooked(one.clone())


@pytest.mark.parametrize("with_value", [False, True])
def test_the_trunk_of_an_actor_and_a_critic(with_value: bool) -> None:
    encoder, head, value = nn.Sequential(nn.Linear(4, 8), nn.Tanh()), nn.Linear(8, 3), nn.Linear(8, 1)
    actor = ProbabilisticActor(
        TensorDictModule(nn.Sequential(encoder, head), ["observation"], ["logits"]),
        in_keys=["logits"],
        out_keys=["action"],
        distribution_class=Categorical,
    )
    policy = ActorCriticWrapper(actor, ValueOperator(nn.Sequential(encoder, value), in_keys=["observation"]))
    site, x = "module.0.module.0.module.0", torch.randn(6, 4)
    from tdhook_rl import targets

    def both(run: Any) -> Tensor:
        score = run.distributions[-1][1].log_prob(run.stored["action"])
        return score + run.outputs["state_value"].squeeze(-1) if with_value else score

    method = Saliency(when="step", target=targets.Target("both", both), input_modules=[f"{site}@all"])
    with method.prepare(policy) as hooked:
        data = hooked(TensorDict({"observation": x}, [6]))
    features = encoder(x).detach().requires_grad_()
    explained = Categorical(logits=head(features)).log_prob(data["action"]).sum()
    explained = explained + value(features).sum() if with_value else explained
    (expected,) = torch.autograd.grad(explained, features)
    torch.testing.assert_close(data["attr", f"{site}@all"].sum(1), expected)


def test_runs_requests_speak_of_one_run() -> None:
    net, data = Shared().double(), batch()
    values, slopes = truth(net, "act", data["input"])
    with HookedModule.from_module(net).run(data, target=lambda found: found["output"].sum()) as run:
        proxies = {key: (run.get(f"act{key}"), run.get_grad_output(f"act{key}")) for key in ("", *RUNS, "@all")}
        taken = run.get_input("act@0")
    for key, (value, slope) in proxies.items():
        torch.testing.assert_close(value.resolve(), pick(values, key or "@-1"))
        torch.testing.assert_close(slope.resolve(), pick(slopes, key or "@-1"))
    torch.testing.assert_close(taken.resolve(), net.one(data["input"]))


def test_runs_override_the_run_that_is_named() -> None:
    net, data, other = Shared().double(), batch(), batch()
    hooked = HookedModule.from_module(net)
    with hooked.run(data) as run:
        every, first = run.get("act@all"), run.get("act@0")
    for site, value in (("act@all", every), ("act@0", first)):
        found = other.clone()
        with hooked.run(found) as run:
            run.set(site, value.resolve())
        whole = net.head(first.resolve() + net.act(net.two(first.resolve())))
        torch.testing.assert_close(found["output"], whole)
    with pytest.raises(SiteError, match="act@all"), hooked.run(other.clone()) as run:
        run.set("act", first.resolve())
    with pytest.raises(SiteError, match="given 3 runs"), hooked.run(other.clone()) as run:
        run.set("act@all", torch.zeros(6, 3, 8, dtype=torch.float64))
    with hooked.run(found := other.clone()) as run:
        run.set("act", None, callback=lambda output: 2 * output)
    h = 2 * net.act(net.one(other["input"]))
    torch.testing.assert_close(found["output"], net.head(h + 2 * net.act(net.two(h))))
    with hooked.run(other.clone()) as run:
        run.stop("act@1")
        inside = run.get("two")
    assert inside.resolve().shape == (6, 8)


@pytest.mark.parametrize("run", [*RUNS, "@all"])
def test_gradients_of_a_loss_arrive_from_the_run_that_is_named(run: str) -> None:
    net, data, cache = Shared().double(), batch(), TensorDict()
    values, slopes = truth(net, "act", data["input"])
    method = ActivationCaching(f"act{run}", directions=["fwd", "fwd_pre", "bwd", "bwd_pre"], cache=cache)
    with method.prepare(net) as hooked:
        for _ in range(2):
            hooked(data.clone())["output"].sum().backward()
            torch.testing.assert_close(cache["fwd", f"act{run}"], pick(values, run))
            torch.testing.assert_close(cache["bwd_pre", f"act{run}"], pick(slopes, run))
            given = [net.one(data["input"]), net.two(values[0])]
            torch.testing.assert_close(cache["fwd_pre", f"act{run}"], pick(given, run))
            before = [slope * (1 - value**2) for slope, value in zip(slopes, values, strict=True)]
            torch.testing.assert_close(cache["bwd", f"act{run}"], pick(before, run))


def test_probes_and_additions_read_the_run_that_is_named() -> None:
    net, data = Shared(), TensorDict({"input": torch.randn(6, 4)}, [6])
    seen: dict[str, Tensor] = {}

    class Keep:
        def __init__(self, key: str, direction: str) -> None:
            self.key = key

        def step(self, activation: Tensor) -> None:
            seen[self.key] = activation

    probe = LinearProbe(weight=torch.randn(2, 8), bias=torch.zeros(2), path="act@0", kind="lda")
    data["positive", "input"], data["negative", "input"] = data["input"] + 1, data["input"]
    method = Compose(
        ActivationCaching(["act@0", "act@1"]),
        Probing(["act@0", "act"], Keep),
        ProbeReadout({"door": probe}),
        ActivationAddition(["act@0"]),
    )
    with method.prepare(net) as hooked:
        found = hooked(data)
    assert torch.equal(seen["act@0"], found["cache", "act@0"])
    assert torch.equal(seen["act"], found["cache", "act@1"])
    torch.testing.assert_close(found["probe", "door"], probe.probabilities(found["cache", "act@0"]))
    expected = (net.act(net.one(data["input"] + 1)) - net.act(net.one(data["input"]))).mean(0)
    torch.testing.assert_close(found["steer", "act@0"][0], expected)


def test_names_that_end_like_a_run_are_escaped() -> None:
    net = nn.Sequential()
    net.add_module("act@0", nn.Linear(4, 8))
    net.add_module("act", nn.Tanh())
    data = TensorDict({"input": torch.randn(6, 4)}, [6])
    with ActivationCaching(["act@0", "<act@0>"]).prepare(net) as hooked:
        found = hooked(data)["cache"]
    torch.testing.assert_close(found["<act@0>"], net[0](data["input"]))
    torch.testing.assert_close(found["act@0"], net(data["input"]))


@pytest.mark.parametrize("dims", [DimsConfig((2, 3), (1,)), DimsConfig((-2, -1), (-3,))])
def test_grad_cam_of_runs(dims: DimsConfig) -> None:
    act = nn.ReLU()
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), act, nn.Conv2d(4, 4, 3, padding=1), act, nn.Flatten(), nn.Linear(144, 2)
    ).double()
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    maps = []
    for value, slope in zip(*truth(net, "1", x), strict=True):
        maps.append((slope.mean((-2, -1), keepdim=True) * value).sum(1))
    method = GradCAM(modules_to_attribute={"1@0": dims, "1@all": dims, "(2)$": dims})
    with method.prepare(net) as hooked:
        found = hooked(TensorDict({"input": x}, [3]))["attr"]
    torch.testing.assert_close(found["1@0"], maps[0])
    torch.testing.assert_close(found["1@all"], torch.stack(maps, 1))
    assert found["2"].shape == (3, 6, 6)

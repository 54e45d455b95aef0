"""Nets of many agents: sites inside ``vmap`` and in folded rows show their agents, and each can be steered alone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import EnsembleModule, TensorDictModule
from torch import Tensor, nn
from torchrl.modules import VmapModule

from tdhook_rl import ActivationCaching, Compose, Saliency, SteeringVectors, targets
from tdhook_rl.attribution import LRP, DimsConfig, GradCAM, IntegratedGradients
from tdhook_rl.calls.provenance import is_stamp
from tdhook_rl.errors import InputError, SiteError
from tdhook_rl.latent import ActivationPatching, DirectionalAblation
from tdhook_rl.weights import Adapters
from tests.policies import FEATURES, HIDDEN
from tests.zoo import ZOO, Entry
from tests.zoo_agents import agents_mlp
from tests.zoo_entry import AGENTS, OBSERVED

NETS = [name for name in ZOO if name.startswith("agents_")]
every_net = pytest.mark.parametrize("net", NETS)


def observed(entry: Entry, *batch: int) -> TensorDict:
    shape = entry.observations[OBSERVED].shape
    return TensorDict({OBSERVED: torch.randn(*batch, *shape)}, batch_size=batch)


def by_hand(entry: Entry, policy: nn.Module, data: TensorDict, change=lambda hidden: hidden) -> tuple[Tensor, Tensor]:
    """What the site computes, and what the net computes from that, in the batch shape of the data."""
    rows = data.reshape(-1) if data.ndim else data.unsqueeze(0)
    hidden = entry.first(policy, rows)
    (output,) = entry.rest(policy, change(hidden), rows).values()
    return tuple(value.reshape(*data.batch_size, *value.shape[1:]) for value in (hidden, output))


def outputs(net: str, data: TensorDict) -> Tensor:
    return data["agents", "action_value" if net == "agents_q" else "logits"]


@every_net
@pytest.mark.parametrize("batch", [(), (1,), (3,), (2, 3)])
def test_each_agent_is_shown_and_steered_in_every_batch_shape(net: str, batch: tuple[int, ...]) -> None:
    entry = ZOO[net]
    policy, data = entry.build(), observed(entry, *batch)
    for vector in (torch.randn(entry.features), torch.randn(entry.features[1:])):
        method = Compose(ActivationCaching(entry.site), SteeringVectors({entry.site: vector}))
        with method.prepare(policy) as hooked:
            found = hooked(data.clone())
            again = hooked.get_dist(data.clone()).logits if hasattr(hooked, "get_dist") else None
        hidden, expected = by_hand(entry, policy, data, lambda hidden, vector=vector: hidden + vector)
        torch.testing.assert_close(found["cache", entry.site], hidden)
        torch.testing.assert_close(outputs(net, found), expected)
        if again is not None:
            torch.testing.assert_close(again, expected.log_softmax(-1))


@every_net
def test_vectors_and_strengths_of_each_row(net: str) -> None:
    entry = ZOO[net]
    policy, data = entry.build(), observed(entry, 2, 3)
    data["alpha"] = torch.rand(2, 3)
    for shape in (entry.features, entry.features[1:]):
        data["vector"] = torch.randn(2, 3, *shape)
        with SteeringVectors({entry.site: "vector"}, alpha="alpha").prepare(policy) as hooked:
            found = hooked(data.clone())
        vectors = data["vector"].reshape(6, *shape)
        vectors = vectors if shape == entry.features else vectors.unsqueeze(1)
        added = data["alpha"].reshape(6, *(1,) * len(entry.features)) * vectors
        _, expected = by_hand(entry, policy, data, lambda hidden, added=added: hidden + added)
        torch.testing.assert_close(outputs(net, found), expected)


@every_net
@pytest.mark.parametrize("method", [SteeringVectors, DirectionalAblation])
def test_a_vector_for_each_row_is_no_vector_of_features(net: str, method: type) -> None:
    entry = ZOO[net]
    rows = 5
    for shape in ((rows, *entry.features), (rows, *entry.features[1:])):
        with method({entry.site: torch.randn(shape)}).prepare(entry.build()) as hooked:
            with pytest.raises(InputError, match="without the batch"):
                hooked(observed(entry, rows))


def test_a_batch_of_as_many_rows_as_agents_is_no_agents() -> None:
    # Without vmap as well: (rows, features) is no shape of features.
    net = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh())
    for method in (SteeringVectors, DirectionalAblation):
        with method({"0": torch.randn(AGENTS, HIDDEN)}).prepare(net) as hooked:
            with pytest.raises(InputError, match="without the batch"):
                hooked(TensorDict({"input": torch.randn(AGENTS, FEATURES)}, batch_size=AGENTS))


@every_net
@pytest.mark.parametrize("batch", [(), (4,), (2, 2)])
def test_inner_activations_are_explained_for_each_agent(net: str, batch: tuple[int, ...]) -> None:
    entry = ZOO[net]
    policy, data = entry.build(), observed(entry, *batch)
    of_maps = DimsConfig() if "conv" in net else DimsConfig((), (-1,))
    method = Compose(
        Saliency(when="step", input_modules=[entry.site]),
        GradCAM(modules_to_attribute={entry.site: of_maps}, when="step", attribution_key="cam"),
        IntegratedGradients(when="step", input_modules=[entry.site], baseline=0.0, n_steps=32, attribution_key="path"),
    )
    with method.prepare(policy) as hooked:
        found = hooked(data.clone())
        with torch.inference_mode():
            functional = hooked(data.clone().update(found.select(("agents", "action"))))
    rows = found.reshape(-1) if batch else found.unsqueeze(0)
    hidden = entry.first(policy, rows).detach().requires_grad_()

    def score(value: Tensor) -> Tensor:
        return entry.score(entry.rest(policy, value, rows), rows)

    (gradient,) = torch.autograd.grad(score(hidden).sum(), hidden)
    torch.testing.assert_close(found["attr", entry.site], gradient.reshape(*batch, *entry.features))
    weights = gradient.mean((-2, -1), keepdim=True) if "conv" in net else gradient
    maps = (weights * hidden).sum(-3 if "conv" in net else -1)
    torch.testing.assert_close(found["cam", entry.site], maps.reshape(*batch, *maps.shape[1:]).detach())
    # Complete between the activations at zero and at the observation.
    zero = entry.first(policy, rows.clone().apply(torch.zeros_like))
    change = (score(hidden) - score(zero)).detach()
    total = found["path", entry.site].reshape(len(rows), -1).sum(-1)
    torch.testing.assert_close(total, change, rtol=1e-3, atol=1e-3)
    if bool((functional["agents", "action"] == found["agents", "action"]).all()):
        torch.testing.assert_close(functional["attr", entry.site], found["attr", entry.site])


@every_net
def test_adapters_patches_and_runs_see_agents(net: str) -> None:
    entry = ZOO[net]
    policy, data = entry.build(), observed(entry, 4)
    seen = []

    def adapter(hidden: Tensor) -> Tensor:
        seen.append(hidden.shape)
        return hidden.tanh()

    with Adapters({"tanh": (adapter, entry.site, entry.site)}).prepare(policy) as hooked:
        found = outputs(net, hooked(data.clone()))
    torch.testing.assert_close(found, by_hand(entry, policy, data, torch.tanh)[1])
    assert seen == [(4, *entry.features)]
    other = observed(entry, 4)
    with ActivationPatching(entry.site).prepare(policy) as hooked:
        found = hooked(other.clone().set("patched", data.clone()))
        torch.testing.assert_close(outputs(net, found["patched"]), outputs(net, found))
        with hooked.run(data.clone(), target=lambda given: outputs(net, given).sum()) as run:
            run.save(entry.site)
            run.save_grad_output(entry.site)
        hidden = by_hand(entry, policy, data)[0].detach().requires_grad_()
        torch.testing.assert_close(run.get(entry.site).resolve(), hidden.detach())
        (output,) = entry.rest(policy, hidden, data).values()
        expected = torch.autograd.grad(output.sum(), hidden)[0]
        torch.testing.assert_close(run.get_grad_output(entry.site).resolve(), expected)
        held = torch.ones(4, *entry.features)
        given = data.clone()
        with hooked.run(given) as run:
            run.set(entry.site, held)
    torch.testing.assert_close(outputs(net, given), by_hand(entry, policy, data, torch.ones_like)[1])


@pytest.mark.parametrize(
    "net", [net for net in NETS if "shared" not in net]
)  # shared ones cannot be told to in TorchRL
def test_nothing_escapes_from_a_vmap_around_the_policy(net: str) -> None:
    # As losses call ensembles: the hooked policy itself inside vmap, its agents in another.
    entry = ZOO[net]
    policies = [entry.build() for _ in range(2)]
    weights = TensorDict.from_modules(*policies)
    data = observed(entry, 3)
    vector = torch.randn(entry.features)
    method = Compose(ActivationCaching(entry.site), SteeringVectors({entry.site: vector}), Saliency(when="step"))
    with method.prepare(policies[0]) as hooked:

        def call(params: TensorDict) -> TensorDict:
            with params.to_module(hooked):
                return hooked(data.clone()).select("cache", "attr", *hooked.policy_out_keys)

        found = torch.vmap(call, randomness="different")(weights)
        assert not hooked._hooked.runtime.slots
        pickle.dumps(hooked)
        copy.deepcopy(hooked)
    for member, policy in zip(found, policies, strict=True):
        hidden, expected = by_hand(entry, policy, data, lambda hidden: hidden + vector)
        torch.testing.assert_close(member["cache", entry.site], hidden)
        torch.testing.assert_close(outputs(net, member), expected)
        assert member["attr", *OBSERVED].shape == data[OBSERVED].shape


@pytest.mark.filterwarnings(
    "ignore:Using lock_:UserWarning", "ignore:torch._dynamo.config:FutureWarning"
)  # tensordict's
@pytest.mark.parametrize(
    ("net", "method"),
    [("agents_shared", "caching"), *(("agents_separate", one) for one in ("caching", "steering", "saliency", "inner"))],
)
def test_one_graph_with_agents(net: str, method: str) -> None:
    entry = ZOO[net]
    policy, data = entry.build(), observed(entry, 4)
    make = {
        "caching": lambda: ActivationCaching(entry.site),
        "steering": lambda: SteeringVectors({entry.site: torch.randn(entry.features)}),
        "saliency": lambda: Saliency(when="step", target=targets.logit(1)),
        "inner": lambda: Saliency(when="step", target=targets.logit(1), input_modules=[entry.site]),
    }
    torch._dynamo.reset()
    with make[method]().prepare(policy) as hooked, torch.no_grad():
        expected = hooked(data.clone())
        found = torch.compile(hooked, backend="eager", fullgraph=True)(data.clone())
    for key in (*hooked.result_keys, ("agents", "logits")):
        if not is_stamp(key):  # a compiled graph cannot say whose its results are
            torch.testing.assert_close(found[key], expected[key])


@every_net
def test_lrp_says_that_weights_are_lent(net: str) -> None:
    with pytest.raises(SiteError, match="Saliency or IntegratedGradients"):
        LRP().prepare(ZOO[net].build()).__enter__()


@pytest.mark.parametrize("share", [True, False])
def test_parameters_inside_the_net(share: bool) -> None:
    mlp = agents_mlp(share)
    inside = type(mlp)(
        n_agent_inputs=FEATURES, n_agent_outputs=4, n_agents=AGENTS, centralized=False, share_params=share,
        num_cells=[HIDDEN], activation_class=nn.Tanh, use_td_params=False,
    )  # fmt: skip
    policy = TensorDictModule(inside, in_keys=[OBSERVED], out_keys=[("agents", "logits")])
    data = TensorDict({OBSERVED: torch.randn(5, AGENTS, FEATURES)}, batch_size=5)
    expected = inside(data[OBSERVED])
    with ActivationCaching("module._empty_net.1").prepare(policy) as hooked:
        found = hooked(data)
    assert found["cache", "module._empty_net.1"].shape == (5, AGENTS, HIDDEN)
    torch.testing.assert_close(found["agents", "logits"], expected)


@pytest.mark.parametrize(("batch", "dim"), [((HIDDEN,), 0), ((3,), None), ((2, HIDDEN), 0), ((HIDDEN, 4), None)])
def test_rows_that_a_vmap_module_takes_one_by_one(batch: tuple[int, ...], dim: int | None) -> None:
    # As many rows as features: only the module can tell which is which.
    net = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 2))
    policy = VmapModule(TensorDictModule(net, in_keys=["observation"], out_keys=["values"]), dim)
    data = TensorDict({"observation": torch.randn(*batch, FEATURES), "alpha": torch.rand(batch)}, batch_size=batch)
    site, shift = "module.module.1", torch.randn(HIDDEN)
    method = Compose(
        ActivationCaching(site),
        SteeringVectors({site: shift}, alpha="alpha"),
        Saliency(when="step", inputs=["observation"]),
        Saliency(when="step", input_modules=[site], attribution_key="inner"),
    )
    with method.prepare(policy) as hooked:
        found = hooked(data.clone())
    x = data["observation"].clone().requires_grad_()
    hidden = net[:2](x)
    values = net[2:](hidden + data["alpha"].unsqueeze(-1) * shift)
    of_input, of_hidden = torch.autograd.grad(values.sum(), (x, hidden))
    torch.testing.assert_close(found["cache", site], hidden.detach())
    torch.testing.assert_close(found["values"], values)
    torch.testing.assert_close(found["attr", "observation"], of_input)
    torch.testing.assert_close(found["inner", site], of_hidden)


@pytest.mark.parametrize("rows", [4, 3])  # 3: as many as copies
def test_an_ensemble_is_steered_and_its_activations_are_refused(rows: int) -> None:
    net = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 2))
    policy = EnsembleModule(TensorDictModule(net, in_keys=["observation"], out_keys=["values"]), num_copies=3)
    data = TensorDict({"observation": torch.randn(rows, FEATURES), "alpha": torch.rand(rows)}, batch_size=rows)
    site, shift = "module.module.1", torch.randn(HIDDEN)
    with SteeringVectors({site: shift}, alpha="alpha").prepare(policy) as hooked:
        found = hooked(data.clone())["values"]
    for values, weights in zip(found, policy.params_td["module"].unbind(0), strict=True):
        hidden = nn.functional.linear(data["observation"], weights["0", "weight"], weights["0", "bias"]).tanh()
        hidden = hidden + data["alpha"].unsqueeze(-1) * shift
        torch.testing.assert_close(values, nn.functional.linear(hidden, weights["2", "weight"], weights["2", "bias"]))
    readers = (ActivationCaching(site), Saliency(input_modules=[site]), Saliency(input_modules=[site], missing="nan"))
    for method in readers:
        with pytest.raises(SiteError, match="an activation for each of its copies"):
            method.prepare(policy, return_context=False)

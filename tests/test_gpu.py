"""On a CUDA device: the same numbers, and the action of a collector that lives on two devices."""

from __future__ import annotations

import pytest
import torch
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, ReplayBuffer

from tdhook_rl import ActivationCaching, Compose, ControlRecord, ProbeReadout, Saliency, SteeringVectors
from tdhook_rl.attribution import IntegratedGradients
from tdhook_rl.envs import CueCorners
from tdhook_rl.latent import SteeringVector
from tdhook_rl.sweeps import ablate_units, attribution_patching, faithfulness, find_circuit, patch_sites
from tests.method_table import probe
from tests.policies import CASES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

POLICIES = ("categorical", "tanh_normal", "value", "q_value", "pixels")


def method_for(case) -> Compose:
    return Compose(
        ActivationCaching(case.site),
        SteeringVectors({case.site: torch.ones(case.features)}, alpha=0.3),
        ProbeReadout({"concept": probe(case)}),
        Saliency(when="step"),
        IntegratedGradients(baseline=0.0, n_steps=4, when="step", attribution_key="path"),
        ControlRecord(),
    )


@pytest.mark.parametrize("name", POLICIES)
def test_cuda_equals_cpu(name: str) -> None:
    case = CASES[name]
    policy = case.build()
    method = method_for(case)
    data = case.data(5)
    with method.prepare(policy) as hooked, torch.no_grad():
        expected = hooked(data.clone())
    policy.to("cuda")
    with method.prepare(policy) as hooked, torch.no_grad():
        acted = expected.select(*hooked.in_keys, *hooked.policy_out_keys).to("cuda")
        found = hooked.annotate(acted)
        inline = hooked(data.to("cuda"))
    for key in expected.keys(True, True):
        if isinstance(key, tuple) and key[0] in ("attr", "path", "cache", "probe"):
            assert found[key].device.type == inline[key].device.type == "cuda"
            torch.testing.assert_close(found[key].cpu(), expected[key], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", POLICIES)
def test_causal_tests_find_the_same_on_the_device(name: str) -> None:
    case = CASES[name]
    policy, pair = case.build(), [case.data(12), case.data(12)]
    circuit = find_circuit(policy, *pair, case.site, controls=0)
    found = {}
    for device in ("cpu", "cuda"):
        own, clean, corrupt = policy.to(device), pair[0].to(device), pair[1].to(device)
        patched = patch_sites(own, clean, corrupt, case.site, rank=1, controls=2)[0].shares
        estimates = attribution_patching(own, clean, corrupt, case.site, compare=4).estimates
        kept = faithfulness(own, clean, corrupt, circuit).estimate  # another may be as small
        assert find_circuit(own, clean, corrupt, case.site, controls=2).faithfulness.estimate > 0.89
        needed = ablate_units(own, clean, case.site, by="resample")
        found[device] = [patched, estimates, torch.tensor(kept), needed.changes[needed.ranked]]
    for cpu, cuda in zip(*found.values(), strict=True):
        torch.testing.assert_close(cpu, cuda, rtol=1e-3, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_directions_are_extracted_where_the_policy_is(where: str) -> None:
    case = CASES["categorical"]
    policy, positive, negative = case.build(), case.data(70), case.data(70)
    pairs = SteeringVector.from_pairs(policy, case.site, positive, negative)
    both = torch.cat([positive, negative])
    both["door"] = torch.arange(140) < 70
    contrast = SteeringVector.from_contrast(policy, case.site, both, "door")
    policy.to("cuda")
    moved = [one.to(where) for one in (positive, negative, both)] if where == "cuda" else [positive, negative, both]
    for found, expected in (
        (SteeringVector.from_pairs(policy, case.site, *moved[:2]), pairs),
        (SteeringVector.from_contrast(policy, case.site, moved[2], "door"), contrast),
    ):
        assert found.check(policy) == expected.check(policy) == "same"
        torch.testing.assert_close(found.vector.cpu(), expected.vector, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.shuffled.cpu(), expected.shuffled, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close((found + expected).vector.cpu(), 2 * expected.vector, atol=1e-4, rtol=1e-4)
        assert found.facts["data"] == expected.facts["data"]
        with SteeringVectors(expected).prepare(policy) as hooked:
            hooked(positive.to("cuda"))


def test_a_policy_on_the_device_and_an_environment_on_the_cpu() -> None:
    from tdhook_rl.examples.agent import FC2, make_actor

    actor = make_actor().to("cuda")
    method = Compose(ActivationCaching(FC2), SteeringVectors({FC2: torch.ones(64)}, alpha=0.0), Saliency(when="step"))
    buffer = ReplayBuffer(storage=LazyTensorStorage(64))
    with method.prepare(actor) as policy:
        collector = Collector(
            CueCorners(batch_size=[4], seed=0),
            policy,
            frames_per_batch=64,
            total_frames=128,
            policy_device="cuda",
            env_device="cpu",
            storing_device="cpu",
            replay_buffer=buffer,
            auto_register_policy_transforms=False,
        )
        for _ in collector:
            pass
        collector.shutdown()
        data = buffer[:]
        again = policy.annotate(data.exclude("attr", "cache", "computed").to("cuda"))
    for key in (("cache", FC2), ("attr", "observation")):
        torch.testing.assert_close(again[key].cpu(), data[key], atol=1e-4, rtol=1e-4)


def test_a_captured_cuda_graph_is_right_or_refused() -> None:
    from tensordict.nn import CudaGraphModule

    case = CASES["categorical"]
    policy = case.build().to("cuda")
    with Compose(ActivationCaching(case.site)).prepare(policy) as hooked, torch.no_grad():
        graph = CudaGraphModule(hooked, warmup=2)
        for _ in range(5):
            data = case.data(5).to("cuda")
            found = graph(data.clone())
            expected = hooked(data.clone())
            torch.testing.assert_close(found["cache", case.site], expected["cache", case.site])
    # Controls live in the memory of the CPU, which a graph cannot read: an error, never a frozen vector.
    with SteeringVectors({case.site: torch.ones(16)}, alpha=1.0).prepare(policy) as hooked, torch.no_grad():
        graph = CudaGraphModule(hooked, warmup=2)
        try:
            for _ in range(4):
                graph(case.data(5).to("cuda"))
        except RuntimeError:
            return
        hooked.controls["steering.alpha"] = 0.0
        data = case.data(5).to("cuda")
        torch.testing.assert_close(graph(data.clone())["logits"], hooked(data.clone())["logits"])

"""Random networks against an oracle: every method, in every mode, is right or refuses; nothing is wrong in silence.

``python -m tests.fuzz --trees 2000`` prints how often each check was right, said something, or was refused, and every
difference; it exits 1 if there is one.
"""

from __future__ import annotations

import argparse
import collections
import copy
import random
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from tdhook_rl import ActivationCaching, ActivationPatching, Compose, IntegratedGradients, Saliency, SteeringVectors
from tdhook_rl.attribution import LRP, Occlusion
from tdhook_rl.attribution.lrp_rules import Epsilon, Uniform
from tdhook_rl.errors import TdhookError
from tdhook_rl.targets import logit
from tests.random_networks import WIDTH, Policy, Stateful, random_network

__all__ = ["CHECKS", "Outcome", "run"]

TOLERANCE = 1e-6  # controls are kept in float32
MODES = ("grad", "no_grad", "inference")
BATCHES: list[tuple[int, ...]] = [(), (1,), (3,), (2, 3)]
STEPS = 6


@dataclass
class Outcome:
    """How often each check was right, right with a warning, or refused; and what was wrong."""

    counts: collections.Counter[tuple[str, str]] = field(default_factory=collections.Counter)
    refusals: collections.Counter[tuple[str, str]] = field(default_factory=collections.Counter)
    wrong: list[str] = field(default_factory=list)


class Difference(AssertionError):
    pass


class Trial:
    """One network, a batch and a mode."""

    def __init__(self, seed: int, kinds: str) -> None:
        rng = random.Random(f"{seed} trial")
        self.seed = seed
        self.net: Policy = random_network(seed, kinds)
        torch.manual_seed(seed + 1)
        self.batch = rng.choice(BATCHES)
        self.mode = rng.choice(MODES)
        self.x = torch.randn(*self.batch, WIDTH, dtype=torch.float64)
        self.other = torch.randn(*self.batch, WIDTH, dtype=torch.float64)
        self.index = rng.randrange(3)
        names = [name for name, child in self.net.named_modules() if name and type(child) is not nn.ModuleList]
        self.site = rng.choice(names)
        self.vector = torch.randn(3 if self.site == "head" else WIDTH, dtype=torch.float64)
        self.stateful = self.net.has(Stateful)
        self.noisy = self.net.has(nn.Dropout)

    def policy(self) -> TensorDictModule:
        return TensorDictModule(copy.deepcopy(self.net), in_keys=["observation"], out_keys=["logits"])

    def data(self) -> TensorDict:
        return TensorDict({"observation": self.x.clone()}, batch_size=self.batch)

    @contextmanager
    def as_user(self) -> Iterator[None]:
        with {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}[self.mode]():
            yield

    # ------------------------------------------------------------------ the oracle

    def at_site(self, net: Policy, change: Callable[[Tensor, int], Tensor]) -> Callable[[nn.Module, Tensor], Tensor]:
        """``change(output, run)`` at every run of the site."""
        site, runs = net.get_submodule(self.site), [0]

        def at(module: nn.Module, y: Tensor) -> Tensor:
            if module is not site:
                return y
            runs[0] += 1
            return change(y, runs[0] - 1)

        return at

    def outputs(self, net: Policy, x: Tensor, at: Callable[..., Tensor] = lambda module, y: y) -> Tensor:
        """Of a network that is used up: its state moves."""
        return net.value(x, at)

    def captured(self, net: Policy) -> list[Tensor]:
        found: list[Tensor] = []

        def keep(y: Tensor, run: int) -> Tensor:
            found.append(y)
            return y

        with torch.no_grad():
            self.outputs(net, self.x, self.at_site(net, keep))
        return found

    def gradient(self, net: Policy, x: Tensor, at: Callable[..., Tensor] = lambda module, y: y) -> Tensor:
        leaf = x.clone().requires_grad_()
        target = self.outputs(net, leaf, at)[..., self.index].sum()
        if not target.requires_grad:
            return torch.zeros_like(x)
        found = torch.autograd.grad(target, leaf, allow_unused=True)[0]
        return torch.zeros_like(x) if found is None else found


def same(found: Tensor, expected: Tensor, what: str) -> None:
    if found.shape != expected.shape:
        raise Difference(f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    gap = (found - expected).abs()
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    if not bool((gap <= TOLERANCE * scale).all()):
        raise Difference(f"{what}: largest difference {float(gap.max()):.3g} of {scale:.3g}")


def bits(found: Tensor, expected: Tensor, what: str) -> None:
    if not torch.equal(found, expected):
        raise Difference(f"{what}: not bit for bit ({float((found - expected).abs().max()):.3g})")


def state(module: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = dict(module.named_buffers())
    for name, child in module.named_modules():
        for key in ("calls", "last"):
            if key in vars(child):
                found[f"{name}.{key}"] = getattr(child, key)
    return found


def same_state(found: nn.Module, expected: nn.Module, what: str) -> None:
    ours, theirs = state(found), state(expected)
    for name, value in theirs.items():
        mine = ours[name]
        pairs = zip(mine, value, strict=True) if isinstance(value, (list, collections.deque)) else [(mine, value)]
        for a, b in pairs:
            if not (torch.equal(a, b) if isinstance(b, Tensor) else a == b):
                raise Difference(f"{what}: the state {name!r} is {a}, the plain twin's is {b}")


# ---------------------------------------------------------------------- checks


def twin(trial: Trial, method: Any, annotates: bool = False) -> None:
    """Three steps beside a plain twin: outputs, state and generators."""
    plain, policy = trial.policy(), trial.policy()
    with trial.as_user(), method.prepare(policy) as hooked:
        for step in range(3):
            given, seen = trial.data(), trial.data()
            torch.manual_seed(step)
            expected = plain(given)
            after = torch.get_rng_state()
            torch.manual_seed(step)
            found = hooked(seen)
            bits(found["logits"], expected["logits"], f"logits of step {step}")
            bits(found["observation"], expected["observation"], f"observation of step {step}")
            bits(torch.get_rng_state(), after, f"generator after step {step}")
            if annotates:
                batch = trial.data()
                batch["logits"] = found["logits"]
                hooked.annotate(batch, on_mismatch="ignore")
                bits(batch["observation"], trial.x, "the annotated observation")
                bits(torch.get_rng_state(), after, f"generator after annotate {step}")
            # What the hooked copy holds in attributes is its own; buffers are the user's.
            same_state(hooked, plain, f"step {step}")


def twin_saliency(trial: Trial) -> None:
    twin(trial, Saliency(target=logit(trial.index), when="step"))


def twin_paths(trial: Trial) -> None:
    twin(trial, IntegratedGradients(target=logit(trial.index), baseline=0.0, n_steps=4, when="step"))


def twin_annotate(trial: Trial) -> None:
    method = Saliency(target=logit(trial.index), when="batch")
    twin(trial, Compose(ActivationCaching(trial.site), method), annotates=True)


def twin_occlusion(trial: Trial) -> None:
    twin(trial, Occlusion(target=logit(trial.index), baseline=0.0, when="batch"), annotates=True)


def saliency_step(trial: Trial) -> None:
    oracle = copy.deepcopy(trial.net)
    with Saliency(target=logit(trial.index), when="step").prepare(trial.policy()) as hooked:
        for step in range(2):
            before = copy.deepcopy(oracle)
            torch.manual_seed(step)
            expected = trial.gradient(before, trial.x)
            torch.manual_seed(step)
            with torch.no_grad():
                trial.outputs(oracle, trial.x)
            torch.manual_seed(step)
            with trial.as_user():
                found = hooked(trial.data())
            same(found["attr", "observation"], expected, f"saliency of step {step}")


def saliency_batch(trial: Trial) -> None:
    """Of a fresh batch: at the state of now; with noise only that it is somebody's."""
    if trial.noisy:
        return
    expected = trial.gradient(copy.deepcopy(trial.net), trial.x)
    with trial.as_user(), Saliency(target=logit(trial.index)).prepare(trial.policy()) as hooked:
        found = hooked.annotate(trial.data())
    same(found["attr", "observation"], expected, "saliency of a batch")


def caching(trial: Trial) -> None:
    torch.manual_seed(3)
    runs = trial.captured(copy.deepcopy(trial.net))
    with trial.as_user(), ActivationCaching(trial.site).prepare(trial.policy()) as hooked:
        torch.manual_seed(3)
        found = hooked(trial.data())["cache", trial.site]
    if not runs:
        raise Difference("a site that did not run was cached")
    same(found, runs[-1], f"cache of {trial.site} ({len(runs)} runs)")


def steering(trial: Trial) -> None:
    def push(y: Tensor, run: int) -> Tensor:
        return y + 0.5 * trial.vector

    torch.manual_seed(4)
    oracle = copy.deepcopy(trial.net)
    expected = trial.outputs(oracle, trial.x, trial.at_site(oracle, push))
    torch.manual_seed(4)
    other = copy.deepcopy(trial.net)
    slope = trial.gradient(other, trial.x, trial.at_site(other, push))
    method = Compose(
        SteeringVectors({trial.site: trial.vector}, alpha=0.5), Saliency(target=logit(trial.index), when="step")
    )
    with trial.as_user(), method.prepare(trial.policy()) as hooked:
        torch.manual_seed(4)
        found = hooked(trial.data())
    same(found["logits"], expected.detach(), f"steered at {trial.site}")
    same(found["attr", "observation"], slope, f"saliency steered at {trial.site}")


def inner_saliency(trial: Trial) -> None:
    """The gradient with respect to what a site puts out; where it runs several times this is refused or of one run."""
    torch.manual_seed(5)
    oracle, points = copy.deepcopy(trial.net), []

    def leaf(y: Tensor, run: int) -> Tensor:
        points.append(y if y.requires_grad else y.detach().requires_grad_())
        return points[-1]

    value = trial.outputs(oracle, trial.x.clone().requires_grad_(), trial.at_site(oracle, leaf))[..., trial.index].sum()
    if not points:
        expected = None
    else:
        found = torch.autograd.grad(value, points, allow_unused=True) if value.requires_grad else [None]
        expected = [torch.zeros_like(p) if g is None else g for g, p in zip(found, points, strict=True)]
    method = Saliency(target=logit(trial.index), input_modules=[trial.site], when="step")
    with trial.as_user(), method.prepare(trial.policy()) as hooked:
        torch.manual_seed(5)
        ours = hooked(trial.data())["attr", trial.site]
    if expected is None:
        raise Difference("a site that did not run was explained")
    if len(expected) > 1:
        raise Difference(f"{trial.site} ran {len(expected)} times and was explained without a word")
    same(ours, expected[0], f"saliency at {trial.site}")


def patching(trial: Trial) -> None:
    torch.manual_seed(6)
    clean = trial.captured(copy.deepcopy(trial.net))
    torch.manual_seed(6)
    oracle = copy.deepcopy(trial.net)
    with torch.no_grad():
        expected = trial.outputs(oracle, trial.other, trial.at_site(oracle, lambda y, run: clean[run]))
    data = trial.data()
    data["patched", "observation"] = trial.other.clone()
    with trial.as_user(), ActivationPatching([trial.site]).prepare(trial.policy()) as hooked:
        torch.manual_seed(6)
        found = hooked(data)["patched", "logits"]
    if not clean:
        raise Difference("a site that did not run was patched")
    same(found, expected, f"patched at {trial.site} ({len(clean)} runs)")


def paths(trial: Trial) -> None:
    """Integrated gradients at the same points, each a pass of the whole batch on the state of before."""
    if trial.noisy:
        return
    points, weights = np.polynomial.legendre.leggauss(STEPS)
    expected = torch.zeros_like(trial.x)
    for point, weight in zip((points + 1) / 2, weights / 2, strict=True):
        expected += float(weight) * trial.gradient(copy.deepcopy(trial.net), trial.x * float(point))
    method = IntegratedGradients(target=logit(trial.index), baseline=0.0, n_steps=STEPS, when="step")
    with trial.as_user(), method.prepare(trial.policy()) as hooked:
        found = hooked(trial.data())
    same(found["attr", "observation"], expected * trial.x, "integrated gradients")


def occlusion(trial: Trial) -> None:
    if trial.noisy:
        return
    with torch.no_grad():
        before = trial.outputs(copy.deepcopy(trial.net), trial.x)[..., trial.index]
        drops = []
        for feature in range(WIDTH):
            x = trial.x.clone()
            x[..., feature] = 0
            drops.append(before - trial.outputs(copy.deepcopy(trial.net), x)[..., trial.index])
    with trial.as_user(), Occlusion(target=logit(trial.index), baseline=0.0).prepare(trial.policy()) as hooked:
        found = hooked.annotate(trial.data(), on_mismatch="ignore")
    same(found["attr", "observation"], torch.stack(drops, -1), "occlusion")


def relevance(trial: Trial) -> None:
    """Relevance adds up to the output, where nothing absorbs it; else it is refused, marked or said."""
    if trial.net.first.bias is not None:
        return
    # The default epsilon absorbs a share where a sum is as small as it.
    rules = Uniform(Epsilon(1e-12), epsilon=1e-12)
    with LRP(target=logit(trial.index), when="step", rule_mapper=rules).prepare(trial.policy()) as hooked:
        torch.manual_seed(8)
        found = hooked(trial.data())
    if trial.stateful or not bool(found["computed", "attr"].all()):
        return  # what a state adds is absorbed as a bias is
    shares = found["attr", "observation"]
    gap = (shares.sum(-1) - found["logits"][..., trial.index]).abs()
    if bool((gap > 1e-3 * (1e-2 + shares.abs().sum(-1) + found["logits"].abs().amax(-1))).any()):
        raise Difference(f"relevance misses the output by {float(gap.max()):.3g}")


CHECKS: dict[str, Callable[[Trial], None]] = {
    check.__name__: check
    for check in (
        twin_saliency, twin_paths, twin_annotate, twin_occlusion, saliency_step, saliency_batch, caching, steering,
        inner_saliency, patching, paths, occlusion, relevance,
    )
}  # fmt: skip


def run(seed: int, kinds: str, outcome: Outcome, only: str | None = None) -> None:
    """All checks of one network."""
    trial = Trial(seed, kinds)
    for name, check in CHECKS.items():
        if only is not None and name != only:
            continue
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                check(trial)
            except TdhookError as error:
                outcome.counts[name, "refused"] += 1
                outcome.refusals[name, f"{type(error).__name__}: {str(error)[:150]}"] += 1
            except Difference as error:
                if said:
                    outcome.counts[name, "said"] += 1
                    continue
                outcome.counts[name, "WRONG"] += 1
                outcome.wrong.append(f"{name} of seed {seed} ({trial.mode}, {trial.batch}): {error}")
            except Exception as error:
                outcome.counts[name, "RAW"] += 1
                where = traceback.extract_tb(error.__traceback__)[-1]
                outcome.wrong.append(
                    f"{name} of seed {seed} ({trial.mode}, {trial.batch}): raw {type(error).__name__}: "
                    f"{str(error)[:200]} ({where.filename.rsplit('/', 1)[-1]}:{where.lineno})"
                )
            else:
                outcome.counts[name, "right"] += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trees", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--kinds", default="reuse state noise arithmetic")
    parser.add_argument("--only", choices=CHECKS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    outcome = Outcome()
    for seed in range(options.first, options.first + options.trees):
        # Half of the networks are plain trees, for which nothing has to be refused.
        run(seed, options.kinds if seed % 2 else "", outcome, options.only)
    columns = ("right", "said", "refused", "WRONG", "RAW")
    print(f"{'':16}" + "".join(f"{column:>9}" for column in columns))
    for name in CHECKS:
        print(f"{name:16}" + "".join(f"{outcome.counts[name, column]:9}" for column in columns))
    print("\nrefusals:")
    for (name, text), count in outcome.refusals.most_common(25):
        print(f"{count:5} {name}: {text}")
    print(f"\n{len(outcome.wrong)} differences")
    print("\n".join(outcome.wrong[:60]))
    return int(bool(outcome.wrong))


if __name__ == "__main__":
    sys.exit(main())

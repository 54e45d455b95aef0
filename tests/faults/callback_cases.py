"""Where functions of the user's are called: for each sort of function, what builds a call with it.

A case is given what wraps a function, and returns the user's policy and an act that calls it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl.collectors import Collector

from tdhook_rl import ActivationCaching, Compose, IntegratedGradients, Saliency, SteeringVectors, targets
from tdhook_rl.attribution import LRP, ActivationMaximisation, Occlusion
from tdhook_rl.latent import ActivationPatching, StateSubtraction
from tdhook_rl.metrics.randomisation import cascading_randomisation
from tdhook_rl.replay import analyze, by_feature, probe_grid
from tdhook_rl.report import Monitor
from tdhook_rl.report.sweep_hook import SweepHook
from tdhook_rl.rollout import GroupSplit, OnlineProbe
from tdhook_rl.sweeps import patch_sites, steering_sweep
from tdhook_rl.targets import Target
from tdhook_rl.weights import Adapters, Pruning
from tests.faults.agents import SITE, actor, env

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
Case = Callable[[Wrap], tuple[nn.Module, Callable[[], Any]]]


def batch(seed: int = 3) -> TensorDict:
    """Rows that were acted on."""
    torch.manual_seed(seed)
    return env().rollout(4, actor(), break_when_any_done=False).detach().reshape(-1)


def _method(make: Callable[[Wrap], Any], how: str) -> Case:
    """A hooked policy whose method calls the function, called in one of several ways."""

    def build(wrap: Wrap) -> tuple[nn.Module, Callable[[], Any]]:
        policy = actor()
        hooked = make(wrap).prepare(policy, return_context=False)
        rows = batch()

        def collect() -> Any:
            collector = Collector(env(), hooked, frames_per_batch=8, total_frames=8, postproc=hooked.annotate,
                                  auto_register_policy_transforms=False)  # fmt: skip
            try:
                return next(iter(collector)).exclude("collector")
            finally:
                collector.shutdown()

        acts: dict[str, Callable[[], Any]] = {
            "a call": lambda: hooked(rows.select("observation")),
            "get_dist": lambda: hooked.get_dist(rows.select("observation")).logits,
            "annotate": lambda: hooked.annotate(rows.clone()),
            "a rollout": lambda: env().rollout(3, hooked, break_when_any_done=False),
            "a collector": collect,
        }
        return policy, acts[how]

    return build


def _with_vector(key: str, output: Tensor) -> Tensor:
    return output + 0.5


def _patched(module_key: str, mine: Tensor, other: Tensor) -> Tensor:
    return (mine + other) / 2


def _in_patch(wrap: Wrap) -> tuple[nn.Module, Callable[[], Any]]:
    policy, rows = actor(), batch().select("observation")
    rows["patched", "observation"] = rows["observation"].flip(0)
    hooked = ActivationPatching([SITE], patch_fn=wrap(_patched)).prepare(policy, return_context=False)
    return policy, lambda: hooked(rows.clone())


def _target(wrap: Wrap) -> Target:
    return Target("mine", wrap(lambda run: run.outputs["logits"][..., 0]))


def _logits(outputs: Any, additional: Any) -> TensorDict:
    return TensorDict({"logits": outputs["logits"][..., 0]}, outputs["logits"].shape[:1])


HOOKS: dict[str, Case] = {
    **{f"steer_fn= in {how}": _method(lambda wrap: SteeringVectors([SITE], wrap(_with_vector)), how)
       for how in ("a call", "get_dist", "a rollout", "a collector")},
    **{f"when= in {how}": _method(
        lambda wrap: SteeringVectors({SITE: torch.ones(8)}, when=wrap(lambda rows: rows["observation"].sum(-1) > 0)),
        how) for how in ("a call", "a rollout", "a collector")},
    **{f"alpha= in {how}": _method(
        lambda wrap: SteeringVectors({SITE: torch.ones(8)}, alpha=wrap(lambda rows: rows["observation"].sum(-1))), how)
       for how in ("a call", "a rollout")},
    "patch_fn=": _in_patch,
    **{f"callback= of a cache in {how}": _method(
        lambda wrap: ActivationCaching(SITE, callback=wrap(lambda output: output * 2)), how)
       for how in ("a call", "annotate", "a collector")},
    **{f"counterfactual= in {how}": _method(
        lambda wrap: StateSubtraction(SITE, wrap(lambda rows: rows.set("observation", rows["observation"] * 0))), how)
       for how in ("a call", "a rollout")},
    **{f"an adapter in {how}": _method(
        lambda wrap: Adapters({"mine": (wrap(lambda value: value * 2), SITE, SITE)}), how)
       for how in ("a call", "get_dist", "a collector")},
    "steer_fn= beside others in a collector": _method(
        lambda wrap: Compose(ActivationCaching(SITE), SteeringVectors([SITE], wrap(_with_vector)), Saliency()),
        "a collector"),
}  # fmt: skip


ATTRIBUTION: dict[str, Case] = {
    **{f"the target of {name} in {how}": _method(make, how) for name, make in {
        "Saliency": lambda wrap: Saliency(target=_target(wrap)),
        "integrated gradients": lambda wrap: IntegratedGradients(target=_target(wrap), n_steps=4, baseline=0.0),
        "LRP": lambda wrap: LRP(target=_target(wrap)),
        "occlusion": lambda wrap: Occlusion(target=_target(wrap), groups=[[0, 1], [2, 3]]),
    }.items() for how in ("annotate", "a collector")},
    "the target of Saliency at each step": _method(
        lambda wrap: Saliency(target=_target(wrap), when="step"), "a rollout"),
    "init_attr_targets=": _method(lambda wrap: Saliency(init_attr_targets=wrap(_logits)), "a call"),
    "init_attr_inputs=": _method(
        lambda wrap: Saliency(init_attr_inputs=wrap(lambda inputs, additional: inputs.clone())), "annotate"),
    "init_attr_grads=": _method(
        lambda wrap: Saliency(init_attr_targets=_logits, init_attr_grads=wrap(lambda found, more: found.apply(
            torch.ones_like))), "a call"),
    "the target beside a second method": _method(
        lambda wrap: Compose(ActivationCaching(SITE), Saliency(target=_target(wrap)),
                             Occlusion(target=targets.logit(0), groups=[[0, 1]], attribution_key="occluded")),
        "annotate"),
}  # fmt: skip


def _in_run(request: Callable[[Any, Any, Wrap], Any]) -> Case:
    """A run with a request of the user's."""

    def build(wrap: Wrap) -> tuple[nn.Module, Callable[[], Any]]:
        policy, rows = actor(), batch().select("observation")
        hooked = ActivationCaching(SITE).prepare(policy, return_context=False)

        def act() -> Any:
            return request(hooked, rows.clone(), wrap)

        return policy, act

    return build


def _set(hooked: Any, rows: Any, wrap: Wrap) -> Any:
    with hooked.run(rows) as run:
        run.set(SITE, torch.zeros(8, 8), callback=wrap(lambda value, output: output * 2))
    return rows


def _save(hooked: Any, rows: Any, wrap: Wrap) -> Any:
    with hooked.run(rows) as run:
        proxy = run.get(SITE, callback=wrap(lambda output: output * 2))
    return proxy.resolve()


def _run_callback(hooked: Any, rows: Any, wrap: Wrap) -> Any:
    with hooked.run(rows, run_callback=wrap(lambda module, data: module(data))) as run:
        proxy = run.get(SITE)
    return proxy.resolve()


def _own_hook(hooked: Any, rows: Any, wrap: Wrap) -> Any:
    handle = hooked.register_submodule_hook(SITE, wrap(lambda module, given, output: output * 2))
    try:
        return hooked(rows)
    finally:
        handle.remove()


def _body(hooked: Any, rows: Any, wrap: Wrap) -> Any:
    with hooked.run(rows) as run:
        run.set(SITE, torch.zeros(8, 8))
        wrap(lambda: None)()
    return rows


def _after(hooked: Any, rows: Any, wrap: Wrap) -> Any:
    with hooked.disable_context_hooks():
        wrap(lambda: None)()
    return hooked(rows)


RUNS: dict[str, Case] = {
    "set(callback=)": _in_run(_set), "get(callback=)": _in_run(_save), "run_callback=": _in_run(_run_callback),
    "a hook of one's own": _in_run(_own_hook), "the body of a run": _in_run(_body),
    "the body of disable_context_hooks": _in_run(_after),
}  # fmt: skip


# ------------------------------------------------------------------ analyses, sweeps, logs


def _analysed(given: Callable[[Wrap, Any, Path], Any]) -> Case:
    def build(wrap: Wrap) -> tuple[nn.Module, Callable[[], Any]]:
        policy, rows = actor(), batch()
        hooked = Saliency(target=targets.logit(0)).prepare(policy, return_context=False)
        return policy, lambda: _in_folder(lambda folder: given(wrap, (hooked, rows), folder).clone())

    return build


def _in_folder(act: Callable[[Path], Any]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return act(Path(folder) / "found")


def _parts(wrap: Wrap, rows: Any) -> Callable[[], Iterator[TensorDictBase]]:
    each = wrap(lambda part: part)
    return lambda: (each(part) for part in rows.split(2))


def _features(wrap: Wrap) -> tuple[nn.Module, Callable[[], Any]]:
    rows = batch()
    found = TensorDict({"attr": {"observation": rows["observation"]}}, rows.batch_size)
    return actor(), lambda: by_feature(found, rows, statistic=wrap(lambda value: value.abs()),
                                       where=wrap(lambda part: part["observation"].sum(-1) > -99))  # fmt: skip


def _probed(wrap: Wrap) -> tuple[nn.Module, Callable[[], Any]]:
    rows, policy = batch(), actor()
    rows["episode"] = torch.arange(len(rows))
    concept = wrap(lambda part: (part["observation"][..., 0] > 0).long())
    return policy, lambda: probe_grid(
        policy, rows, sites=SITE, concepts={"mine": concept}, split=GroupSplit("episode"), batch_size=4, min_rows=1,
        progress=wrap(lambda what, done, size: None),
    ).json()  # fmt: skip


ANALYSES: dict[str, Case] = {
    "where= of an analysis": _analysed(lambda wrap, given, folder: analyze(
        *given, folder, batch_size=4, where=wrap(lambda rows: rows["observation"].sum(-1) > -99))),
    "progress= of an analysis": _analysed(lambda wrap, given, folder: analyze(
        *given, folder, batch_size=2, progress=wrap(lambda done, size: None))),
    "an iterable of an analysis": _analysed(lambda wrap, given, folder: analyze(
        given[0], _parts(wrap, given[1]), folder, batch_size=4)),
    "functions of by_feature": _features,
    "concepts and progress of a grid of probes": _probed,
}  # fmt: skip


def _swept(**given: Callable[[Wrap], Any]) -> Case:
    def build(wrap: Wrap) -> tuple[nn.Module, Callable[[], Any]]:
        policy = actor()
        chosen = {name: make(wrap) for name, make in given.items()}
        world = chosen.pop("env", env())

        def act() -> Any:
            return steering_sweep(policy, world, {"v": {SITE: torch.ones(8)}}, alphas=(1.0,), controls=1, episodes=2,
                                  max_steps=4, **chosen).values  # fmt: skip

        return policy, act

    return build


def _causal(wrap: Wrap) -> tuple[nn.Module, Callable[[], Any]]:
    policy, rows = actor(), batch()
    other = rows.clone().set("observation", rows["observation"].flip(0))
    return policy, lambda: patch_sites(policy, rows, other, SITE, controls=2,
                                       metric=wrap(lambda outputs: outputs["logits"][..., 0])).json()  # fmt: skip


def _randomised(wrap: Wrap) -> tuple[nn.Module, Callable[[], Any]]:
    policy, rows = actor(), batch()
    return policy, lambda: cascading_randomisation(
        Saliency(target=targets.logit(0)), policy, rows, initialise=wrap(lambda layer: layer.reset_parameters())
    )


SWEEPS: dict[str, Case] = {
    "an outcome": _swept(outcomes=lambda wrap: {"mine": wrap(lambda data: data["next", "reward"].sum((-1, -2)))}),
    "the sign": _swept(sign=lambda wrap: wrap(lambda state: torch.ones(state.batch_size))),
    "where it acts": _swept(when=lambda wrap: wrap(lambda rows: rows["observation"].sum(-1) > 0)),
    "progress": _swept(progress=lambda wrap: wrap(lambda done, size: None)),
    "what makes environments": _swept(env=lambda wrap: wrap(env)),
    "a causal metric": _causal,
    "what makes layers anew": _randomised,
}  # fmt: skip


def _pruned(**given: Callable[[Wrap], Any]) -> Case:
    def build(wrap: Wrap) -> tuple[nn.Module, Callable[[], Any]]:
        policy, rows = actor(), batch().select("observation")

        def act() -> Any:
            with Pruning(amount_to_prune=0.5, **{name: make(wrap) for name, make in given.items()}).prepare(
                policy
            ) as hooked:
                return hooked(rows.clone())

        return policy, act

    return build


WEIGHTS: dict[str, Case] = {
    "scores of pruning": _pruned(importance_callback=lambda wrap: wrap(lambda **given: given["parameter"].abs())),
    "modules that pruning skips": _pruned(skip_modules=lambda wrap: wrap(lambda name, module: False)),
    "an adapter in its context": lambda wrap: _adapted(wrap),
    "a maximised input's target": lambda wrap: _maximised(wrap),
}  # fmt: skip


def _adapted(wrap: Wrap) -> tuple[nn.Module, Callable[[], Any]]:
    policy, rows = actor(), batch().select("observation")

    def act() -> Any:
        with Adapters({"mine": (wrap(lambda value: value * 2), SITE, SITE)}).prepare(policy) as hooked:
            return hooked(rows.clone())

    return policy, act


def _maximised(wrap: Wrap) -> tuple[nn.Module, Callable[[], Any]]:
    policy, rows = actor(), batch().select("observation")

    def act() -> Any:
        method = ActivationMaximisation(
            [SITE],
            init_attr_targets=wrap(
                lambda outputs, more: TensorDict({"mine": outputs[SITE].sum(-1)}, outputs[SITE].shape[:1])
            ),
            n_steps=3,
        )
        with method.prepare(policy) as hooked:
            return hooked(rows.clone())

    return policy, act


def _monitored(make: Callable[[Wrap, Any], dict[str, Any]]) -> Case:
    def build(wrap: Wrap) -> tuple[nn.Module, Callable[[], Any]]:
        policy, rows = actor(), batch().reshape(2, 4)
        hooked = Compose(ActivationCaching(SITE), Saliency()).prepare(policy, return_context=False)

        def act() -> Any:
            with tempfile.TemporaryDirectory() as folder:
                options = make(wrap, policy)
                sweep = options.pop("sweep", None)
                monitor = Monitor(hooked, folder, media_every=0, table_every=0, animation_every=0, **options)
                found = [monitor.step(rows.clone()) for _ in range(3)]
                if sweep is not None:
                    SweepHook(monitor, sweep).step()
                monitor.close()
            return [{name: value for name, value in (one or {}).items() if "seconds" not in name} for one in found]

        return policy, act

    return build


def _label(wrap: Wrap, policy: Any) -> dict[str, Any]:
    probe = OnlineProbe(features=("cache", SITE), label=wrap(lambda rows: (rows["observation"][..., 0] > 0).long()),
                        min_rows=1, split=GroupSplit(("concept", "cell")))  # fmt: skip
    return {"probes": {"mine": probe}}


def _sweep_of(wrap: Wrap, policy: Any) -> dict[str, Any]:
    return {"sweep": wrap(lambda: steering_sweep(policy, env(), {"v": {SITE: torch.ones(8)}}, alphas=(1.0,), controls=1,
                                                 episodes=2, max_steps=2))}  # fmt: skip


class _Logger:
    """A logger of the user's."""

    def __init__(self, wrap: Wrap) -> None:
        self.rows: list[Any] = []
        self.log_metrics = wrap(self._log)

    def _log(self, metrics: dict[str, float], step: int) -> None:
        self.rows.append((step, metrics))


def _logged(wrap: Wrap) -> tuple[nn.Module, Callable[[], Any]]:
    policy, rows = actor(), batch().reshape(2, 4)
    hooked = Saliency().prepare(policy, return_context=False)

    def act() -> Any:
        with tempfile.TemporaryDirectory() as folder:
            logger = _Logger(wrap)
            monitor = Monitor(hooked, logger, folder=folder, media_every=0, table_every=0, animation_every=0)
            for _ in range(3):
                monitor.step(rows.clone())
            monitor.close()
        return [{name: value for name, value in one.items() if "attr" in name} for _, one in logger.rows]

    return policy, act


LOGS: dict[str, Case] = {
    "the label of a probe": _monitored(_label),
    "a sweep in training": _monitored(_sweep_of),
    "a logger": _logged,
}

CASES: dict[str, dict[str, Case]] = {
    "hooks": HOOKS, "targets": ATTRIBUTION, "callbacks of runs": RUNS, "functions of analyses": ANALYSES,
    "functions of sweeps": SWEEPS, "functions of weights": WEIGHTS, "what is logged": LOGS,
}  # fmt: skip

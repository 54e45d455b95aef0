"""Functions of the user's that read what is not there: each is told in one way, and its own errors stay its own."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdhook_rl import ActivationCaching, Compose, Saliency, SteeringVectors
from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import InputError, MissingKeyError
from tdhook_rl.examples.agent import FC2, make_actor
from tdhook_rl.latent import ActivationPatching, SteeringVector
from tdhook_rl.latent.gates import RowFunction
from tdhook_rl.latent.state_subtraction import StateSubtraction
from tdhook_rl.replay import analyze, rows_where
from tdhook_rl.rollout import Future, GroupSplit, NetworkDiagnostics, OnlineProbe, ProbeSuite, Return
from tdhook_rl.sweeps import steering_sweep
from tdhook_rl.sweeps.causal import patch_sites
from tdhook_rl.targets import Target, logit

VECTOR = torch.ones(64)
Reads = Callable[..., Any]


def env() -> CueCorners:
    return CueCorners(batch_size=[2], seed=0)


def rollout() -> TensorDict:
    return env().rollout(4, make_actor(), break_when_any_done=False)


def called(method: Any) -> None:
    data = env().reset()
    data["patched", "observation"] = data["observation"].clone()
    with method.prepare(make_actor()) as policy:
        policy.annotate(policy(data))


def in_run(**options: Any) -> None:
    net = TensorDictModule(nn.Linear(4, 2), ["input"], ["output"])
    with ActivationCaching("module").prepare(net) as hooked:
        with hooked.run(TensorDict({"input": torch.ones(3, 4)}, [3]), **options) as run:
            run.get_grad("module")


def suite(concept: Any) -> None:
    split = GroupSplit([("concept", "cell")])
    ProbeSuite(make_actor(), sites=[FC2], concepts={"c": concept}, split=split, untrained=False).update(rollout())


def swept(**options: Any) -> None:
    options |= {"alphas": [1.0], "controls": 0, "episodes": 2, "max_steps": 2}
    steering_sweep(make_actor(), env, {"v": {FC2: VECTOR}}, **options)


def patched(metric: Reads) -> None:
    clean, corrupt = rollout()[:, 0], rollout()[:, 1]
    patch_sites(make_actor(), clean, corrupt, FC2, metric=metric)


def analysed(where: Reads, folder: Any) -> None:
    with Saliency().prepare(make_actor()) as hooked:
        analyze(hooked, rollout().reshape(-1), folder, where=where)


#: By name: what calls a function of the user's, given that and a folder; and how messages call it.
CALLS: dict[str, tuple[Callable[[Reads, Any], Any], str]] = {
    "target": (lambda f, _: called(Saliency(target=f)), "the target 'reads'"),
    "target in each step": (lambda f, _: called(Saliency(target=f, when="step")), "the target 'reads'"),
    "named target": (lambda f, _: called(Saliency(target=Target("mine", f))), "the target 'mine'"),
    "init_attr_targets": (lambda f, _: called(Saliency(init_attr_targets=f)), "init_attr_targets="),
    "init_attr_inputs": (lambda f, _: called(Saliency(init_attr_inputs=f)), "init_attr_inputs="),
    "init_attr_grads": (
        lambda f, _: called(Saliency(init_attr_targets=lambda out, more: out.select("logits"), init_attr_grads=f)),
        "init_attr_grads=",
    ),
    "when": (lambda f, _: called(SteeringVectors({FC2: VECTOR}, when=f)), "when= of 'steering'"),
    "alpha": (lambda f, _: called(SteeringVectors({FC2: VECTOR}, alpha=f)), "alpha= of 'steering'"),
    "RowFunction": (
        lambda f, _: called(SteeringVectors({FC2: VECTOR}, when=RowFunction(f, reads=["observation"]))),
        "when= of 'steering'",
    ),
    "steer_fn": (
        lambda f, _: called(
            SteeringVectors(modules_to_steer=FC2, steer_fn=lambda module_key, output, rows: f(rows) * output)
        ),
        f"steer_fn at {FC2!r}",
    ),
    "patch_fn": (
        lambda f, _: called(ActivationPatching(FC2, lambda k, o, first, rows: f(rows) * o)), f"patch_fn at {FC2!r}",
    ),
    "counterfactual": (lambda f, _: called(StateSubtraction(FC2, f)), "counterfactual= of 'subtraction'"),
    "target of a run": (lambda f, _: in_run(target=f), "target= of a run"),
    "run_callback": (lambda f, _: in_run(run_callback=lambda module, data: f(data)), "run_callback="),
    "label": (
        lambda f, _: OnlineProbe(features="observation", label=f, split=GroupSplit([("concept", "cell")])).update(
            rollout()
        ),
        "label= (reads)",
    ),
    "concept": (lambda f, _: suite(f), "the concept reads"),
    "future": (lambda f, _: suite(Future(f, 1)), "the concept reads"),
    "reward": (lambda f, _: suite(Return(reward=f)), "the concept reads"),
    "where of a contrast": (
        lambda f, _: SteeringVector.from_contrast(make_actor(), FC2, rollout().reshape(-1), f),
        "where='reads' of from_contrast",
    ),
    "groups of a contrast": (
        lambda f, _: SteeringVector.from_contrast(
            make_actor(), FC2, rollout().reshape(-1), lambda rows: rows["observation"][:, 0] > 0.5, groups=f
        ),
        "groups='reads' of from_contrast",
    ),
    "where of a query": (lambda f, _: rows_where(rollout().reshape(-1), f), "where="),
    "where of an analysis": (analysed, "where="),
    "outcome": (lambda f, _: swept(outcomes=f), "the outcome 'reads'"),
    "named outcome": (lambda f, _: swept(outcomes={"mine": f}), "the outcome 'mine'"),
    "sign": (lambda f, _: swept(sign=f), "sign="),
    "when of a sweep": (lambda f, _: swept(when=f), "when= of"),
    "metric": (lambda f, _: patched(f), "metric= (reads)"),
    "loss": (
        lambda f, _: NetworkDiagnostics(make_actor(), sites=[FC2], loss=f).update(rollout()), "loss=",
    ),
}  # fmt: skip


def data_of(given: tuple[Any, ...]) -> Any:
    return getattr(given[0], "outputs", given[0])


def by_key(*given: Any) -> Any:
    return data_of(given)["obervation"]


def of_own_dict(*given: Any) -> Any:
    return {"a": 1}["obervation"]


def of_own_data(*given: Any) -> Any:
    return TensorDict({"mine": torch.ones(2)}, [2])["obervation"]


def reading(how: Reads) -> Reads:
    def reads(*given: Any) -> Any:
        return how(*given)

    reads.__qualname__ = "reads"
    return reads


def ends(error: BaseException) -> str:
    """The function that an error was raised in, as far as that is one of these."""
    names = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    return next((name for name in reversed(names) if name in ("by_key", "of_own_dict", "of_own_data")), "")


@pytest.mark.parametrize("name", CALLS)
def test_what_is_not_there_is_named(name: str, tmp_path: Any) -> None:
    call, what = CALLS[name]
    with pytest.raises(MissingKeyError) as told:
        call(reading(by_key), tmp_path / "results")
    said = str(told.value)
    assert said.startswith(what), said
    assert "is a function that reads 'obervation', which is not there; nearest: " in said, said
    assert ". It sees '" in said, said
    before = told.value.__context__  # a TensorDictModule puts a cause of its own in the place of ours
    assert type(before) is KeyError
    assert ends(before) == "by_key"


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("how", [of_own_dict, of_own_data])
def test_what_is_its_own_is_not_masked(name: str, how: Reads, tmp_path: Any) -> None:
    with pytest.raises(KeyError) as told:
        CALLS[name][0](reading(how), tmp_path / "results")
    assert not isinstance(told.value, MissingKeyError)
    assert ends(told.value) == how.__name__


def test_keys_of_nested_entries_are_named_whole() -> None:
    data = TensorDict({"a": {"b": {"c": torch.ones(2)}}, "seen": torch.ones(2)}, [2])
    for reads, key in (
        (lambda rows: rows["a", "b", "d"], ("a", "b", "d")),
        (lambda rows: rows["a"]["d"], ("a", "d")),
        (lambda rows: rows.select("a")["a", "b", "d"], ("a", "b", "d")),
        (lambda rows: rows.copy().set("more", torch.ones(2))["sen"], "sen"),
        (lambda rows: rows[0]["sen"], "sen"),
        (lambda rows: rows.lock_()["sen"], "sen"),
    ):
        with pytest.raises(MissingKeyError) as told:
            rows_where(data, reads)
        assert f"reads {key!r}, which is not there" in str(told.value), str(told.value)


#: What is given copies, or may change what it is given.
MAY_WRITE = (
    "steer_fn", "patch_fn", "counterfactual", "target of a run", "run_callback", "loss", "init_attr_targets",
    "init_attr_grads",
)  # fmt: skip


def some_entry(given: tuple[Any, ...]) -> tuple[Any, Any, torch.Tensor]:
    rows = data_of(given)
    key = next(key for key, value in rows.items(True, True) if value.is_floating_point())
    return rows, key, rows[key]


@pytest.mark.parametrize("name", [name for name in CALLS if name not in MAY_WRITE])
def test_what_only_reads_does_not_write(name: str, tmp_path: Any) -> None:
    def scales(*given: Any) -> Any:
        rows, _, value = some_entry(given)
        with torch.no_grad():
            value.div_(255.0)
        return rows

    with pytest.raises(InputError, match=r"has written to .* in place.*work on a copy"):
        CALLS[name][0](scales, tmp_path / "results")


def test_what_it_sets_is_taken_out_again() -> None:
    def returns(episodes: TensorDict) -> torch.Tensor:
        return episodes["next", "reward"].sum((-1, -2))

    def sets(episodes: TensorDict) -> torch.Tensor:
        episodes["next", "reward"] = episodes["next", "reward"] + 1
        episodes["more"] = torch.ones(episodes.shape)
        return returns(episodes)

    def counts(episodes: TensorDict) -> torch.Tensor:
        return torch.full((len(episodes),), float(len(episodes.keys())))

    options = {"alphas": [1.0], "controls": 0, "episodes": 2, "max_steps": 2}
    outcomes = {"before": counts, "set": sets, "read": returns, "after": counts}
    with pytest.warns(UserWarning, match="did not end"):
        found = steering_sweep(make_actor(), env, {"v": {FC2: VECTOR}}, outcomes=outcomes, **options).values
    assert torch.equal(found["before"], found["after"])
    torch.testing.assert_close(found["set"], found["read"] + 2)


@pytest.mark.parametrize("when", ["step", "batch"])
@pytest.mark.parametrize("first", [True, False])
def test_a_target_that_sets_an_output_changes_neither_others_nor_the_policy(first: bool, when: str) -> None:
    def scaled(run: Any) -> torch.Tensor:
        run.outputs["output"] = run.outputs["output"] * 5
        return run.outputs["output"][..., 1]

    net, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(5, 4)
    methods = [Saliency(target=Target("scaled", scaled), when=when, attribution_key="scaled")]
    methods.insert(
        len(methods) if first else 0, Saliency(target=logit(0, key="output"), when=when, attribution_key="plain")
    )
    with Compose(*methods).prepare(net) as hooked:
        found = hooked.annotate(hooked(TensorDict({"input": x}, [5])))
    torch.testing.assert_close(found["plain", "input"], net[0].weight[0].expand(5, 4))
    torch.testing.assert_close(found["scaled", "input"], 5 * net[0].weight[1].expand(5, 4))
    assert torch.equal(found["output"], net(x))


def test_a_counterfactual_is_written_into_a_copy() -> None:
    def hides(rows: TensorDict) -> TensorDict:
        rows["input"][..., 0] = 0.0
        return rows

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh()).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    hidden = x.clone().index_fill_(1, torch.tensor([0]), 0.0)
    with StateSubtraction("0", hides, alpha=0.5).prepare(net) as hooked:
        data = hooked(TensorDict({"input": x.clone()}, [5]))
    assert torch.equal(data["input"], x)
    torch.testing.assert_close(data["output"], torch.lerp(net[0](x), net[0](hidden), 0.5).tanh())

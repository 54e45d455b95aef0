"""What would do nothing says so: annotate that nobody uses, data of a class, keys of masks, controls after the end."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict, tensorclass
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.collectors import Collector

from tdhook_rl import ActivationCaching, Compose, Saliency, SteeringVectors, errors, targets
from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import InactiveError, InputError, KeyCollisionError, PreparationError
from tdhook_rl.examples.agent import FC2, make_actor
from tdhook_rl.metrics import dormant_units, effective_rank
from tdhook_rl.rollout import GroupSplit, NetworkDiagnostics, check, summarise


def collected(policy: Any, postproc: Any = None) -> list[TensorDict]:
    collector = Collector(
        CueCorners(batch_size=[2], seed=0), policy, frames_per_batch=8, total_frames=16, postproc=postproc,
        auto_register_policy_transforms=False,
    )  # fmt: skip
    batches = [data.clone() for data in collector]
    collector.shutdown()
    return batches


def nobody(policy: Any) -> None:
    collected(policy)


def rollout(policy: Any) -> None:
    CueCorners(batch_size=[2], seed=0).rollout(3, policy)


def postproc(policy: Any) -> None:
    assert all(("attr", "observation") in data.keys(True) for data in collected(policy, policy.annotate))


def afterwards(policy: Any) -> None:
    policy.annotate(torch.cat(collected(policy)))


def pickled(policy: Any) -> None:
    collected(policy, pickle.loads(pickle.dumps(policy.annotate)))


@pytest.mark.parametrize(("use", "told"), [(nobody, 1), (rollout, 1), (postproc, 0), (afterwards, 0), (pickled, 0)])
def test_a_word_when_the_context_ends(use: Callable[[Any], None], told: int) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Compose(ActivationCaching(FC2), Saliency()).prepare(make_actor()) as policy:
            use(policy)
            assert not [one for one in caught if "annotate" in str(one.message)]
    found = [str(one.message) for one in caught if "annotate" in str(one.message)]
    assert len(found) == told
    assert all("('attr', 'observation')" in one and "cache" not in one for one in found)


def test_restore_says_it_once_and_a_policy_that_did_not_act_says_nothing() -> None:
    policy = Saliency().prepare(make_actor(), return_context=False)
    rollout(policy)
    with pytest.warns(UserWarning, match="written by annotate only"):
        policy.restore()
    policy.restore()
    with Saliency().prepare(make_actor()):
        pass
    with Saliency(when="step").prepare(make_actor()) as policy:
        rollout(policy)


def test_the_repr_and_the_doctor_say_who_writes_what() -> None:
    with Compose(ActivationCaching(FC2), Saliency()).prepare(make_actor()) as policy:
        assert f"each step writes ('cache', '{FC2}'); annotate(batch) writes ('attr', 'observation')" in repr(policy)
        for options, levels in (({"frames_per_batch": 32}, ["warning"]), ({"postproc": policy.annotate}, ["ok"])):
            report = check(policy, CueCorners(batch_size=[2]), options)
            assert [one.level for one in report.findings if one.check == "annotate"][-1:] == levels


# ------------------------------------------------------------------ tensorclasses


@tensorclass
class Step:
    observation: torch.Tensor
    logits: torch.Tensor = None
    attr: TensorDict = None
    computed: TensorDict = None


@tensorclass
class Bare:
    observation: torch.Tensor
    logits: torch.Tensor = None


@pytest.mark.parametrize("when", ["step", "batch"])
def test_a_tensorclass_holds_what_a_tensordict_would(when: str) -> None:
    policy = TensorDictModule(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), ["observation"], ["logits"])
    x = torch.randn(6, 4)
    with Saliency(target=targets.logit(0), when=when).prepare(policy) as hooked:
        data = TensorDict({"observation": x}, [6])
        expected = hooked(data) if when == "step" else hooked.annotate(data)
        step = Step(observation=x, batch_size=[6])
        found = hooked(step) if when == "step" else hooked.annotate(step)
        assert isinstance(found, Step)
        torch.testing.assert_close(found.attr["observation"], expected["attr", "observation"])
        assert bool(found.computed["attr"].all())
        assert (step.attr is None) == (when == "batch")
        bare = Bare(observation=x, batch_size=[6])
        with pytest.raises(InputError, match="tensorclass Bare has no field 'attr', 'computed'"):
            _ = hooked(bare) if when == "step" else hooked.annotate(bare)


# ------------------------------------------------------------------ what cannot be


def test_an_input_where_the_masks_are_is_refused() -> None:
    for key in (("computed", "attr"), ("computed", "seen")):
        policy = TensorDictModule(nn.Linear(4, 2), [key], ["logits"])
        with pytest.raises(KeyCollisionError, match="holds the masks of results"):
            Saliency().prepare(policy).__enter__()


def test_an_environment_is_no_policy() -> None:
    with pytest.raises(PreparationError, match="environment"):
        Saliency().prepare(CueCorners()).__enter__()


def test_a_control_that_is_set_after_the_end_is_refused() -> None:
    with SteeringVectors({FC2: torch.ones(64)}, alpha=0.0).prepare(make_actor()) as policy:
        policy.controls["steering.alpha"] = 0.5
    with pytest.raises(InactiveError, match="after the context"):
        policy.controls["steering.alpha"] = 1.0
    with pytest.raises(InactiveError, match="after the context"):
        policy.controls.update_({"steering.alpha": 1.0})
    assert policy.controls["steering.alpha"] == 0.5


@pytest.mark.parametrize("when", ["step", "batch"])
def test_booleans_are_explained_where_there_is_nothing_else(when: str) -> None:
    class Switches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, held: torch.Tensor) -> torch.Tensor:
            return self.linear(held.float())

    class Gates(Switches):
        def forward(self, held: torch.Tensor) -> torch.Tensor:
            return self.linear(torch.where(held, 1.0, -1.0))

    data = TensorDict({"held": torch.rand(3, 4) > 0.5}, [3])
    keys = {"in_keys": ["held"], "out_keys": ["logits"]}
    net = Switches()
    with Saliency(target=targets.logit(0), when=when).prepare(net, **keys) as hooked:
        found = hooked(data.clone()) if when == "step" else hooked.annotate(data)
    torch.testing.assert_close(found["attr", "held"], net.linear.weight[0].detach().expand(3, 4))
    with Saliency(target=targets.logit(0), when=when).prepare(Gates(), **keys) as hooked:
        with pytest.raises(InputError, match="bool"):
            _ = hooked(data.clone()) if when == "step" else hooked.annotate(data)


@pytest.mark.parametrize("home", ["tdhook_rl_study.agents", "my_study", "__main__"])
def test_a_warning_is_about_the_callers_line(home: str) -> None:
    code = compile("def called(tell):\n    tell('so it is')", "/a/file/of/the/callers.py", "exec")
    names: dict[str, object] = {"__name__": home}
    exec(code, names)
    with pytest.warns(UserWarning, match="so it is") as told:
        names["called"](errors.warn)  # type: ignore[operator]
    assert (told[0].filename, told[0].lineno) == ("/a/file/of/the/callers.py", 2)


@pytest.mark.parametrize("option", [{"tau": -1.0}, {"delta": -0.1}, {"delta": 1.0}])
def test_thresholds_of_diagnostics_are_those_of_the_measures(option: dict[str, float]) -> None:
    measure = dormant_units if "tau" in option else effective_rank
    with pytest.raises(InputError) as said:
        measure(torch.rand(8, 4), **option)
    with pytest.raises(InputError, match=re.escape(str(said.value))):
        NetworkDiagnostics(make_actor(), sites=[FC2], **option)


@pytest.mark.parametrize("grouping", [[], (), "", [""], [3], 3, [["cell", 3]]])
def test_a_split_by_nothing_is_refused(grouping: Any) -> None:
    with pytest.raises(InputError, match="a grouping of GroupSplit is a key, or a list of keys"):
        GroupSplit("episode", grouping)


def test_groupings_are_read_from_any_list() -> None:
    keys = ["episode", ("concept", "cell")]
    for same in (keys, iter(keys), dict.fromkeys(keys), ["episode", ["concept", "cell"]]):
        assert GroupSplit(same).groupings == [keys]


def test_a_summary_of_what_holds_entries_names_them() -> None:
    data = TensorDict({"cache": {"fc": torch.ones(3, 2)}}, batch_size=3)
    for asked in (["cache"], ("cache", "fc")):  # the second would be two keys
        with pytest.raises(InputError, match=r"'cache' is no entry but holds entries: .* \('cache', 'fc'\)"):
            summarise(data, asked)

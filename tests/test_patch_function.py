"""`patch_fn` of `ActivationPatching`: which run an argument is of, what None means, and who is warned."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.data import Bounded
from torchrl.data import Categorical as CategoricalSpec
from torchrl.modules import AdditiveGaussianModule, EGreedyModule, OrnsteinUhlenbeckProcessModule, QValueActor

from tdhook_rl.errors import InputError
from tdhook_rl.latent import ActivationPatching


class Mixer:
    def __call__(self, module_key, output, output_to_patch):
        return output + 0.25 * (output_to_patch - output)


def by_name(module_key, output, output_to_patch):
    return output + 0.25 * (output_to_patch - output)


def keywords_only(*, module_key, output, output_to_patch):
    return output + 0.25 * (output_to_patch - output)


def any_keywords(**given):
    return given["output"] + 0.25 * (given["output_to_patch"] - given["output"])


def other_order(output_to_patch, output, module_key):
    return output + 0.25 * (output_to_patch - output)


def by_position(path, here, first):
    return here + 0.25 * (first - here)


def share(path, here, first, *, weight):
    return here + weight * (first - here)


NAMED = [by_name, keywords_only, any_keywords, other_order, Mixer(), partial(by_name)]
POSITIONAL = [by_position, partial(share, weight=0.25), lambda *given: given[1] + 0.25 * (given[2] - given[1])]


def patched(function, site="1"):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    first, second = torch.randn(2, 3, 4, dtype=torch.float64)
    with ActivationPatching([site], patch_fn=function).prepare(net) as hooked:
        data = hooked(TensorDict({"input": first, ("patched", "input"): second}, batch_size=3))
    mixed = 0.75 * net[:2](second) + 0.25 * net[:2](first)
    return data["patched", "output"], net[2](mixed)


@pytest.mark.parametrize("function", NAMED)
def test_a_function_of_the_names_is_given_the_roles_of_tdhook_and_warned_of(function) -> None:
    with pytest.warns(FutureWarning, match="`output` is of the run that is patched"):
        found, expected = patched(function)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("function", POSITIONAL)
def test_other_names_are_filled_by_position_in_silence(function) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, expected = patched(function)
    torch.testing.assert_close(found, expected)


def test_the_warning_points_at_the_users_line() -> None:
    with pytest.warns(FutureWarning) as caught:
        ActivationPatching(["1"], patch_fn=by_name)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("wrong", [lambda x: x, lambda: None, 3, "f", torch.zeros(2)])
def test_what_cannot_be_called_is_refused_at_once(wrong) -> None:
    with pytest.raises(InputError, match="patch_fn"):
        ActivationPatching(["1"], patch_fn=wrong)


def explores(kind: str) -> TensorDictSequential:
    spec, place = Bounded(-1, 1, (2,)), {"in_keys": ["observation"], "out_keys": ["action"]}
    if kind == "none":
        return TensorDictSequential(TensorDictModule(nn.Linear(4, 2), **place))
    if kind == "e-greedy":
        choice = CategoricalSpec(3)
        return TensorDictSequential(
            QValueActor(nn.Linear(4, 3), in_keys=["observation"], spec=choice), EGreedyModule(spec=choice, eps_init=0.5)
        )
    noise = AdditiveGaussianModule(spec) if kind == "gaussian" else OrnsteinUhlenbeckProcessModule(spec=spec)
    return TensorDictSequential(TensorDictModule(nn.Linear(4, 2), **place), noise)


@pytest.mark.parametrize("kind", ["none", "e-greedy", "gaussian", "ornstein-uhlenbeck"])
def test_what_exploration_may_have_drawn_is_no_outcome_of_a_patch(kind):
    """It would be the stored action, whatever is patched; values and the action of no exploration are outcomes."""
    data = TensorDict({"observation": torch.randn(3, 4), "is_init": torch.zeros(3, 1, dtype=torch.bool)}, batch_size=3)
    data["patched", "observation"] = torch.randn(3, 4)
    policy = explores(kind)
    site = next(path for path, module in policy.named_modules() if isinstance(module, nn.Linear))
    with ActivationPatching([site]).prepare(policy) as hooked:
        outcomes = set(hooked(data)["patched"].keys()) - {"observation", "is_init"}
    found = {"none": {"action"}, "e-greedy": {"action_value", "chosen_action_value"}}.get(kind, set())
    assert outcomes & {"action", "action_value", "chosen_action_value"} == found

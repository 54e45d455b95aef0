"""An explanation is the same to the last bit whatever else is asked of the call: comparisons, other methods, steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook_rl import ActivationCaching, Compose, IntegratedGradients, Saliency, targets
from tdhook_rl.method import Method
from tests.policies import POLICIES, Case

METHODS: dict[str, Callable[..., Method]] = {
    "saliency": Saliency,
    "a short path": lambda **kwargs: IntegratedGradients(baseline=0.0, n_steps=1, **kwargs),
    "a path": lambda **kwargs: IntegratedGradients(baseline=0.0, n_steps=7, **kwargs),
}
#: Beside the target that is chosen by itself: a function of a distribution, and what is linear in what a head is given.
TARGETS = {
    "default": (None, POLICIES),
    "entropy": (targets.entropy(), ("categorical", "one_hot", "recurrent")),
    "scale": (targets.logit(1, "scale"), ("tanh_normal",)),
}
# Where its own forward moves the statistics of its batches, no two calls are the same.
ASKED = [(name, what) for what, (_, names) in TARGETS.items() for name in names if name != "batch_norm"]


def attributed(case: Case, method: Method, policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """In every way: the attributions of the same rows."""
    data = case.data(4)
    other = ActivationCaching([path for path, module in policy.named_modules() if type(module) is nn.Linear][-1:])

    def of(batch: TensorDict) -> Tensor:
        return batch["attr"][case.key].clone()

    with method.prepare(policy) as hooked:
        acted = hooked(data.clone())
        yield "in a step", of(acted)
        acted = acted.exclude(*hooked.result_keys)
        yield "afterwards", of(hooked.annotate(acted))
        yield "compared with nothing", of(hooked.annotate(acted, on_mismatch="ignore"))
        moved = acted.clone()
        for key in ("logits", "loc", "action_value", "state_value", "hidden"):
            if key in moved.keys():
                moved[key] += 1.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            hooked.annotate(moved)
        yield "once more, when all was said", of(hooked.annotate(acted))
    for order in ((method, other), (other, method)):
        with Compose(*order).prepare(policy) as hooked:
            yield "beside another method", of(hooked.annotate(acted))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "what"), ASKED)
def test_bits_are_those_of_the_rows(name: str, what: str, method: str) -> None:
    case, policy = POLICIES[name], POLICIES[name].build()
    if what == "default" and name == "actor_value":
        policy = policy.get_policy_operator()
    made = METHODS[method](target=TARGETS[what][0], when="step", inputs=[case.key])
    ways = list(attributed(case, made, policy))
    differ = [way for way, found in ways if not torch.equal(found, ways[0][1])]
    assert not differ, f"other bits than {ways[0][0]}: {differ}"
    assert ways[0][1].abs().max() > 0

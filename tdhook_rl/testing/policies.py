"""``check_hooked_policy``: whether a policy of the user's can be hooked, and is the same policy hooked."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from tdhook_rl.attribution import Saliency
from tdhook_rl.errors import ConformanceError
from tdhook_rl.latent.activation_caching import ActivationCaching
from tdhook_rl.method import Compose, Method
from tdhook_rl.testing.conformance import run_check
from tdhook_rl.testing.subject import Subject, same_bits

#: The checks of a method that say something of a policy.
OF_POLICIES = (
    "original_is_untouched", "restored_after_exit", "observing_is_bit_neutral", "data_is_read_only", "nothing_is_kept",
    "is_the_policy", "pickles", "deep_copies",
)  # fmt: skip


def check_hooked_policy(
    policy: Callable[[], TensorDictModuleBase] | TensorDictModuleBase,
    env: EnvBase | Callable[[], EnvBase],
    *,
    method: Callable[[], Method] | None = None,
    steps: int = 10,
) -> None:
    """Check that a policy can be hooked in its environment, and that hooked it is the same policy.

    Args:
        policy: gives the policy, or the policy itself (which is only called).
        env: the environment, or what makes it; it must be seedable.
        method: what it is hooked with; by default every module is cached, and saliency explains what was decided.
        steps: the length of the rollouts that are compared.

    Raises:
        ConformanceError: names the check that failed: one of those of
            :func:`tdhook_rl.testing.check_method`, or ``rollouts_are_the_same``.

    Example:
        >>> from tdhook_rl.envs import CueCorners
        >>> from tdhook_rl.examples.agent import make_actor
        >>> check_hooked_policy(make_actor(), CueCorners(batch_size=[2]))
    """
    make = policy if not isinstance(policy, TensorDictModuleBase) else lambda: policy
    world = env if isinstance(env, EnvBase) else env()
    observing = method or (lambda: Compose(ActivationCaching(r".*\d$"), Saliency()))
    _rollouts_are_the_same(make(), world, observing, steps)
    with torch.no_grad():
        rows = world.rollout(steps, make(), break_when_any_done=False).reshape(-1)
    rows = rows.select(*make().in_keys)

    def data(*batch: int) -> TensorDictBase:
        count = torch.Size(batch).numel()
        return rows[torch.arange(count) % len(rows)].reshape(batch).clone()

    subject = Subject(observing, make, data)  # type: ignore[arg-type]
    for name in OF_POLICIES:
        run_check(name, subject)


def _rollouts_are_the_same(policy: Any, env: EnvBase, method: Callable[[], Method], steps: int) -> None:
    def rollout(one: Any) -> TensorDict:
        torch.manual_seed(0)
        env.set_seed(0)
        with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
            return env.rollout(steps, one, break_when_any_done=False)

    expected, again = rollout(policy), rollout(policy)
    try:
        same_bits(again, expected, "two rollouts of the policy itself")
    except ConformanceError as error:
        raise ConformanceError(
            f"rollouts_are_the_same: {error}, so that there is nothing to compare with: the environment cannot be "
            "seeded, or the policy keeps a state",
            check="rollouts_are_the_same",
        ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as that nobody has annotated the rollout
        with method().prepare(policy) as hooked:
            found = rollout(hooked)
    try:
        same_bits(found, expected, "a rollout of the hooked policy")
    except ConformanceError as error:
        raise ConformanceError(f"rollouts_are_the_same: {error}", check="rollouts_are_the_same") from error

"""What Stable-Baselines3 has stored, and what its environments show, as TensorDicts: environments by steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.utils import unravel_key
from torch import Tensor, nn

from tdhook_rl.adapters.actions import ToBounds
from tdhook_rl.adapters.sb3_networks import RAW
from tdhook_rl.adapters.sb3_reading import Keys, observation_keys
from tdhook_rl.arguments.checked import checked
from tdhook_rl.errors import InputError
from tdhook_rl.internals.sb3_names import ended_last


@checked
def sb3_data(
    model: Any, buffer: Any = None, *, newest: int | None = None, in_keys: Keys | None = None
) -> TensorDictBase:
    """The steps in a rollout or replay buffer of Stable-Baselines3, in the order in which they were collected.

    Args:
        model: the algorithm; its buffer is read unless another is given.
        buffer: a ``RolloutBuffer`` or ``ReplayBuffer``, or one of dictionaries.
        newest: of each environment only so many steps, the last ones.
        in_keys: as of :func:`~tdhook_rl.adapters.from_sb3`.

    Returns:
        a TensorDict of ``(environments, steps)`` with copies of the observation, ``"action"`` as the environment got
        it (a continuous one also as ``"raw_action"``, as it was drawn), ``("next", "reward")``,
        ``("next", "done")``, and ``"is_init"``. From a rollout buffer also ``"action_log_prob"``, ``"state_value"``,
        ``"advantage"`` and ``"value_target"`` (of RecurrentPPO the states of its memory too), and its rewards have the
        value in them with which episodes were cut off;
        from a replay buffer ``"terminated"`` and ``"truncated"`` (unless ``handle_timeout_termination=False``, where
        nothing tells them apart) and the next observation (with ``optimize_memory_usage``,
        which keeps none, the oldest step of a full one is left out). Discrete entries are indices.

    Raises:
        InputError: if there is no buffer, or nothing in it.

    Note:
        An agent in a ``VecNormalize`` has normalised observations in a rollout buffer, and those of the environment in
        a replay buffer.

    Example:
        >>> from stable_baselines3 import PPO
        >>> agent = PPO("MlpPolicy", "CartPole-v1", n_steps=64, device="cpu").learn(64)
        >>> data = sb3_data(agent)
        >>> data.batch_size, data["observation"].shape, data["action"].dtype
        (torch.Size([1, 64]), torch.Size([1, 64, 4]), torch.int64)
    """
    if buffer is None:
        buffer = getattr(model, "rollout_buffer", None) or getattr(model, "replay_buffer", None)
    if buffer is None or not hasattr(buffer, "observations"):
        raise InputError(
            f"{type(model).__name__} has no buffer to read (an agent is saved without): give sb3_data(model, buffer)"
        )
    steps = _order(buffer, newest)
    keys = dict(zip(_entries(model.observation_space), observation_keys(model.policy, in_keys), strict=True))
    of_rollouts = hasattr(buffer, "log_probs")
    data = TensorDict({}, [buffer.n_envs, len(steps)])

    def read(name: str, shape: tuple[int, ...] = ()) -> Tensor:
        return _read(getattr(buffer, name), shape, steps, buffer)

    def observe(name: str, within: tuple[str, ...] = ()) -> None:
        stored = getattr(buffer, name)
        for entry, key in keys.items():
            shape = buffer.obs_shape[entry] if entry else buffer.obs_shape
            value = _read(stored[entry] if entry else stored, shape, steps, buffer)
            space = model.observation_space[entry] if entry else model.observation_space
            key = (*within, *(key if isinstance(key, tuple) else (key,)))
            data.set(key, value.squeeze(-1) if _is_index(space) else value)

    observe("observations")
    _put_actions(data, read("actions", (buffer.action_dim,)), model, of_rollouts)
    data["next", "reward"] = read("rewards").unsqueeze(-1)
    if of_rollouts:
        starts = read("episode_starts").bool().unsqueeze(-1)
        last = ended_last(model) if buffer is getattr(model, "rollout_buffer", None) else None
        last = torch.zeros(buffer.n_envs) if last is None else torch.as_tensor(last)
        data["is_init"] = starts
        data["next", "done"] = torch.cat([starts[:, 1:], last.bool().reshape(-1, 1, 1)], 1)
        data["action_log_prob"] = read("log_probs")
        for key, name in (("state_value", "values"), ("advantage", "advantages"), ("value_target", "returns")):
            data[key] = read(name).unsqueeze(-1)
        for key, name in (("recurrent_state_h", "hidden_states_pi"), ("recurrent_state_c", "cell_states_pi")):
            if hasattr(buffer, name):  # of RecurrentPPO: steps, layers, environments, units
                count, layers, envs, units = buffer.hidden_state_shape
                stored = getattr(buffer, name)
                stored = stored.swapaxes(1, 2) if stored.shape == (count, layers, envs, units) else stored
                data[key] = _read(stored, (layers, units), steps, buffer)
        return data
    data["next", "done"] = done = read("dones").bool().unsqueeze(-1)
    if buffer.handle_timeout_termination:  # otherwise nothing says which episodes were cut off
        cut = read("timeouts").bool().unsqueeze(-1)
        data["next", "terminated"], data["next", "truncated"] = done & ~cut, done & cut
    # The oldest step of a full buffer may be any of its episode.
    earlier = _order(buffer, None)[: -len(steps)][-1:]
    first = torch.full((buffer.n_envs, 1), float(not buffer.full))
    first = _read(buffer.dones, (), earlier, buffer) if len(earlier) else first
    data["is_init"] = torch.cat([first.bool().unsqueeze(-1), done[:, :-1]], 1)
    if hasattr(buffer, "next_observations"):
        observe("next_observations", ("next",))
    return data


@checked
def vec_env_rollout(policy: nn.Module, vec_env: Any, steps: int, *, in_keys: Keys | None = None) -> TensorDictBase:
    """Play in a ``VecEnv`` of Stable-Baselines3, with all its wrappers, by a policy of TorchRL.

    A policy with a memory is given the one of its last step (what it reads, and writes below ``"next"``); each episode
    begins with zeros.

    Args:
        policy: from :func:`~tdhook_rl.adapters.from_sb3`, or another that gives actions as ``vec_env`` takes them;
            hooked or not. It acts by the :class:`~torchrl.envs.utils.set_exploration_type` in force, as in
            ``env.rollout``: unless set, without drawing.
        vec_env: the environment, which is reset. Where it normalises observations the policy does not
            (``from_sb3(model, normalize=False)``).
        steps: how many, at least 1.
        in_keys: as of :func:`~tdhook_rl.adapters.from_sb3`. Unless given, where the policy reads: an observation that
            is one under the only key, the entries of a dictionary under their names, or under the keys that
            :func:`~tdhook_rl.adapters.from_sb3` was given for them.

    Returns:
        a TensorDict of ``(environments, steps)`` with all that the policy writes, ``"is_init"``, and below ``"next"``
        the observation (the last one of an episode where it ended), ``"reward"``, ``"done"``, ``"terminated"`` and
        ``"truncated"``.

    Raises:
        InputError: for what is no ``VecEnv``, where it does not show what the policy reads, or takes other actions.

    Example:
        >>> from stable_baselines3 import PPO
        >>> from tdhook_rl import ActivationCaching
        >>> from tdhook_rl.adapters import from_sb3
        >>> agent = PPO("MlpPolicy", "CartPole-v1", device="cpu")
        >>> with ActivationCaching("module.0.module.mlp_extractor.policy_net.1").prepare(from_sb3(agent)) as policy:
        ...     data = vec_env_rollout(policy, agent.get_env(), 10)
        >>> data["cache", "module.0.module.mlp_extractor.policy_net.1"].shape
        torch.Size([1, 10, 64])
    """
    if not hasattr(vec_env, "num_envs") or not hasattr(vec_env, "step_wait"):
        raise InputError(
            f"vec_env_rollout plays in a VecEnv of Stable-Baselines3 (model.get_env()), not in a "
            f"{type(vec_env).__name__}"
        )
    if steps < 1:
        raise InputError(f"steps= is at least 1, got {steps}")
    entries = _entries(vec_env.observation_space)
    memory = _memory_of(policy)
    keys = _read_from(policy, entries, memory) if in_keys is None else _listed(in_keys, entries)
    count, played = vec_env.num_envs, []
    now = _observed(vec_env.reset(), entries, keys, count)
    starts = torch.ones(count, 1, dtype=torch.bool)
    for _ in range(steps):
        with torch.no_grad():
            data = policy(now.copy().set("is_init", starts))
        observation, reward, done, infos = vec_env.step(_as_taken(data, vec_env.action_space, count))
        now = _observed(observation, entries, keys, count)
        after = now.clone()
        for index, info in enumerate(infos):
            if done[index] and "terminal_observation" in info:
                last = info["terminal_observation"]
                after[index] = _observed(last, entries, keys, None)
        starts = torch.as_tensor(done).reshape(count, 1)
        for key in memory:
            state = data["next", key]
            after.set(key, state)
            now.set(key, state.masked_fill(starts.reshape(count, *(1,) * (state.ndim - 1)), 0))
            if key not in data.keys(True):  # the module has made its own zeros
                data.set(key, torch.zeros_like(state))
        cut = torch.tensor([bool(info.get("TimeLimit.truncated", False)) for info in infos]).reshape(count, 1)
        after["reward"] = torch.as_tensor(reward).reshape(count, 1)
        after["done"], after["terminated"], after["truncated"] = starts, starts & ~cut, starts & cut
        played.append(data.set("next", after))
    return torch.stack(played, 1)


# ---------------------------------------------------------------------- inner


def _entries(space: Any) -> list[str]:
    return list(space.spaces) if hasattr(space, "spaces") else [""]


def _is_index(space: Any) -> bool:
    from gymnasium import spaces

    return isinstance(space, spaces.Discrete)


def _order(buffer: Any, newest: int | None) -> np.ndarray:
    """The places of the steps, the oldest first."""
    size = buffer.buffer_size if buffer.full else buffer.pos
    steps = np.arange(size)
    if buffer.full and not hasattr(buffer, "log_probs"):
        steps = (steps + buffer.pos) % size
        # With optimize_memory_usage, the newest observation stands in the place of the oldest.
        steps = steps if hasattr(buffer, "next_observations") else steps[1:]
    steps = steps if newest is None else steps[max(0, len(steps) - newest) :]
    if not len(steps):
        raise InputError("there is nothing in the buffer yet, or newest= is not at least 1")
    return steps


def _read(stored: np.ndarray, shape: tuple[int, ...], steps: np.ndarray, buffer: Any) -> Tensor:
    """A copy, environments first, of what has this shape at each step."""
    if stored.shape != (buffer.buffer_size, buffer.n_envs, *shape):  # training has put them one after the other
        stored = stored.reshape(buffer.n_envs, buffer.buffer_size, *shape).swapaxes(0, 1)
    return torch.from_numpy(np.ascontiguousarray(stored[steps].swapaxes(0, 1)))


def _put_actions(data: TensorDictBase, stored: Tensor, model: Any, of_rollouts: bool) -> None:
    from gymnasium import spaces

    space = model.action_space
    if isinstance(space, spaces.Box):
        data[RAW] = stored
        scaled = model.policy.squash_output or not of_rollouts
        data["action"] = ToBounds(space.low, space.high, scaled=scaled)(stored)
    elif isinstance(space, spaces.Discrete):
        data["action"] = stored.squeeze(-1)
    else:
        data["action"] = stored.float() if isinstance(space, spaces.MultiBinary) else stored


def _listed(in_keys: Keys, entries: list[str]) -> list[NestedKey]:
    """The keys that were given for the entries of an environment."""
    given = in_keys if isinstance(in_keys, Mapping) else {"": in_keys}
    if set(given) != set(entries):
        wanted = "one key" if entries == [""] else f"a key for each of {', '.join(map(repr, entries))}"
        raise InputError(f"in_keys= is {wanted}, as the environment shows it; found {in_keys!r}")
    return [given[name] for name in entries]


def _read_from(policy: Any, entries: list[str], memory: list[NestedKey]) -> list[NestedKey]:
    """The keys that a policy reads the entries of an environment from."""
    known = [unravel_key(key) for key in getattr(policy, "in_keys", ())]
    keys = [key for key in known if key not in memory and key != "is_init"]
    if entries == [""] and len(keys) == 1:
        return keys
    for module in policy.modules():  # made by an adapter, which knows what its entries are called
        parts = getattr(getattr(module, "observation", None), "parts", None)
        if isinstance(parts, dict) and set(parts) == set(entries) and len(keys) == len(parts):
            return [dict(zip(parts, keys, strict=True))[name] for name in entries]
    if keys and set(keys) <= set(entries):
        return list(entries)
    shown = "one observation" if entries == [""] else f"the entries {entries}"
    raise InputError(f"the policy reads {keys}, and the environment shows {shown}: say in_keys=")


def _memory_of(policy: Any) -> list[NestedKey]:
    """The keys under which a policy reads what it has written below ``"next"``."""
    written = {unravel_key(key) for key in getattr(policy, "out_keys", ())}
    return [key for key in map(unravel_key, getattr(policy, "in_keys", ())) if unravel_key(("next", key)) in written]


def _as_taken(data: TensorDictBase, space: Any, count: int) -> np.ndarray:
    """The actions of a step, as an environment with this space takes them."""
    action = data.get("action", None)
    if action is None:
        raise InputError(f"the policy has written no 'action' to play by; it writes {list(data.keys())}")
    shape = (count, *(space.shape or ()))
    if tuple(action.shape) != shape:
        indices = not hasattr(space, "low") and action.ndim == len(shape) + 1
        hint = ", which are indices: of from_sb3 with categorical_action_encoding=True" if indices else ""
        raise InputError(
            f"the policy gives actions of {tuple(action.shape)}, environments included, and the environment takes "
            f"{shape}{hint}"
        )
    return action.cpu().numpy().astype(space.dtype)


def _observed(observation: Any, entries: list[str], keys: list[NestedKey], count: int | None) -> TensorDict:
    values = [torch.as_tensor(np.array(observation[name] if name else observation)) for name in entries]
    return TensorDict(dict(zip(keys, values, strict=True)), [] if count is None else [count])

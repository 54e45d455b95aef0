"""What the environments share: declared concepts, states that can be set, pairs of states, closed-form values.

The state of an environment is a few named *variables* that travel in the TensorDict, so that a rollout can
start from any state. A new environment is one file: it declares its concepts and variables and writes the
hooks at the end of :class:`ConceptEnv`; :func:`tdhook_rl.envs.check_concept_env` then checks it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Categorical, Composite, TensorSpec, Unbounded
from torchrl.envs import EnvBase

from tdhook_rl.envs.concepts import Concept
from tdhook_rl.errors import ConceptError, InputError, nearest

DONE = ("done", "terminated", "truncated")


class ConceptEnv(EnvBase):
    """Base of the environments: batched in torch, not batch-locked, stateless but for the generator.

    Args:
        batch_size: how many copies are stepped at once; ``()`` for one.
        max_steps: an episode is truncated after this many steps.
        seed: of the start states and of all later noise.
        device: where the tensors live; as in TorchRL, ``None`` leaves them on the default device and spares
            collectors a cast at every step.

    Raises:
        InputError: for an empty batch, a time limit below 1 or a seed that is not an integer.
    """

    batch_locked = False
    _supports_set_state = True  # reset(state, set_state=True) begins there
    #: The name under which ``gymnasium.make`` finds the environment.
    gymnasium_id: ClassVar[str]
    n_actions: ClassVar[int]
    #: Of an observation that is a vector.
    observation_features: ClassVar[int]
    #: What each of these is called; ``None`` for pictures.
    feature_names: ClassVar[tuple[str, ...] | None] = None
    #: What the labels are, by name; they lie under ``("concept", name)``.
    concepts: ClassVar[Mapping[str, Concept]]
    #: Where each state variable lies in the TensorDict; ``elapsed`` is one of them.
    variables: ClassVar[Mapping[str, NestedKey]]
    #: Variables that :meth:`state` may be called without.
    defaults: ClassVar[Mapping[str, int]] = {"elapsed": 0}
    #: The discount of :meth:`value` unless another is given.
    gamma: float = 0.95
    #: What the actions are called; empty where they have no names.
    action_names: ClassVar[tuple[str, ...]] = ()
    #: Where the observation is planes over the squares that :meth:`render` draws: their names, rows and columns.
    planes: ClassVar[tuple[str, ...]] = ()
    grid: ClassVar[tuple[int, int] | None] = None
    #: Whether :meth:`render` shows how many steps have passed.
    drawn_with_time: ClassVar[bool] = False
    #: For what :meth:`relevance` is defined.
    relevance_of: ClassVar[tuple[str, ...]] = ("value", "policy")

    def __init__(
        self,
        *,
        batch_size: Sequence[int] = (),
        max_steps: int = 30,
        seed: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if max_steps < 1:
            raise InputError(f"max_steps must be at least 1, got {max_steps}")
        super().__init__(device=device, batch_size=_batch_size(type(self).__name__, batch_size))
        self.max_steps = max_steps
        self._generator = torch.Generator(device=self.device or torch.get_default_device())
        self.set_seed(0 if seed is None else seed)
        shape = self.batch_size
        concepts = Composite({name: concept.spec(shape) for name, concept in self.concepts.items()}, shape=shape)
        free = {**self._variable_specs(shape), "elapsed": Unbounded(shape=shape, dtype=torch.long)}
        self.observation_spec = Composite(
            observation=self._observation_spec(shape),
            **{name: spec.clone() for name, spec in free.items()},
            concept=concepts,
            shape=shape,
            device=self.device,
        )
        self.state_spec = Composite(**free, concept=concepts.clone(), shape=shape, device=self.device)
        self.action_spec = Categorical(self.n_actions, shape=shape, device=self.device)
        self.reward_spec = Unbounded(shape=(*shape, 1), device=self.device)
        self.done_spec = Composite(
            {key: Categorical(2, shape=(*shape, 1), dtype=torch.bool) for key in DONE}, shape=shape, device=self.device
        )

    # ------------------------------------------------------------------ states

    def state(self, **variables: Any) -> TensorDict:
        """The TensorDict of given states: what ``reset`` would return there.

        Args:
            variables: a tensor of shape ``batch + features`` for each name in :attr:`variables`; those in
                :attr:`defaults` may be left out.

        Raises:
            InputError: for unknown, absent or ill-shaped variables, and states that do not exist.
        """
        at = self._checked(variables)
        running = torch.zeros(*at["elapsed"].shape, 1, dtype=torch.bool, device=self.device)
        return self._describe(at).update({key: running.clone() for key in DONE})

    def edit(self, states: TensorDictBase, **variables: Any) -> TensorDict:
        """The same states with some variables set to other values, labels and observation included."""
        return self.state(**{**self._read(states), **variables})

    def sample_states(self, count: int, *, seed: int = 0) -> TensorDict:
        """States to start from, batch ``(count,)``; the environment's own generator is not advanced."""
        if count < 1:
            raise InputError(f"at least one state is sampled, got count={count}")
        with self._other_generator(seed):
            return self.state(**self._sample(torch.Size([count])))

    def change(self, states: TensorDictBase, concept: str, index: int | None = None) -> TensorDict:
        """The same states with one concept changed, and what follows from it; see ``concepts[name].follows``.

        Args:
            states: of this environment.
            concept: a name in :attr:`concepts`.
            index: which element of a vector of labels.

        Raises:
            ConceptError: for an unknown concept, one that cannot be changed alone, or a wrong index.
        """
        declared = self._concept(concept)
        if not declared.moves:
            free = [name for name, other in self.concepts.items() if other.moves]
            raise ConceptError(f"{concept!r} cannot be changed alone; concepts that can: {', '.join(free)}")
        if (index is None) != (declared.size is None) or not 0 <= (index or 0) < (declared.size or 1):
            elements = f"elements 0 to {declared.size - 1}" if declared.size else "a single label and no index"
            raise ConceptError(f"{concept!r} has {elements}, got index {index}")
        at = self._read(states)
        return self.state(**{**at, **self._changed(at, concept, index)})

    def paired(
        self,
        concept: str,
        *,
        index: int | None = None,
        states: TensorDictBase | None = None,
        count: int = 256,
        seed: int = 0,
    ) -> tuple[TensorDictBase, TensorDict]:
        """States, and the same states with one concept changed.

        Args:
            concept: a name in :attr:`concepts`.
            index: which element of a vector of labels.
            states: those to change; by default some are sampled. Where the change is impossible they are left out.
            count: how many to sample.
            seed: of the sample.
        """
        before = self.sample_states(count, seed=seed) if states is None else states
        self._concept(concept)
        before = before[self._changeable(self._read(before), concept)]
        return before, self.change(before, concept, index)

    # ------------------------------------------------------------------ what is known

    def relevance(self, of: str = "value", states: TensorDictBase | None = None) -> Tensor:
        """Which observation features the optimal value or policy depends on: booleans of the observation's shape.

        Args:
            of: ``"value"`` or ``"policy"``.
            states: needed where the features depend on the state (pixels); then the shape is batch + features.
        """
        if of not in self.relevance_of:
            raise InputError(
                f"{type(self).__name__} knows the relevance for {' and '.join(self.relevance_of)}, got {of!r}"
            )
        return self._relevance(of, None if states is None else self._read(states))

    def value(self, states: TensorDictBase, *, gamma: float | None = None) -> Tensor:
        """The value of the optimal policy without a time limit, in closed form: ``batch``."""
        return self._value(self._read(states), self.gamma if gamma is None else gamma)

    def action_values(self, states: TensorDictBase, *, gamma: float | None = None) -> Tensor:
        """Of each action, then optimal play: ``batch + (n_actions,)``."""
        gamma = self.gamma if gamma is None else gamma
        at = self._read(states)
        values = []
        with self._other_generator(0):
            for action in range(self.n_actions):
                moved, reward, terminated = self._advance(at, torch.full_like(at["elapsed"], action))
                following = self._value({**at, **moved, "elapsed": at["elapsed"] + 1}, gamma)
                values.append(reward + gamma * following.masked_fill(terminated, 0.0))
        return torch.stack(values, -1)

    def advantage(self, states: TensorDictBase, action: Tensor, *, gamma: float | None = None) -> Tensor:
        """Of an action over optimal play: ``batch``, zero for the best actions and negative for the others."""
        values = self.action_values(states, gamma=gamma).gather(-1, action.unsqueeze(-1)).squeeze(-1)
        return values - self.value(states, gamma=gamma)

    def render(self, states: TensorDictBase | None = None) -> Tensor:
        """RGB frames for people, uint8: ``batch + (height, width, 3)``."""
        if states is None:
            raise InputError(f"the state of {type(self).__name__} is in the TensorDict: render(states)")
        at = self._read(states)
        rows = {name: value.reshape(-1, *value.shape[states.ndim :]).tolist() for name, value in at.items()}
        drawn = [self._draw({name: values[row] for name, values in rows.items()}) for row in range(states.numel())]
        frames = torch.stack([torch.from_numpy(frame) for frame in drawn])
        return frames.reshape(*states.batch_size, *frames.shape[1:])

    # ------------------------------------------------------------------ EnvBase

    def _reset(
        self, tensordict: TensorDictBase | None = None, set_state: bool | None = None, **kwargs: object
    ) -> TensorDictBase:
        shape = self.batch_size if tensordict is None or tensordict.is_empty() else tensordict.batch_size
        at = self._begin(shape)
        at.setdefault("elapsed", torch.zeros(shape, dtype=torch.long, device=self.device))
        if set_state and tensordict is not None:
            given = self._read(tensordict)
            chosen = tensordict.get("_reset", torch.ones(*shape, 1, dtype=torch.bool, device=self.device)).squeeze(-1)
            self._checked({name: value[chosen] for name, value in given.items()})
            at = {name: torch.where(_like(chosen, value), given[name], value) for name, value in at.items()}
        return self._describe(at)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        at = self._read(tensordict)
        moved, reward, terminated = self._advance(at, tensordict["action"])
        at.update(moved)
        at["elapsed"] = at["elapsed"] + 1
        terminated = terminated.unsqueeze(-1)
        truncated = (at["elapsed"] >= self.max_steps).unsqueeze(-1) & ~terminated
        ends = {"terminated": terminated, "truncated": truncated, "done": terminated | truncated}
        return self._describe(at).update({"reward": reward.unsqueeze(-1), **ends})

    def maybe_reset(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Start new episodes in the rows that are done; entries that are not the environment's stay."""
        done = tensordict["done"].squeeze(-1)
        if bool(done.any()):
            rows = done.nonzero(as_tuple=True) if done.ndim else ()
            began = self._begin(done.shape)
            began.setdefault("elapsed", torch.zeros_like(done, dtype=torch.long))
            fresh = self._describe({name: value[rows] for name, value in began.items()})
            for source, target in ((fresh, tensordict), (fresh["concept"], tensordict["concept"])):
                for key, value in source.items():
                    if key != "concept":
                        # A copy: the entry also belongs to the step that has just ended.
                        target.set(key, target.get(key).index_put(rows, value) if rows else value)
            tensordict.update({key: torch.zeros_like(tensordict.get(key)) for key in DONE})
        return tensordict

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            try:
                self._generator.manual_seed(operator.index(seed))
            except TypeError:
                raise InputError(f"a seed is an integer, got {seed!r}") from None

    # ------------------------------------------------------------------ inner

    def _read(self, data: TensorDictBase) -> dict[str, Tensor]:
        return {name: data[key] for name, key in self.variables.items()}

    def _describe(self, at: Mapping[str, Tensor]) -> TensorDict:
        shape = at["elapsed"].shape
        labels = self._label(at)
        concept = {name: labels[name] if name in labels else at[name] for name in self.concepts}
        free = {name: at[name] for name in self.variables if name not in self.concepts}
        return TensorDict(
            {"observation": self._observe(at), **free, "concept": TensorDict(concept, batch_size=shape)},
            batch_size=shape,
            device=self.device,
        )

    def _concept(self, name: str) -> Concept:
        if name not in self.concepts:
            raise ConceptError(f"{type(self).__name__} has no concept {name!r}; {nearest(name, self.concepts)}")
        return self.concepts[name]

    def _checked(self, given: Mapping[str, Any]) -> dict[str, Tensor]:
        owner = type(self).__name__
        for name in given:
            if name not in self.variables:
                raise InputError(f"{owner} has no state variable {name!r}; {nearest(name, self.variables)}")
        absent = [name for name in self.variables if name not in given and name not in self.defaults]
        if absent:
            raise InputError(f"a state of {owner} also needs {', '.join(absent)}")
        at: dict[str, Tensor] = {}
        batch: torch.Size | None = None
        for name in [*[name for name in self.variables if name in given], *self.defaults]:
            if name in at:
                continue
            spec = self.state_spec[self.variables[name]]
            features = spec.shape[len(self.batch_size) :]
            value = torch.as_tensor(given[name] if name in given else self.defaults[name], device=self.device)
            if name not in given:
                value = value.expand((*(batch or ()), *features))
            if batch is None:
                batch = value.shape[: value.ndim - len(features)]
            if value.shape != (*batch, *features):
                raise InputError(f"{name} has shape {tuple(value.shape)}, expected {(*batch, *features)}")
            if not spec.dtype.is_floating_point and value.is_floating_point() and bool((value != value.round()).any()):
                raise InputError(f"{name} holds integers, got {value.dtype} with fractions")
            at[name] = value.to(spec.dtype)
            if name in self.concepts:
                self.concepts[name].check(name, at[name])
        if bool((at["elapsed"] < 0).any()):
            raise InputError(f"elapsed counts steps from 0, got {int(at['elapsed'].min())}")
        self._check(at)
        return at

    def _sample(self, shape: torch.Size) -> dict[str, Tensor]:
        """The variables of states to study; start states unless an environment knows better."""
        return self._begin(shape)

    @contextmanager
    def _other_generator(self, seed: int) -> Iterator[None]:
        own, self._generator = self._generator, torch.Generator(device=self._generator.device)
        try:
            self.set_seed(seed)
            yield
        finally:
            self._generator = own

    def _changeable(self, at: Mapping[str, Tensor], concept: str) -> Tensor:
        """Where a concept can be changed: ``batch``."""
        return torch.ones_like(at["elapsed"], dtype=torch.bool)

    def _variable_specs(self, shape: torch.Size) -> dict[str, TensorSpec]:
        """The specs of variables that are not concepts, but for ``elapsed``."""
        return {}

    # ------------------------------------------------------------------ an environment writes these

    def _observation_spec(self, shape: torch.Size) -> TensorSpec:
        """By default a vector of numbers between 0 and 1."""
        return Bounded(0.0, 1.0, shape=(*shape, self.observation_features))

    def _begin(self, shape: torch.Size) -> dict[str, Tensor]:
        """Draw the variables of start states from ``self._generator``; ``elapsed`` is 0 unless given."""
        raise NotImplementedError

    def _observe(self, at: Mapping[str, Tensor]) -> Tensor:
        raise NotImplementedError

    def _label(self, at: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The concepts that are not themselves variables."""
        raise NotImplementedError

    def _advance(self, at: Mapping[str, Tensor], action: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """The variables that change, the reward and whether the episode terminates, each ``batch``.

        Rows that have ended may be among them: they are advanced to a state that can be observed, whatever it is.
        """
        raise NotImplementedError

    def _check(self, at: Mapping[str, Tensor]) -> None:
        """Refuse states that do not exist or in which the episode has ended."""
        raise NotImplementedError

    def _changed(self, at: Mapping[str, Tensor], concept: str, index: int | None) -> dict[str, Tensor]:
        """The variables that an intervention on a concept sets; by default one of two classes is flipped."""
        return {concept: 1 - at[concept]}

    def _value(self, at: Mapping[str, Tensor], gamma: float) -> Tensor:
        raise NotImplementedError

    def _relevance(self, of: str, at: Mapping[str, Tensor] | None) -> Tensor:
        raise NotImplementedError

    def _draw(self, at: Mapping[str, Any]) -> Any:
        """One frame of one state, given as Python numbers: a numpy array ``(height, width, 3)``."""
        raise NotImplementedError

    def describe_slowly(self, **variables: Any) -> dict[str, Any]:
        """The labels of one state from its variables as Python numbers, without tensors: the reference."""
        raise NotImplementedError


def _batch_size(owner: str, batch_size: Sequence[int]) -> torch.Size:
    try:
        size = torch.Size(batch_size)
    except TypeError:
        raise InputError(f"{owner}: batch_size is a sequence of integers such as [8], got {batch_size!r}") from None
    if size.numel() < 1 or min(size, default=1) < 1:
        raise InputError(f"{owner} needs at least one copy, got batch_size={tuple(size)}")
    return size


def _like(mask: Tensor, value: Tensor) -> Tensor:
    return mask.reshape((*mask.shape, *(1,) * (value.ndim - mask.ndim)))

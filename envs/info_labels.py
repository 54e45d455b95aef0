"""Labels from environments that are not ours: fields of Gymnasium's info, in the TensorDict, with specs.

TorchRL drops the info unless a reader with a spec is set; without a spec a single environment works and
``SerialEnv`` and ``ParallelEnv`` fail. Here every field is declared or inferred, and what cannot be a label
(strings, fields that come and go) is refused with what to do.

This lives beside the environments because it is about them alone: they use it too, and never import methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from tensordict import TensorDictBase
from torchrl.data import Binary, Composite, TensorSpec, Unbounded
from torchrl.envs import EnvBase, GymWrapper
from torchrl.envs.gym_like import BaseInfoDictReader, GymLikeEnv

from tdhook_rl.envs.concepts import Concept
from tdhook_rl.errors import InputError, MissingKeyError, nearest


@dataclass(frozen=True, kw_only=True)
class InfoField:
    """How one field of the info becomes a label.

    Args:
        spec: of the label: a TorchRL spec without batch dimensions, or a :class:`Concept`.
        source: where it is in the info; several names for nested dictionaries. By default the field of the
            label's name, in the info or in a dictionary inside it.
        fill: the value where the field is absent; without one, absence is an error.
        words: for strings: what they can be; the label is the position in this list.

    Example:
        >>> InfoField(words=("empty", "full")).spec_of("glass").n
        2
    """

    spec: TensorSpec | Concept | None = None
    source: str | tuple[str, ...] | None = None
    fill: float | None = None
    words: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if (self.spec is None) == (self.words is None):
            raise InputError("an InfoField has a spec or, for strings, words")

    def spec_of(self, name: str) -> TensorSpec:
        """The spec of the label, without batch dimensions."""
        if self.words is not None:
            return Concept("needed", name, classes=len(self.words)).spec(())
        return self.spec.spec(()) if isinstance(self.spec, Concept) else self.spec.clone()  # type: ignore[union-attr]

    def find(self, name: str, info: Mapping[str, Any]) -> Any:
        """The field in an info, or ``None``."""
        if self.source is None:
            found = info.get(name)
            return next((value for path, value in _leaves(info) if path[-1] == name), None) if found is None else found
        found = info
        for key in (self.source,) if isinstance(self.source, str) else self.source:
            found = found.get(key) if isinstance(found, Mapping) else None
        return found


class InfoLabels(BaseInfoDictReader):
    """TorchRL's reader of the info: writes declared fields under ``(root, name)``.

    Args:
        fields: the labels by name.
        root: under which they are written.
        device: of the environment.
    """

    def __init__(
        self, fields: Mapping[str, InfoField], *, root: str = "concept", device: torch.device | None = None
    ) -> None:
        if not fields:
            raise InputError("no field was declared: give at least one")
        self.fields = dict(fields)
        self.root = root
        self._specs = {name: field.spec_of(name).to(device) for name, field in self.fields.items()}

    @property
    def info_spec(self) -> Composite:
        """What is added to the observation spec."""
        return Composite({self.root: Composite(self._specs)})

    def reset(self) -> None:
        """There is nothing to forget: the specs are declared."""

    def __call__(self, info_dict: dict[str, Any], tensordict: TensorDictBase) -> TensorDictBase:
        """Write the labels of one step."""
        for name, field in self.fields.items():
            tensordict.set((self.root, name), self._read(name, field, info_dict))
        return tensordict

    def _read(self, name: str, field: InfoField, info: Mapping[str, Any]) -> torch.Tensor:
        spec, found = self._specs[name], field.find(name, info)
        if found is None:
            if field.fill is not None:
                return torch.full(spec.shape, field.fill, dtype=spec.dtype, device=spec.device)
            source = name if field.source is None else field.source
            asked = source if isinstance(source, str) else ".".join(source)
            raise MissingKeyError(
                f"the label {name!r} is absent from this step's info; {nearest(asked, _names(info))}. "
                "If it appears only sometimes, declare InfoField(..., fill=value)"
            )
        if field.words is not None:
            if found not in field.words:
                raise InputError(f"the label {name!r} is {found!r}; {nearest(found, field.words)}")
            return torch.tensor(field.words.index(found), device=spec.device)
        value = _numbers(name, found)
        if value.shape != tuple(spec.shape):
            raise InputError(f"the label {name!r} has shape {value.shape}, its spec {tuple(spec.shape)}")
        label = torch.as_tensor(value, device=spec.device)
        if label.is_floating_point() and not spec.dtype.is_floating_point:
            raise InputError(f"the label {name!r} is {label.dtype}, its spec {spec.dtype}: declare a float spec")
        return label.to(spec.dtype)


class ComputedLabels(gymnasium.Wrapper):
    """Adds labels that are computed from the unwrapped environment to ``info["concept"]``.

    Args:
        env: a Gymnasium environment.
        functions: by name, each from the unwrapped environment to a number or an array.

    Example:
        >>> env = ComputedLabels(gymnasium.make("CartPole-v1"), {"leans": lambda cart: cart.state[2] > 0})
        >>> env.reset(seed=0)[1]["concept"]["leans"] in (True, False)
        True
    """

    def __init__(self, env: gymnasium.Env, functions: Mapping[str, Callable[[Any], Any]]) -> None:
        super().__init__(env)
        self.functions = dict(functions)

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        """As the environment's, with labels."""
        observation, info = self.env.reset(**options)
        return observation, self._labelled(info)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """As the environment's, with labels of the state after the step."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, reward, terminated, truncated, self._labelled(info)

    def _labelled(self, info: dict[str, Any]) -> dict[str, Any]:
        labels = {name: function(self.unwrapped) for name, function in self.functions.items()}
        return {**info, "concept": {**info.get("concept", {}), **labels}}


def add_info_labels(
    env: GymLikeEnv,
    fields: Sequence[str] | Mapping[str, InfoField | Concept] | None = None,
    *,
    root: str = "concept",
    steps: int = 20,
) -> EnvBase:
    """Bring fields of the info into the TensorDict of a TorchRL environment.

    Call it inside the function that makes the environment, so that the workers of ``SerialEnv`` and
    ``ParallelEnv`` have the labels and their specs.

    Args:
        env: a ``GymEnv`` or ``GymWrapper`` of one copy.
        fields: declared fields by name; or names whose specs are inferred from a reset and some random steps;
            or ``None`` for every field of the info. Fields of a dictionary inside the info are found by their
            last name.
        root: labels are written under ``(root, name)``.
        steps: of the inference.

    Returns:
        the same environment.

    Raises:
        InputError: for environments of several copies, and fields that are strings, objects, come and go or
            change their shape, unless they are declared.

    Example:
        >>> from torchrl.envs import GymEnv
        >>> env = add_info_labels(GymEnv("tdhook_rl/TMaze-v0"), ["cue", "junction"])
        >>> env.rollout(9)["concept", "junction"]
        tensor([0, 0, 0, 0, 0, 0, 0, 0, 1])
    """
    if isinstance(env, EnvBase) and env.batch_size:
        raise InputError(
            f"the environment has batch size {tuple(env.batch_size)}: label single copies and put them into "
            "SerialEnv or ParallelEnv"
        )
    if not isinstance(env, GymLikeEnv):
        raise InputError(
            f"labels are read from the info of GymEnv or GymWrapper, got {type(env).__name__}: label the "
            "environment before it is transformed"
        )
    if isinstance(fields, Mapping):
        declared = {
            name: InfoField(spec=field) if isinstance(field, Concept) else field for name, field in fields.items()
        }
    else:
        declared = _infer(env, fields, steps)
    reader = InfoLabels(declared, root=root, device=env.device)
    env.set_info_dict_reader(reader)
    return env


def add_computed_labels(
    env: gymnasium.Env, functions: Mapping[str, Callable[[Any], Any]], concepts: Mapping[str, Concept]
) -> EnvBase:
    """A TorchRL environment whose labels are computed from the unwrapped Gymnasium environment.

    Args:
        env: a Gymnasium environment of one copy.
        functions: by name, each from the unwrapped environment to a number or an array.
        concepts: what the labels are, under the same names.

    Example:
        >>> def leans(cart):
        ...     return int(cart.state[2] > 0)
        >>> concept = Concept("needed", "the pole leans to the right", classes=2)
        >>> env = add_computed_labels(gymnasium.make("CartPole-v1"), {"leans": leans}, {"leans": concept})
        >>> env.rollout(3)["concept", "leans"].shape
        torch.Size([3])
    """
    if set(functions) != set(concepts):
        raise InputError(f"labels are computed for {sorted(functions)} and declared for {sorted(concepts)}")
    fields = {name: InfoField(spec=concept, source=("concept", name)) for name, concept in concepts.items()}
    labelled = add_info_labels(GymWrapper(ComputedLabels(env, functions)), fields)
    labelled.concepts = dict(concepts)  # for check_concept_env
    return labelled


class _Recorder(BaseInfoDictReader):
    """Keeps the infos of the steps from which fields are inferred."""

    def __init__(self) -> None:
        self.infos: list[dict[str, Any]] = []

    @property
    def info_spec(self) -> Composite:
        return Composite()

    def reset(self) -> None: ...

    def __call__(self, info_dict: dict[str, Any], tensordict: TensorDictBase) -> TensorDictBase:
        self.infos.append(info_dict)
        return tensordict


def _infer(env: GymLikeEnv, names: Sequence[str] | None, steps: int) -> dict[str, InfoField]:
    recorder = _Recorder()
    env.info_dict_reader.append(recorder)
    try:
        env.rollout(max(steps, 1), break_when_any_done=False)
    finally:
        env.info_dict_reader.remove(recorder)
    seen = [dict(_leaves(info)) for info in recorder.infos]
    paths = list(dict.fromkeys(path for leaves in seen for path in leaves))
    chosen = {path[-1]: path for path in reversed(paths) if names is None or path[-1] in names}
    for name in names or ():
        if name not in chosen:
            raise InputError(f"the info has no field {name!r}; {nearest(name, [path[-1] for path in paths])}")
    if not chosen:
        raise InputError(f"the info of {env} is empty: there is nothing to label")
    fields = {}
    for name in names or reversed(chosen):
        path = chosen[name]
        values = [leaves[path] for leaves in seen if path in leaves]
        if len(values) < len(seen):
            raise InputError(
                f"info field {name!r} appeared in {len(values)} of {len(seen)} infos; leave it out, or declare "
                f"{{{name!r}: InfoField(spec=..., fill=value)}}"
            )
        arrays = [_numbers(name, value) for value in values]
        if len({array.shape for array in arrays}) > 1:
            raise InputError(f"info field {name!r} changes its shape: {sorted({array.shape for array in arrays})}")
        fields[name] = InfoField(spec=_spec(arrays), source=path)
    return fields


def _spec(arrays: list[np.ndarray]) -> TensorSpec:
    shape = arrays[0].shape
    # A number that is sometimes an int and sometimes a float is a float.
    dtype = torch.as_tensor(np.zeros(1, np.result_type(*arrays))).dtype
    if dtype != torch.bool:
        return Unbounded(shape=shape, dtype=dtype)
    if shape:
        return Binary(n=shape[-1], shape=shape, dtype=torch.bool)
    return Concept("needed", "", classes=2).spec(())


def _numbers(name: str, value: Any) -> np.ndarray:
    array = value.numpy(force=True) if isinstance(value, torch.Tensor) else np.asarray(value)
    if array.dtype.kind in "US":
        raise InputError(
            f"info field {name!r} is the string {str(value)[:40]!r}; leave it out, or declare "
            f"{{{name!r}: InfoField(words=(...))}} with what it can be"
        )
    if array.dtype.kind not in "biuf":
        raise InputError(f"info field {name!r} is a {type(value).__name__}, which cannot be a label; leave it out")
    return array


def _leaves(info: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in info.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*prefix, key))
        elif not key.startswith("_"):
            yield (*prefix, key), value


def _names(info: Mapping[str, Any]) -> list[str]:
    return [".".join(path) for path, _ in _leaves(info)]

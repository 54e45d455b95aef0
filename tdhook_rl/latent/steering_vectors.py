"""Steering vectors: add a direction to what modules compute, while the policy acts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tdhook_rl.arguments.callbacks import asked, has_parameter, takes_keywords
from tdhook_rl.arguments.tensors import numbers
from tdhook_rl.errors import InputError, SiteError, nearest
from tdhook_rl.latent.kept_addend import KeptAddend
from tdhook_rl.latent.placed_vectors import as_vectors
from tdhook_rl.latent.strength import (
    BoundSteered,
    Source,
    Strength,
    as_strength,
    place_strength,
    require_conditions,
    where_it_acts,
)
from tdhook_rl.latent.vectors.places import path_and_entry, place_name, written_entry
from tdhook_rl.method import Binder, Method
from tdhook_rl.replaying.batching import in_recurrent_mode
from tdhook_rl.sites.hooks import Portable
from tdhook_rl.sites.inner_calls import batch_at
from tdhook_rl.sites.numbers import in_dtype
from tdhook_rl.sites.row_values import ROWS_REMEDY, require_whole_rows, rows_under_way
from tdhook_rl.sites.rows import feature_dims, rows_of, with_rows, without_vmap
from tdhook_rl.sites.runtime import Runtime
from tdhook_rl.sites.states import state_names, state_of, with_state
from tdhook_rl.sites.vectors import placed_shape

_ARGUMENTS, _BESIDE = ("module_key", "output"), ("rows",)


@dataclass(frozen=True, eq=False)
class SteeringVectors(Method):
    """Add ``alpha * vector`` to the output of modules (Turner et al. 2023), or apply a function to it.

    Args:
        vectors: for each module path, the vector to add, of the shape of the module's features; or the
            TensorDict key of a vector for each row (batch + features). One number for each channel is added all over
            the channel's map, for each feature to all tokens. In a multi-agent net the vector is for all agents
            (features) or one for each (agents + features), with shared parameters and with separate ones.
            A :class:`SteeringVector` alone, or a list of them, knows its path, and may be a value of the mapping.
            A pair of a path and a key, such as ``("0", ("next", "recurrent_state"))``, steers that entry of what a
            ``TensorDictModule`` writes: the state that a recurrent policy carries to its next step.
            ``("lstm", "h_n")`` steers the last state that an ``nn.LSTM`` (or ``GRU``, ``RNN``) returns, of shape
            layers + features.
        alpha: the strength. A number is for all rows, and becomes the control ``"<name>.alpha"``, which may be changed
            while the policy runs; a TensorDict key gives each row of a batched environment its own (batch-shaped), and
            so does a function of the TensorDict of the rows, such as a schedule over the episode,
            ``lambda rows: 1 - rows["step_count"] / 100``.
        modules_to_steer: for the function form, the module paths.
        steer_fn: ``steer_fn(module_key, output)``, called with keywords where it has those parameters; it
            returns a tensor of the same shape as ``output``, which is the first tensor of a module that returns a
            tuple or a mapping. Where it has a parameter ``rows`` it is also given the TensorDict of the rows, locked.
        when: in which rows it acts, in all by default: a boolean key of each row; a function of the TensorDict of the
            rows, called once in each call of the policy; :class:`AtSteps`; :class:`ProbeGate`; or a list of them, which
            must hold together.
        steered_key: the root of the result keys.
        name: the prefix of the controls: ``"<name>.alpha"`` and ``"<name>.<path>"`` for each vector
            (``"<name>.<path>:<key>"`` for an entry, nested keys joined by dots).

    Where alpha is 0, or a condition does not hold, the output is untouched, bit for bit. Steering acts wherever the
    policy is entered: ``forward``, ``get_dist``, ``log_prob``.

    An output keeps its dtype: vector and alpha are rounded to it (to bfloat16, say), and what it does not hold is
    refused, such as fractions on an output of integers, or what is beyond the largest number of float16.

    With ``when=``, or an alpha by row, it writes ``(steered_key, name)``: in which rows it acted (batch, bool; agents
    after the batch where they are told apart). With an alpha that is a function also ``(steered_key, "<name>.alpha")``,
    the strength (batch, float). Attributions of collected rows are of the policy as these say that it was steered.

    Raises:
        SiteError: if a path matches nothing, an entry is not one that the module writes, or the network reads only
            the last state of a recurrent module whose sequence is steered.
        InputError: if a vector does not fit the module's features, or its dtype does not hold the numbers.
        MissingKeyError: if a per-row key, or what a function reads, is absent.

    Warns:
        UserWarning: once, if the conditions have not held in any row of the first 100 calls.

    Example:
        >>> from tensordict import TensorDict
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> data = TensorDict({"input": torch.randn(3, 4), "alpha": torch.tensor([0.0, 0.5, 1.0])}, batch_size=3)
        >>> with SteeringVectors({"1": torch.ones(8)}, alpha="alpha").prepare(net) as hooked:
        ...     steered = hooked(data.clone())["output"]
        >>> torch.equal(steered[0], net(data["input"])[0]), torch.equal(steered[2], net(data["input"])[2])
        (True, False)
    """

    observes = False

    vectors: Any = None
    alpha: Any = 1.0
    modules_to_steer: str | Sequence[str] | None = None
    steer_fn: Callable[..., Tensor] | None = None
    name: str = "steering"
    when: Any = None
    steered_key: str = "steered"

    def __post_init__(self) -> None:
        if self.modules_to_steer is None and _are_paths(self.vectors):  # by position, as in tdhook
            object.__setattr__(self, "modules_to_steer", self.vectors)
            object.__setattr__(self, "vectors", None)
            if self.steer_fn is None and callable(self.alpha):
                object.__setattr__(self, "steer_fn", self.alpha)
                object.__setattr__(self, "alpha", 1.0)
        require_conditions(self.when)
        if (self.vectors is None) == (self.steer_fn is None):
            raise InputError(
                "SteeringVectors takes either vectors={path: vector} or modules_to_steer=[...] with steer_fn="
            )
        if (self.steer_fn is None) != (self.modules_to_steer is None):
            raise InputError("modules_to_steer= and steer_fn= go together")
        if self.steer_fn is None:
            object.__setattr__(self, "vectors", as_vectors(self.vectors, "vectors"))
            object.__setattr__(self, "alpha", as_strength(self.alpha))
            return
        takes_keywords(self.steer_fn, _ARGUMENTS, "steer_fn", _BESIDE)  # raises
        if not isinstance(self.alpha, float) or self.alpha != 1.0:
            raise InputError(f"alpha= is the strength of vectors=; steer_fn= does as it likes, but got {self.alpha!r}")

    def bind(self, binder: Binder) -> BoundSteered | None:
        alpha = self.alpha if self.steer_fn is None else None
        strength, bound = place_strength(binder, self.name, self.when, self.steered_key, alpha)
        if self.steer_fn is not None:
            keywords = takes_keywords(self.steer_fn, _ARGUMENTS, "steer_fn", _BESIDE)
            function, beside = Portable(self.steer_fn), has_parameter(self.steer_fn, "rows")
            for site in binder.intervention_sites(self.modules_to_steer):
                hook = FunctionHook(binder.runtime, site.name, function, keywords, beside, strength)
                binder.on_output(site, hook)
            return bound
        self.vectors.require_fit(binder.root)
        for steered, vector in self.vectors.items():
            path, entry = path_and_entry(steered, "vectors= names")
            for site in binder.intervention_sites(path):
                key = None if entry is None else written_entry(site, entry)
                name = place_name(site.name, key)
                if isinstance(vector, (str, tuple)):
                    source = Source(binder.runtime, f"the vector {vector!r}", row=binder.read_row(vector))
                else:
                    source = Source(binder.runtime, "the vector", control=self._vector_control(binder, name, vector))
                entry_hook = StateAdditionHook if key in state_names(site.module) else EntryAdditionHook
                kind = AdditionHook if key is None else entry_hook
                binder.on_output(site, kind(binder.runtime, site.name, source, strength, key))
        return bound

    def _vector_control(self, binder: Binder, path: str, vector: Any) -> str:
        beside = ", or the TensorDict key of one for each row"
        vector = numbers(vector, f"the steering vector for {path!r}", imaginary=True, beside=beside)
        if not bool(torch.isfinite(vector).all()):
            raise InputError(f"the steering vector for {path!r} has NaN or infinite entries")
        if not (vector.is_floating_point() or vector.is_complex()):
            vector = vector.to(torch.get_default_dtype())  # it may be set to fractions while the policy runs
        return binder.control(f"{self.name}.{path}", vector)


def _are_paths(given: Any) -> bool:
    return isinstance(given, str) or (
        isinstance(given, (list, tuple)) and bool(given) and all(isinstance(one, str) for one in given)
    )


class AdditionHook:
    """Forward hook: ``output + alpha * vector`` where alpha is not 0."""

    def __init__(self, runtime: Runtime, site: str, vector: Source, strength: Strength, key: Any = None) -> None:
        self.runtime = runtime
        self.site = site
        self.vector = vector
        self.strength = strength
        self.exact = strength.by_row or vector.by_row
        self.key = key  # of an entry or state
        names = strength.alpha.control if strength.alpha else None, vector.control
        self.kept = None if None in names or self.exact else KeptAddend(runtime, *names)  # type: ignore[arg-type]

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        kept = None if torch.compiler.is_compiling() else self.kept
        if kept is not None and (known := kept.steered(output)) is not None:
            return known
        self.runtime.intervene_at(self.site)
        value, disguise = rows_of(output, module, self.site, self.runtime, self.exact)
        steered = self.steered(value, module._hooked_features)  # type: ignore[arg-type]
        if kept is not None:
            kept.keep(module, output, self.vector_shape(value, module._hooked_features))  # type: ignore[arg-type]
        return with_rows(output, steered, module, disguise)

    def steered(self, value: Tensor, features: int | None) -> Tensor:
        """The rows after the addition; ``features`` says where the vector belongs (see ``layouts.survey_features``)."""
        vector = in_dtype(self.vector.read(self.site), value, self.vector.what, self.site, factor=True)
        alpha, acts = self.strength.at(value, self.site)
        if self.vector.by_row:
            vector = self._vectors_per_row(vector, value, features)
        else:
            shape = self.vector_shape(value, features)
            vector = vector if shape == vector.shape else vector.reshape(shape)
        if acts is False:
            return value
        moved = where_it_acts(acts, value + alpha * vector, value)  # type: ignore[operator]
        return in_dtype(moved, value, "what steering makes of the output", self.site)

    def vector_shape(self, value: Tensor, features: int | None) -> torch.Size:
        """The shape in which one vector for all rows is broadcast over them."""
        vector = self.vector.read(self.site).shape
        return placed_shape(vector, value, features, self.runtime, self.site, "steering vector")

    def _vectors_per_row(self, vectors: Tensor, value: Tensor, features: int | None) -> Tensor:
        batch = batch_at(self.runtime, self.site)
        if vectors.shape == value.shape or batch is None:
            return vectors
        if vectors.shape[: len(batch)] != batch:
            raise InputError(
                f"the steering vectors {self.vector.row!r} have shape {tuple(vectors.shape)}, but the output of "
                f"{self.site!r} has shape {tuple(value.shape)}: give each row one vector of the shape of the features"
            )
        require_whole_rows(value, self.runtime, self.site)
        what = f"steering vector {self.vector.row!r} of a row"
        shape = placed_shape(vectors.shape[len(batch) :], value, features, self.runtime, self.site, what)
        rows = value.shape[: value.ndim - feature_dims(value, batch)]
        between = value.ndim - len(rows) - len(shape)  # agents that share the vector of their row
        return vectors.reshape((*rows, *(1,) * between, *shape))


class EntryAdditionHook(AdditionHook):
    """The same for one entry of the TensorDict that a TensorDict-level module writes."""

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        self.runtime.intervene_at(self.site)
        carried = isinstance(self.key, tuple) and self.key[0] == "next"
        if carried and in_recurrent_mode(module):
            raise SiteError(
                f"steering {self.key!r} of {self.site!r} acts between the steps of a recurrent policy, which reads "
                "whole trajectories in recurrent mode: call it step by step"
            )
        value = output.get(self.key, None)
        if value is None:
            raise SiteError(f"{self.site!r} did not write {self.key!r}; {nearest(self.key, output.keys(True, True))}")
        # A state, such as (layers, features), has its features last.
        return output.set(self.key, self.steered(value, module._hooked_features or 0))  # type: ignore[arg-type]


class StateAdditionHook(AdditionHook):
    """The same for the last state that a recurrent module returns beside its sequence."""

    acts_on_states = True

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        self.runtime.intervene_at(self.site)
        state = state_of(output, self.key)
        layered = state.ndim == 3  # else the module was given one sequence without a batch
        rows, back = without_vmap(state.movedim(0, 1) if layered else state, module, self.runtime)
        rows = self.steered(rows, 0)
        rows = rows if back is None else back(rows)
        return with_state(output, self.key, rows.movedim(1, 0) if layered else rows)


class FunctionHook:
    """Forward hook: the user's ``steer_fn``."""

    def __init__(
        self, runtime: Runtime, site: str, function: Portable, keywords: bool, beside: bool, strength: Strength
    ) -> None:
        self.runtime = runtime
        self.site = site
        self.function = function
        self.keywords = keywords
        self.beside = beside  # it takes the rows, too
        self.strength = strength

    @property
    def user_code(self) -> Any:
        return self.function.function

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        self.runtime.intervene_at(self.site)
        value, disguise = rows_of(output, module, self.site, self.runtime)
        beside = {"rows": rows_under_way(self.runtime, self.site, "steer_fn")} if self.beside else {}
        # On a copy: what it writes there in place is what it returns, and no more; not where it does not act, nor to
        # what the module was given, which some hand on as it is.
        lent = value.clone()
        given = () if self.keywords else (self.site, lent)
        named = {"module_key": self.site, "output": lent} if self.keywords else {}
        sees, what = list(beside.values()), f"steer_fn at {self.site!r}"
        steered = asked(self.function, *given, what=what, sees=sees, remedy=ROWS_REMEDY, **named, **beside)
        if not isinstance(steered, Tensor) or steered.shape != value.shape:
            got = tuple(steered.shape) if isinstance(steered, Tensor) else type(steered).__name__
            raise InputError(
                f"steer_fn must return a tensor of shape {tuple(value.shape)} for {self.site!r}, got {got}"
            )
        steered = in_dtype(steered, value, "what steer_fn returns", self.site)
        return with_rows(output, self.strength.changed(value, steered, self.site), module, disguise)

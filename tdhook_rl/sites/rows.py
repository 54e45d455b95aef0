"""What a site computes, with a row for each row of the batch.

Some modules see their rows in disguise: inside ``vmap`` the dimension of agents or ensemble members is hidden, a
convolutional net folds agents into its rows, and a recurrent module adds a dimension of time, pads or packs.
:func:`rows_of` takes the disguise off (batch, then agents, then features), :func:`with_rows` puts it on again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictParams
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from tdhook_rl.errors import InputError, SiteError
from tdhook_rl.internals.functorch_names import (
    add_batch_dim,
    get_unwrapped,
    is_batchedtensor,
    maybe_get_bdim,
    maybe_get_level,
    remove_batch_dim,
)
from tdhook_rl.internals.torchrl_names import lends_weights
from tdhook_rl.sites.containers import first_tensor, tensors_of, with_first_tensor
from tdhook_rl.sites.known import own_class
from tdhook_rl.sites.layouts import is_transformer, survey_features, takes_time_first, time_comes_first
from tdhook_rl.sites.listed import named_modules
from tdhook_rl.sites.runtime import Runtime, vmap_level

#: Puts rows into the form that the module gave them.
Disguise = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Layout:
    """What the modules around a site say about its rows.

    Args:
        agents: how many agents a convolutional net of a multi-agent net may have folded into its rows; 0 elsewhere.
        recurrent: the site is the core of a TorchRL recurrent module.
        flat: the rows have exactly one dimension, also where the batch has none.
        mapped: the dimension of the batch that a ``VmapModule`` around the site hides; negative ones count from the
            last.
        time_first: the site has time in its first dimension and the batch in its second.
        states: the site returns its last states, layers first, and what may be a packed sequence.
    """

    agents: int = 0
    recurrent: bool = False
    flat: bool = False
    mapped: int | None = None
    time_first: bool = False
    states: bool = False

    def hides(self, batch: torch.Size | None) -> int:
        """Where the hidden dimension of the batch belongs."""
        return self.mapped if batch is None or self.mapped >= 0 else len(batch) + self.mapped  # type: ignore[operator, return-value]


#: Rows are those of the batch.
_USUAL = Layout()


class _Around(NamedTuple):
    """What modules say to those inside: of a :class:`Layout` what is theirs."""

    agents: int = 0
    flat: bool = False
    mapped: int | None = None
    time_first: bool = False


def attach_layouts(policy: nn.Module, runtime: Runtime) -> None:
    """Tell each module of a clone the layout of its rows, ``None`` where they are the rows of the batch."""
    runtime.maps = survey_features(policy)
    known: dict[str, tuple[nn.Module, _Around]] = {}
    for path, module in named_modules(policy):
        if isinstance(module, TensorDictParams):  # the original holds the same object, and it never runs
            continue
        parent, around = _inside(path.rpartition(".")[0], policy, known) if path else (None, _Around())
        recurrent = parent is not None and _reads_time(parent)
        time_first, states = takes_time_first(module, around.time_first), isinstance(module, nn.RNNBase)
        layout = Layout(around.agents, recurrent, around.flat, around.mapped, time_first, states)
        runtime.time_first = runtime.time_first or time_first
        module.__dict__["_hooked_layout"] = None if layout == _USUAL else layout
        if _reads_time(module):
            hook = RecurrentHook(runtime)
            module.__dict__["_hooked_recurrent"] = hook
            module.register_forward_pre_hook(hook.before, with_kwargs=True)
            module.register_forward_hook(hook.after, always_call=True)


def _inside(path: str, policy: nn.Module, known: dict[str, tuple[nn.Module, _Around]]) -> tuple[nn.Module, _Around]:
    """The module at a path, and what it and those around it say to the modules in it."""
    from torchrl.modules import DecisionTransformer, VmapModule

    if path in known:
        return known[path]
    module, around = policy, _Around()
    if path:
        above, _, name = path.rpartition(".")
        module, around = _inside(above, policy, known)
        module = module._modules[name]  # type: ignore[assignment]
    agents = getattr(module, "n_agents", 0) if lends_weights(module) else around.agents
    flat = around.flat or isinstance(module, DecisionTransformer) or getattr(type(module), "flat_rows", False)
    mapped = around.mapped
    if isinstance(module, VmapModule):
        mapped = -1 if module.vmap_dim is None else module.vmap_dim
    time_first = is_transformer(module) and takes_time_first(module, around.time_first)
    known[path] = module, _Around(agents, flat, mapped, time_first)
    return known[path]


def note_intervention(root: nn.Module, path: str, name: str) -> None:
    """Remember that something acts on a site, for recurrent modules that can do without a call of it."""
    parent = root.get_submodule(path.rpartition(".")[0])
    if path and _reads_time(parent):
        parent._hooked_recurrent.acting.append(name)  # type: ignore[union-attr, operator]


def _reads_time(module: nn.Module) -> bool:
    return hasattr(type(module), "recurrent_mode")


def rows_of(
    output: Any, module: nn.Module, site: str, runtime: Runtime, exact: bool = True
) -> tuple[Tensor, Disguise | None]:
    """The first tensor of an output (or input) of a site: batch, agents, features; and the way back.

    Not ``exact`` is for what treats all rows alike: there it does not matter which is which.

    Raises:
        InputError: if the output holds no tensor or a nested one, is padded in an unknown way, or has its rows in one
            of two dimensions and nothing says in which.
    """
    value = first_tensor(output, module, site)
    if value.is_nested:
        raise _nested(module, site)
    layout: Layout | None = module._hooked_layout  # type: ignore[assignment]
    if layout is not None:
        if layout.recurrent:
            return _out_of_time(output, value, site, runtime)
        if layout.agents and (folded := _folded(value, layout.agents, runtime.batch)) is not None:
            shape = value.shape
            return value.reshape(folded), lambda rows: rows.reshape(shape)
        if layout.flat and not runtime.batch and runtime.batch is not None:
            return value.squeeze(0), lambda rows: rows.unsqueeze(0)
        if layout.states and (sequence := _packed(output)) is not None:
            return _unpacked(value, sequence)
        if layout.time_first and time_comes_first(value, runtime.batch, site, exact):
            return _batch_first(value, module, runtime)
    elif runtime.time_first and exact:
        _require_one_order(value, module, site, runtime.batch)
    if is_batchedtensor(value):
        return _out_of_vmap(value, runtime, layout)
    return value, None


def _nested(module: nn.Module, site: str) -> InputError:
    name = site.rpartition(":")[2]
    return InputError(
        f"{name!r} ({own_class(module).__name__}) gives a nested tensor, of rows of several lengths, so no value of "
        "one shape belongs to each row. torch's TransformerEncoder makes them of a padding mask, in eval mode without "
        "gradients: set its `use_nested_tensor = False`, or name a module that it is inside of"
    )


def entry_rows(value: Tensor, module: nn.Module, runtime: Runtime) -> Tensor:
    """An entry of the data that a module reads, with a row for each row of the batch."""
    layout: Layout | None = module._hooked_layout  # type: ignore[assignment]
    if layout is None or layout.mapped is None or not is_batchedtensor(value):
        return value
    return _out_of_vmap(value, runtime, layout)[0]


def without_vmap(value: Tensor, module: nn.Module, runtime: Runtime) -> tuple[Tensor, Disguise | None]:
    """A tensor with the dimensions that ``vmap`` hides from a module, as it is otherwise; and the way back."""
    if is_batchedtensor(value):
        return _out_of_vmap(value, runtime, module._hooked_layout)  # type: ignore[arg-type]
    return value, None


def rows_of_part(
    part: Tensor, whole: Any, module: nn.Module, site: str, runtime: Runtime
) -> tuple[Tensor, Disguise | None]:
    """As :func:`rows_of`, for a tensor that the user took out of what a module gave or received.

    What is a tensor of the module's own has the layout that the module says; what was computed from it is as the user
    left it.
    """
    layout: Layout | None = module._hooked_layout  # type: ignore[assignment]
    if layout is None or layout.recurrent or not (layout.states or layout.time_first):
        return rows_of(part, module, site, runtime)
    own = tensors_of(whole)
    if own and part is own[0]:
        return rows_of(whole, module, site, runtime)
    if layout.states and part.ndim == 3 and any(part is one for one in own[1:]):
        rows, back = without_vmap(part.movedim(0, 1), module, runtime)
        return rows, lambda rows: (rows if back is None else back(rows)).movedim(1, 0)
    return without_vmap(part, module, runtime)


def with_rows(output: Any, rows: Tensor, module: nn.Module, disguise: Disguise | None) -> Any:
    """The same output with the rows of :func:`rows_of` replaced."""
    return with_first_tensor(output, rows if disguise is None else disguise(rows), module)


def with_batch(value: Tensor, batch: torch.Size, site: str, offer: str = "") -> Tensor:
    """What a site computed, with the batch shape first.

    Args:
        value: its output.
        batch: the batch shape.
        site: its name.
        offer: what may be done where it ran on fewer rows, for the message.

    Raises:
        InputError: if its rows are not the rows of the batch.
    """
    if value.shape[: len(batch)] == batch:
        return value
    # Convolutional nets flatten the leading dimensions before their layers.
    if len(batch) > 1 and value.ndim and value.shape[0] == batch.numel():
        return value.reshape((*batch, *value.shape[1:]))
    if len(batch) > 1 and value.shape[: len(batch) - 1] == batch[:-1]:
        offer = (
            "; if it is one step of the batch, let time be no dimension of it (data.batch_size = data.batch_size[:-1]) "
            f"and name all runs, '{site.partition('@')[0]}@all'{offer}"
        )
    raise InputError(
        f"the output of {site!r} has shape {tuple(value.shape)}, which does not start with the batch shape "
        f"{tuple(batch)}: name a module whose output has a row for each row of the batch"
        f"{offer if value.ndim and len(value) < batch.numel() else ''}"
    )


def feature_dims(rows: Tensor, batch: torch.Size | None) -> int:
    """How many of the last dimensions are no rows: features, and agents before them."""
    if batch is None:
        return rows.ndim
    return rows.ndim - (len(batch) if rows.shape[: len(batch)] == batch else 1)


def as_leaf(rows: Tensor) -> Tensor:
    """The same values as a point that gradients are taken at."""
    if vmap_level() < 0:
        return rows.detach().requires_grad_()
    # Inside a transform no tensor can be told to require a gradient; a product with one that does can.
    return rows.detach() * torch.ones((), dtype=rows.dtype, device=rows.device, requires_grad=True)


def _require_one_order(value: Tensor, module: nn.Module, site: str, batch: torch.Size | None) -> None:
    """In a policy with modules that take time first, a module that says nothing may stand behind them or before."""
    if batch is None or len(batch) != 1 or value.ndim < 3 or value.shape[0] != batch[0] or batch[0] == 1:
        return
    if value.shape[1] != batch[0]:
        if not torch.compiler.is_compiling():
            module.__dict__["_hooked_rows_first"] = True  # as it will be where both are equal
    elif not module.__dict__.get("_hooked_rows_first"):
        raise InputError(
            f"{site!r} gives {tuple(value.shape)} for a batch of {batch[0]} rows, in a policy that has modules which "
            "take time first (batch_first=False): either dimension may be the batch, and nothing says which. Call it "
            "with another number of rows once (an odd chunk_size of annotate, say), or name the module with "
            "batch_first"
        )


# ---------------------------------------------------------------------- agents


def _folded(value: Tensor, agents: int, batch: torch.Size | None) -> tuple[int, ...] | None:
    if batch is None or value.shape[: len(batch) + 1] == (*batch, agents):
        return None
    if value.ndim < 2 or value.shape[0] != batch.numel() * agents:
        return None
    return *batch, agents, *value.shape[1:]


def _out_of_vmap(value: Tensor, runtime: Runtime, layout: Layout | None) -> tuple[Tensor, Disguise | None]:
    """Make the dimensions that ``vmap`` hides explicit, after the rows. A batched tensor must not outlive its vmap."""
    levels: list[int] = []
    place = _place(value, runtime.batch, layout)
    if torch.compiler.is_compiling():  # sees no further than the innermost vmap
        if (level := vmap_level()) > runtime.level:
            levels.append(level)
            value = remove_batch_dim(value, level, 1, place)
    else:
        while is_batchedtensor(value) and maybe_get_level(value) > runtime.level:
            levels.append(maybe_get_level(value))
            value = get_unwrapped(value).movedim(maybe_get_bdim(value), place)

    def back(rows: Tensor) -> Tensor:
        for level in reversed(levels):
            rows = add_batch_dim(rows, place, level)
        return rows

    return value, back if levels else None


def _place(value: Tensor, batch: torch.Size | None, layout: Layout | None) -> int:
    """Where what ``vmap`` hides belongs: agents after the rows, and a dimension of the batch among them."""
    if layout is not None and layout.mapped is not None:
        return layout.hides(batch)
    if batch is None:
        return max(0, value.ndim - 1)
    if value.shape[: len(batch)] == batch:
        return len(batch)
    return 1 if value.ndim and value.shape[0] == batch.numel() else 0


def unbatched(value: Tensor, level: int) -> Tensor:
    """Turn ``vmap`` dimensions deeper than ``level`` into an explicit dimension before the features.

    A batched tensor must not outlive its ``vmap``; the hidden dimension (agents, ensemble members) is
    part of what the site computed.
    """
    if torch.compiler.is_compiling():
        return value
    while is_batchedtensor(value) and maybe_get_level(value) > level:
        dim = maybe_get_bdim(value)
        value = get_unwrapped(value)
        value = value.movedim(dim, -2 if value.ndim > 1 else 0)
    return value


# ---------------------------------------------------------------------- time


def _batch_first(value: Tensor, module: nn.Module, runtime: Runtime) -> tuple[Tensor, Disguise]:
    rows, back = without_vmap(value.transpose(0, 1), module, runtime)
    return rows, lambda rows: (rows if back is None else back(rows)).transpose(0, 1)


def _unpacked(value: Tensor, packed: PackedSequence) -> tuple[Tensor, Disguise]:
    """The rows of a packed sequence, padded with zeros; what is put into the padding is lost."""
    order, lengths = (one.to(value.device) for one in _order(packed))
    filled = torch.arange(int(lengths.max()), device=value.device) < lengths[:, None]
    blank = value.new_zeros(*filled.shape, *value.shape[1:])
    return blank.index_put((filled,), value[order]), lambda rows: rows[filled][order.argsort()]


class RecurrentHook:
    """Pre-hook and hook of a TorchRL recurrent module: tells the hooks on its core which rows it reads.

    With the backend ``"scan"`` trajectories are read without a call of the core: what acts on it would not act.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.acting: list[str] = []  # sites of interventions on the core

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        data = args[0] if args else kwargs.get("tensordict")
        known = isinstance(data, TensorDictBase)
        self.runtime.time = (data.batch_size, data.get("is_init", None)) if known else None  # type: ignore[union-attr]
        backend = getattr(module, "recurrent_backend", "pad")
        if backend == "auto":
            backend = "scan" if torch.compiler.is_compiling() else "pad"
        if self.acting and backend != "pad" and module.recurrent_mode:
            raise SiteError(
                f"an intervention was placed on {self.acting[0]!r}, but in recurrent mode the backend {backend!r} of "
                f"{type(module).__name__} reads trajectories without calling it, so it would change nothing: use "
                "recurrent_backend='pad', or intervene on the module that reads the output"
            )

    def after(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.runtime.time = None


def _out_of_time(output: Any, value: Tensor, site: str, runtime: Runtime) -> tuple[Tensor, Disguise]:
    """The rows of the core of a recurrent module, which has a dimension of time, padded or packed at resets."""
    if runtime.time is None:
        raise InputError(
            f"the rows of {site!r} are unknown, because its recurrent module was not called with a TensorDict"
        )
    batch, is_init = runtime.time
    shape = value.shape
    packed = _packed(output)
    if packed is not None:
        order = _order(packed)[0].to(value.device)
        rows = value[order].reshape((*batch, *shape[1:]))
        inverse = order.argsort()
        return rows, lambda rows: rows.reshape(shape)[inverse]
    if shape[:2].numel() == batch.numel():
        return value.reshape((*batch, *shape[2:])), lambda rows: rows.reshape(shape)
    lengths = _lengths(is_init, batch)
    if lengths is None or shape[:2] != (len(lengths), int(lengths.max())):
        raise InputError(
            f"the output of {site!r} has shape {tuple(shape)}, which is no padded form of the batch {tuple(batch)}"
        )
    filled = torch.arange(shape[1], device=value.device) < lengths.to(value.device)[:, None]

    def pad(rows: Tensor) -> Tensor:
        blank = torch.zeros(shape, dtype=rows.dtype, device=rows.device)
        return blank.index_put((filled,), rows.reshape(-1, *shape[2:]))

    return value[filled].reshape((*batch, *shape[2:])), pad


def _packed(output: Any) -> PackedSequence | None:
    while isinstance(output, (tuple, list)) and not isinstance(output, PackedSequence) and output:
        output = output[0]
    return output if isinstance(output, PackedSequence) else None


def _order(packed: PackedSequence) -> tuple[Tensor, Tensor]:
    """For each row, trajectory by trajectory, where it is in the packed data; and the trajectories' lengths."""
    places = torch.arange(len(packed.data))
    sorting = (None if one is None else one.cpu() for one in (packed.sorted_indices, packed.unsorted_indices))
    padded, lengths = pad_packed_sequence(PackedSequence(places, packed.batch_sizes, *sorting), batch_first=True)
    return padded[torch.arange(padded.shape[1]) < lengths[:, None]], lengths


def _lengths(is_init: Tensor | None, batch: torch.Size) -> Tensor | None:
    """The lengths of the trajectories in the rows of a batch of which the last dimension is time."""
    if is_init is None:
        return None
    starts = is_init.reshape(-1, batch[-1]).clone()
    starts[:, 0] = True
    places = starts.flatten().nonzero().squeeze(-1)
    return torch.diff(places, append=places.new_tensor([starts.numel()]))

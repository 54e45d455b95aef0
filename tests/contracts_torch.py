"""As :mod:`tests.contracts`, for what is expected of torch."""

from __future__ import annotations

import functools
from collections import namedtuple
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import distributions as D
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import prune
from torch.overrides import TorchFunctionMode

from tdhook_rl.internals import dynamo_names, functorch_names, torch_names
from tests.contracts import contract


@contract(
    "torch_names", "BatchNorm", "ConvNd", "DropoutNd", "ConstantPadNd", "ReflectionPadNd", "ReplicationPadNd",
    "CircularPadNd",
)  # fmt: skip
def common_classes() -> None:
    kinds = {
        torch_names.BatchNorm: "BatchNorm1d BatchNorm2d BatchNorm3d SyncBatchNorm LazyBatchNorm1d",
        torch_names.ConvNd: "Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d LazyConv2d",
        torch_names.DropoutNd: "Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout",
        torch_names.ConstantPadNd: "ConstantPad1d ConstantPad2d ConstantPad3d ZeroPad2d",
        torch_names.ReflectionPadNd: "ReflectionPad1d ReflectionPad2d ReflectionPad3d",
        torch_names.ReplicationPadNd: "ReplicationPad1d ReplicationPad2d ReplicationPad3d",
        torch_names.CircularPadNd: "CircularPad1d CircularPad2d CircularPad3d",
    }
    for base, names in kinds.items():
        for name in names.split():
            assert issubclass(getattr(nn, name), base), name
        assert not issubclass(nn.Linear, base)


@contract("torch_names", "BackwardHookFunction")
def what_stands_around_backward_hooks() -> None:
    layer = nn.Linear(2, 2)
    layer.register_full_backward_hook(lambda *_: None)
    found = layer(torch.zeros(1, 2, requires_grad=True))
    assert torch_names.function_of(found.grad_fn) is torch_names.BackwardHookFunction


@contract("torch_names", "held_parameters", "held_buffers")
def what_modules_hold() -> None:
    class Groups(nn.BatchNorm1d):
        def parameters(self) -> Any:  # type: ignore[override]
            return [{"params": [self.weight]}]

        def named_parameters(self) -> Any:  # type: ignore[override]
            return [("weight", self.weight)]

        named_buffers = named_parameters

    for norm, name in ((Groups(2), ""), (nn.Sequential(Groups(2)), "0.")):
        assert list(torch_names.held_parameters(norm)) == [f"{name}weight", f"{name}bias"]
        assert f"{name}running_mean" in torch_names.held_buffers(norm)


@contract("torch_names", "DisableTorchFunction")
def code_that_modes_do_not_see() -> None:
    seen: list[Any] = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Mode():
        torch.relu(torch.ones(1))
        count = len(seen)
        with torch_names.DisableTorchFunction():
            torch.relu(torch.ones(1))
    assert count > 0
    assert len(seen) == count


@contract("torch_names", "TorchDispatchMode")
def operations_that_a_mode_sees() -> None:
    seen: list[Any] = []

    class Mode(torch_names.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append((function, args))
            return function(*args, **(kwargs or {}))

    x = torch.ones(1)
    with Mode():
        torch.relu(x)
    [(function, args)] = seen
    assert function is torch.ops.aten.relu.default
    assert args[0] is x


@contract("torch_names", "call_methods")
def what_calls_pass() -> None:
    class Called(nn.Linear):
        def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
            return "replaced"

    assert Called(1, 1)(torch.ones(1)) == "replaced"
    assert torch_names.call_methods(nn.Linear) == torch_names.call_methods(nn.Module)
    assert torch_names.call_methods(Called) != torch_names.call_methods(nn.Module)


@contract("torch_names", "cholesky_factor")
def factors() -> None:
    factor = torch.tensor([[1.0, 0.0], [0.5, 2.0]])
    found = torch_names.cholesky_factor(D.MultivariateNormal(torch.zeros(3, 2), scale_tril=factor))
    assert torch.equal(found.reshape(2, 2), factor)


@contract("torch_names", "convolved")
def convolutions() -> None:
    x = torch.randn(1, 2, 5, 5)
    for mode in ("zeros", "circular"):
        layer = nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode)
        assert torch.equal(torch_names.convolved(layer, x, layer.weight, layer.bias), layer(x))
        assert not torch_names.convolved(layer, x, torch.zeros_like(layer.weight), None).any()


@contract("torch_names", "copy_all_")
def copies_of_many() -> None:
    targets = [torch.zeros(2), torch.zeros(3)]
    torch_names.copy_all_(targets, [torch.ones(2), torch.ones(3)])
    assert all(bool(one.all()) for one in targets)


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return 2 * gradient


@contract("torch_names", "function_of")
def functions_of_nodes() -> None:
    x = torch.ones(1, requires_grad=True)
    assert torch_names.function_of(Twice.apply(x).grad_fn) is Twice
    assert torch_names.function_of((2 * x).grad_fn) is None


@contract("torch_names", "has_any_global_hook")
def hooks_on_all_modules() -> None:
    assert not torch_names.has_any_global_hook()
    handle = nn.modules.module.register_module_forward_hook(print)
    found = bool(torch_names.has_any_global_hook())
    handle.remove()
    assert found
    assert not torch_names.has_any_global_hook()


@contract("torch_names", "hooks_made")
def hooks_are_counted() -> None:
    module = nn.Linear(2, 2)
    for register in (
        module.register_forward_hook, module.register_forward_pre_hook, module.register_full_backward_hook
    ):  # fmt: skip
        before = torch_names.hooks_made()
        handle = register(print)
        assert torch_names.hooks_made() == before + 1
        handle.remove()
        assert torch_names.hooks_made() == before + 1


@contract("torch_names", "take_forward_hooks")
def hooks_of_one_module() -> None:
    module = nn.Linear(2, 2)
    module.register_forward_pre_hook(lambda module, args: None)
    module.register_forward_pre_hook(lambda module, args, kwargs: None, with_kwargs=True)
    module.register_forward_hook(lambda module, args, output: None, always_call=True)
    module.register_forward_hook(lambda module, args, kwargs, output: output + 1, with_kwargs=True, prepend=True)
    x = torch.ones(1, 2)
    expected = module(x) - 1
    before, after = torch_names.take_forward_hooks(module)
    assert [rest for _, *rest in before] == [[False], [True]]
    assert [rest for _, *rest in after] == [[True, False], [False, True]]
    torch.testing.assert_close(module(x), expected)


@contract("torch_names", "in_forward_ad")
def dual_levels() -> None:
    assert not torch_names.in_forward_ad()
    with forward_ad.dual_level():
        assert torch_names.in_forward_ad()


@contract("torch_names", "is_any_autocast_enabled")
def autocast() -> None:
    assert not torch_names.is_any_autocast_enabled()
    with torch.autocast("cpu"):
        assert torch_names.is_any_autocast_enabled()


@contract("torch_names", "saved_tensors_hooks_on", "turn_saved_tensors_hooks_on")
def hooks_on_saved_tensors() -> None:
    assert torch_names.saved_tensors_hooks_on()
    with torch.autograd.graph.disable_saved_tensors_hooks("off"):
        assert not torch_names.saved_tensors_hooks_on()
        torch_names.turn_saved_tensors_hooks_on()
        assert torch_names.saved_tensors_hooks_on()


@contract("torch_names", "storage_id")
def storages() -> None:
    one, other = torch.zeros(3), torch.zeros(0)
    assert torch_names.storage_id(one) == torch_names.storage_id(one[1:])
    assert len({torch_names.storage_id(value) for value in (one, other, torch.zeros(0))}) == 3


@contract("torch_names", "parse_to")
def arguments_of_to() -> None:
    like = torch.zeros(1, dtype=torch.double)
    cpu = torch.device("cpu")
    assert torch_names.parse_to("cpu", torch.double)[:2] == torch_names.parse_to(like)[:2] == (cpu, torch.double)
    assert torch_names.parse_to(dtype=torch.half)[:2] == (None, torch.half)
    assert len(torch_names.parse_to("cpu")) == 4


@contract("torch_names", "pruned_name")
def masked_parameters() -> None:
    layer = prune.l1_unstructured(nn.Linear(2, 2), "bias", 0.5)
    assert [torch_names.pruned_name(hook) for hook in layer._forward_pre_hooks.values()] == ["bias"]


@contract("torch_names", "pytree")
def nested_values() -> None:
    value = {"b": [1, (2,)], "a": namedtuple("Pair", "x y")(3, None)}
    leaves, layout = torch_names.pytree.tree_flatten(value)
    assert sorted(leaves, key=str) == [1, 2, 3, None]
    assert torch_names.pytree.tree_unflatten(leaves, layout) == value


# ---------------------------------------------------------------------- torch.func


@contract(
    "functorch_names", "is_batchedtensor", "is_wrapped", "get_unwrapped", "maybe_get_level", "maybe_get_bdim",
    "transform_stack", "in_transform", "are_transforms_active",
)  # fmt: skip
def what_a_vmap_hides() -> None:
    names = functorch_names

    def inner(x: torch.Tensor) -> torch.Tensor:
        assert names.is_batchedtensor(x)
        assert names.is_wrapped(x)
        assert (names.maybe_get_level(x), names.maybe_get_bdim(x)) == (1, 1)
        assert names.get_unwrapped(x).shape == (3, 2)
        assert [one.level() for one in names.transform_stack()] == [1]
        assert names.in_transform() is not None
        assert names.are_transforms_active()
        return x

    def wrapped(x: torch.Tensor) -> torch.Tensor:
        assert names.is_wrapped(x)
        assert not names.is_batchedtensor(x)
        return x.sum()

    x = torch.zeros(3, 2)
    torch.vmap(inner, in_dims=1)(x)
    torch.func.grad(wrapped)(x)
    assert not names.is_batchedtensor(x)
    assert not names.is_wrapped(x)
    assert not names.transform_stack()
    assert names.in_transform() is None
    assert not names.are_transforms_active()


@contract("functorch_names", "add_batch_dim", "remove_batch_dim", "increment_nesting", "decrement_nesting")
def out_of_a_vmap_and_back() -> None:
    names = functorch_names

    def inner(x: torch.Tensor) -> torch.Tensor:
        level = names.increment_nesting(1, "error") - 1
        names.decrement_nesting()
        shown = names.remove_batch_dim(x, level, 1, 0)
        return names.add_batch_dim(shown - shown.mean(0), 0, level)

    x = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    compiled = torch.compile(lambda x: torch.vmap(inner, randomness="different")(x), backend="eager", fullgraph=True)
    for call in (torch.vmap(inner), compiled):
        assert torch.equal(call(x), torch.tensor([[-1.0, -2.0], [1.0, 2.0]]))


# ---------------------------------------------------------------------- torch.compile


@contract("dynamo_names", "TorchDynamoException")
def graphs_that_break() -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x

    try:
        torch.compile(broken, backend="eager", fullgraph=True)(torch.ones(1))
    except dynamo_names.TorchDynamoException:
        return
    raise AssertionError("a graph that breaks raises no TorchDynamoException")


@contract("dynamo_names", "skip_code", "get_eval_frame_callback")
def frames_that_begin_no_graph() -> None:
    seen: list[Any] = []

    def graphs_of(mark: Callable[[Any], None]) -> tuple[int, int]:
        """How many graphs there are of a function: called in a graph, and called by Python in a compiled function."""
        graphs: list[Any] = []

        def backend(graph: Any, inputs: Any) -> Any:
            graphs.append(graph)
            return graph.forward

        def inner(x: torch.Tensor) -> torch.Tensor:
            return x + 1

        @torch.compiler.disable(recursive=False)
        def run_as_python(x: torch.Tensor) -> torch.Tensor:
            seen.append(dynamo_names.get_eval_frame_callback())
            return inner(x)

        torch._dynamo.reset()  # both times it is the same code
        mark(inner.__code__)
        torch.compile(lambda x: inner(x) * 2, backend=backend, fullgraph=True)(torch.ones(1))
        in_a_graph = len(graphs)
        torch.compile(lambda x: run_as_python(x), backend=backend)(torch.ones(1))
        return in_a_graph, len(graphs) - in_a_graph

    assert graphs_of(lambda code: None) == (1, 1)
    assert graphs_of(dynamo_names.skip_code) == (1, 0)
    assert len(seen) == 2
    assert None not in seen
    assert dynamo_names.get_eval_frame_callback() is None


@contract("dynamo_names", "compiled_from")
def compiled_functions() -> None:
    assert dynamo_names.compiled_from(torch.compile(compiled_modules, backend="eager")) is compiled_modules

    class Own:
        def method(self) -> None: ...

    method = Own().method
    assert dynamo_names.compiled_from(torch.compile(method, backend="eager")) is method
    for other in (torch.tanh, method, functools.wraps(method)(lambda x: x), torch.compiler.disable(compiled_modules)):
        assert dynamo_names.compiled_from(other) is None


_OWN_LAYER = torch.relu


@contract("dynamo_names", "is_of_library_code")
def names_of_libraries() -> None:
    """What a name of torch's means is told apart from what one of the user's does, and from what a class holds."""
    asked: list[Any] = []

    def keep(guards: Sequence[Any]) -> list[bool]:
        asked.extend(guards)
        return [True] * len(guards)

    layer = nn.LeakyReLU()

    def function(x: torch.Tensor) -> torch.Tensor:
        return layer(_OWN_LAYER(x))

    compiled = torch.compile(function, backend="eager", fullgraph=True, options={"guard_filter_fn": keep})
    compiled(torch.ones(2))
    left_out = [guard.name for guard in asked if dynamo_names.is_of_library_code(guard)]
    assert left_out
    assert all(name.startswith("G['__import_torch_dot_nn_dot_modules_dot_") for name in left_out)
    assert any("_OWN_LAYER" in guard.name for guard in asked)


@contract("dynamo_names", "is_compiled")
def compiled_modules() -> None:
    told = nn.Linear(1, 1)
    told.compile(backend="eager")
    assert dynamo_names.is_compiled(told)
    assert dynamo_names.is_compiled(torch.compile(nn.Linear(1, 1), backend="eager"))
    assert not dynamo_names.is_compiled(nn.Linear(1, 1))


@contract("torch_names", "draw_attention")
def attention_is_drawn_anew() -> None:
    layer = nn.MultiheadAttention(4, 2, add_bias_kv=True)
    assert not hasattr(layer, "reset_parameters")
    before = {name: one.clone() for name, one in layer.named_parameters()}
    torch_names.draw_attention(layer)
    changed = {name for name, one in layer.named_parameters() if not torch.equal(one, before[name])}
    assert changed == {"in_proj_weight", "out_proj.weight", "bias_k", "bias_v"}
    assert not layer.out_proj.bias.any()


@contract("torch_names", "network_initialiser")
def networks_that_initialise_their_layers() -> None:
    from transformers import GPT2Config, GPT2Model

    model = GPT2Model(
        GPT2Config(n_layer=1, n_head=1, n_embd=4, n_positions=4, vocab_size=4, bos_token_id=0, eos_token_id=0)
    )
    layer: Any = model.h[0].attn.c_attn
    before = layer.weight.detach().clone()
    assert not hasattr(layer, "reset_parameters")
    initialise = torch_names.network_initialiser(model)
    assert initialise is not None
    initialise(layer)
    assert not torch.equal(layer.weight, before)
    assert torch_names.network_initialiser(nn.Linear(2, 2)) is None

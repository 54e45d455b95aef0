"""The functions of torch by what they do with the entries of their inputs, as explanations need to know."""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.nn import functional as F


class Kind(Enum):
    """What a function does with the entries of its tensors."""

    MOVES = "each entry of the result is an entry of an input, a constant, or no number that has a gradient"
    STEPS = "constant in pieces"
    CHOOSES = "of two tensors, each entry is that of the one or of the other"
    ELEMENTWISE = "each entry is a function of one entry of each tensor"
    LINEAR = "linear in all tensors together"
    WEIGHTED = "a layer as a function: linear in the input, by a weight and a bias"
    MULTILINEAR = "linear in each tensor by itself"
    OTHER = "anything else"


_NAMES = {
    Kind.MOVES: (
        "T mT H mH t adjoint view view_as reshape reshape_as permute transpose swapaxes swapdims movedim moveaxis "
        "flatten unflatten ravel squeeze unsqueeze expand expand_as broadcast_to broadcast_tensors repeat "
        "repeat_interleave tile cat concat concatenate stack hstack vstack dstack row_stack column_stack block_diag "
        "split split_with_sizes chunk unbind tensor_split hsplit vsplit dsplit unsafe_split unsafe_chunk getitem iter "
        "select narrow narrow_copy index_select gather take take_along_dim masked_select where clone contiguous to "
        "type type_as float double half bfloat16 cpu cuda detach data roll flip fliplr flipud rot90 pad tril triu "
        "diag diagonal diag_embed diagflat masked_fill unfold as_strided pixel_shuffle pixel_unshuffle "
        "channel_shuffle native_channel_shuffle atleast_1d atleast_2d atleast_3d meshgrid alias lift_fresh "
        "max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices "
        "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d amax amin sort msort topk kthvalue median "
        "nanmedian mode cummax cummin copy fill zero index_fill index_copy masked_scatter scatter index_put "
        "select_scatter slice_scatter diagonal_scatter requires_grad register_hook retain_grad embedding one_hot "
        "shape size dim ndim ndimension numel nelement len device dtype layout is_leaf grad_fn is_floating_point "
        "is_complex is_contiguous stride storage_offset data_ptr element_size is_cuda item tolist numpy names "
        "is_sparse untyped_storage has_names nbytes itemsize is_nested is_quantized is_meta is_cpu get_device version "
        "output_nr empty_like zeros_like ones_like full_like rand_like randn_like new_zeros new_ones new_empty "
        "new_full new_tensor eq ne lt le gt ge isnan isinf isfinite argmax argmin argsort any all equal allclose "
        "result_type is_same_size isclose searchsorted bucketize nonzero count_nonzero bool int long"
    ),
    Kind.STEPS: "sign sgn heaviside",
    Kind.CHOOSES: "maximum minimum fmax fmin",
    Kind.ELEMENTWISE: (
        "mul multiply div divide true_divide truediv rdiv rtruediv rmul floor_divide remainder fmod pow rpow "
        "float_power ldexp neg negative positive abs absolute clamp clip clamp_min clamp_max round floor ceil trunc "
        "fix frac exp exp2 expm1 log log1p log2 log10 sqrt rsqrt square reciprocal sin cos tan sinh cosh asin acos "
        "atan asinh acosh atanh arcsin arccos arctan arcsinh arccosh arctanh sinc erf erfc erfinv lgamma digamma logit "
        "sigmoid expit tanh relu relu6 leaky_relu elu celu selu gelu silu mish softplus softsign hardtanh hardsigmoid "
        "hardswish hardshrink softshrink tanhshrink logsigmoid log_sigmoid threshold prelu rrelu nan_to_num deg2rad "
        "rad2deg dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout"
    ),
    Kind.LINEAR: (
        "add sub subtract rsub radd sum mean nansum nanmean cumsum sum_to_size diff trace index_add scatter_add "
        "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d interpolate "
        "upsample upsample_nearest upsample_bilinear fold"
    ),
    Kind.WEIGHTED: (
        "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d"
    ),
    Kind.MULTILINEAR: (
        "matmul rmatmul mm bmm mv dot vdot inner outer ger einsum tensordot kron chain_matmul multi_dot bilinear "
        "linalg_multi_dot linalg_vecdot linalg_matmul cross linalg_cross addmm addmv addr addbmm baddbmm addcmul "
        "batch_norm"
    ),
}  # fmt: skip
_KINDS = {name: kind for kind, names in _NAMES.items() for name in names.split()}

#: What errors call the commonest functions that have no rule.
DESCRIBED = {
    "mul": "a product (mul) of two tensors that both depend on the inputs",
    "multiply": "a product (multiply) of two tensors that both depend on the inputs",
    "div": "a quotient (div) of two tensors that both depend on the inputs",
    "true_divide": "a quotient (true_divide) of two tensors that both depend on the inputs",
    "matmul": "a product (matmul) of two tensors that both depend on the inputs, as in attention",
    "bmm": "a product (bmm) of two tensors that both depend on the inputs, as in attention",
    "einsum": "a product (einsum) of two tensors that both depend on the inputs, as in attention",
}


@dataclass(frozen=True)
class Operation:
    """One call of a function: its name as a word, its kind, and the same function out of place."""

    name: str
    kind: Kind
    in_place: bool
    base: Any

    def out_of_place(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, tuple, dict[str, Any]]:
        """The tensor that a call in place writes into, and the arguments of the call of ``base``."""
        kwargs = {key: value for key, value in kwargs.items() if key != "inplace"}
        target = args[0] if args else kwargs.pop("input")
        return target, (target, *args[1:]), kwargs


def operation(function: Any, args: tuple, kwargs: dict[str, Any]) -> Operation:
    """What a call of a function of torch is."""
    name, kind, in_place, base = _described(function)
    if kwargs.get("inplace"):
        in_place = True
    if name in ("max", "min"):
        # Over dimensions an entry is chosen; of two tensors the larger.
        other = args[1] if len(args) > 1 else kwargs.get("other")
        kind = Kind.CHOOSES if isinstance(other, Tensor) else Kind.MOVES
    elif (name == "scatter" and ("reduce" in kwargs or len(args) > 4)) or (
        name == "index_put" and (kwargs.get("accumulate") or len(args) > 3)
    ):
        kind = Kind.OTHER
    elif name == "lerp":
        weight = args[2] if len(args) > 2 else kwargs.get("weight")
        kind = Kind.OTHER if isinstance(weight, Tensor) and weight.requires_grad else Kind.LINEAR
    elif name == "batch_norm" and (args[5] if len(args) > 5 else kwargs.get("training")):
        kind = Kind.OTHER  # entries are normalised by others
    return Operation(name, kind, in_place, base)


@functools.lru_cache(maxsize=1024)
def _described(function: Any) -> tuple[str, Kind, bool, Any]:
    raw = getattr(function, "__name__", "")
    if raw in ("__get__", "__set__"):
        raw = getattr(function.__self__, "__name__", "")
    dunder = raw.startswith("__")
    name = raw.strip("_").removeprefix("special_")
    in_place = raw.endswith("_") and not dunder
    if dunder and name not in _KINDS and name.startswith("i") and name[1:] in _KINDS:
        name, in_place = name[1:], True
    if name == "setitem":
        return name, Kind.MOVES, True, function
    base = function
    if in_place:
        places = (torch.Tensor, torch, F)
        base = next((getattr(place, name) for place in places if hasattr(place, name)), None)
    return name, _KINDS.get(name, Kind.OTHER), in_place, base


def running_module() -> nn.Module | None:
    """The module whose code is running: the nearest in the stack of calls."""
    frame = sys._getframe(1)
    while frame is not None:
        own = frame.f_locals.get("self")
        if isinstance(own, nn.Module):
            return own
        frame = frame.f_back  # type: ignore[assignment]
    return None


def is_torch_module(module: nn.Module) -> bool:
    """Whether a module computes in a way of torch's own: what others write is seen function by function."""
    own = type(module).__module__.startswith("torch.nn.") or isinstance(module, torch.jit.ScriptModule)
    return own or type(module) is TensorDictModule

"""How large weights and gradients are, module by module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from tensordict.nn import TensorDictParams
from torch import Tensor, nn

from tdhook_rl.arguments.checked import checked
from tdhook_rl.errors import InputError
from tdhook_rl.internals.torch_names import ConvNd, held_buffers, held_parameters
from tdhook_rl.replaying.batching import GeneratorState
from tdhook_rl.weights.computed import computed_weights

#: Matrices whose smaller side is larger than this are left out: a spectral norm takes its cube in time.
LARGEST = 512


@checked
def weight_norms(module: nn.Module) -> dict[str, float]:
    """The Euclidean norm of the parameters (Lyle, Zheng, Nikishin, Avila Pires, Pascanu & Dabney 2023, ICML, follow it
    beside plasticity).

    Args:
        module: a network; parameters that two modules share count once, at the first.

    Returns:
        by the path of the module that has them; ``""`` for all together.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 1, bias=False), nn.ReLU())
        >>> _ = nn.init.ones_(net[0].weight)
        >>> {path: round(norm, 3) for path, norm in weight_norms(net).items()}
        {'0': 1.414, '': 1.414}
    """
    return _by_module({name: one for name, one in held_parameters(module).items() if not _unready(one)})


@checked
def gradient_norms(module: nn.Module, loss: Callable[[], Any] | None = None) -> dict[str, float]:
    """The Euclidean norm of the gradients.

    Args:
        module: a network.
        loss: gives a scalar that depends on its parameters. Its gradients are taken beside training: ``.grad``, buffers
            and generators are left as they are. Unless given, what is in ``.grad`` now: after a training step that
            of its last loss, clipped if it was.

    Returns:
        by the path of the module whose parameters they are of; ``""`` for all together; empty where there are none.

    Raises:
        InputError: if the loss is no scalar, or depends on no parameter.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> found = gradient_norms(net, lambda: net(torch.tensor([[3.0, 0.0]])).sum())
        >>> round(found[""] ** 2, 3), net.weight.grad is None
        (10.0, True)
    """
    own = {name: one for name, one in held_parameters(module).items() if not _unready(one)}
    if loss is None:
        return _by_module({name: one.grad for name, one in own.items() if one.grad is not None})
    own = {name: one for name, one in own.items() if one.requires_grad}
    before = GeneratorState(next((one.device for one in own.values()), None), others=True)
    try:
        with torch.enable_grad(), _buffers_kept(module):
            value = loss()
            if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
                raise InputError(f"loss= gives a scalar that depends on the network's parameters, got {value!r:.80}")
            found = torch.autograd.grad(value.reshape(()), list(own.values()), allow_unused=True)
    finally:
        before.restore()
    reached = {name: one for name, one in zip(own, found, strict=True) if one is not None}
    if not reached:
        raise InputError(f"the loss depends on no parameter of this {type(module).__name__}")
    return _by_module(reached)


@checked
def spectral_norms(module: nn.Module) -> dict[str, float]:
    """The largest singular value of the weights of each module that has matrices; of several matrices the largest.

    Kernels are taken as matrices ``(channels out, everything else)``, as Miyato, Kataoka, Koyama & Yoshida 2018 (ICLR)
    do; of weights that agents have each for themselves, the largest counts. Matrices with more than 512 rows and
    columns are left out. A weight that a layer computes (a norm of weights, a pruning mask, a parametrisation) is taken
    as the layer uses it, and not what it is computed from.

    Args:
        module: a network.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> _ = net.weight.data.copy_(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        >>> round(spectral_norms(nn.Sequential(net))["0"], 6)
        3.0
    """
    modules: Mapping[str, nn.Module] = dict(module.named_modules())
    found: dict[str, float] = {}
    computed = {
        f"{path}.{name}" if path else name: one
        for path, layer in modules.items()
        for name, one in computed_weights(layer).items()
    }
    within = tuple(
        f"{_path(name)}.parametrizations.".lstrip(".") for name, one in computed.items() if not one.originals
    )
    originals = {
        f"{_path(name)}.{original}".lstrip(".") for name, one in computed.items() for original in one.originals
    }
    plain = {
        name: one
        for name, one in held_parameters(module).items()
        if name not in originals and not (within and name.startswith(within))
    }
    for name, one in (plain | {name: one.effective() for name, one in computed.items()}).items():
        if _unready(one) or not one.is_floating_point():
            continue
        path = _path(name)
        owner, held = modules.get(path), _held(modules, path)
        lead = 0 if held is None else held.batch_dims  # over agents
        matrix = one.detach().double()
        if matrix.ndim < lead + 2:
            continue  # a bias
        if isinstance(owner, ConvNd) and owner.transposed:
            matrix = matrix.movedim(1, 0)
        if held is not None or isinstance(owner, ConvNd):
            matrix = matrix.flatten(lead + 1)
        if matrix.ndim != lead + 2 or not matrix.numel() or min(matrix.shape[-2:]) > LARGEST:
            continue
        smaller = matrix @ matrix.mT if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT @ matrix
        largest = float(torch.linalg.eigvalsh(smaller).max().clamp_min(0).sqrt()) if _finite(smaller) else float("nan")
        found[path] = max(found.get(path, 0.0), largest)
    return found


def _by_module(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    squares: dict[str, Tensor] = {}
    for name, value in tensors.items():
        path = _path(name)
        square = value.detach().double().norm().square()
        squares[path] = squares[path] + square if path in squares else square
    if not squares:
        return {}
    whole = torch.stack(list(squares.values())).sum()
    return {path: float(square.sqrt()) for path, square in squares.items()} | {"": float(whole.sqrt())}


def _path(name: str) -> str:
    return name.rpartition(".")[0]


def _held(modules: Mapping[str, nn.Module], path: str) -> TensorDictParams | None:
    """What holds the parameters of TorchRL's multi-agent networks, stacked over agents that have their own."""
    while path:
        owner = modules.get(path)
        if isinstance(owner, TensorDictParams):
            return owner
        path = _path(path)
    return None


def _unready(parameter: Tensor) -> bool:
    return parameter.is_meta or isinstance(parameter, nn.parameter.UninitializedParameter)


def _finite(value: Tensor) -> bool:
    return bool(torch.isfinite(value).all())


@contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """A block whose passes leave running statistics as they were."""
    before = {buffer: buffer.detach().clone() for buffer in held_buffers(module).values()}
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before.items():
                if not torch.equal(buffer, value):
                    buffer.copy_(value)

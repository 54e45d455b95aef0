"""A step of a recurrent module inside a hooked policy is that of TorchRL's, to the bit, and so are its errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import LazyStackedTensorDict, TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.modules import GRUModule, LSTMModule, set_recurrent_mode

from tdhook_rl import ActivationCaching
from tdhook_rl.calls.recurrent_steps import OneStepMixin


class Doubled(GRUModule):
    """What a user's own class computes is not known."""

    def forward(self, tensordict: Any) -> Any:
        found = super().forward(tensordict)
        return found.set("hidden", 2 * found["hidden"])


FEATURES, HIDDEN = 3, 4
MODULES = {
    "GRU": (GRUModule, {}),
    "LSTM": (LSTMModule, {}),
    "GRU of two layers": (GRUModule, {"num_layers": 2, "dropout": 0.5}),
    "LSTM of two layers": (LSTMModule, {"num_layers": 2}),
    "GRU both ways": (GRUModule, {"bidirectional": True}),
    "LSTM without bias": (LSTMModule, {"bias": False}),
    "GRU in Python": (GRUModule, {"python_based": True}),
    "LSTM in Python": (LSTMModule, {"python_based": True}),
    "a user's own": (Doubled, {}),
    "nested keys": (GRUModule, {"in_keys": [("agent", "x"), ("agent", "state")],
                                "out_keys": ["hidden", ("next", "agent", "state")]}),
}  # fmt: skip
BATCHES = ((), (1,), (5,), (2, 3), (2, 1, 3), (0,))


def policies(name: str) -> TensorDictSequential:
    kind, options = MODULES[name]
    keys = {} if "in_keys" in options else {"in_key": "x", "out_key": "hidden"}
    module = kind(input_size=FEATURES, hidden_size=HIDDEN, **keys, **options)
    width = HIDDEN * (1 + options.get("bidirectional", False))
    return TensorDictSequential(module, TensorDictModule(nn.Linear(width, 2), ["hidden"], ["logits"]))


def data_of(policy: TensorDictSequential, batch: tuple[int, ...], begins: Any, with_states: bool) -> TensorDict:
    module = policy.module[0]
    core = module.gru if isinstance(module, GRUModule) else module.lstm
    number = len(module.out_keys) - 1
    layers = core.num_layers * (1 + getattr(core, "bidirectional", False))
    data = TensorDict({"other": torch.randn(*batch, 2), ("deep", "other"): torch.randn(batch)}, batch_size=batch)
    data[module.in_keys[0]] = torch.randn(*batch, FEATURES)
    data["is_init"] = torch.full((*batch, 1), begins) if begins is not None else torch.rand(*batch, 1) < 0.5
    for key in module.in_keys[1 : 1 + number] if with_states else ():
        data[key] = torch.randn(*batch, layers, HIDDEN)
    return data


def outcome(policy: Any, data: TensorDict) -> dict[Any, Tensor] | str:
    torch.manual_seed(3)
    try:
        found = policy(data)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    own = {key: value for key, value in found.items(True, True) if key[0] not in ("cache", "computed")}
    if own["logits"].requires_grad:
        total = sum(value.square().sum() for value in own.values() if value.requires_grad)
        names, weights = zip(*((n, p) for n, p in policy.named_parameters() if p.requires_grad), strict=True)
        own |= dict(zip(names, torch.autograd.grad(total, weights, allow_unused=True), strict=True))
    return own


@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_a_step_is_the_step_of_torchrl(name: str, batch: tuple[int, ...]) -> None:
    policy = policies(name)
    with ActivationCaching("module.1").prepare(policy) as hooked:
        assert isinstance(hooked.module[0], OneStepMixin) is (name != "a user's own")
        for begins in (True, False, None):
            for with_states in (True, False):
                for training in (True, False):
                    data = data_of(policy, batch, begins, with_states)
                    policy.train(training)
                    hooked.train(training)
                    plain, ours = outcome(policy, data.clone()), outcome(hooked, data.clone())
                    if isinstance(plain, str):
                        assert ours == plain
                        continue
                    assert set(ours) == set(plain)
                    for key, value in plain.items():
                        assert (value is None) == (ours[key] is None)
                        assert value is None or (ours[key].shape == value.shape and torch.equal(ours[key], value))


@pytest.mark.parametrize("name", ["GRU", "LSTM", "nested keys"])
def test_what_is_no_step_goes_torchrls_way(name: str) -> None:
    policy = policies(name)
    keys = policy.module[0].in_keys

    def without(key: Any) -> Any:
        return lambda data: data.exclude(key)

    changes = [without("is_init"), *map(without, keys), lambda data: data.set("is_init", data["is_init"][:, 0])]
    changes += [lambda data: LazyStackedTensorDict(*data.unbind(0)), lambda data: data.lock_()]
    with ActivationCaching("module.1").prepare(policy) as hooked:
        for change in changes:
            data = change(data_of(policy, (4,), None, True))
            plain, ours = outcome(policy, data.copy()), outcome(hooked, data.copy())
            if isinstance(plain, str):
                assert isinstance(ours, str)
            else:
                assert all(torch.equal(ours[key], value) for key, value in plain.items() if value is not None)
        whole = data_of(policy, (4, 6), False, True)
        with set_recurrent_mode(True):
            plain, ours = outcome(policy, whole.clone()), outcome(hooked, whole.clone())
        assert all(torch.equal(ours[key], value) for key, value in plain.items())

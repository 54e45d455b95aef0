"""Policies of the zoo that read several steps: recurrent ones and decision transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torch.distributions import Categorical
from torchrl.data import Unbounded
from torchrl.envs import InitTracker
from torchrl.modules import DTActor, LSTMModule, ProbabilisticActor

from tests.policies import ACTIONS, FEATURES, HIDDEN
from tests.zoo_entry import CONTEXT, CONTROLS, Entry, index_log_prob


def recurrent(kind: type) -> Callable[[], ProbabilisticActor]:
    def build() -> ProbabilisticActor:
        core = kind(input_size=FEATURES, hidden_size=HIDDEN, in_key="observation", out_key="hidden")
        head = TensorDictModule(nn.Linear(HIDDEN, ACTIONS), in_keys=["hidden"], out_keys=["logits"])
        net = TensorDictSequential(core, head)
        return ProbabilisticActor(net, in_keys=["logits"], distribution_class=Categorical, return_log_prob=True)

    return build


def one_step(policy: Any, data: TensorDictBase) -> Tensor:
    module = policy.module[0].module[0]
    states = [data[key] for key in module.in_keys if "recurrent" in str(key)]
    states = [(state * ~data["is_init"].unsqueeze(-1)).transpose(0, 1).contiguous() for state in states]
    core = module.lstm if isinstance(module, LSTMModule) else module.gru
    output, _ = core(data["observation"].unsqueeze(1), tuple(states) if len(states) > 1 else states[0])
    return output.squeeze(1)


def recurrent_entry(kind: type, core: str) -> Entry:
    return Entry(
        build=recurrent(kind),
        site=f"module.0.module.0.{core}",
        first=one_step,
        rest=lambda p, h, d: {"logits": p.module[0].module[1].module(h)},
        score=index_log_prob(),
        transforms=lambda p: [InitTracker(), p.module[0].module[0].make_tensordict_primer()],
    )


CONTEXT_KEYS = ["observation_cat", "action_cat", "return_to_go_cat"]
CONTEXT_SPECS = dict(zip(CONTEXT_KEYS, (Unbounded((CONTEXT, n)) for n in (FEATURES, CONTROLS, 1)), strict=True))


def transformer() -> DTActor:
    config = DTActor.default_config()
    config.n_embd, config.n_layer, config.n_head, config.n_inner = HIDDEN, 2, 2, 2 * HIDDEN
    config.resid_pdrop = config.attn_pdrop = 0.0
    return DTActor(FEATURES, CONTROLS, transformer_config=config)


class Last(nn.Module):
    """What is decided for the last step of the context."""

    def forward(self, actions: Tensor) -> Tensor:
        return actions[..., -1, :].tanh()


def decision_transformer() -> TensorDictSequential:
    return TensorDictSequential(
        TensorDictModule(transformer().eval(), in_keys=CONTEXT_KEYS, out_keys=["actions"]),
        TensorDictModule(Last(), in_keys=["actions"], out_keys=["action"]),
    )


def block(net: DTActor, inputs: list[Tensor], replaced: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The output of the attention of the first block and of the net, by a hook on a module of the test's own."""
    seen = []

    def hook(module: nn.Module, args: tuple, output: Any) -> Any:
        seen.append(output[0])
        return None if replaced is None else (replaced, *output[1:])

    handle = net.transformer.transformer.h[0].attn.register_forward_hook(hook)
    try:
        return net(*inputs), seen[0]
    finally:
        handle.remove()

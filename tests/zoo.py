"""A zoo of policies: each with an environment, an inner site, and what it computes, written out by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn
from torch.distributions import Categorical
from torchrl.data import Binary, Bounded, OneHot, TensorSpec, Unbounded
from torchrl.data import Categorical as CategoricalSpec
from torchrl.envs import Compose, EnvBase, InitTracker, TransformedEnv
from torchrl.modules import (
    Actor,
    ActorCriticOperator,
    ActorCriticWrapper,
    ActorValueOperator,
    AdditiveGaussianModule,
    ConvNet,
    DecisionTransformerInferenceWrapper,
    DistributionalQValueActor,
    DTActor,
    EGreedyModule,
    GRUModule,
    LSTMModule,
    MaskedCategorical,
    MultiAgentConvNet,
    MultiAgentMLP,
    OneHotCategorical,
    OrnsteinUhlenbeckProcessModule,
    ProbabilisticActor,
    QValueActor,
    QValueModule,
    TanhDelta,
    TanhModule,
    ValueOperator,
)

from tdhook_rl import targets
from tdhook_rl.targets import Target
from tests.mock_env import MockEnv
from tests.policies import ACTIONS, FEATURES, HIDDEN, categorical, mlp, one_hot, tanh_normal

AGENTS, ATOMS, CONTEXT, CONTROLS = 3, 5, 3, 2
SUPPORT = torch.linspace(-1, 1, ATOMS)
OBSERVED = ("agents", "observation")

Outputs = dict[NestedKey, Tensor]

VECTOR = {"observation": Unbounded((FEATURES,))}
DISCRETE = {"action": CategoricalSpec(ACTIONS)}
CONTINUOUS = {"action": Bounded(-1.0, 1.0, shape=(CONTROLS,))}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A policy of the zoo.

    Args:
        build: makes the policy (or the critic).
        site: a module inside it, whose output has one row of ``features`` for each row of the batch.
        first: what the site computes, by hand: ``(policy, rows) -> (rows, *features)``.
        rest: what the policy computes from that, by hand.
        score: by hand, what attributions explain by default: the taken action where there is one.
        value: the target for the value, and the value by hand.
        observations, actions: of the environment.
        explained: the inputs that are explained.
        critic: a value network, which does not act.
        transforms: of the environment, made for a policy.
    """

    build: Callable[[], nn.Module]
    site: str
    features: tuple[int, ...] = (HIDDEN,)
    first: Callable[[Any, TensorDictBase], Tensor]
    rest: Callable[[Any, Tensor, TensorDictBase], Outputs]
    score: Callable[[Outputs, TensorDictBase], Tensor]
    target: Target | None = None
    value: tuple[Target, Callable[[Outputs, TensorDictBase], Tensor]] | None = None
    observations: Mapping[NestedKey, TensorSpec] = field(default_factory=lambda: VECTOR)
    actions: Mapping[NestedKey, TensorSpec] = field(default_factory=lambda: DISCRETE)
    explained: tuple[NestedKey, ...] = ("observation",)
    critic: bool = False
    transforms: Callable[[Any], list] = lambda policy: []

    def env(self, policy: nn.Module, *batch: int, seed: int = 0) -> EnvBase:
        strength = {"strength": Unbounded(())}
        env: EnvBase = MockEnv({**self.observations, **strength}, self.actions, batch_size=batch, seed=seed)
        transforms = self.transforms(policy)
        return TransformedEnv(env, Compose(*transforms)) if transforms else env


# ---------------------------------------------------------------------- what is taken, by hand


def index_log_prob(logits: NestedKey = "logits", action: NestedKey = "action") -> Callable:
    def score(outputs: Outputs, data: TensorDictBase) -> Tensor:
        found = outputs[logits].log_softmax(-1).gather(-1, data[action].unsqueeze(-1)).squeeze(-1)
        return found.reshape(len(data), -1).sum(-1)

    return score


def one_hot_log_prob(outputs: Outputs, data: TensorDictBase) -> Tensor:
    return (outputs["logits"].log_softmax(-1) * data["action"]).sum(-1)


def masked_log_prob(outputs: Outputs, data: TensorDictBase) -> Tensor:
    logits = outputs["logits"].masked_fill(~data["action_mask"], -torch.inf)
    return logits.log_softmax(-1).gather(-1, data["action"].unsqueeze(-1)).squeeze(-1)


def tanh_normal_log_prob(outputs: Outputs, data: TensorDictBase) -> Tensor:
    loc, scale, action = outputs["loc"], outputs["scale"], data["action"].double().clamp(-1 + 1e-6, 1 - 1e-6)
    before = action.atanh()
    density = -((before - loc) ** 2) / (2 * scale**2) - scale.log() - 0.5 * torch.log(torch.tensor(2 * torch.pi))
    return (density - (1 - action**2).log()).sum(-1)


def chosen(values: NestedKey = "action_value", action: NestedKey = "action") -> Callable:
    def score(outputs: Outputs, data: TensorDictBase) -> Tensor:
        found = outputs[values].gather(-1, data[action].unsqueeze(-1)).squeeze(-1)
        return found.reshape(len(data), -1).sum(-1)

    return score


def expected_q(outputs: Outputs, data: TensorDictBase) -> Tensor:
    values = (outputs["action_value"].exp() * SUPPORT[:, None]).sum(-2)
    return values.gather(-1, data["action"].unsqueeze(-1)).squeeze(-1)


def summed(*keys: NestedKey) -> Callable:
    def score(outputs: Outputs, data: TensorDictBase) -> Tensor:
        return torch.stack([outputs[key].reshape(len(data), -1).sum(-1) for key in keys]).sum(0)

    return score


def state_value(key: str = "state_value") -> tuple[Target, Callable]:
    return targets.state_value(key), lambda outputs, data: outputs[key].squeeze(-1)


# ---------------------------------------------------------------------- feed-forward policies


def layers(net: Callable[[Any], nn.Sequential], cut: int = 2, key: NestedKey = "observation") -> Callable:
    return lambda policy, data: net(policy)[:cut](data[key])


def into(key: NestedKey, net: Callable[[Any], nn.Sequential], cut: int = 2) -> Callable:
    return lambda policy, hidden, data: {key: net(policy)[cut:](hidden)}


def first_module(policy: Any) -> nn.Sequential:
    return policy.module[0].module


def own_module(policy: Any) -> nn.Sequential:
    return policy.module


def q_module(policy: Any) -> nn.Sequential:
    return policy.module[0].module[0].module


def deterministic() -> Actor:
    return Actor(mlp(CONTROLS), in_keys=["observation"])


def masked() -> ProbabilisticActor:
    net = TensorDictModule(mlp(), in_keys=["observation"], out_keys=["logits"])
    return ProbabilisticActor(
        net,
        in_keys={"logits": "logits", "mask": "action_mask"},
        distribution_class=MaskedCategorical,
        return_log_prob=True,
    )


def normal_params(policy: Any, hidden: Tensor, data: TensorDictBase) -> Outputs:
    net = policy.module[0].module
    loc, scale = net[1](net[0][2:](hidden))
    return {"loc": loc, "scale": scale}


def critic() -> ValueOperator:
    return ValueOperator(mlp(1), in_keys=["observation"])


def q_value() -> QValueActor:
    return QValueActor(mlp(), in_keys=["observation"], spec=CategoricalSpec(ACTIONS))


def q_value_greedy() -> TensorDictSequential:
    spec = CategoricalSpec(ACTIONS)
    return TensorDictSequential(q_value(), EGreedyModule(spec=spec, eps_init=0.5, eps_end=0.5))


class Atoms(nn.Module):
    """Logits of the atoms of each action's return, ``(atoms, actions)``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (ATOMS, ACTIONS))


def distributional() -> DistributionalQValueActor:
    net = nn.Sequential(*mlp(ATOMS * ACTIONS), Atoms())
    return DistributionalQValueActor(net, in_keys=["observation"], support=SUPPORT, spec=CategoricalSpec(ACTIONS))


def atom_values(policy: Any, hidden: Tensor, data: TensorDictBase) -> Outputs:
    return {"action_value": policy.module[0].module[2:](hidden).log_softmax(-2)}


def gaussian_noise() -> TensorDictSequential:
    spec = CONTINUOUS["action"]
    net = TensorDictModule(mlp(CONTROLS), in_keys=["observation"], out_keys=["param"])
    return TensorDictSequential(
        net,
        TanhModule(in_keys=["param"], out_keys=["action"], spec=spec),
        AdditiveGaussianModule(spec=spec, sigma_init=0.3, sigma_end=0.3),
    )


def ou_noise() -> TensorDictSequential:
    return TensorDictSequential(deterministic(), OrnsteinUhlenbeckProcessModule(spec=CONTINUOUS["action"].clone()))


class Custom(TensorDictModuleBase):
    """A policy with a forward of its own, which samples by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, ACTIONS)
        self.in_keys, self.out_keys = ["observation"], ["logits", "action"]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        logits = self.head(self.body(tensordict["observation"]).tanh())
        tensordict.set("logits", logits)
        return tensordict.set("action", Categorical(logits=logits).sample())


class Plain(nn.Module):
    """A policy that knows nothing of TensorDicts."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(CONTROLS)

    def forward(self, observation: Tensor) -> Tensor:
        return self.net(observation).tanh()


def nested() -> ProbabilisticActor:
    net = TensorDictModule(mlp(), in_keys=[("sense", "vector")], out_keys=[("mind", "logits")])
    return ProbabilisticActor(
        net,
        in_keys={"logits": ("mind", "logits")},
        out_keys=[("act", "move")],
        distribution_class=Categorical,
        return_log_prob=True,
    )


class Scaled(nn.Module):
    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.to(torch.get_default_dtype()) / 255


def pixels(scaled: bool) -> Callable[[], ProbabilisticActor]:
    def build() -> ProbabilisticActor:
        conv = ConvNet(in_features=2, num_cells=[4, 4], kernel_sizes=3)
        net = nn.Sequential(Scaled() if scaled else nn.Identity(), conv, nn.Linear(64, ACTIONS))
        module = TensorDictModule(net, in_keys=["pixels"], out_keys=["logits"])
        return ProbabilisticActor(module, in_keys=["logits"], distribution_class=Categorical, return_log_prob=True)

    return build


def conv_layers(policy: Any) -> nn.Sequential:
    return nn.Sequential(*policy.module[0].module[1])


def pixel_entry(scaled: bool) -> Entry:
    dtype = torch.uint8 if scaled else torch.float32
    return Entry(
        build=pixels(scaled),
        site="module.0.module.1.1",
        features=(4, 6, 6),
        first=lambda p, d: conv_layers(p)[:2](p.module[0].module[0](d["pixels"])),
        rest=lambda p, h, d: {"logits": p.module[0].module[2](conv_layers(p)[2:](h))},
        score=index_log_prob(),
        observations={"pixels": Unbounded((2, 8, 8), dtype=dtype)},
        explained=("pixels",),
    )


# ---------------------------------------------------------------------- actors with critics


def actor_value() -> ActorValueOperator:
    common = TensorDictModule(nn.Linear(FEATURES, HIDDEN), in_keys=["observation"], out_keys=["hidden"])
    head = TensorDictModule(nn.Linear(HIDDEN, ACTIONS), in_keys=["hidden"], out_keys=["logits"])
    actor = ProbabilisticActor(head, in_keys=["logits"], distribution_class=Categorical, return_log_prob=True)
    return ActorValueOperator(common, actor, ValueOperator(nn.Linear(HIDDEN, 1), in_keys=["hidden"]))


class Judge(nn.Module):
    """The value of a state and an action."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(HIDDEN + ACTIONS, 1)

    def forward(self, hidden: Tensor, action: Tensor) -> Tensor:
        return self.net(torch.cat([hidden, action.to(hidden.dtype)], -1)).tanh()


def actor_critic() -> ActorCriticOperator:
    common = TensorDictModule(nn.Linear(FEATURES, HIDDEN), in_keys=["observation"], out_keys=["hidden"])
    head = TensorDictModule(nn.Linear(HIDDEN, ACTIONS), in_keys=["hidden"], out_keys=["logits"])
    actor = ProbabilisticActor(head, in_keys=["logits"], distribution_class=OneHotCategorical, return_log_prob=True)
    judge = ValueOperator(Judge(), in_keys=["hidden", "action"], out_keys=["state_action_value"])
    return ActorCriticOperator(common, actor, judge)


def linear(policy: Any, data: TensorDictBase) -> Tensor:
    return policy.module[0].module(data["observation"])


def trunk_rest(policy: Any, hidden: Tensor, data: TensorDictBase) -> Outputs:
    return {
        "logits": policy.module[1].module[0].module(hidden),
        "state_value": policy.module[2].module(hidden),
    }


def critic_rest(policy: Any, hidden: Tensor, data: TensorDictBase) -> Outputs:
    return {
        "logits": policy.module[1].module[0].module(hidden),
        "state_action_value": policy.module[2].module(hidden, data["action"]),
    }


def head_rest(key: str) -> Callable:
    return lambda policy, hidden, data: {key: policy.module[1].module(hidden)}


def wrapper_rest(policy: Any, hidden: Tensor, data: TensorDictBase) -> Outputs:
    return {
        "logits": policy.module[0].module[0].module[2:](hidden),
        "state_value": policy.module[1].module(data["observation"]),
    }


# ---------------------------------------------------------------------- policies with time


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


def inference_transformer() -> DecisionTransformerInferenceWrapper:
    module = TensorDictModule(transformer().eval(), in_keys=CONTEXT_KEYS, out_keys=["param"])
    kwargs = {"low": -1.0, "high": 1.0}
    actor = ProbabilisticActor(
        module, in_keys=["param"], out_keys=["action"], distribution_class=TanhDelta, distribution_kwargs=kwargs
    )
    wrapper = DecisionTransformerInferenceWrapper(actor, inference_context=CONTEXT)
    names = dict(zip(("observation", "action", "return_to_go"), CONTEXT_KEYS, strict=True))
    wrapper.set_tensor_keys(**names, out_action="action")
    return wrapper


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


# ---------------------------------------------------------------------- many agents


def agents(net: nn.Module) -> ProbabilisticActor:
    module = TensorDictModule(net, in_keys=[OBSERVED], out_keys=[("agents", "logits")])
    return ProbabilisticActor(
        module,
        in_keys={"logits": ("agents", "logits")},
        out_keys=[("agents", "action")],
        distribution_class=Categorical,
        return_log_prob=True,
    )


def agents_mlp(share: bool, central: bool = False, outputs: int = ACTIONS) -> MultiAgentMLP:
    return MultiAgentMLP(
        n_agent_inputs=FEATURES,
        n_agent_outputs=outputs,
        n_agents=AGENTS,
        centralized=central,
        share_params=share,
        num_cells=[HIDDEN],
        activation_class=nn.Tanh,
    )


def agents_layer(params: Any, layer: str, x: Tensor, separate: bool) -> Tensor:
    weight, bias = params[layer, "weight"], params[layer, "bias"]
    return torch.einsum("bni,noi->bno", x, weight) + bias if separate else x @ weight.T + bias


def agents_entry(share: bool, central: bool = False, net: Callable = own_module) -> Entry:
    def first(policy: Any, data: TensorDictBase) -> Tensor:
        x = data["agents", "observation"]
        if central:
            x = x.reshape(len(x), 1, -1).expand(-1, AGENTS, -1)
        return agents_layer(policy.module[0].module.params, "0", x, not share).tanh()

    def rest(policy: Any, hidden: Tensor, data: TensorDictBase) -> Outputs:
        return {("agents", "logits"): agents_layer(policy.module[0].module.params, "2", hidden, not share)}

    return Entry(
        build=lambda: agents(agents_mlp(share, central)),
        site="module.0.module._empty_net.1",
        features=(AGENTS, HIDDEN),
        first=first,
        rest=rest,
        score=index_log_prob(("agents", "logits"), ("agents", "action")),
        observations={OBSERVED: Unbounded((AGENTS, FEATURES))},
        actions={("agents", "action"): CategoricalSpec(ACTIONS, shape=(AGENTS,))},
        explained=(OBSERVED,),
    )


def agents_q() -> TensorDictSequential:
    module = TensorDictModule(agents_mlp(False), in_keys=[OBSERVED], out_keys=[("agents", "action_value")])
    keys = [("agents", key) for key in ("action", "action_value", "chosen_action_value")]
    value = QValueModule(
        action_value_key=("agents", "action_value"),
        out_keys=keys,
        spec=None,
        action_space="categorical",
    )
    return TensorDictSequential(module, value)


def agents_conv(share: bool) -> Entry:
    def build() -> ProbabilisticActor:
        conv = MultiAgentConvNet(
            n_agents=AGENTS,
            centralized=False,
            share_params=share,
            in_features=2,
            num_cells=[4],
            kernel_sizes=3,
            strides=1,
        )
        return agents(nn.Sequential(conv, nn.Linear(64, ACTIONS)))

    def first(policy: Any, data: TensorDictBase) -> Tensor:
        x, params = data["agents", "observation"], policy.module[0].module[0].params
        maps = []
        for agent in range(AGENTS):
            weight, bias = (params["0", name] if share else params["0", name][agent] for name in ("weight", "bias"))
            maps.append(nn.functional.elu(nn.functional.conv2d(x[:, agent], weight, bias)))
        return torch.stack(maps, 1)

    return Entry(
        build=build,
        site="module.0.module.0._empty_net.1",
        features=(AGENTS, 4, 4, 4),
        first=first,
        rest=lambda p, h, d: {("agents", "logits"): p.module[0].module[1](h.flatten(-3))},
        score=index_log_prob(("agents", "logits"), ("agents", "action")),
        observations={OBSERVED: Unbounded((AGENTS, 2, 6, 6))},
        actions={("agents", "action"): CategoricalSpec(ACTIONS, shape=(AGENTS,))},
        explained=(OBSERVED,),
    )


SEPARATE = agents_entry(share=False)

ZOO: dict[str, Entry] = {
    "actor": Entry(
        build=deterministic,
        site="module.1",
        first=layers(own_module),
        rest=into("action", own_module),
        score=summed("action"),
        actions=CONTINUOUS,
    ),
    "categorical": Entry(
        build=categorical,
        site="module.0.module.1",
        first=layers(first_module),
        rest=into("logits", first_module),
        score=index_log_prob(),
    ),
    "one_hot": Entry(
        build=one_hot,
        site="module.0.module.1",
        first=layers(first_module),
        rest=into("logits", first_module),
        score=one_hot_log_prob,
        actions={"action": OneHot(ACTIONS)},
    ),
    "masked": Entry(
        build=masked,
        site="module.0.module.1",
        first=layers(first_module),
        rest=into("logits", first_module),
        score=masked_log_prob,
        observations={**VECTOR, "action_mask": Binary(ACTIONS, dtype=torch.bool)},
    ),
    "tanh_normal": Entry(
        build=tanh_normal,
        site="module.0.module.0.1",
        first=layers(lambda p: p.module[0].module[0]),
        rest=normal_params,
        score=tanh_normal_log_prob,
        actions=CONTINUOUS,
    ),
    "value": Entry(
        build=critic,
        site="module.1",
        first=layers(own_module),
        rest=into("state_value", own_module),
        score=summed("state_value"),
        value=state_value(),
        critic=True,
    ),
    "actor_value": Entry(
        build=actor_value,
        site="module.0.module",
        first=linear,
        rest=trunk_rest,
        score=index_log_prob(),
        value=state_value(),
    ),
    "actor_value_policy": Entry(
        build=lambda: actor_value().get_policy_operator(),
        site="module.0.module",
        first=linear,
        rest=head_rest("logits"),
        score=index_log_prob(),
    ),
    "actor_value_value": Entry(
        build=lambda: actor_value().get_value_operator(),
        site="module.0.module",
        first=linear,
        rest=head_rest("state_value"),
        score=summed("state_value"),
        value=state_value(),
        critic=True,
    ),
    "actor_critic": Entry(
        build=lambda: actor_critic().get_critic_operator(),
        site="module.0.module",
        first=linear,
        rest=critic_rest,
        score=one_hot_log_prob,
        value=state_value("state_action_value"),
        actions={"action": OneHot(ACTIONS)},
    ),
    "actor_critic_policy": Entry(
        build=lambda: actor_critic().get_policy_operator(),
        site="module.0.module",
        first=linear,
        rest=head_rest("logits"),
        score=one_hot_log_prob,
        actions={"action": OneHot(ACTIONS)},
    ),
    "actor_critic_wrapper": Entry(
        build=lambda: ActorCriticWrapper(categorical(), critic()),
        site="module.0.module.0.module.1",
        first=layers(lambda p: p.module[0].module[0].module),
        rest=wrapper_rest,
        score=index_log_prob(),
        value=state_value(),
    ),
    "q_value": Entry(
        build=q_value,
        site="module.0.module.1",
        first=layers(first_module),
        rest=into("action_value", first_module),
        score=chosen(),
        value=(targets.chosen_q(), chosen()),
    ),
    "q_value_egreedy": Entry(
        build=q_value_greedy,
        site="module.0.module.0.module.1",
        first=layers(q_module),
        rest=into("action_value", q_module),
        score=chosen(),
        value=(targets.chosen_q(), chosen()),
    ),
    "distributional_q": Entry(
        build=distributional,
        site="module.0.module.1",
        first=layers(first_module),
        rest=atom_values,
        score=expected_q,
        value=(targets.chosen_q(), expected_q),
    ),
    "gaussian_noise": Entry(
        build=gaussian_noise,
        site="module.0.module.1",
        first=layers(first_module),
        rest=into("param", first_module),
        score=lambda o, d: o["param"].tanh().sum(-1),
        actions=CONTINUOUS,
    ),
    "ou_noise": Entry(
        build=ou_noise,
        site="module.0.module.1",
        first=layers(first_module),
        rest=into("proposed", first_module),  # the stored action has noise on top
        score=summed("proposed"),
        actions=CONTINUOUS,
        transforms=lambda p: [InitTracker()],
    ),
    "lstm": recurrent_entry(LSTMModule, "lstm"),
    "gru": recurrent_entry(GRUModule, "gru"),
    "decision_transformer": Entry(
        build=decision_transformer,
        site="module.0.module.transformer.transformer.h.0.attn",
        features=(3 * CONTEXT, HIDDEN),
        first=lambda p, d: block(p.module[0].module, [d[key] for key in CONTEXT_KEYS])[1],
        rest=lambda p, h, d: {
            "actions": (found := block(p.module[0].module, [d[key] for key in CONTEXT_KEYS], h)[0]),
            "action": found[..., -1, :].tanh(),
        },
        score=summed("action"),
        observations=CONTEXT_SPECS,
        actions=CONTINUOUS,
        explained=tuple(CONTEXT_KEYS),
    ),
    "agents_shared": agents_entry(share=True),
    "agents_separate": SEPARATE,
    "agents_central": agents_entry(share=False, central=True),
    "agents_q": Entry(
        build=agents_q,
        site="module.0.module._empty_net.1",
        features=(AGENTS, HIDDEN),
        first=SEPARATE.first,
        rest=lambda p, h, d: {("agents", "action_value"): SEPARATE.rest(p, h, d)["agents", "logits"]},
        score=chosen(("agents", "action_value"), ("agents", "action")),
        value=(targets.chosen_q(("agents", "action_value")), chosen(("agents", "action_value"), ("agents", "action"))),
        observations=SEPARATE.observations,
        actions=SEPARATE.actions,
        explained=SEPARATE.explained,
    ),
    "agents_conv_shared": agents_conv(share=True),
    "agents_conv_separate": agents_conv(share=False),
    "nested": Entry(
        build=nested,
        site="module.0.module.1",
        first=layers(first_module, key=("sense", "vector")),
        rest=into(("mind", "logits"), first_module),
        score=index_log_prob(("mind", "logits"), ("act", "move")),
        observations={("sense", "vector"): Unbounded((FEATURES,))},
        actions={("act", "move"): CategoricalSpec(ACTIONS)},
        explained=(("sense", "vector"),),
    ),
    "pixels": pixel_entry(scaled=False),
    "pixels_uint8": pixel_entry(scaled=True),
    "custom": Entry(
        build=Custom,
        site="body",
        first=lambda p, d: p.body(d["observation"]),
        rest=lambda p, h, d: {"logits": p.head(h.tanh())},
        score=lambda o, d: o["logits"].gather(-1, d["action"].unsqueeze(-1)).squeeze(-1),
        target=targets.chosen_logit(),
    ),
    "plain": Entry(
        build=Plain,
        site="net.1",
        first=lambda p, d: p.net[:2](d["observation"]),
        rest=lambda p, h, d: {"action": p.net[2:](h).tanh()},
        score=summed("action"),
        actions=CONTINUOUS,
    ),
}

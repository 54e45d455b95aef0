"""The code blocks and tables that the library is held to, as they are printed, and models with their paths."""

from __future__ import annotations

import re
from typing import Any

import torch
from tensordict import TensorDict
from torch import nn

F64 = torch.float64

WORKFLOW_1 = """
from tdhook.attribution import IntegratedGradients

def init_attr_targets(targets, _):
    return TensorDict(out=targets["output"][..., class_idx], batch_size=targets.batch_size)

with IntegratedGradients(init_attr_targets=init_attr_targets).prepare(model) as hooked:
    td = hooked(TensorDict({"input": x, ("baseline", "input"): baseline}))
    attr = td.get(("attr", "input"))
"""

WORKFLOW_2 = """
from tdhook.latent.probing import Probing, ProbeManager

manager = ProbeManager(LogisticRegression, {}, compute_metrics)
with Probing(
    "transformer.h.(0|5|10).mlp$",
    manager.probe_factory,
    additional_keys=["labels", "step_type"],
).prepare(model, in_keys=["input_ids"], out_keys=["logits"]) as hooked:
    hooked(train_td)  # step_type="fit"
    hooked(test_td)   # step_type="predict"
"""

WORKFLOW_3 = """
with hooked_module.run(data, grad_enabled=True) as run:
    run.save("layers.5.mlp")
    run.set("layers.5.attn", override_tensor)
cached = run.get("layers.5.mlp", cache_key="my_key").resolve()
"""

QUICK_PATTERNS = """
# Attribution (needs baseline for IG)
with IntegratedGradients(init_attr_targets=init_fn).prepare(model) as hooked:
    td = hooked(TensorDict({"input": x, ("baseline", "input"): baseline}))
    attr = td.get(("attr", "input"))

# Steering: extract and apply
with ActivationAddition(["layer.7.mlp"]).prepare(model) as hooked:
    steer = hooked(TensorDict({("positive","input"): pos, ("negative","input"): neg})).get(("steer","layer.7.mlp"))
with SteeringVectors(modules_to_steer=["layer.7.mlp"], steer_fn=lambda k, o: o + scale*steer).prepare(model) as hooked:
    out = hooked(TensorDict({"input": x}))
"""

KEYS = {
    '("baseline", "input")': "Attribution baseline",
    '("positive", "input"), ("negative", "input")': "Steering extraction",
    '("patched", "input")': "Patching source",
    '("attr", key)': "Attribution output",
    "labels, step_type": "Probing (via additional_keys)",
}

ISSUES = {
    "KeyError on TensorDict": 'Use tuple keys: ("attr", "input"), ("baseline", "input")',
    "HuggingFace model fails": 'Pass in_keys=["input_ids"], out_keys=["logits"] to prepare()',
    "BilinearProbeManager shape mismatch": "Call manager.before_all() before forwards, manager.after_all() after",
    "Module path not found": "Use relative=False or correct regex; see api.md Module Path Resolution",
    "Probing step_type missing": 'Add additional_keys=["labels", "step_type"] and pass both in TensorDict',
    "IG baseline wrong shape": 'Ensure ("baseline", "input") matches "input" shape and device',
}

METHODS = {
    "Saliency": "init_attr_targets, input_modules",
    "IntegratedGradients": "init_attr_targets, n_steps, baseline in TensorDict",
    "GradCAM": "modules_to_attribute (path → DimsConfig)",
    "ActivationAddition": 'module list, ("positive","input"), ("negative","input")',
    "SteeringVectors": "steer_fn(module_key, output)",
    "ActivationPatching": 'patch_fn, ("patched","input")',
    "Probing": "key_pattern, probe_factory, additional_keys",
    "Pruning": "importance_callback, amount_to_prune",
    "Adapters": "adapters={path: (adapter, source, target)}",
}

PITFALLS = {
    "IG without baseline": 'IntegratedGradients requires ("baseline", "input")',
    "Probing without step_type": 'Probing needs step_type in TensorDict ("fit" for training, "predict" for eval)',
    "Nested keys as strings": 'Use ("attr", "input") not "attr/input" for TensorDict',
    "Wrong module path": "transformer.h.5.mlp vs layers.5.mlp depends on model",
}


def run_block(block: str, **names: Any) -> dict[str, Any]:
    """Run a code block with ``tdhook`` replaced, given the names that it leaves free; what it has defined."""
    scope = {"TensorDict": TensorDict, **names}
    exec(compile(re.sub(r"\btdhook\b", "tdhook_rl", block), "page", "exec"), scope)
    return scope


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn, self.mlp = nn.Linear(width, width), nn.Sequential(nn.Linear(width, width), nn.Tanh())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.attn(x))


class Model(nn.Module):
    """A residual stack with the paths of the page: ``layer.7.mlp``, or ``layers.5.attn`` with another name."""

    def __init__(self, name: str = "layer", width: int = 6) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.ModuleList([Layer(width) for _ in range(8)]))
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.get_submodule(self.name):
            x = layer(x)
        return self.head(x)


def inputs(rows: int = 5) -> torch.Tensor:
    return torch.randn(rows, 6, dtype=F64)


def of_class(index: int):
    """``init_attr_targets`` of one output, as the page writes it."""
    return lambda targets, _: TensorDict(out=targets["output"][..., index], batch_size=targets.batch_size)

"""Rows of the oracle table: rules of layer-wise relevance propagation."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.comparison import Case, Row, row
from benchmarks.oracle_rows_attribution import INDEX, inputs, result, target, tdhook
from tdhook_rl.attribution import LRP
from tdhook_rl.attribution.lrp_rules import AlphaBeta, Epsilon, Flat, Gamma, Rule, Uniform, WSquare, ZPlus
from tests.test_cam_and_guided import relu_net
from tests.test_lrp import EPS, replica


def by_layers(net: nn.Sequential, rule: Rule, x: Tensor) -> Tensor:
    """Relevance of one output, layer by layer in matrix form; activations hand it on."""
    found = []
    for one in x:
        values = [one]
        for layer in net:
            values.append(layer(values[-1]))
        relevance = values[-1] * torch.eye(len(values[-1]), dtype=one.dtype)[INDEX]
        for layer, value in zip(reversed(net), reversed(values[:-1]), strict=True):
            if isinstance(layer, nn.Linear):
                relevance = replica(rule, layer, value, relevance)
        found.append(relevance)
    return torch.stack(found)


def lrp_row(name: str, rule: Rule, in_captum: str | None, in_tdhook: tuple[str, dict[str, float]] | None) -> Row:
    @row(f"LRP, {name}", "matrix form, layer by layer")
    def case() -> Case:
        net, x = relu_net(), inputs()

        def theirs() -> Tensor:
            from captum.attr import LRP as Captum
            from captum.attr._utils import lrp_rules

            copied = copy.deepcopy(net)
            for module in copied:
                if isinstance(module, nn.Linear):
                    module.rule = getattr(lrp_rules, in_captum)(*([rule.gamma] if isinstance(rule, Gamma) else []))
                    module.rule.STABILITY_FACTOR = EPS
            return Captum(copied).attribute(x.clone().requires_grad_(), target=INDEX)

        def tdhooks() -> Tensor:
            from tdhook.attribution.lrp_helpers import rules

            others = rules.BaseRuleMapper()
            kind, options = in_tdhook

            def mapper(name: str, module: nn.Module) -> Any:
                return getattr(rules, kind)(**options) if isinstance(module, nn.Linear) else others(name, module)

            # By default it starts at 1, whatever is explained.
            starts = {"init_attr_grads": lambda values, _: values.detach()}
            return result(tdhook("LRP", rule_mapper=mapper, **starts), net, x)

        ours = LRP(target=target(), rule_mapper=Uniform(rule))
        return Case(by_layers(net, rule, x), lambda: result(ours, net, x), in_captum and theirs, in_tdhook and tdhooks)

    return case


RULES = (
    lrp_row("epsilon", Epsilon(EPS), "EpsilonRule", ("EpsilonRule", {"epsilon": EPS})),
    lrp_row("gamma", Gamma(0.5, EPS), "GammaRule", None),
    lrp_row("alpha 2 beta 1", AlphaBeta(2.0, 1.0, EPS), None, ("AlphaBetaRule", {"stabilizer": EPS})),
    lrp_row(
        "z-plus",
        ZPlus(epsilon=EPS),
        "Alpha1_Beta0_Rule",
        ("AlphaBetaRule", {"alpha": 1.0, "beta": 0.0, "stabilizer": EPS}),
    ),
    lrp_row("w-square, nothing to the bias", WSquare(), None, ("WSquareRule", {"stabilizer": 1e-12})),
    lrp_row("flat", Flat(), None, ("FlatRule", {"stabilizer": 1e-12})),
)

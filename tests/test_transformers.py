"""A GPT-2 of ``transformers``, built from a configuration: named by its own paths, and right against its own hooks."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from tensordict import TensorDict
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from tdhook_rl import Compose, HookedModule
from tdhook_rl.attribution import IntegratedGradients, Saliency
from tdhook_rl.errors import InputError, MissingKeyError, SiteError
from tdhook_rl.latent import (
    ActivationAddition,
    ActivationCaching,
    ActivationPatching,
    DirectionalAblation,
    SteeringVectors,
)
from tests import seed_page

VOCABULARY, WIDTH, LAYERS = 50, 16, 11
KEYS = {"in_keys": ["input_ids"], "out_keys": ["logits"]}
WTE = "transformer.wte"


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=LAYERS, n_embd=WIDTH, n_head=2, vocab_size=VOCABULARY, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    # Larger weights than a fresh GPT-2 has, so that layers matter.
    config.initializer_range = 0.2
    return GPT2LMHeadModel(config).double().eval()


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    return gpt2()


def tokens(rows: int = 6, length: int = 5) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, length))


def batch(ids: Tensor, **entries: Tensor) -> TensorDict:
    return TensorDict({"input_ids": ids, **entries}, batch_size=len(ids))


def with_hook(module: nn.Module, hook, run):
    """Run with a plain forward hook on the user's own module: what a method should be equal to."""
    handle = module.register_forward_hook(hook)
    try:
        return run()
    finally:
        handle.remove()


def test_workflow_2(model: GPT2LMHeadModel) -> None:
    labels = torch.randint(0, 2, (40,))
    ids = tokens(40)
    ids[:, -1] = ids[:, -1] % 25 + 25 * labels  # the class is which half of the vocabulary the last token is from

    def compute_metrics(predictions, targets):
        return {"accuracy": float((predictions == targets).mean())}

    def data(rows: slice, step_type: str) -> TensorDict:
        return TensorDict({"input_ids": ids[rows], "labels": labels[rows], "step_type": step_type}, batch_size=20)

    train, test = slice(0, 20), slice(20, 40)
    manager = seed_page.run_block(
        seed_page.WORKFLOW_2,
        LogisticRegression=LogisticRegression,
        compute_metrics=compute_metrics,
        model=model,
        train_td=data(train, "fit"),
        test_td=data(test, "predict"),
    )["manager"]
    assert list(manager.fit_metrics) == [f"transformer.h.{layer}.mlp_fwd" for layer in (0, 5, 10)]
    for layer in (0, 5, 10):
        kept: list[Tensor] = []
        with_hook(
            model.transformer.h[layer].mlp, lambda m, a, o, kept=kept: kept.append(o.detach()), lambda: model(ids)
        )
        features = kept[0].reshape(40, -1).numpy()
        by_hand = LogisticRegression().fit(features[train], labels[train].numpy())
        name = f"transformer.h.{layer}.mlp_fwd"
        assert manager.fit_metrics[name]["accuracy"] == by_hand.score(features[train], labels[train].numpy())
        assert manager.predict_metrics[name]["accuracy"] == by_hand.score(features[test], labels[test].numpy())


def test_caching_equals_the_hidden_states_that_the_model_gives(model: GPT2LMHeadModel) -> None:
    ids = tokens()
    expected = model(ids, output_hidden_states=True)
    method = Compose(
        ActivationCaching("transformer.h.(0|1).mlp$", cache_key="mlp"),
        ActivationCaching(["transformer.h.3", "transformer.h[-2]", "transformer"]),
    )
    with method.prepare(model, **KEYS) as hooked:
        found = hooked(batch(ids))
    assert torch.equal(found["logits"], expected.logits)
    assert torch.equal(found["cache", "transformer.h.3"], expected.hidden_states[4])
    assert torch.equal(found["cache", "transformer.h[-2]"], expected.hidden_states[LAYERS - 1])
    assert torch.equal(found["cache", "transformer"], expected.hidden_states[-1])  # the first tensor of its output
    assert list(found["mlp"].keys()) == ["transformer.h.0.mlp", "transformer.h.1.mlp"]
    assert found["computed", "mlp"].shape == (6,)


def test_token_ids_of_any_batch_shape(model: GPT2LMHeadModel) -> None:
    ids = tokens(6)
    with ActivationCaching("transformer.h.1.mlp").prepare(model, **KEYS) as hooked:
        flat = hooked(batch(ids))["cache", "transformer.h.1.mlp"]
        by_time = hooked(TensorDict({"input_ids": ids.reshape(2, 3, 5)}, batch_size=(2, 3)))
        without = hooked(TensorDict({"input_ids": ids}))
    torch.testing.assert_close(by_time["cache", "transformer.h.1.mlp"].reshape(6, 5, WIDTH), flat)
    assert torch.equal(without["cache", "transformer.h.1.mlp"], flat)


def test_inputs_that_are_named(model: GPT2LMHeadModel) -> None:
    ids, mask = tokens(), (torch.arange(5) > 0).long().expand(6, 5)
    names = {"input_ids": "ids", "attention_mask": "mask"}
    with ActivationCaching("transformer.h.0.mlp").prepare(model, in_keys=names, out_keys=["logits"]) as hooked:
        assert hooked.in_keys == ["ids", "mask"]
        found = hooked(TensorDict({"ids": ids, "mask": mask}, batch_size=6))["logits"]
    assert torch.equal(found, model(ids, attention_mask=mask).logits)
    assert not torch.allclose(found, model(ids).logits)


def test_without_its_keys_the_error_says_what_to_pass(model: GPT2LMHeadModel) -> None:
    with ActivationCaching("transformer.h.0.mlp").prepare(model) as hooked:
        with pytest.raises(MissingKeyError, match=r"reads 'input'.*nearest: 'input_ids'.*in_keys=\[\.\.\.\]") as caught:
            hooked(batch(tokens()))
        assert "input_ids or inputs_embeds" in str(caught.value.__cause__)
    with pytest.raises(
        SiteError, match=r"GPT2LMHeadModel matches 'layers\.5\.mlp'; nearest: 'transformer\.h\.\d+\.mlp'"
    ):
        ActivationCaching("layers.5.mlp").prepare(model, **KEYS).__enter__()


@pytest.mark.parametrize("site", ["transformer.h.4", "transformer.h.4.mlp", "transformer.h.4.attn"])
@pytest.mark.parametrize("form", ["vector", "function"])
def test_steering_equals_a_plain_hook(model: GPT2LMHeadModel, site: str, form: str) -> None:
    ids, vector = tokens(), torch.randn(WIDTH, dtype=torch.float64)

    def add(module, args, output):
        return output + vector if isinstance(output, Tensor) else (output[0] + vector, *output[1:])

    if form == "vector":
        method = SteeringVectors({site: vector})
    else:
        method = SteeringVectors(modules_to_steer=[site], steer_fn=lambda k, o: o + vector)
    expected = with_hook(model.get_submodule(site), add, lambda: model(ids).logits)
    with method.prepare(model, **KEYS) as hooked:
        torch.testing.assert_close(hooked(batch(ids))["logits"], expected)
    assert not torch.allclose(expected, model(ids).logits)


def test_extracted_vectors_and_patched_activations(model: GPT2LMHeadModel) -> None:
    ids, other = tokens(), tokens()
    states, others = (model(one, output_hidden_states=True).hidden_states for one in (ids, other))
    with ActivationAddition(["transformer.h.7"]).prepare(model, **KEYS) as hooked:
        data = TensorDict({("positive", "input_ids"): ids, ("negative", "input_ids"): other[:4]})
        steer = hooked(data)["steer", "transformer.h.7"]
    torch.testing.assert_close(steer, (states[8].mean(0) - others[8][:4].mean(0)).detach())
    for layer in (2, LAYERS - 1):
        with ActivationPatching([f"transformer.h.{layer}"]).prepare(model, **KEYS) as hooked:
            found = hooked(batch(ids).set(("patched", "input_ids"), other))
        # A whole block is all that the later ones read.
        torch.testing.assert_close(found["patched", "logits"], found["logits"])
    with ActivationPatching(["transformer.h.2.mlp"]).prepare(model, **KEYS) as hooked:
        found = hooked(batch(ids).set(("patched", "input_ids"), other))["patched", "logits"]
    mlp, kept = model.transformer.h[2].mlp, []
    with_hook(mlp, lambda m, a, o: kept.append(o), lambda: model(ids))
    torch.testing.assert_close(found, with_hook(mlp, lambda m, a, o: kept[0], lambda: model(other).logits))


def test_an_ablated_direction_is_gone_after_the_block(model: GPT2LMHeadModel) -> None:
    direction = torch.randn(WIDTH, dtype=torch.float64)
    method = Compose(DirectionalAblation({"transformer.h.3": direction}), ActivationCaching("transformer.h.3"))
    with method.prepare(model, **KEYS) as hooked:
        found = hooked(batch(tokens()))["cache", "transformer.h.3"]
    assert float((found @ direction).abs().max()) < 1e-12


def test_workflow_3_on_tokens(model: GPT2LMHeadModel) -> None:
    ids, override = tokens(), torch.randn(6, 5, WIDTH, dtype=torch.float64)
    data = batch(ids)
    hooked = HookedModule.from_module(model, **KEYS)
    with hooked.run(data, target=lambda d: d["logits"][:, -1, 3]) as run:
        run.save("transformer.h.5.mlp")
        run.set("transformer.h.5.attn", override)
        run.save_grad_output("transformer.h.5.mlp")
        run.save_input("transformer.h.6.ln_1")
    leaf: list[Tensor] = []

    def replace(module, args, output):
        return (override, *output[1:])

    def keep(module, args, output):
        leaf.append(output)

    attn, mlp = model.transformer.h[5].attn, model.transformer.h[5].mlp
    logits = with_hook(attn, replace, lambda: with_hook(mlp, keep, lambda: model(ids).logits))
    torch.testing.assert_close(data["logits"], logits)
    torch.testing.assert_close(run.get("transformer.h.5.mlp", cache_key="my_key").resolve(), leaf[0])
    expected = torch.autograd.grad(logits[:, -1, 3].sum(), leaf[0])[0]
    torch.testing.assert_close(run.get_grad_output("transformer.h.5.mlp").resolve(), expected)
    with hooked.run(batch(ids)) as run:
        proxy = run.get("transformer.h.1")
        run.stop("transformer.h.1")
    torch.testing.assert_close(proxy.resolve(), model(ids, output_hidden_states=True).hidden_states[2])


def test_tokens_are_explained_through_their_embeddings(model: GPT2LMHeadModel) -> None:
    ids, baseline = tokens(3), torch.zeros(3, 5, dtype=torch.long)

    def last(targets, _):
        return TensorDict(out=targets["logits"][:, -1, 3], batch_size=targets.batch_size)

    def logit(embeddings: Tensor) -> Tensor:
        return model(inputs_embeds=embeddings).logits[..., -1, 3]

    for method in (Saliency(init_attr_targets=last), IntegratedGradients(baseline=0.0, init_attr_targets=last)):
        with method.prepare(model, **KEYS) as hooked:
            with pytest.raises(InputError, match=r"'input_ids' \(torch.int64\).*input_modules=\[path\]"):
                hooked(batch(ids))
    embeddings = model.transformer.wte(ids).detach().requires_grad_()
    with Saliency(init_attr_targets=last, input_modules=[WTE]).prepare(model, **KEYS) as hooked:
        found = hooked(batch(ids))["attr", WTE]
    torch.testing.assert_close(found, torch.autograd.grad(logit(embeddings).sum(), embeddings)[0])

    method = IntegratedGradients(
        init_attr_targets=last, input_modules=[WTE], n_steps=32, compute_convergence_delta=True
    )
    with method.prepare(model, **KEYS) as hooked:
        with pytest.raises(MissingKeyError, match=r"neutral indices.*\('baseline', 'input_ids'\)"):
            hooked(batch(ids))
        data = hooked(batch(ids).set(("baseline", "input_ids"), baseline))
    low = model.transformer.wte(baseline).detach()
    points = ((torch.arange(300, dtype=torch.float64) + 0.5) / 300)[:, None, None, None]
    path = torch.lerp(low, embeddings.detach(), points).flatten(0, 1).requires_grad_()
    slopes = torch.autograd.grad(logit(path).sum(), path)[0].reshape(300, 3, 5, WIDTH)
    expected = (embeddings - low) * slopes.mean(0)
    torch.testing.assert_close(data["attr", WTE], expected.detach(), rtol=1e-3, atol=1e-6)
    change = (logit(embeddings) - logit(low)).detach()
    torch.testing.assert_close(data["attr", WTE].sum((1, 2)) - change, data["convergence_delta"], atol=1e-9, rtol=0)
    assert float(data["convergence_delta"].abs().max()) < 1e-3 * float(change.abs().max())


def test_copies_of_a_hooked_model_travel() -> None:
    model = gpt2()  # asked for its hidden states, the model itself gets hooks that do not pickle
    ids = tokens()
    with SteeringVectors({"transformer.h.4": torch.randn(WIDTH)}).prepare(model, **KEYS) as hooked:
        expected = hooked(batch(ids))["logits"]
        for twin in (pickle.loads(pickle.dumps(hooked)), copy.deepcopy(hooked)):
            assert torch.equal(twin(batch(ids))["logits"], expected)

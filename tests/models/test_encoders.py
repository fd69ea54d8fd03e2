"""BERT, RoBERTa and ALBERT equal Hugging Face's: both heads, gradients, padding, files in both directions."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import same
from oracles import edited, error, pair, random_encoder, tree_error
from safetensors.numpy import load_file, save_file

from xylem.models import PRESETS, build, hub
from xylem.models.bert import albert
from xylem.peft import tree

pytestmark = pytest.mark.oracle

LOGITS, GRADIENTS = 1e-4, 1e-3
FAMILIES = ["bert", "roberta", "albert"]
EACH = pytest.mark.parametrize("family", FAMILIES)
SECOND = {"bert": "seq_relationship_logits", "albert": "sop_logits"}


def drawn(rng: np.random.Generator, model: Any) -> dict[str, np.ndarray]:
    """Tokens without the padding id, texts of unequal length, and the text of the pair that each token belongs to."""
    config, batch, length = model.config, 3, 17
    tokens = rng.integers(4, config.vocab_size, (batch, length)).astype(np.int32)
    real = np.arange(length)[None, :] < np.array([length, 9, 12])[:, None]
    types = (np.arange(length)[None, :] >= np.array([5, 4, 7])[:, None]).astype(np.int32)
    tokens = np.where(real, tokens, config.pad_token_id).astype(np.int32)
    return {"tokens": tokens, "segments": real.astype(np.int32), "token_types": types * (config.type_vocab_size > 1)}


def reference(model: Any, batch: dict[str, np.ndarray]) -> dict[str, Any]:
    """The reference's logits, and those of its second head where it has one, as torch tensors."""
    import torch

    ids = {name: torch.from_numpy(array.astype(np.int64)) for name, array in batch.items()}
    out = model(ids["tokens"], attention_mask=ids["segments"], token_type_ids=ids["token_types"])
    found = {"logits": getattr(out, "prediction_logits", None) if hasattr(out, "prediction_logits") else out.logits}
    kind = model.config.model_type
    return {**found, "pair_logits": getattr(out, SECOND[kind])} if kind in SECOND else found


def ours(config: Any, params: Any, batch: dict[str, np.ndarray]) -> Any:
    arguments = {name: jnp.asarray(array) for name, array in batch.items() if name != "tokens"}
    if config.embedding.token_types == 1:
        arguments.pop("token_types")
    return build(config).apply({"params": params}, jnp.asarray(batch["tokens"]), **arguments)


def apart(config: Any, params: Any, batch: dict[str, np.ndarray], expected: dict[str, Any]) -> float:
    """The worst head's error over real tokens."""
    out, real = ours(config, params, batch), batch["segments"] > 0
    errors = [error(np.asarray(out.logits)[real], expected["logits"].detach().numpy()[real])]
    if "pair_logits" in expected:
        errors.append(error(np.asarray(out.pair_logits), expected["pair_logits"].detach().numpy()))
    return max(errors)


@EACH
def test_encoder_heads_equal_hugging_face(family, rng_seed, tmp_path, proof):
    rng = np.random.default_rng(rng_seed)
    made = pair(random_encoder(rng, family), tmp_path / "hf")
    batch = drawn(rng, made.model)
    expected = reference(made.model, batch)
    faults = {
        "padding seen": (made.config, made.params, {**batch, "segments": np.ones_like(batch["segments"])}),
        "the norms exchanged": (made.config, _exchanged(made.params), batch),
    }
    for fault, arguments in faults.items():
        assert apart(*arguments, expected) > LOGITS, fault
    measured = apart(made.config, made.params, batch, expected)
    row = f"{family}: {'both heads' if family in SECOND else 'logits'}, padded"
    proof(row, type(made.model).__name__, measured, LOGITS, rng_seed, "; ".join(faults))


def _exchanged(params: dict) -> dict:
    """The tree with the two norms of a layer exchanged."""
    layers = params["layers"]
    return {**params, "layers": {**layers, "attention_norm": layers["mlp_norm"], "mlp_norm": layers["attention_norm"]}}


@EACH
def test_encoder_gradients_equal_hugging_face(family, rng_seed, tmp_path, proof):
    import torch

    rng = np.random.default_rng(rng_seed)
    made = pair(random_encoder(rng, family), tmp_path / "hf")
    batch = drawn(rng, made.model)
    real = batch["segments"] > 0
    labels = rng.integers(4, made.config.vocab_size, real.shape)
    verdicts = rng.integers(0, 2, len(real))
    made.model.zero_grad()
    expected = reference(made.model, batch)
    entropy = torch.nn.functional.cross_entropy
    loss = entropy(expected["logits"][torch.from_numpy(real)], torch.from_numpy(labels[real]))
    if "pair_logits" in expected:
        loss = loss + entropy(expected["pair_logits"], torch.from_numpy(verdicts))
    loss.backward()
    unused = {name for name, weight in made.model.named_parameters() if weight.grad is None}
    assert not unused, unused
    (scratch := tmp_path / "gradients").mkdir()
    (scratch / "config.json").write_text((made.folder / "config.json").read_text())
    slopes = {name: weight.grad.numpy() for name, weight in made.model.named_parameters()}
    save_file(slopes, scratch / "model.safetensors", metadata={"format": "pt"})

    def objective(params, shares):
        out = ours(made.config, params, batch)
        picked = jnp.take_along_axis(jax.nn.log_softmax(out.logits), jnp.asarray(labels)[..., None], -1)[..., 0]
        total = -jnp.where(real, picked, 0.0).sum() / real.sum()
        if out.pair_logits is not None:
            chosen = jnp.take_along_axis(jax.nn.log_softmax(out.pair_logits), jnp.asarray(verdicts)[:, None], -1)
            total = total - shares * chosen.mean()
        return total

    slope, theirs = jax.jit(jax.grad(objective)), hub.load(scratch)[1]
    halved = slope(made.params, 0.5) if family in SECOND else slope(_exchanged(made.params), 1.0)
    assert tree_error(halved, theirs) > GRADIENTS
    fault = "second loss halved" if family in SECOND else "norms exchanged"
    measured = tree_error(slope(made.params, 1.0), theirs)
    proof(f"{family}: gradients", f"{type(made.model).__name__}, autograd", measured, GRADIENTS, rng_seed, fault)


@EACH
def test_encoder_files_go_both_ways(family, rng_seed, tmp_path, proof):
    rng = np.random.default_rng(rng_seed)
    made = pair(random_encoder(rng, family), tmp_path / "hf")
    hub.save(tmp_path / "ours", made.config, made.params)
    assert same(hub.load(tmp_path / "ours")[1], made.params)
    again = type(made.model).from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    batch = drawn(rng, made.model)
    expected = reference(again, batch)
    wrong = edited(made.params, **{"head/bias": 1.0 + made.params["head"]["bias"]})
    assert apart(made.config, wrong, batch, expected) > LOGITS
    measured = apart(made.config, made.params, batch, expected)
    proof(f"hub.save: {family}", type(again).__name__, measured, LOGITS, rng_seed, "output bias one too large")


def test_encoders_without_heads_load_and_give_states(tmp_path):
    made = pair(random_encoder(np.random.default_rng(0), "bert"), tmp_path / "hf")
    bare = {name.removeprefix("bert."): value for name, value in load_file(tmp_path / "hf/model.safetensors").items()}
    bare = {name: value for name, value in bare.items() if not name.startswith(("cls.", "pooler."))}
    save_file(bare, tmp_path / "hf/model.safetensors", metadata={"format": "pt"})
    config, params = hub.load(tmp_path / "hf")
    assert params.keys() == made.params.keys() - {"head", "pooler", "pair_head"}
    batch = drawn(np.random.default_rng(1), made.model)
    out = ours(config, params, batch)
    assert out.logits is None and out.pair_logits is None and out.pooled is None
    assert bool((out.hidden == ours(made.config, made.params, batch).hidden).all())


@pytest.mark.parametrize("preset", [name for name in PRESETS if name.startswith(("bert", "roberta", "albert"))])
def test_encoder_presets_have_the_published_number_of_parameters(preset, tmp_path):
    import torch
    import transformers

    config = PRESETS[preset]()
    _, described = hub.describe(config)
    kind = config.family.capitalize()
    with torch.device("meta"):
        settings = getattr(transformers, f"{kind}Config")(**{k: v for k, v in described.items() if v is not None})
        trunk = getattr(transformers, f"{kind}Model")(settings)
    shapes = hub.parameter_shapes(config)
    width = config.d_model
    # RoBERTa's published figure counts a pooler that its pretraining never had.
    pooler = width * width + width if config.family == "roberta" else 0
    counted = sum(leaf.size for path, leaf in shapes.items() if not path.startswith(("head/", "pair_head/"))) + pooler
    assert counted == sum(weight.numel() for weight in trunk.parameters())
    published = {"bert_base": 109_482_240, "roberta_base": 124_645_632, "albert_base": 11_683_584}
    assert counted == published.get(preset, counted)


def test_shared_layers_repeat_one_and_adapt_apart(rng_seed):
    rng = np.random.default_rng(rng_seed)
    config = replace(albert(3, 20, 4, 31, embedding_size=7, d_ff=29), max_length=19)
    module, tokens = build(config), jnp.asarray(rng.integers(0, 31, (2, 11)), jnp.int32)
    params = module.init(jax.random.key(rng_seed), tokens)["params"]
    assert {leaf.shape[0] for leaf in jax.tree.leaves(params["layers"])} == {1}
    repeated = jax.tree.map(lambda x: jnp.concatenate([x] * 3), params["layers"])
    apart_config = replace(config, sharing="none")
    shared = module.apply({"params": params}, tokens).logits
    unshared = build(apart_config).apply({"params": {**params, "layers": repeated}}, tokens).logits
    assert bool((shared == unshared).all())
    # An adapter a layer beside the shared weights: each is its own.
    slot = {
        "down": {"kernel": jnp.zeros((3, 20, 2)), "bias": jnp.ones((3, 2))},
        "up": {"kernel": jnp.zeros((3, 2, 20)).at[1, :, :9].set(0.3), "bias": jnp.zeros((3, 20))},
    }
    adapted = {**params, "layers": {**params["layers"], "mlp_adapter": slot}}
    taps = lambda p: module.clone(taps=("block_out",)).apply({"params": p}, tokens).taps["block_out"]  # noqa: E731
    before, after = taps(params), taps(adapted)
    assert bool((before[0] == after[0]).all()) and not np.allclose(before[1], after[1])
    assert tree.count(params["layers"]) == tree.count(repeated) // 3

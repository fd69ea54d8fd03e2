"""Heads for fine-tuning equal Hugging Face's: logits, losses, gradients, files in both directions."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import change_config, same
from oracles import Pair, error, of_class, pair, random_encoder, random_gpt1, random_gpt2, tree_error
from safetensors.numpy import load_file, save_file

from xylem.errors import ConfigError
from xylem.models import build, heads, hub
from xylem.training.classification import text_classification, text_classification_with_lm, token_classification
from xylem.training.objective_config import ObjectiveConfig

pytestmark = pytest.mark.oracle

LOGITS, GRADIENTS = 1e-4, 1e-3
B, T, IGNORED = 4, 17, -100
LENGTHS = np.array([T, 9, 12, 5])
REAL = np.arange(T)[None, :] < LENGTHS[:, None]
ENCODERS = ["bert", "roberta", "albert"]
CLASSES = {"bert": "Bert", "roberta": "Roberta", "albert": "Albert", "gpt1": "OpenAIGPT", "gpt2": "GPT2"}
KINDS = {"classifier": "ForSequenceClassification", "tagger": "ForTokenClassification"}
CASES = [(family, kind) for family in ENCODERS for kind in KINDS] + [("gpt1", "classifier"), ("gpt2", "classifier")]
LOSSES = {"classifier": text_classification, "tagger": token_classification}


def random_model(rng: np.random.Generator, family: str, kind: str, labels: int) -> Any:
    """Hugging Face's class with the head, of odd sizes, every parameter random."""
    values = {"num_labels": labels, "pad_token_id": 1}
    if family in ENCODERS:
        model = random_encoder(rng, family, **values)
    else:
        model = random_gpt1(rng, **values) if family == "gpt1" else random_gpt2(rng, True, **values)
    return of_class(CLASSES[family] + KINDS[kind], model, rng)


def drawn(rng: np.random.Generator, made: Pair, kind: str, labels: int) -> dict[str, np.ndarray]:
    """Padded texts, and labels of texts or of tokens, some of them ignored."""
    config, pad = made.config, made.model.config.pad_token_id
    batch = {"tokens": np.where(REAL, rng.integers(5, config.vocab_size, (B, T)), pad).astype(np.int32)}
    batch["segments"] = REAL.astype(np.int32)
    if config.embedding.token_types == 2:
        batch["token_types"] = rng.integers(0, 2, (B, T)).astype(np.int32)
    if kind == "classifier":
        return batch | {"labels": rng.integers(0, labels, B).astype(np.int32), "weights": np.ones(B, np.float32)}
    kept = REAL & (rng.random((B, T)) < 0.8)
    marked = np.where(kept, rng.integers(0, labels, (B, T)), IGNORED).astype(np.int32)
    return batch | {"labels": marked, "weights": kept.astype(np.float32)}


def reference(model: Any, batch: dict[str, np.ndarray]) -> Any:
    """The reference's output with its own loss."""
    import torch

    names = {"input_ids": "tokens", "attention_mask": "segments", "token_type_ids": "token_types", "labels": "labels"}
    return model(**{n: torch.from_numpy(batch[o].astype(np.int64)) for n, o in names.items() if o in batch})


def slopes(made: Pair, scratch: Path) -> dict:
    """The reference's gradients, laid out as our tree by ``hub`` itself."""
    scratch.mkdir()
    (scratch / "config.json").write_text((made.folder / "config.json").read_text())
    found = {name: weight.grad.numpy() for name, weight in made.model.named_parameters()}
    save_file(found, scratch / "model.safetensors", metadata={"format": "pt"})
    return hub.load(scratch)[1]


def ours(made: Pair, params: Any, batch: dict[str, np.ndarray], kind: str) -> np.ndarray:
    arguments = {name: jnp.asarray(batch[name]) for name in ("segments", "token_types") if name in batch}
    out: Any = build(made.config).apply({"params": params}, jnp.asarray(batch["tokens"]), **arguments)
    if kind == "tagger":
        return np.asarray(heads.tag(params, out))[REAL]
    return np.asarray(heads.classify(params, out, arguments["segments"]))


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_heads_equal_hugging_face(family, kind, rng_seed, tmp_path, proof):
    rng = np.random.default_rng(rng_seed)
    labels = int(rng.choice([2, 3, 5]))
    made = pair(random_model(rng, family, kind, labels), tmp_path / "hf")
    batch = drawn(rng, made, kind, labels)
    made.model.zero_grad()
    theirs = reference(made.model, batch)
    theirs.loss.backward()
    logits = theirs.logits.detach().numpy()
    logits = logits[REAL] if kind == "tagger" else logits

    def mean(params: Any, batch: dict[str, Any]) -> Any:
        sums = LOSSES[kind](build(made.config), ObjectiveConfig(), params, batch)
        return sums.loss / sums.weight

    loss, gradient = jax.jit(jax.value_and_grad(mean))(made.params, jax.tree.map(jnp.asarray, batch))
    head = made.params[kind]
    scaled = {**made.params, kind: {**head, "kernel": head["kernel"] * 1.1}}
    assert error(ours(made, scaled, batch, kind), logits) > LOGITS
    name, oracle = f"{family}: {kind}", type(made.model).__name__
    measured = error(ours(made, made.params, batch, kind), logits)
    proof(f"{name}, padded", oracle, measured, LOGITS, rng_seed, "head a tenth too large")
    expected = slopes(made, tmp_path / "gradients")
    halved = {**gradient, kind: jax.tree.map(lambda x: x / 2, gradient[kind])}
    assert tree_error(halved, expected) > GRADIENTS
    apart = max(tree_error(gradient, expected), error(np.asarray(loss), theirs.loss.detach().numpy()))
    proof(f"{name}, loss and gradients", f"{oracle}, autograd", apart, GRADIENTS, rng_seed, "head's gradient halved")


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_heads_are_saved_for_hugging_face(family, kind, rng_seed, tmp_path, proof):
    rng = np.random.default_rng(rng_seed)
    labels = int(rng.choice([2, 3, 5]))
    made = pair(random_model(rng, family, kind, labels), tmp_path / "hf")
    hub.save(tmp_path / "ours", made.config, made.params)
    config, params = hub.load(tmp_path / "ours")
    assert config == made.config and same(params, made.params) and heads.held(params) == (labels, kind)
    again = type(made.model).from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    again.config.pad_token_id = made.model.config.pad_token_id
    assert again.config.num_labels == labels and again.config.architectures == [type(made.model).__name__]
    batch = drawn(rng, made, kind, labels)
    logits = reference(again, batch).logits.detach().numpy()
    logits = logits[REAL] if kind == "tagger" else logits
    wrong = {**made.params, kind: {**made.params[kind], "kernel": made.params[kind]["kernel"][:, ::-1]}}
    assert error(ours(made, wrong, batch, kind), logits) > LOGITS
    measured = error(ours(made, made.params, batch, kind), logits)
    proof(f"hub.save: {family}, {kind}", type(again).__name__, measured, LOGITS, rng_seed, "labels exchanged")


def test_classification_with_auxiliary_language_modelling_equals_hugging_face(rng_seed, tmp_path, proof):
    import torch

    rng = np.random.default_rng(rng_seed)
    labels, auxiliary = int(rng.choice([2, 3, 5])), float(rng.uniform(0.3, 0.9))
    trunk = random_gpt1(rng)
    model = of_class("OpenAIGPTDoubleHeadsModel", trunk, rng)
    # Its second head has one output and a softmax over rows; with one a label it is the classifier of the paper.
    model.multiple_choice_head.summary = torch.nn.Linear(trunk.config.n_embd, labels, bias=False)
    trunk.transformer, trunk.lm_head = model.transformer, model.lm_head
    made = pair(trunk, tmp_path / "hf")
    head = model.multiple_choice_head.summary.weight
    params = {**made.params, "classifier": {"kernel": jnp.asarray(head.detach().numpy().T)}}
    tokens = rng.integers(5, made.config.vocab_size, (B, T)).astype(np.int32)
    verdicts = rng.integers(0, labels, B).astype(np.int32)
    batch: dict[str, Any] = {"tokens": tokens, "segments": REAL.astype(np.int32)}
    batch = jax.tree.map(jnp.asarray, batch | {"labels": verdicts, "weights": np.ones(B, np.float32)})
    model.zero_grad()
    out = model(torch.from_numpy(tokens.astype(np.int64)), mc_token_ids=torch.from_numpy(LENGTHS - 1))
    entropy = torch.nn.functional.cross_entropy
    judged = entropy(out.mc_logits, torch.from_numpy(verdicts.astype(np.int64)))
    read = [
        entropy(out.logits[row, : size - 1], torch.from_numpy(tokens[row, 1:size].astype(np.int64)))
        for row, size in enumerate(LENGTHS)
    ]
    total = judged + auxiliary * sum(read) / B
    total.backward()

    def mean(params: Any, share: float) -> Any:
        sums = text_classification_with_lm(build(made.config), ObjectiveConfig(), params, batch, auxiliary=share)
        return sums.loss / sums.weight, sums.nll / sums.weight

    run = jax.jit(jax.value_and_grad(mean, has_aux=True), static_argnums=1)
    (loss, nll), gradient = run(params, auxiliary)
    expected = slopes(made, tmp_path / "gradients") | {"classifier": {"kernel": head.grad.numpy().T}}
    assert tree_error(run(params, 0.9 * auxiliary)[1], expected) > GRADIENTS
    values = error(np.array([loss, nll]), np.array([total.item(), judged.item()]))
    measured = max(values, tree_error(gradient, expected))
    row = "gpt1: classification and its auxiliary objective, loss and gradients"
    proof(row, "OpenAIGPTDoubleHeadsModel, autograd", measured, GRADIENTS, rng_seed, "lambda a tenth smaller")


def test_a_tagger_of_an_old_release_loads_without_the_pooler_it_stored(rng_seed, tmp_path):
    made = pair(random_model(np.random.default_rng(rng_seed), "bert", "tagger", 3), tmp_path / "hf")
    stored = load_file(tmp_path / "hf/model.safetensors")
    width = made.config.d_model
    stored |= {"bert.pooler.dense.weight": np.ones((width, width), np.float32)}
    stored |= {"bert.pooler.dense.bias": np.ones(width, np.float32)}
    save_file(stored, tmp_path / "hf/model.safetensors", metadata={"format": "pt"})
    assert same(hub.load(tmp_path / "hf")[1], made.params)


def test_a_head_of_other_labels_than_its_config_says_is_named(rng_seed, tmp_path):
    pair(random_model(np.random.default_rng(rng_seed), "albert", "classifier", 3), tmp_path / "hf")
    change_config(tmp_path / "hf", id2label={"0": "no", "1": "yes"}, label2id={"no": 0, "yes": 1})
    with pytest.raises(ConfigError, match=r"classifier/kernel: .3, \d+. is not possible; classifier.weight"):
        hub.load(tmp_path / "hf")

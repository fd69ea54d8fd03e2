"""BART and T5 equal Hugging Face's, the original Transformer torch's: logits, gradients, caches, packing, files."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import same
from oracles import error, pair, random_seq2seq, tree_error
from safetensors.numpy import save_file

from xylem.models import PRESETS, build, hub
from xylem.models.config import Seq2SeqConfig
from xylem.models.conversion import unflatten
from xylem.models.vanilla import vanilla
from xylem.sharding import param_specs

pytestmark = pytest.mark.oracle

LOGITS, GRADIENTS = 1e-4, 1e-3
EACH = pytest.mark.parametrize("family", ["bart", "t5", "t5_1_1"])
B, S, T = 3, 13, 17


def drawn(rng: np.random.Generator, config: Any) -> dict[str, np.ndarray]:
    """Sources of unequal length, and targets."""
    real = np.arange(S)[None, :] < np.array([S, 7, 10])[:, None]
    tokens = np.where(real, rng.integers(4, config.vocab_size, (B, S)), 1).astype(np.int32)
    targets = rng.integers(4, config.vocab_size, (B, T)).astype(np.int32)
    return {"tokens": tokens, "segments": real.astype(np.int32), "decoder_tokens": targets}


def reference(model: Any, batch: dict[str, np.ndarray]) -> Any:
    import torch

    ids = {name: torch.from_numpy(array.astype(np.int64)) for name, array in batch.items()}
    names = {"input_ids": "tokens", "attention_mask": "segments", "decoder_input_ids": "decoder_tokens"}
    return model(**{theirs: ids[name] for theirs, name in names.items()}).logits


def ours(config: Any, params: Any, batch: dict[str, np.ndarray]) -> Any:
    arguments = {name: jnp.asarray(array) for name, array in batch.items()}
    tokens, targets = arguments.pop("tokens"), arguments.pop("decoder_tokens")
    return build(config).apply({"params": params}, tokens, targets, **arguments).logits


def without_cross(params: dict) -> dict:
    """The tree whose decoder reads nothing of the source."""
    layers = params["decoder"]["layers"]
    cross = layers["cross_attention"]
    mute = {**cross, "output": jax.tree.map(jnp.zeros_like, cross["output"])}
    return {**params, "decoder": {**params["decoder"], "layers": {**layers, "cross_attention": mute}}}


@EACH
def test_seq2seq_logits_equal_hugging_face(family, rng_seed, tmp_path, proof):
    rng = np.random.default_rng(rng_seed)
    made = pair(random_seq2seq(rng, family), tmp_path / "hf")
    batch = drawn(rng, made.config)
    expected = reference(made.model, batch).detach().numpy()
    faults = {
        "source not read": (without_cross(made.params), batch),
        "padding seen": (made.params, {**batch, "segments": np.ones_like(batch["segments"])}),
    }
    for fault, arguments in faults.items():
        assert error(ours(made.config, *arguments), expected) > LOGITS, fault
    measured = error(ours(made.config, made.params, batch), expected)
    proof(f"{family}: logits, padded sources", type(made.model).__name__, measured, LOGITS, rng_seed, "; ".join(faults))


@EACH
def test_seq2seq_gradients_equal_hugging_face(family, rng_seed, tmp_path, proof):
    import torch

    rng = np.random.default_rng(rng_seed)
    made = pair(random_seq2seq(rng, family), tmp_path / "hf")
    batch = drawn(rng, made.config)
    labels = rng.integers(4, made.config.vocab_size, (B, T))
    made.model.zero_grad()
    logits = reference(made.model, batch)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(labels).flatten()).backward()
    (scratch := tmp_path / "gradients").mkdir()
    (scratch / "config.json").write_text((made.folder / "config.json").read_text())
    slopes = {name: weight.grad.numpy() for name, weight in made.model.named_parameters() if weight.grad is not None}
    save_file(slopes, scratch / "model.safetensors", metadata={"format": "pt"})

    @jax.jit
    def slope(params, labels):
        def objective(params):
            scores = jax.nn.log_softmax(ours(made.config, params, batch))
            return -jnp.take_along_axis(scores, labels[..., None], axis=-1).mean()

        return jax.grad(objective)(params)

    theirs = hub.load(scratch)[1]
    assert tree_error(slope(made.params, jnp.asarray(np.roll(labels, 1, axis=1))), theirs) > GRADIENTS
    measured = tree_error(slope(made.params, jnp.asarray(labels)), theirs)
    oracle = f"{type(made.model).__name__}, autograd"
    proof(f"{family}: gradients", oracle, measured, GRADIENTS, rng_seed, "labels shifted by one")


@EACH
def test_seq2seq_files_go_both_ways(family, rng_seed, tmp_path, proof):
    rng = np.random.default_rng(rng_seed)
    made = pair(random_seq2seq(rng, family), tmp_path / "hf")
    hub.save(tmp_path / "ours", made.config, made.params)
    assert same(hub.load(tmp_path / "ours")[1], made.params)
    again = type(made.model).from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    batch = drawn(rng, made.config)
    expected = reference(again, batch).detach().numpy()
    assert error(ours(made.config, without_cross(made.params), batch), expected) > LOGITS
    measured = error(ours(made.config, made.params, batch), expected)
    proof(f"hub.save: {family}", type(again).__name__, measured, LOGITS, rng_seed, "source not read")


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_seq2seq_decodes_step_by_step(family, rng_seed, tmp_path, proof):
    rng = np.random.default_rng(rng_seed)
    made = pair(random_seq2seq(rng, family), tmp_path / "hf")
    module, batch = build(made.config), {name: jnp.asarray(x) for name, x in drawn(rng, made.config).items()}
    full = ours(made.config, made.params, batch)
    targets = batch["decoder_tokens"]
    step = jax.jit(lambda cache, ids: module.apply({"params": made.params}, None, ids, cache=cache))
    cache = module.start(made.params, batch["tokens"], T, batch["segments"])
    parts = []
    for start, stop in [(0, 6), *((t, t + 1) for t in range(6, T))]:
        out = step(cache, targets[:, start:stop])
        cache, parts = out.cache, [*parts, out.logits]
    assert cache.lengths.tolist() == [T] * B
    rows = jnp.array([2, 0, 0])
    back = step(cache.select(rows).rewind(jnp.full(B, 6)), targets[rows, 6:8]).logits
    assert error(back, full[rows, 6:8]) <= 1e-5
    unpadded = module.start(made.params, batch["tokens"], T, None)
    assert error(step(unpadded, targets[:, :6]).logits, full[:, :6]) > 1e-5
    measured = error(jnp.concatenate(parts, axis=1), full)
    proof(f"{family}: token by token", "the full forward pass", measured, 1e-5, rng_seed, "source's padding remembered")


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_packed_pairs_read_as_if_alone(family, rng_seed, tmp_path):
    rng = np.random.default_rng(rng_seed)
    made = pair(random_seq2seq(rng, family), tmp_path / "hf")
    tokens, targets = (jnp.asarray(rng.integers(4, made.config.vocab_size, (1, n)), jnp.int32) for n in (S, T))
    sources = jnp.array([[1] * 5 + [2] * 8])
    goals = jnp.array([[1] * 9 + [2] * 8])
    module = build(made.config)
    run = lambda *args, **kwargs: module.apply({"params": made.params}, *args, **kwargs).logits  # noqa: E731
    packed = run(tokens, targets, segments=sources, decoder_segments=goals)
    for number in (1, 2):
        source, goal = np.flatnonzero(sources[0] == number), np.flatnonzero(goals[0] == number)
        assert error(packed[0, goal], run(tokens[:, source], targets[:, goal])[0]) <= 1e-5
    moved = run(tokens.at[0, 0].set((tokens[0, 0] + 1) % 9 + 4), targets, segments=sources, decoder_segments=goals)
    assert bool((moved[0, 9:] == packed[0, 9:]).all()) and not np.allclose(moved[0, :9], packed[0, :9])


def test_original_transformer_equals_torch(rng_seed, proof):
    import torch

    rng = np.random.default_rng(rng_seed)
    torch.manual_seed(rng_seed)
    heads, depth, width = 3, 2, 15
    config = vanilla(depth, width, heads, vocab_size=37, max_length=29, dropout=0.0)
    encoder, decoder = (
        replace(config.encoder, d_ff=23, norm_eps=1e-3),
        replace(config.decoder, d_ff=23, norm_eps=1e-3),
    )
    config = replace(config, encoder=encoder, decoder=decoder)
    options = {"dim_feedforward": 23, "dropout": 0.0, "batch_first": True, "layer_norm_eps": 1e-3}
    sides = (
        torch.nn.TransformerEncoder(
            torch.nn.TransformerEncoderLayer(width, heads, **options), depth, enable_nested_tensor=False
        ),
        torch.nn.TransformerDecoder(torch.nn.TransformerDecoderLayer(width, heads, **options), depth),
    )
    table = torch.randn(37, width) / width**0.5
    for side in sides:
        for weight in side.parameters():
            torch.nn.init.normal_(weight, std=0.3)
    params = unflatten(_from_torch(sides, table))
    batch = {"tokens": rng.integers(0, 37, (B, S)), "decoder_tokens": rng.integers(0, 37, (B, T))}
    batch = {name: ids.astype(np.int32) for name, ids in batch.items()}

    def embedded(ids, sines):
        position, column = np.arange(ids.shape[1])[:, None], np.arange(width)[None]
        angle = position / 10_000 ** (2 * (column // 2) / width)
        waves = np.where(column % 2 == 0, np.sin(angle), np.cos(angle)) * sines
        return table[torch.from_numpy(ids.astype(np.int64))] * width**0.5 + torch.from_numpy(waves.astype(np.float32))

    def expected(sines):
        memory = sides[0](embedded(batch["tokens"], sines))
        ahead = torch.nn.Transformer.generate_square_subsequent_mask(T)
        states = sides[1](embedded(batch["decoder_tokens"], sines), memory, tgt_mask=ahead)
        return (states @ table.T).detach().numpy()

    logits = ours(config, params, batch)
    assert error(logits, expected(0.0)) > LOGITS
    proof("transformer: logits", "torch.nn.Transformer", error(logits, expected(1.0)), LOGITS, rng_seed, "no sinusoids")


def _from_torch(sides: Any, table: Any) -> dict[str, np.ndarray]:
    """Our paths from ``torch.nn.TransformerEncoder`` and ``TransformerDecoder``, layer by layer, by hand."""
    flat: dict[str, list[np.ndarray]] = {}

    def put(path: str, weight: Any) -> None:
        array = weight.detach().numpy()
        flat.setdefault(path, []).append(array.T if path.endswith("kernel") else array)

    def attention(prefix: str, layer: Any) -> None:
        for name, kernel, bias in zip(
            ("query", "key", "value"), layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3), strict=True
        ):
            put(f"{prefix}/{name}/kernel", kernel)
            put(f"{prefix}/{name}/bias", bias)
        put(f"{prefix}/output/kernel", layer.out_proj.weight)
        put(f"{prefix}/output/bias", layer.out_proj.bias)

    def norm(prefix: str, layer: Any) -> None:
        put(f"{prefix}/scale", layer.weight)
        put(f"{prefix}/bias", layer.bias)

    for side, stack in zip(("encoder", "decoder"), sides, strict=True):
        for layer in stack.layers:
            at = f"{side}/layers"
            attention(f"{at}/attention", layer.self_attn)
            norm(f"{at}/attention_norm", layer.norm1)
            if side == "decoder":
                attention(f"{at}/cross_attention", layer.multihead_attn)
                norm(f"{at}/cross_attention_norm", layer.norm2)
            norm(f"{at}/mlp_norm", layer.norm3 if side == "decoder" else layer.norm2)
            for name, linear in (("up", layer.linear1), ("down", layer.linear2)):
                put(f"{at}/mlp/{name}/kernel", linear.weight)
                put(f"{at}/mlp/{name}/bias", linear.bias)
    return {"embed/embedding": table.numpy(), **{path: np.stack(arrays) for path, arrays in flat.items()}}


@pytest.mark.parametrize("preset", [name for name in PRESETS if isinstance(PRESETS[name](), Seq2SeqConfig)])
def test_seq2seq_presets_have_the_published_number_of_parameters(preset):
    import torch
    import transformers

    config = PRESETS[preset]()
    shapes = hub.parameter_shapes(config)
    counted = sum(leaf.size for leaf in shapes.values())
    param_specs(unflatten(shapes))  # a rule for each of them
    if config.family == "transformer":  # 1706.03762, table 3, in millions, as printed there
        assert counted / 1e6 == pytest.approx({"transformer_base": 65, "transformer_big": 213}[preset], rel=0.04)
        return
    _, described = hub.describe(config)
    settings = {name: value for name, value in described.items() if value is not None}
    name = config.family.capitalize()
    with torch.device("meta"):
        kind, settings_of = (
            getattr(transformers, f"{name}ForConditionalGeneration"),
            getattr(transformers, f"{name}Config"),
        )
        theirs = sum(weight.numel() for weight in kind(settings_of(**settings)).parameters())
    untied = config.vocab_size * config.d_model if config.head == "untied" else 0  # transformers ties new models
    assert counted == theirs + untied
    assert counted == {"bart_base": 139_420_416}.get(preset, counted)

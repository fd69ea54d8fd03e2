"""Each method against Hugging Face's peft: from the same numbers the same logits, and the same gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from operations import apart
from oracles import pair, random_encoder, random_gpt2, random_llama, random_seq2seq, random_tokens, with_small_queries

from xylem.models import build
from xylem.models.conversion import flatten
from xylem.models.families import FAMILIES, NAMES
from xylem.models.settings import Compute
from xylem.peft import calls, config
from xylem.peft.tree import combine, partition
from xylem.sharding import path_name

# What peft itself calls.
OLD = ("`is_gradient_checkpointing` is deprecated", "`past_key_values` is deprecated")
pytestmark = [
    pytest.mark.oracle,
    *(pytest.mark.filterwarnings(f"ignore:{words}:FutureWarning") for words in OLD),
]
BAR = 1e-4
RANK, ALPHA, LENGTH = 3, 5.0, 4
EVERYWHERE = r"layers/.*/kernel|^head/kernel"
# Theirs: the modules of a target. The feed-forward's last matrix is among those of (IA)3, its inputs stretched.
LLAMA_ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
BERT_OUTPUT = r".*layer\.\d+\.output\.dense"
MODELS = {
    "llama": partial(random_llama, tied=False),
    "gpt2": partial(random_gpt2, tied=True),
    "t5": lambda rng: with_small_queries(random_seq2seq(rng, "t5_1_1")),
    "bert": partial(random_encoder, family="bert"),
}


def cases():
    """(family, method, our config, their config's class and fields)."""
    low = {"r": RANK, "lora_alpha": ALPHA}
    ours = partial(config.LoRAConfig, RANK, ALPHA)
    some = ["q_proj", "down_proj"]
    few = r"attention/query/kernel|mlp/down/kernel"
    causal = {"task_type": "CAUSAL_LM", "num_virtual_tokens": LENGTH}
    hidden = {"prefix_projection": True, "encoder_hidden_size": 6}
    crossed = r"attention/(key|value)/kernel"
    return {
        "llama LoRA": ("lora", ours(EVERYWHERE), "LoraConfig", {**low, "target_modules": LLAMA_ALL}),
        "llama rsLoRA, embeddings too": (
            "lora",
            ours(f"^embed/|{few}", scaling="stabilized"),
            "LoraConfig",
            {**low, "target_modules": [*some, "embed_tokens"], "use_rslora": True},
        ),
        "t5 LoRA": (
            "lora",
            ours(r"attention/(query|value)/kernel|mlp/down/kernel"),
            "LoraConfig",
            {**low, "target_modules": ["q", "v", "wo"]},
        ),
        "llama DoRA": (
            "dora",
            config.DoRAConfig(RANK, ALPHA, few),
            "LoraConfig",
            {**low, "target_modules": some, "use_dora": True},
        ),
        "llama (IA)3": (
            "ia3",
            config.IA3Config(),
            "IA3Config",
            {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        ),
        "t5 (IA)3": (
            "ia3",
            config.IA3Config(outputs=crossed),
            "IA3Config",
            {"target_modules": ["k", "v", "wo"], "feedforward_modules": ["wo"]},
        ),
        "bert (IA)3": (
            "ia3",
            config.IA3Config(),
            "IA3Config",
            {"target_modules": rf".*\.(key|value)|{BERT_OUTPUT}", "feedforward_modules": BERT_OUTPUT},
        ),
        "llama prompt tuning": ("prompt", config.PromptConfig(LENGTH), "PromptTuningConfig", causal),
        "gpt2 prompt tuning": ("prompt", config.PromptConfig(LENGTH), "PromptTuningConfig", causal),
        "llama prefix tuning": ("prefix", config.PrefixConfig(LENGTH, 0), "PrefixTuningConfig", causal),
        "gpt2 prefix tuning": ("prefix", config.PrefixConfig(LENGTH, 0), "PrefixTuningConfig", causal),
        "llama prefix tuning, reparametrised": (
            "prefix",
            config.PrefixConfig(LENGTH, 6),
            "PrefixTuningConfig",
            {**causal, **hidden},
        ),
    }


CASES = cases()


def reference(model, kind: str, fields: dict, rng):
    """peft's network with an adapter, every number of it random."""
    import peft
    import torch

    grafted = peft.get_peft_model(model, getattr(peft, kind)(**fields)).eval()
    with torch.no_grad():
        for name, parameter in grafted.named_parameters():
            if parameter.requires_grad:
                drawn = 0.2 * rng.standard_normal(parameter.shape).astype(np.float32)
                near = "ia3" in name or "magnitude" in name  # these begin as ones and as lengths
                parameter.copy_(parameter * (1 + torch.from_numpy(drawn)) if near else torch.from_numpy(drawn))
    return grafted


def theirs(grafted, batch, labels):
    """Logits; every number that learns, by name; and the gradients of the mean cross-entropy by them."""
    import torch

    names = {"tokens": "input_ids", "decoder_tokens": "decoder_input_ids"}
    out = grafted(**{names[name]: torch.from_numpy(np.asarray(x, np.int64)) for name, x in batch.items()})
    logits = out.logits if hasattr(out, "logits") else out.prediction_logits
    logits = logits[:, logits.shape[1] - labels.shape[1] :]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(labels).flatten()).backward()
    learned = {name: x for name, x in grafted.named_parameters() if x.requires_grad}
    values = {name: x.detach().numpy() for name, x in learned.items()}
    return logits.detach().numpy(), values, {name: x.grad.numpy() for name, x in learned.items()}


PARTS = {
    "lora_A.default.weight": "a",
    "lora_B.default.weight": "b",
    "lora_embedding_A.default": "a",
    "lora_embedding_B.default": "b",
    "lora_magnitude_vector.default.weight": "magnitude",
    "ia3_l.default": "stretch",
}


def as_ours(model_config, params, method: str, named: dict) -> dict:
    """Their numbers (or gradients) by our paths."""
    if method == "prompt":
        return {"prompt/embedding": named["prompt_encoder.default.embedding.weight"]}
    if method == "prefix":
        return as_our_prefix(named, model_config.num_layers)
    family, made = FAMILIES[NAMES.get(model_config.family, model_config.family)], {}
    shapes = flatten(params)
    for row in family.table(model_config):
        path = row.ours[0]
        modules = [family.outer(name) for name in row.names(shapes[path].shape[0])] if path in shapes else []
        for part, field in PARTS.items():
            names = [f"base_model.model.{module.removesuffix('weight')}{part}" for module in modules]
            if names and names[0] in named:
                arrays = [named[name].T for name in names]
                where = f"{path}/base" if field in "ab" and method == "dora" else path
                made[f"{where}/{field}"] = np.stack(arrays) if row.stacked else arrays[0]
    return made


def as_our_prefix(named: dict, layers: int) -> dict:
    name = "prompt_encoder.default"
    if f"{name}.transform.0.weight" in named:
        made = {"prefix/attention/embedding": named[f"{name}.embedding.weight"]}
        for number, part in ((0, "up"), (2, "down")):
            made[f"prefix/attention/{part}/kernel"] = named[f"{name}.transform.{number}.weight"].T
            made[f"prefix/attention/{part}/bias"] = named[f"{name}.transform.{number}.bias"]
        return made
    both = rearrange(named[f"{name}.embedding.weight"], "P (L two E) -> two L P E", L=layers, two=2)
    return {f"layers/attention/prefix/{part}": both[index] for index, part in enumerate(("key", "value"))}


def arguments(rng, model_config, vocabulary: int):
    """Of more tokens than a matrix has inputs: by fewer, a pair's product is not the one with gradients of its own."""
    batch = {"tokens": random_tokens(rng, vocabulary, 7, 11)}
    if model_config.family == "t5":
        batch["decoder_tokens"] = random_tokens(rng, vocabulary, 7, 9)
    last = batch.get("decoder_tokens", batch["tokens"])
    return batch, rng.integers(0, vocabulary, last.shape)


def filled(params, method: str, made, given: dict):
    """Our graft with their numbers: every array that learns, and no other."""
    learns = calls.METHODS[method].trainable(params, made)
    paths = {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(partition(params, learns)[0])}
    assert paths == given.keys()

    return placed(params, given), learns


def placed(params, given: dict):
    return jax.tree_util.tree_map_with_path(lambda where, x: jnp.asarray(given.get(path_name(where), x)), params)


def ours(model_config, method: str, params, learns, batch, labels, compile=jax.jit):
    """Logits, and gradients by path, as a CPU computes them unless told otherwise."""
    module = build(model_config.with_compute(Compute(layers="scan", kernels="fused")))
    batch, labels = jax.tree.map(jnp.asarray, (batch, labels))
    run = compile(_slopes, static_argnums=(0, 1))
    slopes, logits = run(module, method, *partition(params, learns), batch, labels)
    return np.asarray(logits), {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(slopes)}


def _slopes(module, method, trainable, frozen, batch, labels):
    def loss(trainable):
        folded = calls.METHODS[method].fold(combine(trainable, frozen))
        logits = module.apply({"params": folded}, **batch).logits
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1).mean(), logits

    return jax.grad(loss, has_aux=True)(trainable)


def wrong(method: str, given: dict, params, learns):
    """A fault of each method, and its name."""
    swapped = dict(given)
    if method == "lora":
        pairs = ("kernel/scale", "embedding/scale")  # a norm has a scale as well
        scaled = lambda where, x: x * RANK**0.5 if path_name(where).endswith(pairs) else x  # noqa: E731
        return jax.tree_util.tree_map_with_path(scaled, params), "alpha / sqrt(rank) and alpha / rank confused"
    if method == "prompt":
        swapped["prompt/embedding"] = swapped["prompt/embedding"][::-1]
        name = "the rows in the opposite order"
    elif method == "ia3":
        one, two = (
            next(path for path in given if path.endswith(f"{part}/kernel/stretch")) for part in ("key", "value")
        )
        swapped[one], swapped[two] = swapped[two], swapped[one]
        name = "keys and values stretched by each other's vectors"
    elif method == "dora":
        swapped = {path: x[::-1] if path.endswith("magnitude") else x for path, x in given.items()}
        name = "the lengths of one layer's columns in another's"
    elif "prefix/attention/embedding" in given:
        swapped["prefix/attention/down/bias"] = np.roll(swapped["prefix/attention/down/bias"], 1)
        name = "a bias of the reparametrising network one number late"
    else:
        key, value = given
        swapped[key], swapped[value] = swapped[value], swapped[key]
        name = "keys and values confused"
    return placed(params, swapped), name


@pytest.mark.parametrize("case", CASES)
def test_the_same_numbers_give_the_same_logits_and_gradients(case, rng_seed, proof, tmp_path):
    method, made, kind, fields = CASES[case]
    rng = np.random.default_rng(rng_seed)
    model = MODELS[case.partition(" ")[0]](rng)
    held = pair(model, tmp_path / "base")
    batch, labels = arguments(rng, held.config, model.config.vocab_size)
    logits, values, gradients = theirs(reference(model, kind, fields, rng), batch, labels)

    grafted = calls.METHODS[method].graft(held.params, jax.random.key(0), made)
    given = as_ours(held.config, held.params, method, values)
    params, learns = filled(grafted, method, made, given)
    out, slopes = ours(held.config, method, params, learns, batch, labels)
    wanted = as_ours(held.config, held.params, method, gradients)
    error = max(apart([out], [logits]), apart(slopes, wanted, floor=1e-3))
    fault, name = wrong(method, given, params, learns)
    faulty, _ = ours(held.config, method, fault, learns, batch, labels)
    assert apart([faulty], [logits]) > 10 * BAR
    proof(f"{case}: logits and gradients", "peft 0.21", error, BAR, rng_seed, name)


def test_one_pair_for_query_key_and_value_is_three_of_ours(rng_seed, proof, tmp_path):
    """GPT-2 has one matrix for all three, and so one A: its gradient is the sum of ours."""
    rng = np.random.default_rng(rng_seed)
    model = MODELS["gpt2"](rng)
    held = pair(model, tmp_path / "base")
    batch, labels = arguments(rng, held.config, model.config.vocab_size)
    fields = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}
    logits, values, gradients = theirs(reference(model, "LoraConfig", fields, rng), batch, labels)

    made = config.LoRAConfig(RANK, ALPHA, r"attention/(query|key|value)/kernel|mlp/down/kernel")
    grafted = calls.lora(held.params, jax.random.key(0), RANK, ALPHA, made.targets)
    joined, down = (by_layer(values, name) for name in ("attn.c_attn", "mlp.c_proj"))
    given = {f"layers/mlp/down/kernel/{part}": x for part, x in down.items()}
    pieces = dict(zip(("query", "key", "value"), np.split(joined["b"], 3, axis=-1), strict=True))
    for name, piece in pieces.items():
        given |= {f"layers/attention/{name}/kernel/a": joined["a"], f"layers/attention/{name}/kernel/b": piece}
    params, learns = filled(grafted, "lora", made, given)
    out, slopes = ours(held.config, "lora", params, learns, batch, labels)
    own = {part: [slopes[f"layers/attention/{name}/kernel/{part}"] for name in pieces] for part in "ab"}
    ours_joined = {"a": sum(own["a"]), "b": jnp.concatenate(own["b"], axis=-1)}
    ours_down = {part: slopes[f"layers/mlp/down/kernel/{part}"] for part in "ab"}
    wanted = [by_layer(gradients, name) for name in ("attn.c_attn", "mlp.c_proj")]
    error = max(apart([out], [logits]), apart([ours_joined, ours_down], wanted, floor=1e-3))
    fault = {
        **given,
        "layers/attention/query/kernel/b": pieces["key"],
        "layers/attention/key/kernel/b": pieces["query"],
    }
    faulty, _ = ours(held.config, "lora", placed(params, fault), learns, batch, labels)
    assert apart([faulty], [logits]) > 10 * BAR
    proof("gpt2 LoRA: logits and gradients", "peft 0.21", error, BAR, rng_seed, "rows of query and key confused")


def by_layer(named: dict, module: str) -> dict:
    """A and B of a module of GPT-2, stacked."""
    start, made = "base_model.model.transformer.h", {}
    for part, name in (("a", "lora_A"), ("b", "lora_B")):
        names = [f"{start}.{layer}.{module}.{name}.default.weight" for layer in range(len(named))]
        made[part] = np.stack([named[name].T for name in names if name in named])
    return made


def test_the_norms_of_a_doras_columns_are_constants_to_the_gradient(rng_seed, monkeypatch, tmp_path):
    """Section 4.3 says so, and so does peft: without it the gradients differ."""
    case = "llama DoRA"
    method, made, kind, fields = CASES[case]
    rng = np.random.default_rng(rng_seed)
    held = pair(MODELS["llama"](rng), tmp_path / "base")
    batch, labels = arguments(rng, held.config, held.config.vocab_size)
    _, values, gradients = theirs(reference(held.model, kind, fields, rng), batch, labels)
    given = as_ours(held.config, held.params, method, values)
    params, learns = filled(calls.METHODS[method].graft(held.params, jax.random.key(0), made), method, made, given)
    monkeypatch.setattr(jax.lax, "stop_gradient", lambda x: x)
    anew = lambda function, **how: jax.jit(lambda *args: function(*args), **how)  # noqa: E731
    _, slopes = ours(held.config, method, params, learns, batch, labels, anew)
    assert apart(slopes, as_ours(held.config, held.params, method, gradients), floor=1e-3) > 10 * BAR

"""LoRA adapters to and from Hugging Face peft, which reads what is written here and writes what is read here."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from operations import apart
from oracles import pair, random_encoder, random_gpt2, random_llama, random_seq2seq, random_tokens, with_small_queries
from safetensors.numpy import load_file, save_file

from xylem import peft as methods
from xylem.errors import ConfigError
from xylem.models import build, hub
from xylem.models.settings import Compute
from xylem.peft.config import DoRAConfig, LoRAConfig, PrefixConfig
from xylem.peft.exchange import load_peft, save_peft
from xylem.peft.methods import lora, prefix
from xylem.sharding import path_name

OLD = ("`is_gradient_checkpointing` is deprecated", "`past_key_values` is deprecated")
pytestmark = [
    pytest.mark.oracle,
    *(pytest.mark.filterwarnings(f"ignore:{words}:FutureWarning") for words in OLD),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]
BAR = 1e-4
RANK, ALPHA = 3, 5.0


def random_model(family: str, rng):
    if family == "llama":
        return random_llama(rng, tied=False)
    if family == "gpt2":
        return random_gpt2(rng, tied=True)
    if family == "bert":
        return random_encoder(rng, "bert")
    return with_small_queries(random_seq2seq(rng, "t5_1_1"))


def batch_of(model, rng):
    names = ["input_ids", "decoder_input_ids"] if model.config.model_type == "t5" else ["input_ids"]
    return {name: random_tokens(rng, model.config.vocab_size, 2, 5 + len(names)) for name in names}


def their_logits(model, batch):
    import torch

    with torch.no_grad():
        out = model(**{name: torch.from_numpy(x.astype(np.int64)) for name, x in batch.items()})
    return (out.logits if hasattr(out, "logits") else out.prediction_logits).numpy()


def our_logits(config, params, batch):
    module = build(config.with_compute(Compute(layers="scan", kernels="plain")))
    return jax.jit(lambda params, tokens: module.apply({"params": params}, *tokens).logits)(
        params, [jnp.asarray(x) for x in batch.values()]
    )


def drawn(params, rng):
    """The tree with every number of its pairs random."""

    def draw(where, x):
        random = path_name(where).endswith(("/a", "/b"))
        return jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype) if random else x

    return jax.tree_util.tree_map_with_path(draw, params)


def reread(model, folder):
    """A copy of the base with the adapter in a folder; peft must find what it looks for, and nothing else."""
    import peft

    return peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()


FIELDS = {
    "llama": {"target_modules": ["q_proj", "down_proj", "embed_tokens", "lm_head"], "use_rslora": True},
    "gpt2": {"target_modules": ["c_attn", "mlp.c_proj", "wpe"], "fan_in_fan_out": True},
    "t5": {"target_modules": r"encoder\..*\.(q|wo)|decoder\..*\.EncDecAttention\.v"},
    "bert": {"target_modules": r".*\.(query|value)|.*layer\.\d+\.output\.dense"},
}


@pytest.mark.parametrize("family", FIELDS)
def test_what_peft_writes_is_read_and_goes_back(family, rng_seed, proof, tmp_path):
    import peft
    import torch

    rng = np.random.default_rng(rng_seed)
    model = random_model(family, rng)
    held, batch = pair(model, tmp_path / "base"), batch_of(model, rng)
    fields = {"r": RANK, "lora_alpha": ALPHA, "init_lora_weights": False, **FIELDS[family]}
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**fields)).eval()
    with torch.no_grad():
        for _, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.from_numpy(0.3 * rng.standard_normal(parameter.shape).astype(np.float32)))
    theirs.save_pretrained(tmp_path / "adapter")
    wanted = their_logits(theirs, batch)

    config, params = load_peft(tmp_path / "adapter", held.config, held.params)
    assert (config.rank, config.alpha, config.scaling == "stabilized") == (RANK, ALPHA, family == "llama")
    grafted = lora.graft(held.params, jax.random.key(0), config)
    assert jax.tree.structure(params) == jax.tree.structure(grafted)
    error = apart([our_logits(held.config, params, batch)], [wanted])

    save_peft(tmp_path / "back", held.config, params, config)
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "back"))
    assert {name for name in before if "base_layer" not in name} == after.keys()
    for name in after:
        np.testing.assert_array_equal(after[name], before[name])
    assert apart([their_logits(reread(model, tmp_path / "back"), batch)], [wanted]) == 0.0
    wrong = config.__class__(RANK, ALPHA, config.targets, "standard" if family == "llama" else "stabilized")
    pairs = ("kernel/scale", "embedding/scale")  # a norm has a scale as well
    scaled = jax.tree_util.tree_map_with_path(
        lambda where, x: jnp.full_like(x, wrong.scale) if path_name(where).endswith(pairs) else x, params
    )
    assert apart([our_logits(held.config, scaled, batch)], [wanted]) > 10 * BAR
    row, fault = f"a LoRA adapter of {family}, read and written", "alpha / sqrt(rank) and alpha / rank confused"
    proof(row, "peft 0.21", error, BAR, rng_seed, fault)


TARGETS = {
    "llama": r"attention/(query|value)/kernel|mlp/gate/kernel|^head/kernel",
    "gpt2": r"attention/(query|value)/kernel|mlp/up/kernel",
    "t5": r"decoder/layers/attention/query/kernel",
    "bert": r"attention/output/kernel",
}


@pytest.mark.parametrize("scaling", ["standard", "stabilized"])
@pytest.mark.parametrize("family", TARGETS)
def test_what_is_written_is_read_by_peft_and_comes_back(family, scaling, rng_seed, tmp_path):
    """GPT-2's pairs of query and value become one of three times the rank, and these two again."""
    rng = np.random.default_rng(rng_seed)
    model = random_model(family, rng)
    held, batch = pair(model, tmp_path / "base"), batch_of(model, rng)
    config = LoRAConfig(RANK, ALPHA, TARGETS[family], scaling)
    params = drawn(lora.graft(held.params, jax.random.key(0), config), rng)
    save_peft(tmp_path / "adapter", held.config, params, config)
    read = reread(model, tmp_path / "adapter")
    expected = our_logits(held.config, methods.merge(params), batch)
    assert apart([their_logits(read, batch)], [expected]) <= BAR
    held_by_peft = {name.replace(".default", "") for name, _ in read.named_parameters() if "lora_" in name}
    assert held_by_peft == load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()

    found, back = load_peft(tmp_path / "adapter", held.config, held.params)
    assert found.scale == pytest.approx(config.scale)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    size = sum(file.stat().st_size for file in (tmp_path / "adapter").iterdir())
    assert size < 60_000, "the adapter alone"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A base, and a folder with an adapter of its queries."""
    folder = tmp_path_factory.mktemp("written")
    held = pair(random_llama(np.random.default_rng(0), tied=True), folder / "base")
    config = LoRAConfig(RANK, ALPHA, "query/kernel")
    params = lora.graft(held.params, jax.random.key(0), config)
    save_peft(folder / "adapter", held.config, params, config)
    return held, config, params, folder / "adapter"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": "all"}, "bias"),
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "LOHA"}, "peft_type"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa'"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"something_new": True}, "something_new"),
        ({"rank_pattern": {"q_proj": 5}}, "rank_pattern: 5"),
        ({"alpha_pattern": {r"layers\.0\..*q_proj": 7}}, "alpha_pattern: 7"),
        ({"r": 5}, "rank_pattern: 5"),
        ({"r": 0}, "r: 0"),
        ({"lora_alpha": "much"}, "lora_alpha: 'much'"),
        ({"use_rslora": 1}, "use_rslora: 1"),
    ],
)
def test_an_adapter_that_asks_for_more_is_refused(changes, message, written, tmp_path):
    held, _, _, folder = written
    copied = folder_like(folder, tmp_path / "changed")
    settings = json.loads((folder / "adapter_config.json").read_text())
    (copied / "adapter_config.json").write_text(json.dumps(settings | changes))
    with pytest.raises(ConfigError, match=message):
        load_peft(copied, held.config, held.params)


def folder_like(folder, new):
    new.mkdir()
    for file in folder.iterdir():
        (new / file.name).write_bytes(file.read_bytes())
    return new


@pytest.mark.parametrize(
    "fault", ["no A", "no layer", "another module", "another width", "a pickle", "a changed table"]
)
def test_damaged_arrays_are_refused(fault, written, tmp_path):
    held, _, _, folder = written
    copied = folder_like(folder, tmp_path / "changed")
    arrays = load_file(folder / "adapter_model.safetensors")
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight".format
    if fault in ("no A", "no layer"):
        arrays = {
            name: x for name, x in arrays.items() if name not in ([first("A")] + [first("B")] * (fault != "no A"))
        }
        message = "must have its A and B in every layer"
    elif fault == "another module":
        arrays["base_model.model.model.layers.0.self_attn.x_proj.lora_A.weight"] = np.zeros((3, 4), np.float32)
        message = "no place for layers.0.self_attn.x_proj.lora_A.weight"
    elif fault == "another width":
        arrays = {name: x[:, :-1] if "lora_A" in name else x for name, x in arrays.items()}
        message = "A and B of this network have shapes"
    elif fault == "a changed table":
        table = np.asarray(held.params["embed"]["embedding"]) + 1
        arrays["base_model.model.model.embed_tokens.base_layer.weight"] = table
        message = "made with another base"
    else:
        (copied / "adapter_model.safetensors").rename(copied / "adapter_model.bin")
        message = "is a pickle"
    if fault != "a pickle":
        save_file({name: np.ascontiguousarray(x) for name, x in arrays.items()}, copied / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=message):
        load_peft(copied, held.config, held.params)


def test_what_peft_has_no_place_for_is_not_written(written, tmp_path):
    held, config, params, folder = written
    new = tmp_path / "new"

    def refused(message, params, config=config, to=new):
        with pytest.raises(ConfigError, match=message):
            save_peft(to, held.config, params, config)
        assert not new.exists()

    refused("must not exist yet", params, to=folder)
    refused("lora_config: 'DoRAConfig'", params, DoRAConfig(RANK, ALPHA, "query"))
    refused("none of them has a pair", held.params)
    refused("another rank or scale", params, LoRAConfig(RANK, ALPHA + 1))
    refused("layers/attention/prefix/key", prefix.graft(params, jax.random.key(0), PrefixConfig(2, 0)))
    refused("one pair, and no other graft", methods.ia3(params, jax.random.key(0)))
    tied = LoRAConfig(RANK, ALPHA, "^embed/")
    refused("the table is shared", lora.graft(held.params, jax.random.key(0), tied), tied)


def test_biases_beside_stretched_weights_are_saved_and_merged_with_them(rng_seed, tmp_path):
    """(IA)3 stretches keys and values, their biases included; the hub writes what the network computes."""
    held = pair(random_encoder(np.random.default_rng(rng_seed), "bert"), tmp_path / "base")
    noise = lambda x: x * (1 + 0.3 * jax.random.normal(jax.random.key(rng_seed), x.shape))  # noqa: E731
    params = jax.tree_util.tree_map_with_path(
        lambda where, x: noise(x) if path_name(where).endswith("/stretch") else x,
        methods.ia3(held.params, jax.random.key(0)),
    )
    merged = methods.merge(params)
    hub.save(tmp_path / "saved", held.config, params)
    jax.tree.map(np.testing.assert_array_equal, hub.load(tmp_path / "saved")[1], merged)
    attention, own = merged["layers"]["attention"], held.params["layers"]["attention"]
    assert apart([attention["key"]["bias"]], [own["key"]["bias"]]) > 1e-3
    np.testing.assert_array_equal(attention["query"]["bias"], own["query"]["bias"])
    assert apart(methods.unmerge(merged, params), params) <= 1e-6

"""GGUF files of the LLaMA family: names, axes, rotary order, quantized blocks, metadata and what is refused."""

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from oracles import error, our_logits, random_llama, random_tokens, reference_logits
from small import with_positions

from xylem.errors import ConfigError
from xylem.models import hub, llama
from xylem.models.config import RopeScaling
from xylem.models.conversion import flatten

# Their name for each tensor, by Hugging Face's (llama.cpp, gguf-py/gguf/tensor_mapping.py).
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def their_name(name: str) -> str:
    name = name.removesuffix(".weight")
    if name in NAMES:
        return f"{NAMES[name]}.weight"
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.weight"


def paired(rows: np.ndarray, heads: int) -> np.ndarray:
    """Half-split rows of each head in neighbouring pairs: what llama.cpp's converter does to query and key."""
    width = rows.shape[0] // heads
    order = [
        head * width + half * width // 2 + i for head in range(heads) for i in range(width // 2) for half in (0, 1)
    ]
    return rows[order]


def write(path: Path, config, tensors: dict[str, np.ndarray], kinds: dict[str, Type] | None = None, **fields) -> Path:
    """A GGUF file of Hugging Face's tensors; ``kinds`` by GGUF name, ``fields`` change or (None) drop metadata."""
    writer = gguf.GGUFWriter(path, fields.pop("architecture", "llama"))
    metadata = {
        "block_count": config.num_layers,
        "context_length": config.max_length,
        "embedding_length": config.d_model,
        "feed_forward_length": config.d_ff,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        **{name.replace("__", "."): value for name, value in fields.items()},
    }
    for name, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(f"llama.{name}", value)
        elif isinstance(value, str):
            writer.add_string(f"llama.{name}", value)
        elif value is not None:
            writer.add_uint32(f"llama.{name}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", config.norm_eps)
    writer.add_float32("llama.rope.freq_base", config.positions.rope_theta)
    for name, tensor in tensors.items():
        theirs = name if name == "rope_freqs.weight" else their_name(name)
        heads = {"q": config.num_heads, "k": config.num_kv_heads}
        if ".attn_q." in theirs or ".attn_k." in theirs:
            tensor = paired(tensor, heads[theirs.split("attn_")[1][0]])
        kind = (kinds or {}).get(theirs, Type.F32)
        writer.add_tensor(theirs, gguf.quantize(np.ascontiguousarray(tensor), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny(**values):
    config = llama.llama(2, 6 * 14, 6, 2, 37, 53, 45, rope_theta=2345.0, norm_eps=3e-5, head="tied")
    return replace(config, **{"d_model": 22, **values})


def random_tensors(config, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors under Hugging Face's names and shapes."""
    rng = np.random.default_rng(seed)
    d, f, q, k = config.d_model, config.d_ff, *(n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
    shapes = {"model.embed_tokens": (config.vocab_size, d), "model.norm": (d,)}
    layer = {"input_layernorm": (d,), "post_attention_layernorm": (d,), "self_attn.q_proj": (q, d)}
    layer |= {"self_attn.k_proj": (k, d), "self_attn.v_proj": (k, d), "self_attn.o_proj": (d, q)}
    layer |= {"mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)}
    for i in range(config.num_layers):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    if config.head == "untied":
        shapes["lm_head"] = (config.vocab_size, d)
    return {f"{name}.weight": rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_gguf_floats_arrive_exactly(head, tmp_path):
    config = tiny(head=head)
    tensors = random_tensors(config)
    found, params = hub.load(write(tmp_path / "model.gguf", config, tensors))
    assert replace(found, init=config.init) == config
    flat = flatten(params)
    for i in range(config.num_layers):
        prefix = f"model.layers.{i}."
        for ours, theirs in {"query": "q", "key": "k", "value": "v", "output": "o"}.items():
            kernel = tensors[f"{prefix}self_attn.{theirs}_proj.weight"].T
            np.testing.assert_array_equal(flat[f"layers/attention/{ours}/kernel"][i], kernel)
        for name in ("gate", "up", "down"):
            np.testing.assert_array_equal(
                flat[f"layers/mlp/{name}/kernel"][i], tensors[f"{prefix}mlp.{name}_proj.weight"].T
            )
        scale = tensors[f"{prefix}post_attention_layernorm.weight"]
        np.testing.assert_array_equal(flat["layers/mlp_norm/scale"][i], scale)
    np.testing.assert_array_equal(flat["embed/embedding"], tensors["model.embed_tokens.weight"])
    assert ("head/kernel" in flat) == (head == "untied")


@pytest.mark.parametrize("kind", [Type.F16, Type.BF16, Type.Q8_0, Type.Q4_1, Type.Q5_0])
def test_gguf_quantized_blocks_become_their_floats(kind, tmp_path):
    config = tiny(d_model=64, d_ff=96)
    tensors = random_tensors(config)
    kinds = {their_name(name): kind for name, tensor in tensors.items() if tensor.ndim == 2 and "o_proj" not in name}
    _, params = hub.load(write(tmp_path / "model.gguf", config, tensors, kinds))
    floats = lambda tensor: gguf.dequantize(gguf.quantize(tensor, kind), kind)  # noqa: E731
    flat = flatten(params)
    np.testing.assert_array_equal(flat["embed/embedding"], floats(tensors["model.embed_tokens.weight"]))
    query = floats(tensors["model.layers.1.self_attn.q_proj.weight"])
    np.testing.assert_array_equal(flat["layers/attention/query/kernel"][1], query.T)
    down = floats(tensors["model.layers.0.mlp.down_proj.weight"])
    np.testing.assert_array_equal(flat["layers/mlp/down/kernel"][0], down.T)


def test_gguf_blocks_of_any_size_give_the_same_tree(tmp_path, monkeypatch):
    config = tiny()
    file = write(tmp_path / "model.gguf", config, random_tensors(config))
    whole = flatten(hub.load(file)[1])
    monkeypatch.setattr("xylem.models.conversion.BLOCK_BYTES", 200)
    for path, leaf in flatten(hub.load(file)[1]).items():
        np.testing.assert_array_equal(leaf, whole[path])


@pytest.mark.oracle
@pytest.mark.parametrize("tied", [True, False])
def test_gguf_logits_equal_those_of_the_network_it_was_made_of(tied, rng_seed, tmp_path, proof):
    rng = np.random.default_rng(rng_seed)
    model = random_llama(rng, tied)
    model.save_pretrained(tmp_path / "hf")
    config = hub.load(tmp_path / "hf")[0]
    tensors = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    found, params = hub.load(write(tmp_path / "model.gguf", config, tensors))
    tokens = random_tokens(rng, config.vocab_size)
    reference = reference_logits(model, tokens)
    counts = {"attention__head_count": config.num_heads, "attention__head_count_kv": config.num_kv_heads}
    one_head = replace(config, num_heads=1, num_kv_heads=1)
    faulty = hub.load(write(tmp_path / "faulty.gguf", one_head, tensors, **counts))[1]
    assert error(our_logits(config, faulty, tokens), reference) > 1e-4
    measured = error(our_logits(found, params, tokens), reference)
    row = f"hub.load: GGUF, {'tied' if tied else 'untied'} head"
    proof(row, "LlamaForCausalLM", measured, 1e-4, rng_seed, "rotary rows paired across heads")


def their_factors(config, scaling: RopeScaling) -> np.ndarray:
    """What llama.cpp's converter stores for LLaMA 3.1: the divisor of each rotary frequency, case by case."""
    factors = []
    for i in range(config.head_dim // 2):
        wavelength = 2 * np.pi * config.positions.rope_theta ** (2 * i / config.head_dim)
        turns = scaling.original_max_length / wavelength
        if turns > scaling.high_frequency_factor:
            factors.append(1.0)
        elif turns < scaling.low_frequency_factor:
            factors.append(scaling.factor)
        else:
            width = scaling.high_frequency_factor - scaling.low_frequency_factor
            smooth = (turns - scaling.low_frequency_factor) / width
            factors.append(1.0 / ((1.0 - smooth) / scaling.factor + smooth))
    return np.array(factors, np.float32)


def test_gguf_rotary_scaling_is_recognised_from_its_factors(tmp_path):
    scaling = RopeScaling(8.0, 1.0, 4.0, 8192)
    config = with_positions(tiny(head_dim=64), rope_theta=5e5)
    factors = their_factors(config, scaling)
    assert {1.0, 8.0} < set(factors.tolist())
    tensors = random_tensors(config)
    file = write(tmp_path / "model.gguf", config, {**tensors, "rope_freqs.weight": factors})
    assert hub.load(file)[0] == replace(with_positions(config, rope_scaling=scaling), init=llama.initializers(2))
    odd = write(tmp_path / "odd.gguf", config, {**tensors, "rope_freqs.weight": factors[::-1]})
    refused(odd, "not scaled as LLaMA 3.1's are")


def refused(file: Path, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        hub.load(file)


@pytest.mark.parametrize(
    "fields, match",
    [
        ({"architecture": "mamba"}, "general.architecture: 'mamba'"),
        ({"block_count": None}, "llama.block_count: None"),
        ({"block_count": 3}, r"lacks blk\.2\.attn_k\.weight"),
        ({"block_count": 1}, r"no place for blk\.1\.attn_k\.weight"),
        ({"rope__scaling__type": "yarn"}, "llama.rope.scaling.type: 'yarn'"),
        ({"rope__scaling__factor": 2}, "llama.rope.scaling.factor: 2"),
        ({"expert_count": 8}, "llama.expert_count: 8"),
        ({"rope__dimension_count": 4}, "llama.rope.dimension_count: 4"),
        ({"attention__head_count_kv": [2, 3]}, r"llama.attention.head_count_kv: \[2, 3\]"),
        ({"feed_forward_length": 36}, r"layers/mlp/gate/kernel: \(37, 22\)"),
    ],
)
def test_gguf_refuses_what_it_does_not_implement(fields, match, tmp_path):
    config = tiny()
    refused(write(tmp_path / "model.gguf", config, random_tensors(config), **fields), match)


@pytest.mark.parametrize("damage", ["absent", "empty", "magic", "text", "header", "truncated", "no_embedding"])
def test_gguf_refuses_damaged_files_by_path(damage, tmp_path):
    config = tiny()
    tensors = random_tensors(config)
    if damage == "no_embedding":
        del tensors["model.embed_tokens.weight"]
    file = write(tmp_path / "model.gguf", config, tensors)
    content = file.read_bytes()
    changed = {
        "empty": b"",
        "magic": b"GGML" + content[4:],
        "text": b"GGUF, but only in name",
        "header": content[:60] + b"\xff" * 40 + content[100:],
        "truncated": content[: len(content) // 2],
    }
    file.unlink() if damage == "absent" else file.write_bytes(changed.get(damage, content))
    refused(file, "model.gguf' is not possible" if damage != "no_embedding" else "token_embd.weight")

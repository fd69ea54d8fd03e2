"""A real model from outside: SmolLM2-135M-Instruct, whose GGUF file ships inside a Python package."""

import warnings
from itertools import islice

import jax
import numpy as np
import pytest
from oracles import edited, error, our_logits, reference_logits
from small import with_positions

from xylem.data import tokenizers
from xylem.data.config import DataConfig
from xylem.data.corpora import open_corpus
from xylem.data.pretrained import pretrained
from xylem.generation.sampling import Sampling, generate
from xylem.models import PRESETS, build, hub

LOGITS = 1e-4
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
WINDOWS, LENGTH = 4, 512

# config.json of HuggingFaceTB/SmolLM2-135M-Instruct, written out: nothing here comes from our reading of the file.
PUBLISHED = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def file():
    return pretrained("smollm2")


@pytest.fixture(scope="module")
def ours(file):
    return hub.load(file)


@pytest.fixture(scope="module")
def tokenizer(file):
    return tokenizers.load(file)


@pytest.fixture(scope="module")
def prompt(tokenizer):
    return tokenizer.encode(tokenizer.apply_chat_template(QUESTION), parse_special=True)[None]


@pytest.fixture(scope="module")
def reference(file):
    """LlamaForCausalLM with the file's dequantized tensors, named and reordered here by hand."""
    import gguf
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    names = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    names |= {f"attn_{ours}": f"self_attn.{theirs}_proj" for ours, theirs in zip("qkv", "qkv", strict=True)}
    names |= {"attn_output": "self_attn.o_proj"} | {
        f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")
    }
    state = {}
    for tensor in gguf.GGUFReader(file).tensors:
        value = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tuple(int(n) for n in reversed(tensor.shape)))
        kind = tensor.name.split(".")[-2]
        if kind in ("attn_q", "attn_k"):
            # Stored: (head, pair, which of the pair); Hugging Face: (head, which of the pair, pair).
            value = value.reshape(-1, 32, 2, 576).transpose(0, 2, 1, 3).reshape(-1, 576)
        if tensor.name.startswith("blk."):
            name = f"model.layers.{tensor.name.split('.')[1]}.{names[kind]}.weight"
        else:
            name = {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}[kind]
        state[name] = torch.from_numpy(np.array(value))
    model = LlamaForCausalLM(LlamaConfig(**PUBLISHED)).eval()
    lacking = model.load_state_dict(state, strict=False)
    assert lacking.missing_keys == ["lm_head.weight"] and not lacking.unexpected_keys
    model.tie_weights()
    return model


def test_smollm2_is_its_preset(ours):
    config, params = ours
    assert config == PRESETS["smollm2"]()
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 134_515_008


def test_smollm2_answers_paris(ours, tokenizer, prompt):
    config, params = ours
    sampling = Sampling(max_new_tokens=16, temperature=0.0, stop=tokenizer.stop)
    answer = generate(build(config), params, prompt.tolist(), sampling, jax.random.key(0))
    assert "Paris" in tokenizer.decode(answer.tokens[0])


@pytest.mark.oracle
def test_smollm2_logits(ours, reference, prompt, rng_seed, proof):
    config, params = ours
    expected = reference_logits(reference, prompt)
    kernel = params["layers"]["attention"]["query"]["kernel"]
    pairs = kernel.reshape(30, 576, 9, 2, 32).swapaxes(3, 4).reshape(kernel.shape)
    left = edited(params, **{"layers/attention/query/kernel": pairs})
    assert error(our_logits(config, left, prompt), expected) > LOGITS
    measured = error(our_logits(config, params, prompt), expected)
    oracle = "LlamaForCausalLM on the same dequantized weights"
    proof("SmolLM2-135M from GGUF: logits", oracle, measured, LOGITS, rng_seed, "query rows left in rotary pairs")


@pytest.mark.oracle
@pytest.mark.slow
def test_smollm2_greedy_ids(ours, reference, tokenizer, prompt, rng_seed, proof):
    import torch

    config, params = ours
    story = tokenizer.apply_chat_template([{"role": "user", "content": "Tell me how rivers are formed."}])
    ids = tokenizer.encode(story, parse_special=True)[None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = {"do_sample": False, "max_new_tokens": 32, "min_new_tokens": 32}
        expected = reference.generate(torch.from_numpy(ids.astype(np.int64)), **settings)[0, ids.shape[1] :].numpy()
    sampling = Sampling(max_new_tokens=32, temperature=0.0)

    def differing(config):
        # The other prompt in the batch is shorter: its padding must not matter.
        rows = [prompt[0].tolist(), ids[0].tolist()]
        return np.mean(generate(build(config), params, rows, sampling, jax.random.key(0)).tokens[1] != expected)

    assert differing(with_positions(config, rope_theta=10_000.0)) > 0
    row, oracle = "SmolLM2-135M: first 32 greedy ids", "LlamaForCausalLM.generate, share that differs"
    proof(row, oracle, differing(config), 0.0, rng_seed, "rope_theta 10,000 instead of 100,000")


@pytest.mark.oracle
@pytest.mark.slow
def test_smollm2_perplexity(ours, reference, tokenizer, rng_seed, proof):
    config, params = ours
    text = "".join(islice(open_corpus(DataConfig()).splits["test"](), 3))
    tokens = tokenizer.encode(text)[: WINDOWS * LENGTH].reshape(WINDOWS, LENGTH)

    def perplexity(logits):
        logits = logits[:, :-1].astype(np.float64)
        peak = logits.max(axis=-1, keepdims=True)
        normaliser = np.log(np.exp(logits - peak).sum(axis=-1)) + peak[..., 0]
        picked = np.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
        return float(np.exp(np.mean(normaliser - picked)))

    expected = perplexity(np.concatenate([reference_logits(reference, row[None]) for row in tokens]))
    assert 29.5 < expected < 30.5

    def off(config):
        ours = perplexity(np.concatenate([our_logits(config, params, row[None]) for row in tokens]))
        print(f"perplexity: ours {ours:.5f}, reference {expected:.5f}")
        return abs(ours / expected - 1.0)

    assert off(with_positions(config, rope_theta=10_000.0)) > LOGITS
    row, oracle = "SmolLM2-135M: WikiText-2 test perplexity, 4 x 512 tokens", "LlamaForCausalLM, relative"
    proof(row, oracle, off(config), LOGITS, rng_seed, "rope_theta 10,000 instead of 100,000")


@pytest.mark.oracle
@pytest.mark.slow
def test_smollm2_saved_equals_transformers_own_reading(file, ours, prompt, tmp_path, rng_seed, proof):
    """Tensor by tensor and bit by bit: our GGUF -> tree -> safetensors against transformers' GGUF -> state dict."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config, params = ours
    hub.save(tmp_path / "hf", config, params, shard_bytes=200_000_000)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    saved = {name: value.numpy() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        described = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        read = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"]
    theirs = {name: value.numpy() for name, value in read.items()}
    keys = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings")
    assert [getattr(described, key) for key in keys] == [getattr(model.config, key) for key in keys]
    assert saved.keys() == theirs.keys()

    def differing(tensors):
        return sum(not np.array_equal(tensors[name], theirs[name]) for name in theirs) / len(theirs)

    key = "model.layers.17.self_attn.k_proj.weight"
    assert differing({**saved, key: saved[key][::-1]}) > 0
    row, oracle = "SmolLM2-135M: GGUF -> hub.save", "transformers' GGUF reader, share of tensors that differ"
    proof(row, oracle, differing(saved), 0.0, rng_seed, "rows of one key kernel reversed")
    assert error(our_logits(config, params, prompt), reference_logits(model, prompt)) <= LOGITS

"""A real encoder from outside: all-MiniLM-L6-v2, a BERT without heads that ships inside a Python package."""

import jax.numpy as jnp
import numpy as np
import pytest
from oracles import error

from xylem.data.pretrained import pretrained
from xylem.models import build, hub

pytestmark = [pytest.mark.oracle, pytest.mark.slow]

SENTENCES = ["That is a happy person", "That is a happy dog", "That is a very happy person", "Today is a sunny day"]
PUBLISHED = [0.6946, 0.9429, 0.2569]  # cosines of the first with each other one, on the model's page
BAR = 1e-5


def pooled(states: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Sentence embeddings: states averaged over real tokens, of length 1 (1_Pooling/config.json of the model)."""
    mean = (states * real[..., None]).sum(1) / real.sum(1)[:, None]
    return mean / np.linalg.norm(mean, axis=-1, keepdims=True)


def test_minilm_embeds_sentences_as_the_reference(rng_seed, proof):
    import torch
    from tokenizers import Tokenizer
    from transformers import BertModel

    folder = pretrained("minilm")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(SENTENCES)
    ids, real = (np.array([getattr(each, name) for each in encoded]) for name in ("ids", "attention_mask"))
    model = BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        mask = torch.from_numpy(real)
        reference = model(torch.from_numpy(ids), attention_mask=mask)
    config, params = hub.load(folder)
    module = build(config)

    def ours(segments):
        return module.apply({"params": params}, jnp.asarray(ids), segments=jnp.asarray(segments))

    out = ours(real)
    assert out.logits is None and error(np.asarray(out.pooled), reference.pooler_output.numpy()) <= 1e-4
    expected = pooled(reference.last_hidden_state.numpy(), real)
    embeddings = pooled(np.asarray(out.hidden), real)
    np.testing.assert_allclose(embeddings[1:] @ embeddings[0], PUBLISHED, atol=1e-4)
    assert error(pooled(np.asarray(ours(np.ones_like(real)).hidden), real), expected) > BAR
    row, oracle = "all-MiniLM-L6-v2: sentence embeddings", "BertModel on the same weights"
    proof(row, oracle, error(embeddings, expected), BAR, rng_seed, "padding seen")

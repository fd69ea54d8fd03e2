"""What T5 and BART write equals what Hugging Face's generate writes, for padded sources of unequal length."""

from typing import Any

import jax
import numpy as np
import pytest
from oracles import pair, random_seq2seq

from xylem.generation.sampling import Sampling, generate
from xylem.models import build

pytestmark = pytest.mark.oracle

LENGTHS, BUDGET = (13, 5, 9), 14


def restless(model: Any) -> Any:
    """The model made not to repeat itself, as a random one with a tied head does for ever.

    Tokens are of one norm, the last states point away from the token just read, and what is the same at every place
    (the decoder's biases, most of BART's source) is small beside the positions.
    """
    import torch

    config = model.config
    t5 = config.model_type == "t5"
    last = "decoder" if t5 else f"model.decoder.layers.{config.decoder_layers - 1}"
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in ("shared.weight", "model.shared.weight"):
                weight.mul_((1 if t5 else 3) / weight.norm(dim=1, keepdim=True))
            elif name == f"{last}.final_layer_norm.weight":
                weight.neg_()
            elif name == "model.decoder.embed_positions.weight":
                weight.mul_(2.0)
            elif name.endswith("encoder_attn.out_proj.weight"):
                weight.mul_(0.3)
            elif name.startswith("model.decoder") and name.endswith("bias"):
                weight.zero_()
    return model


def theirs(model: Any, sources: list[list[int]], pad: int, end: int | None) -> list[list[int]]:
    """Greedy ids of the reference, behind the start and before the end."""
    import torch

    longest = max(map(len, sources))
    ids = torch.tensor([source + [pad] * (longest - len(source)) for source in sources])
    mask = torch.tensor([[1] * len(source) + [0] * (longest - len(source)) for source in sources])
    settings = model.generation_config
    settings.forced_bos_token_id = settings.forced_eos_token_id = settings.bos_token_id = None
    settings.eos_token_id, settings.pad_token_id = end, pad
    settings.decoder_start_token_id = model.config.decoder_start_token_id
    settings.max_length = None
    # Without its cache, which has too few layers where the decoder has more than the encoder (transformers 5.23, T5).
    plain = {"do_sample": False, "num_beams": 1, "max_new_tokens": BUDGET, "use_cache": False}
    written = model.generate(ids, attention_mask=mask, **plain)[:, 1:].tolist()
    return [row[: row.index(end)] if end in row else row for row in written]


@pytest.mark.parametrize("family", ["t5", "t5_1_1", "bart"])
def test_greedy_ids_equal_hugging_face(family, rng_seed, tmp_path, proof):
    rng = np.random.default_rng(rng_seed)
    values = {} if family == "bart" else {"decoder_start_token_id": 3, "pad_token_id": 0}
    while True:  # until every source has a target of its own, of more than one token
        model = restless(random_seq2seq(rng, family, **values))
        pad = model.config.pad_token_id
        sources = [rng.integers(4, model.config.vocab_size, length).tolist() for length in LENGTHS]
        free = theirs(model, sources, pad, None)
        if len({*map(tuple, free)}) == len(free) and all(len(set(row)) > 1 for row in free):
            break
    made = pair(model, tmp_path / "hf")
    module = build(made.config)

    def ours(texts: list[list[int]], stop: tuple[int, ...]) -> list[list[int]]:
        sampling = Sampling(BUDGET, temperature=0.0, stop=stop)
        return [row.tolist() for row in generate(module, made.params, texts, sampling, jax.random.key(0)).tokens]

    # An end that ends some row after its first token.
    end = next(token for token in free[1] if token != free[1][0])
    expected = free + theirs(model, sources, pad, end)
    found = ours(sources, ()) + ours(sources, (end,))
    wrong = sum(one != other for one, other in zip(found, expected, strict=True))
    assert ours(sources[::-1], ()) != free
    assert 0 < len(expected[4]) < BUDGET
    row = f"{family}: greedy ids, unequal sources, an end"
    proof(row, f"{type(model).__name__}.generate", wrong, 0, rng_seed, "sources exchanged")

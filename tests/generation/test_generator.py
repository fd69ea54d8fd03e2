"""Text in, text out: a completion reads as it stands behind its prompt, whatever the decoder does to a text's start."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from xylem import models
from xylem.data import tokenizers
from xylem.generation.generator import Generator
from xylem.generation.sampling import Sampling, generate
from xylem.models.gpt import gpt
from xylem.models.settings import Compute

GREEDY = Sampling(5, temperature=0.0)
LINES = ["the tree drinks and the roots grow in the shade of the old tree"] * 20
CHAT = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %} [answer]"


@pytest.fixture(scope="module", params=["metaspace", "strip"])
def sentencepiece(request, tmp_path_factory):
    """A tokenizer as LLaMA's: "▁" for spaces, one before the text, bytes for what is unknown.

    Its decoder drops the first space of what it is given, in either of the two forms that published files have.
    """
    import tokenizers as backend
    from tokenizers import decoders, pre_tokenizers, processors, trainers

    made = backend.Tokenizer(backend.models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))], show_progress=False
    )
    made.train_from_iterator(LINES, trainer)
    strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Metaspace() if request.param == "metaspace" else decoders.Sequence(strip)
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    folder = tmp_path_factory.mktemp("tokenizer")
    described = json.loads(made.to_str())
    # Bytes are plain tokens of the vocabulary in published files; the trainer makes whatever it is told of special.
    described["added_tokens"] = [token for token in described["added_tokens"] if token["content"] in special]
    (folder / "tokenizer.json").write_text(json.dumps(described))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT})
    )
    return tokenizers.load(folder)


def always(token: int, tokenizer, more: int = 0) -> Generator:
    """A generator that writes one token for ever; its table has ``more`` rows than there are tokens."""
    config = gpt(1, 16, 2, vocab_size=tokenizer.vocab_size + more, max_length=64)
    module = models.build(dataclasses.replace(config, compute=Compute(layers="scan", kernels="plain")))
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    params["final_norm"]["bias"] = jnp.ones(16)
    params["embed"]["embedding"] = params["embed"]["embedding"].at[token].set(1.0)
    return Generator(module, params, tokenizer)


def test_generator_continues_texts_and_stops_at_the_end_of_text():
    tokenizer = tokenizers.byte_level()
    config = gpt(1, 16, 2, vocab_size=tokenizer.vocab_size, max_length=64)
    module = models.build(dataclasses.replace(config, compute=Compute(layers="scan", kernels="plain")))
    params = jax.jit(lambda key: module.init(key, jnp.zeros((1, 2), jnp.int32))["params"])(jax.random.key(0))
    texts = Generator(module, params, tokenizer)(["ab", "a longer one"], GREEDY)
    ids = [[tokenizer.end_of_text, *b"ab"], [tokenizer.end_of_text, *b"a longer one"]]
    tokens = generate(module, params, ids, GREEDY, jax.random.key(0)).tokens
    assert texts == [tokenizer.decode(each) for each in tokens]
    assert always(tokenizer.end_of_text, tokenizer)(["ab"], GREEDY) == [""]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_of_the_table_that_are_no_token_are_never_drawn(temperature):
    tokenizer = tokenizers.byte_level()
    likeliest = always(tokenizer.vocab_size + 3, tokenizer, more=9)
    (text,) = likeliest(["ab"], Sampling(5, temperature=temperature))
    assert tokenizer.encode(text).max(initial=0) < tokenizer.vocab_size
    prompts, free = [[1]], Sampling(5, temperature=temperature)
    (ids,) = generate(likeliest.module, likeliest.params, prompts, free, jax.random.key(0)).tokens
    assert (ids == tokenizer.vocab_size + 3).any(), "who asks for ids gets them all"


def test_generator_keeps_the_space_between_prompt_and_completion(sentencepiece):
    (tree,) = sentencepiece.encode("tree")
    write = always(int(tree), sentencepiece)
    assert sentencepiece.decode([tree]) == "tree", "the decoder alone drops the space"
    assert write(["the", "in the shade"], GREEDY) == [" tree" * 5] * 2
    assert write.chat(["the"], GREEDY) == [" tree" * 5]


def test_generator_writes_what_has_no_space_without_one(sentencepiece):
    piece = sentencepiece.json["model"]["vocab"]["e"]
    assert always(piece, sentencepiece)(["the tre"], GREEDY) == ["eeeee"]


@pytest.mark.parametrize("sentencepiece", ["strip"], indirect=True)
def test_decoding_behind_a_text_is_exact_where_a_character_is_cut(sentencepiece):
    snowman = [sentencepiece.json["model"]["vocab"][f"<0x{byte:02X}>"] for byte in "☃".encode()]
    before = [1, *sentencepiece.encode("the")]
    for cut in range(3):
        assert sentencepiece.decode_after([*before, *snowman[:cut]], snowman[cut:]) == "☃"
    assert sentencepiece.decode_after([*before, *snowman], []) == ""
    # One byte too many spoils the whole run, on the prompt's side too: the completion is that byte alone.
    assert sentencepiece.decode([*before, *snowman, snowman[0]]) == "<s> the" + 4 * "\ufffd"
    assert sentencepiece.decode_after([*before, *snowman], snowman[:1]) == "\ufffd"


def test_decoding_bytes_behind_a_text_is_exact_where_a_character_is_cut():
    bytewise, euro = tokenizers.byte_level(), list("€".encode())
    assert bytewise.decode_after([*b"a ", *euro[:2]], [euro[2], *b"b"]) == "€b"
    assert bytewise.decode_after([*b"a ", *euro[:2]], b"b") == "b"
    assert bytewise.decode_after([*b"a ", *euro], euro[:1]) == "\ufffd"
    assert bytewise.decode_after([], b" a") == " a"

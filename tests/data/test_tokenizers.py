"""Round trips, ids that agree with independent encoders, files from outside that are broken or hostile."""

import json
import struct

import numpy as np
import pytest

from xylem.data import tokenizers
from xylem.errors import ConfigError
from xylem.models import gguf_file

TEXT = 3 * (
    "Voilà: 2024 naïve cafés, 1 ☃ and\r\n\ttabs; <|endoftext|> is text here.  \x00 \u2028 "
    "don't \U0001d518\U0001d52b 𠮷\n"
)


@pytest.fixture(scope="module")
def trained():
    return tokenizers.train_bpe([TEXT, "the cat sat on the mat and the cat sat " * 20], 300)


def test_bytes_have_their_values_as_ids():
    made = tokenizers.byte_level()
    assert made.encode(TEXT).tolist() == list(TEXT.encode())
    assert (made.vocab_size, made.end_of_text) == (257, 256)


def test_byte_alphabet_is_that_of_the_library():
    from tokenizers.pre_tokenizers import ByteLevel

    assert sorted(tokenizers.byte_alphabet()) == sorted(ByteLevel.alphabet())


def test_characters_are_their_places_in_the_sorted_alphabet():
    made = tokenizers.characters(["cab\n", "bad"])
    assert made.encode("dab\n").tolist() == [4, 1, 2, 0]
    assert (made.vocab_size, made.end_of_text) == (6, 5)


def test_characters_refuse_another_character_by_name():
    with pytest.raises(ConfigError, match=r"no token for '☃' \(U\+2603\)"):
        tokenizers.characters(["abc"]).encode("a☃")


@pytest.mark.parametrize("kind", ["bytes", "characters", "bpe"])
def test_decoding_gives_the_text_back(kind, trained):
    made = {"bytes": tokenizers.byte_level(), "characters": tokenizers.characters([TEXT]), "bpe": trained}[kind]
    assert made.decode(made.encode(TEXT)) == TEXT
    assert made.encode("").shape == (0,)


@pytest.mark.parametrize("kind", ["bytes", "characters", "bpe"])
def test_saving_and_loading_keeps_ids_and_hash(kind, trained, tmp_path):
    made = {"bytes": tokenizers.byte_level(), "characters": tokenizers.characters([TEXT]), "bpe": trained}[kind]
    made.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        again = tokenizers.load(path)
        assert (again.hash, again.end_of_text, again.stop) == (made.hash, made.end_of_text, made.stop)
        np.testing.assert_array_equal(again.encode(TEXT), made.encode(TEXT))


def test_hash_differs_between_vocabularies(trained):
    other = tokenizers.train_bpe([TEXT, "the cat sat on the mat and the cat sat " * 20], 299)
    assert len({trained.hash, other.hash, tokenizers.byte_level().hash}) == 3


def test_hash_does_not_see_how_merges_are_written(trained):
    older = {**trained.json, "model": {**trained.json["model"]}}
    older["model"]["merges"] = [" ".join(pair) for pair in older["model"]["merges"]]
    assert tokenizers.Tokenizer(older, begin_of_text=tokenizers.END_OF_TEXT).hash == trained.hash


def test_special_tokens_in_a_text_are_text_unless_asked(trained):
    assert trained.end_of_text not in trained.encode("a<|endoftext|>b")
    assert trained.encode("a<|endoftext|>b", parse_special=True).tolist().count(trained.end_of_text) == 1


def test_long_texts_are_cut_without_changing_their_ids(monkeypatch):
    text = "It's  a \n\n test , 12 34 ;\t(so-called) é è \n = = x = = \n" * 200
    trained = tokenizers.train_bpe([text], 400)
    whole = trained.encode(text)
    monkeypatch.setattr(tokenizers, "_PIECE", 7)
    assert len(list(tokenizers.cut(text))) > 1000
    np.testing.assert_array_equal(trained.encode(text), whole)
    # The fault this guards against: a cut inside a run of spaces changes what GPT-2's expression matches.
    monkeypatch.setattr(tokenizers, "_BREAK", tokenizers.re.compile(r"(?<= )(?= )|(?<=\n)"))
    assert trained.encode(text).tolist() != whole.tolist()


def test_documents_stream_through_in_order(trained):
    documents = [f"document {i} " * (i % 5) for i in range(50)]
    expected = [trained.encode(one) for one in documents]
    for got, want in zip(trained.encode_documents(iter(documents)), expected, strict=True):
        np.testing.assert_array_equal(got, want)


def test_decoding_refuses_ids_outside(trained):
    with pytest.raises(ConfigError, match=f"ids of .* are 0 to {trained.vocab_size - 1}"):
        trained.decode([trained.vocab_size])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"model": {"type": "BPE"}}',
        b"[" * 100_000,
        b'{"model": null, "added_tokens": 3}',
    ],
)
def test_broken_tokenizer_files_are_named(content, tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        tokenizers.load(tmp_path)


def test_missing_tokenizer_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        tokenizers.load(tmp_path)


def test_tokenizer_without_end_of_text_is_refused(tmp_path):
    plain = tokenizers.describe(
        {"type": "BPE", "vocab": {"a": 0}, "merges": []}, tokenizers.BYTE_LEVEL, {"type": "Fuse"}, {}
    )
    (tmp_path / "tokenizer.json").write_text(json.dumps(plain))
    with pytest.raises(ConfigError, match="special token"):
        tokenizers.load(tmp_path)


def test_truncation_and_padding_of_a_file_are_dropped(trained, tmp_path):
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps({**trained.json, "truncation": cut}))
    assert len(tokenizers.load(tmp_path).encode(TEXT)) > 3


def test_beginning_of_text_comes_from_the_post_processor(trained, tmp_path):
    single = [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}
    template = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special}
    processor = {"type": "Sequence", "processors": [template]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({**trained.json, "post_processor": processor}))
    loaded = tokenizers.load(tmp_path)
    assert loaded.begin_of_text == loaded.end_of_text
    assert loaded.encode("a").tolist() == trained.encode("a").tolist()


CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def chatting(template):
    json_of = tokenizers.byte_level().json
    return tokenizers.Tokenizer(json_of, chat_template=template, named={"eos_token": "<|endoftext|>"}, name="chatty")


def test_chat_template_writes_the_conversation():
    made = chatting(CHAT)
    messages = [{"role": "user", "content": "Hi"}]
    assert made.apply_chat_template(messages) == "<user>Hi<|endoftext|><a>"
    assert made.apply_chat_template(messages, add_generation_prompt=False) == "<user>Hi<|endoftext|>"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{% for %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.getcwd() }}",
    ],
)
def test_chat_templates_cannot_leave_the_sandbox_or_print_tracebacks(template):
    with pytest.raises(ConfigError, match="the chat template of chatty failed"):
        chatting(template).apply_chat_template([{"role": "user", "content": "Hi"}])


def test_chat_without_template_is_refused():
    with pytest.raises(ConfigError, match="no chat template"):
        tokenizers.byte_level().apply_chat_template([])


def write_gguf(path, made, pre="gpt-2", model="gpt2", **more):
    """A GGUF file of a tokenizer's vocabulary, written by the package that defines the format."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    vocabulary = sorted(made.json["model"]["vocab"].items(), key=lambda pair: pair[1])
    tokens = [token for token, _ in vocabulary]
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token == "<|endoftext|>" else 1 for token in tokens])
    writer.add_token_merges(more.get("merges", [" ".join(pair) for pair in made.json["model"]["merges"]]))
    writer.add_eos_token_id(made.end_of_text)
    writer.add_chat_template(CHAT)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_gives_the_ids_of_the_tokenizer_it_was_made_from(trained, tmp_path):
    write_gguf(tmp_path / "a.gguf", trained)
    loaded = tokenizers.load(tmp_path / "a.gguf")
    np.testing.assert_array_equal(loaded.encode(TEXT), trained.encode(TEXT))
    assert (loaded.end_of_text, loaded.stop, loaded.begin_of_text) == (0, (0,), None)
    assert loaded.apply_chat_template([{"role": "u", "content": "?"}]) == "<u>?<|endoftext|><a>"


def test_gguf_pre_tokenizer_is_that_of_the_file(trained, tmp_path):
    write_gguf(tmp_path / "a.gguf", trained, pre="smollm")
    text = "the cat 1234"
    assert len(tokenizers.load(tmp_path / "a.gguf").encode(text)) >= len(trained.encode(text))
    loaded = tokenizers.load(tmp_path / "a.gguf")
    assert loaded.decode(loaded.encode(TEXT)) == TEXT


@pytest.mark.parametrize(
    ("fault", "words"),
    [({"model": "llama"}, "byte-level BPE"), ({"pre": "odd"}, "pre-tokenizer"), ({"merges": ["q zz"]}, "broken")],
)
def test_gguf_of_another_kind_is_refused(fault, words, trained, tmp_path):
    write_gguf(tmp_path / "a.gguf", trained, **fault)
    with pytest.raises(ConfigError, match=words):
        tokenizers.load(tmp_path / "a.gguf")


def test_gguf_cut_short_or_lying_about_sizes_is_refused(trained, tmp_path, rng_seed):
    file = tmp_path / "a.gguf"
    write_gguf(file, trained)
    whole = file.read_bytes()
    rng = np.random.default_rng(rng_seed)
    for end in [0, 3, 20, *rng.integers(24, len(whole) // 2, 10).tolist()]:
        file.write_bytes(whole[:end])
        with pytest.raises(ConfigError, match=r"a\.gguf"):
            tokenizers.load(file)
    for count in (2**63, 2**40):
        file.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"k", 9, 4, count))
        with pytest.raises(ConfigError, match=r"a\.gguf"):
            gguf_file.header(file)


def test_gguf_metadata_agrees_with_the_package_that_defines_the_format(trained, tmp_path):
    import gguf

    write_gguf(tmp_path / "a.gguf", trained)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    theirs = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert gguf_file.header(tmp_path / "a.gguf")[0] == theirs


@pytest.mark.oracle
def test_smollm2_ids_agree_with_transformers(proof, rng_seed, tmp_path):
    """The vocabulary, pre-tokenizer and chat template of a real GGUF file, against transformers' reading of it."""
    import warnings

    from xylem.data.pretrained import pretrained

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoTokenizer

        file = pretrained("smollm2")
        theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ours = tokenizers.load(file)
    rng = np.random.default_rng(rng_seed)
    # transformers drops the pre-tokenizer a GGUF file names, which parts numerals from a space before them; only beyond
    # ASCII does that show (" ³"), so those are left out.
    beyond = [number for number in range(0xA1, 0x250) if not chr(number).isnumeric()]
    noise = ["".join(map(chr, rng.choice([*range(32, 127), *beyond, 0x2603, 10, 9], 60))) for _ in range(50)]
    texts = [TEXT.replace("<|endoftext|>", ""), "In 1984, 3.14159 and 007; don't  stop", *noise]
    wrong = sum(ours.encode(text).tolist() != theirs(text).input_ids for text in texts)
    unsplit = {**tokenizers.BYTE_LEVEL, "use_regex": False}
    faulty = tokenizers.Tokenizer({**ours.json, "pre_tokenizer": unsplit})
    assert sum(faulty.encode(text).tolist() != theirs(text).input_ids for text in texts) > 0
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = ours.apply_chat_template(messages)
    assert prompt == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.encode(prompt, parse_special=True).tolist() == theirs(prompt).input_ids
    proof("SmolLM2 tokenizer from GGUF", "transformers, share of texts that differ", wrong / len(texts), 0.0, rng_seed,
          "text not split into words before merging")  # fmt: skip


@pytest.mark.parametrize(("kind", "first"), [("RobertaProcessing", "<s>"), ("BertProcessing", "[CLS]")])
def test_the_first_token_of_a_text_is_read_of_older_processors_too(kind, first, tmp_path):
    """They name it ``cls``, where newer ones have a template."""
    trained = tokenizers.byte_level()
    trained.save(tmp_path / "ours")
    described, own = json.loads((tmp_path / "ours/tokenizer.json").read_text()), trained.vocab_size
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    described["added_tokens"].append({"id": own, "content": first, "special": True, **plain})
    more = {"trim_offsets": True, "add_prefix_space": False} if kind == "RobertaProcessing" else {}
    described["post_processor"] = {"type": kind, "sep": [first, own], "cls": [first, own], **more}
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))  # alone in its folder: ours says more beside it
    assert tokenizers.load(tmp_path).begin_of_text == own

"""Text to ids and back: one class over a ``tokenizers`` pipeline, whichever way the vocabulary came about.

Bytes and characters are written as the same ``tokenizer.json`` that a trained or downloaded byte-level BPE has, so
that saving, loading, hashing and the bindings to data and checkpoints know one form only.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain, takewhile
from operator import index
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import tokenizers as backend
from jaxtyping import Int32

from xylem.data import chat
from xylem.errors import ConfigError
from xylem.files import disk_full_named, read_object, write_whole

END_OF_TEXT = "<|endoftext|>"
# The token between documents goes by these names; a vocabulary with none of them names it in its config (eos_token).
_SEPARATORS = (END_OF_TEXT, "<|end_of_text|>", "<eos>", "</s>", "[SEP]")

# Byte-level BPE of GPT-2 (Radford et al. 2019, section 2.2): its regular expression is the default of ByteLevel.
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_EVERY_CHARACTER = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}

# Texts are encoded in pieces of about this many characters: all cores work on one long document, and the Rust side's
# bookkeeping (some 100 bytes a token) stays small.
_PIECE = 1 << 16
# A piece may end before a space that follows a visible ASCII character: no match of GPT-2's expression spans that
# place or looks across it, so the ids are those of the whole text.
_BREAK = re.compile(r"(?<=[!-~])(?= )")


class Tokenizer:
    """Ids for text, text for ids.

    Attributes:
        json: the ``tokenizer.json`` as an object.
        vocab_size: one more than the largest id.
        end_of_text: id of the token between documents.
        begin_of_text: id of the token the model wants first, or None.
        stop: ids that end an answer; ``end_of_text`` is among them.
        chat_template: Jinja text of the chat format, or None.
        hash: SHA-256 of the canonical ``json`` and the names of the separating tokens. Equal hashes give equal ids.
    """

    def __init__(
        self,
        description: Mapping[str, Any],
        *,
        end_of_text: str | None = None,
        begin_of_text: str | None = None,
        stop: Sequence[str] = (),
        named: Mapping[str, str] | None = None,
        chat_template: str | None = None,
        name: str = "tokenizer",
    ):
        """Build one from a ``tokenizer.json`` object.

        Args:
            description: the object; its truncation and padding are dropped, as rows are packed elsewhere.
            end_of_text: the token between documents; the usual names are tried where it is None.
            begin_of_text: the token a text starts with, if the model wants one.
            stop: tokens that end an answer.
            named: what a chat template knows as ``bos_token`` and ``eos_token``.
            chat_template: Jinja text.
            name: what error messages call this tokenizer (its path).

        Raises:
            ConfigError: ``description`` is not a tokenizer, or a named token is not in its vocabulary.
        """
        self.name = name
        self.json = {**description, "truncation": None, "padding": None}
        self._plain = _parse(self.json, name)
        self._plain.encode_special_tokens = True
        vocabulary = self._plain.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ConfigError("data.tokenizer", name, "a tokenizer with at least one token")
        self.vocab_size = max(vocabulary.values()) + 1
        separator = end_of_text or next((token for token in _SEPARATORS if token in vocabulary), None)
        tokens = {"end_of_text": separator, "begin_of_text": begin_of_text}
        for token in [separator, *([begin_of_text] if begin_of_text else []), *stop]:
            if token not in vocabulary:
                allowed = f"its vocabulary must have the special token {token or END_OF_TEXT!r}"
                raise ConfigError("data.tokenizer", name, allowed)
        self.end_of_text = vocabulary[str(separator)]
        self.begin_of_text = vocabulary[begin_of_text] if begin_of_text else None
        self.stop = tuple(dict.fromkeys([*(vocabulary[token] for token in stop), self.end_of_text]))
        self.chat_template = chat_template
        self._named = dict(named or {})
        self._config = tokens | {"stop": list(stop)}
        canonical = json.dumps([_canonical(self.json), tokens], sort_keys=True, separators=(",", ":"))
        self.hash = hashlib.sha256(canonical.encode()).hexdigest()
        self._breakable = _is_breakable(self.json)

    @cached_property
    def _special(self) -> backend.Tokenizer:
        """A second pipeline that reads special tokens in the text; apart, as the switch is a state of the object."""
        return _parse(self.json, self.name)

    def token_id(self, token: str) -> int | None:
        """The id of one token by its name, or None where the vocabulary has none such."""
        return self._plain.token_to_id(token)

    def encode(self, text: str, *, parse_special: bool = False) -> Int32[np.ndarray, " T"]:
        """The ids of one text.

        Args:
            text: any text. No token is put before or after it.
            parse_special: whether ``<|endoftext|>`` and its like in the text mean the special tokens. True for what a
                chat template wrote, False for text from outside.

        Raises:
            ConfigError: the text has a character that the vocabulary cannot spell.
        """
        return self.encode_batch([text], parse_special=parse_special)[0]

    def prompt(self, text: str) -> list[int]:
        """The ids of a text that is to be continued: behind the token that begins texts, where there is one."""
        first = [] if self.begin_of_text is None else [self.begin_of_text]
        return [*first, *self.encode(text).tolist()]

    def encode_batch(self, texts: Sequence[str], *, parse_special: bool = False) -> list[Int32[np.ndarray, " T"]]:
        """The ids of each text, encoded on all cores; see ``encode``."""
        pieces = [list(cut(text)) if self._breakable else [text] for text in texts]
        pipeline = self._special if parse_special else self._plain
        try:
            encoded = iter(pipeline.encode_batch_fast(list(chain(*pieces)), add_special_tokens=False))
        except Exception as error:
            allowed = f"it cannot spell the text: {self._unknown(texts)}"
            raise ConfigError("data.tokenizer", self.name, allowed) from error
        return [_join([np.asarray(next(encoded).ids, np.int32) for _ in of_text]) for of_text in pieces]

    def encode_documents(self, documents: Iterable[str]) -> Iterator[Int32[np.ndarray, " T"]]:
        """The ids of each document of a stream, a few megabytes of which are in memory at a time."""
        batch, characters = [], 0
        for document in documents:
            batch.append(document)
            characters += len(document)
            if characters >= 16 * _PIECE:
                yield from self.encode_batch(batch)
                batch, characters = [], 0
        yield from self.encode_batch(batch)

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of ids; exact for whatever ``encode`` gave where the vocabulary is byte-level or characters.

        Args:
            ids: ids below ``vocab_size``.

        Raises:
            ConfigError: an id outside the vocabulary.
        """
        listed = [index(i) for i in ids]
        wrong = next((i for i in listed if not 0 <= i < self.vocab_size), None)
        if wrong is not None:
            raise ConfigError("id", wrong, f"the ids of {self.name} are 0 to {self.vocab_size - 1}")
        return self._plain.decode(listed, skip_special_tokens=False)

    def decode_after(self, before: Iterable[SupportsIndex], ids: Iterable[SupportsIndex]) -> str:
        """The text of ``ids`` where they stand behind ``before``; alone it may be another: LLaMA's loses a first space.

        A character whose bytes lie on both sides belongs to ``ids``.
        """
        before, ids = list(before), list(ids)
        first, whole = self.decode(before), self.decode([*before, *ids])
        if not whole.startswith(first) and not first.endswith("\ufffd"):
            # One wrong byte in ``ids`` makes byte fallback give up the run of bytes before it too: a token parts them.
            first, whole = self.decode([self.end_of_text]), self.decode([self.end_of_text, *ids])
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, whole, strict=False)))
        return whole[shared:]

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation, to be encoded with ``parse_special=True``.

        Args:
            messages: ``{"role": ..., "content": ...}`` each.
            add_generation_prompt: end with the opening of the assistant's turn.

        Raises:
            ConfigError: there is no chat template, or it refuses the messages.
        """
        if self.chat_template is None:
            raise ConfigError("tokenizer", self.name, "it has no chat template: give plain text")
        named = {"bos_token": "", "eos_token": ""} | self._named
        return chat.render(self.chat_template, messages, add_generation_prompt, named, self.name)

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json`` into ``folder``; ``load(folder)`` reads them back."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # eos_token, bos_token and chat_template are Hugging Face's keys; the other three are ours, and decide here.
        config = {"eos_token": self._config["end_of_text"]} | self._named | self._config
        config["chat_template"] = self.chat_template
        with disk_full_named(folder):
            write_whole(folder / "tokenizer.json", json.dumps(self.json, ensure_ascii=False))
            write_whole(folder / "tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=2))

    def _unknown(self, texts: Sequence[str]) -> str:
        known = self._plain.get_vocab()
        strange = sorted({character for text in texts for character in text if character not in known})
        return f"no token for {strange[0]!r} (U+{ord(strange[0]):04X})" if strange else "the encoder failed"


def byte_level() -> Tokenizer:
    """256 bytes, whose ids are their values, and end-of-text (id 256)."""
    vocabulary = {character: value for value, character in enumerate(byte_alphabet())}
    model = {"type": "BPE", "vocab": vocabulary, "merges": []}
    description = describe(model, BYTE_LEVEL, {"type": "ByteLevel"}, {END_OF_TEXT: 256})
    return Tokenizer(description, begin_of_text=END_OF_TEXT, name="bytes")


def characters(texts: Iterable[str]) -> Tokenizer:
    """The characters that occur in ``texts``, in code point order, and end-of-text. Others cannot be spelt."""
    alphabet = sorted(set().union(*map(set, texts)))
    model = {"type": "WordLevel", "vocab": {c: i for i, c in enumerate(alphabet)}, "unk_token": "<|unknown|>"}
    special = {END_OF_TEXT: len(alphabet)}
    description = describe(model, _EVERY_CHARACTER, {"type": "Fuse"}, special)
    return Tokenizer(description, begin_of_text=END_OF_TEXT, name="characters")


def train_bpe(texts: Iterable[str], size: int) -> Tokenizer:
    """A byte-level BPE of ``size`` tokens (Sennrich et al. 2016, on bytes as in GPT-2), trained on ``texts``.

    Id 0 is end-of-text, then come the 256 bytes, then the merges by frequency. A small corpus may have fewer pairs
    than ``size`` asks for.
    """
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    pipeline = _parse(describe(empty, BYTE_LEVEL, {"type": "ByteLevel"}, {}), "bpe")
    trainer = backend.trainers.BpeTrainer(  # pyright: ignore[reportAttributeAccessIssue]
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=byte_alphabet(),
        show_progress=False,
    )
    pipeline.train_from_iterator(chain.from_iterable(map(cut, texts)), trainer)
    return Tokenizer(json.loads(pipeline.to_str()), begin_of_text=END_OF_TEXT, name=f"bpe:{size}")


def load(path: str | Path) -> Tokenizer:
    """Read a tokenizer: a ``tokenizer.json``, a folder that holds one, or a GGUF file with a byte-level BPE.

    Beside a ``tokenizer.json``, ``tokenizer_config.json`` and ``chat_template.jinja`` tell the special tokens and the
    chat template. The weights of a textgenrnn (``.hdf5``) stand for the characters that are listed beside them.

    Raises:
        ConfigError: the file is missing, broken, or of a kind that is not read; the message names it.
    """
    path = Path(path).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        allowed = "no such file; a tokenizer.json, a folder that holds one, a .gguf or a textgenrnn's .hdf5 is read"
        raise ConfigError("tokenizer", str(file), allowed)
    if file.suffix == ".gguf":
        from xylem.data import gguf_vocabulary

        return Tokenizer(**gguf_vocabulary.read(file), name=str(file))
    if file.suffix == ".hdf5":
        return _textgenrnn(file)
    description = read_object(file, "tokenizer")
    try:
        surroundings = _surroundings(file, description)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ConfigError("tokenizer", str(file), f"a tokenizer whose settings can be read ({error!r})") from error
    return Tokenizer(description, **surroundings, name=str(file))


def _textgenrnn(weights: Path) -> Tokenizer:
    """The characters of a ``NAME_weights.hdf5``, which ``NAME_vocab.json`` numbers from 1; others are 0 (utils.py)."""
    file = weights.with_name(weights.name.replace("_weights", "_vocab").replace(".hdf5", ".json"))
    vocabulary = {"<|unknown|>": 0, **read_object(file, "tokenizer")}
    start = "<s>"  # between texts (textgenrnn.py, META_TOKEN)
    numbers = sorted(number for number in vocabulary.values() if isinstance(number, int))
    if numbers != list(range(len(vocabulary))) or start not in vocabulary:
        raise ConfigError("tokenizer", str(file), f"it must number its characters from 1 on, {start!r} among them")
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<|unknown|>"}
    description = describe(model, _EVERY_CHARACTER, {"type": "Fuse"}, {start: vocabulary[start]})
    return Tokenizer(description, end_of_text=start, begin_of_text=start, name=str(file))


def _surroundings(file: Path, description: Mapping[str, Any]) -> dict[str, Any]:
    """The special tokens and the chat template that a ``tokenizer.json`` and the files beside it tell of."""
    config_file, template_file = file.with_name("tokenizer_config.json"), file.with_name("chat_template.jinja")
    config = read_object(config_file, "tokenizer") if config_file.is_file() else {}
    named = {key: text for key in ("bos_token", "eos_token") if (text := _token_text(config.get(key)))}
    template = template_file.read_text("utf-8") if template_file.is_file() else config.get("chat_template")
    if isinstance(template, list):  # several named templates: the one for chat is called "default"
        template = next((one.get("template") for one in template if one.get("name") == "default"), None)
    added = {token["content"] for token in description.get("added_tokens") or []}
    eos = named.get("eos_token")
    return {
        "end_of_text": config.get("end_of_text") or next((token for token in _SEPARATORS if token in added), eos),
        "begin_of_text": config.get("begin_of_text", _first_special(description.get("post_processor") or {})),
        "stop": config.get("stop", [eos] if eos else []),
        "named": named,
        "chat_template": template,
    }


def cut(text: str) -> Iterator[str]:
    """A long text in pieces; where GPT-2's expression (or a finer one) splits words, no token crosses a cut."""
    start = 0
    while len(text) - start > _PIECE and (found := _BREAK.search(text, start + _PIECE)):
        yield text[start : found.start()]
        start = found.start()
    yield text[start:]


def describe(model: Mapping, pre_tokenizer: Mapping, decoder: Mapping, special: Mapping[str, int]) -> dict[str, Any]:
    """A ``tokenizer.json`` object of these parts; ``special`` maps special tokens to ids."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    if decoder["type"] == "ByteLevel":
        decoder = {**BYTE_LEVEL, **decoder}
    if model["type"] == "BPE":
        blank = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
        usual = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
        model = {**dict.fromkeys(blank), **usual, **model}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": token, **flags} for token, number in special.items()],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def byte_alphabet() -> list[str]:
    """The visible character that stands for each byte in GPT-2's vocabularies, by byte value.

    Visible Latin-1 characters stand for themselves; the other 68 bytes are U+0100 onwards, in order (``encoder.py``
    of github.com/openai/gpt-2).
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


def _parse(description: Mapping[str, Any], name: str) -> backend.Tokenizer:
    """The pipeline of a ``tokenizer.json`` object."""
    try:
        return backend.Tokenizer.from_str(json.dumps(description, ensure_ascii=False))
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic on the Rust side is a BaseException
        raise ConfigError("tokenizer", name, f"not a tokenizer.json that can be used ({error})") from error


def _token_text(token: object) -> str | None:
    """The text of a token that ``tokenizer_config.json`` gives as a string or as an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) and text else None


def _first_special(processor: Mapping[str, Any]) -> str | None:
    """The token that a post-processor puts before every text, if it puts one there."""
    if processor.get("type") == "Sequence":
        return next((token for part in processor["processors"] if (token := _first_special(part))), None)
    if "cls" in processor:  # BertProcessing, RobertaProcessing: [token, id]
        return processor["cls"][0]
    first = (processor.get("single") or [{}])[0]
    return first["SpecialToken"]["id"] if "SpecialToken" in first else None


def _canonical(description: Mapping[str, Any]) -> dict[str, Any]:
    """The object with merges as pairs: older files write "a b", newer ones ["a", "b"]."""
    model = dict(description.get("model") or {})
    if "merges" in model:
        model["merges"] = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    return {**description, "model": model}


def _is_breakable(description: Mapping[str, Any]) -> bool:
    """Whether cutting a text at ``_BREAK`` cannot change its ids: known pre-tokenizers, and nothing around them."""
    top = description.get("pre_tokenizer") or {}
    parts = top.get("pretokenizers", [top])
    plain = ({"type": "Digits", "individual_digits": True}, _EVERY_CHARACTER)
    known = all(part in plain or (part.get("type"), part.get("use_regex")) == ("ByteLevel", True) for part in parts)
    prefixed = any(part.get("add_prefix_space") for part in parts)
    spaced = any(" " in token["content"] and not token["special"] for token in description.get("added_tokens") or [])
    return known and not prefixed and not spaced and description.get("normalizer") is None


def _join(arrays: list[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

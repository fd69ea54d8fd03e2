"""From a ``DataConfig`` to batches: ``prepare`` once, then ``TrainIterator`` and ``eval_batches``."""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, Int32

from xylem import files
from xylem.data import corpora, corruption, examples, progress, tokenizers
from xylem.data.config import TOKENIZER_FORMS, TOKENIZER_NAMES, DataConfig, bpe_size, cache_root
from xylem.data.examples import MakeExample
from xylem.data.ramp import BatchRamp
from xylem.errors import ConfigError

Batch = dict[str, Int32[np.ndarray, "B ..."] | Float32[np.ndarray, "B ..."]]

# Goes into the name of what is cached: raise it when tokens or windows of the same text would come out otherwise.
_FORMAT = 1
_DATASET = Path("packed_text", "1.0.0")


@dataclass(frozen=True)
class Prepared:
    """A tokenized, packed corpus on disk.

    Attributes:
        config: what was asked for.
        corpus: the text it was made of.
        key: identifies corpus text, tokenizer, window length and format; a checkpoint of the iterator carries it.
        folder: where it lies.
        tokenizer: the tokenizer of its ids.
        counts: by split, ``documents``, ``bytes`` of text, ``tokens`` of the stream (each document's end-of-text
            included) and ``windows``.
        example: what a record becomes in a batch; ``dataclasses.replace`` puts another objective's here.
    """

    config: DataConfig
    corpus: corpora.Corpus
    key: str
    folder: Path
    tokenizer: tokenizers.Tokenizer
    counts: dict[str, dict[str, int]]
    example: MakeExample = examples.next_token

    @cached_property
    def _builder(self) -> Any:
        import tensorflow_datasets as tfds

        return tfds.builder_from_directory(str(self.folder / _DATASET))

    def parts(self) -> dict[str, Any]:
        """What any prepared corpus is made of: another kind is made of it and of more."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(Prepared)}

    def source(self, split: str) -> Any:
        """Random access to a split: ``len``, ``[i]`` and ``__getitems__`` of tokens and segments, int32 (T+1,).

        Raises:
            ConfigError: there is no such split.
        """
        if split not in self.counts:
            raise ConfigError("split", split, f"allowed: {', '.join(self.counts)}", self.counts)
        return self._builder.as_data_source(split=split)

    def order(self, seed: int) -> Callable[[int], tuple[int, int]]:
        """Which record of the train split stands at a place in the order of training, and how often it stood before: a
        fresh permutation each epoch, end to end."""
        import grain

        count = len(self.source("train"))
        rows: Any = grain.MapDataset.range(count).seed(seed).shuffle().repeat()
        return lambda place: (rows[place], place // count)

    def documents(self, split: str) -> list[Int32[np.ndarray, " _"]]:
        """The ids of each document of a split, without end-of-text: the stream that was packed, all of it in memory.

        Raises:
            ConfigError: as ``source`` and ``batch``.
        """
        records = self._records(source := self.source(split), range(len(source)))
        # Every token of the stream stands once behind another, but the end-of-text that opens the first document.
        later = [(record["tokens"][1:], record["segments"][1:] > 0) for record in records]
        stream = np.concatenate([tokens[real] for tokens, real in later])
        bounds = np.flatnonzero(stream == self.tokenizer.end_of_text)
        first, *others = np.split(stream, bounds)
        return [first, *(document[1:] for document in others)]

    def batch(
        self, source: Any, rows: Sequence[int], epochs: Sequence[int] | None = None, *, seed: int = 0, pad_to: int = 0
    ) -> Batch:
        """The records ``rows`` of ``source`` as one batch, filled with zeros up to ``pad_to`` rows.

        Args:
            source: of ``source(split)``.
            rows: which records.
            epochs: how often each was read before (0 where not given): with ``seed`` and its row, what its randomness
                comes from (``corruption.generator``).
            seed: as above.
            pad_to: the number of rows of the batch, at least.

        Returns:
            the arrays of ``example``, stacked. Of packed text these are tokens, labels, segments (int32) and weights
            (float32), all (B, T). labels[t] follows tokens[t]; segments number the documents of a row from 1 and are 0
            in padding; weights are 1 where the label is a token of the corpus, else 0.

        Raises:
            ConfigError: a stored id is outside the tokenizer's vocabulary; the message names the record.
        """
        places = zip(epochs or [0] * len(rows), map(int, rows), strict=True)
        draw = [corruption.generator(seed, epoch, row) for epoch, row in places]
        made = [self.example(record, rng) for record, rng in zip(self._records(source, rows), draw, strict=True)]
        if len(made) < pad_to:
            shape = made or [self.example(self._records(source, [0])[0], corruption.generator(seed, 0, 0))]
            made += [{name: np.zeros_like(x) for name, x in shape[0].items()}] * (pad_to - len(made))
        return {name: np.stack([each[name] for each in made]) for name in made[0]}

    def _records(self, source: Any, rows: Sequence[int]) -> Sequence[Mapping[str, Any]]:
        read = source.__getitems__([int(row) for row in rows])
        most = self.tokenizer.vocab_size - 1
        for row, record in zip(rows, read, strict=True):
            tokens = record["tokens"]
            if tokens.min() < 0 or tokens.max() > most:
                allowed = f"ids are 0 to {most}; record {row} of {self.folder} is damaged"
                raise ConfigError("token id", int(max(tokens, key=abs)), allowed)
        return read


def prepare(config: DataConfig, report: files.Report = print) -> Prepared:
    """Fetch, tokenize and pack a corpus, or find it done.

    Each stage (download, tokenizer, windows) is kept in the cache when it is whole, and never before: a call that was
    killed is repeated from the last whole stage. Processes that want the same thing wait for the first.

    Args:
        config: what to prepare.
        report: takes lines of progress. With ``print`` on a terminal, stages are shown by rich instead.

    Raises:
        ConfigError: the config names something that does not exist, is broken, empty or too small.
        CheckpointError: the disk is full; nothing half-written is left.
        Failure: a package cannot be fetched.
    """
    root = cache_root(config.cache_dir)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("data.cache_dir", str(root), f"a folder that can be written ({error.strerror})") from error
    corpus = corpora.open_corpus(config, report)
    tokenizer = _tokenizer(config, corpus, root, report)
    key = _key("windows", corpus.identity, tokenizer.hash, config.sequence_length)
    folder = root / "packed" / f"{corpus.name}-{config.sequence_length}-{key}"
    with files.locked(folder.with_name(f"{folder.name}.lock"), report):
        counts = _finished(folder, tokenizer.hash)
        if counts is None:
            _build(folder, corpus, tokenizer, config.sequence_length, report)
            counts = _finished(folder, tokenizer.hash)
    if counts is None:
        raise ConfigError("data.cache_dir", str(root), f"what was just written to {folder} is not there")
    return Prepared(config, corpus, key, folder, tokenizer, counts)


def _build(folder: Path, corpus: corpora.Corpus, tokenizer: tokenizers.Tokenizer, length: int, report: Any) -> None:
    """Write the dataset, its tokenizer and, last, the manifest that makes it count as whole."""
    import tensorflow_datasets as tfds

    from xylem.data.builders import PackedText

    tfds.disable_progress_bar()
    with files.disk_full_named(folder.parent), files.whole_folder(folder) as building:
        builder = PackedText(
            corpus=corpus, tokenizer=tokenizer, sequence_length=length, report=report, data_dir=str(building)
        )
        builder.download_and_prepare()
        tokenizer.save(building / "tokenizer")
        written = sorted(path for path in building.rglob("*") if path.is_file())
        manifest = {
            "tokenizer_hash": tokenizer.hash,
            "counts": builder.counts,
            "files": {str(path.relative_to(building)): path.stat().st_size for path in written},
        }
        files.write_whole(building / "manifest.json", json.dumps(manifest, indent=2))


def _finished(folder: Path, tokenizer_hash: str) -> dict[str, dict[str, int]] | None:
    """The counts of a dataset that is whole: its manifest is there and each file has the size it names."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in manifest["files"]}
        whole = sizes == manifest["files"] and manifest["tokenizer_hash"] == tokenizer_hash
        return manifest["counts"] if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _tokenizer(config: DataConfig, corpus: corpora.Corpus, root: Path, report: Any) -> tokenizers.Tokenizer:
    """The tokenizer that ``config`` names; one made from the corpus is cached."""
    if config.tokenizer == "bytes":
        return tokenizers.byte_level()
    size = bpe_size(config.tokenizer)
    if size is None and config.tokenizer != "characters":
        if not Path(config.tokenizer).expanduser().exists():
            raise ConfigError("data.tokenizer", config.tokenizer, TOKENIZER_FORMS, TOKENIZER_NAMES)
        return tokenizers.load(config.tokenizer)
    key = _key(config.tokenizer, corpus.identity)
    folder = root / "tokenizers" / f"{corpus.name}-{config.tokenizer.replace(':', '-')}-{key}"
    with files.locked(folder.with_name(f"{folder.name}.lock"), report):
        if (folder / "tokenizer.json").is_file():
            return tokenizers.load(folder)
        with progress.stage(f"making the tokenizer {config.tokenizer} of {corpus.name}", report) as advance:
            # Characters come from every split, as in nanoGPT: an alphabet is no statistic, and this keeps it lossless.
            splits = ["train"] if size else list(corpus.splits)
            texts = progress.counted((text for split in splits for text in corpus.splits[split]()), advance)
            made = tokenizers.train_bpe(texts, size) if size else tokenizers.characters(texts)
        with files.disk_full_named(folder.parent), files.whole_folder(folder) as building:
            made.save(building)
        return tokenizers.load(folder)


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([_FORMAT, *parts]).encode()).hexdigest()[:16]


class TrainIterator:
    """An endless, shuffled, resumable stream of training batches; ``next(iterator)`` gives one.

    The order is ``Prepared.order``; batch ``step`` holds places ``step * batch_size .. (step + 1) * batch_size - 1`` of
    it, whatever the number of hosts: host h of H has every H-th of these, from place h. Batches are read ahead by one
    thread.

    With a ``ramp`` the same order is cut into steps that grow. Every batch has as many rows as the full one: its step's
    own, where ``training.step.micro_batches`` finds them in its first micro-batches, and zeros.

    In ``consecutive`` order each row of a batch goes on where the same row of the batch before it ended: the text is
    cut into ``batch_size`` parts, which are read side by side, from a place that the seed decides.
    """

    def __init__(
        self,
        prepared: Prepared,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        *,
        order: Literal["shuffled", "consecutive"] = "shuffled",
        ramp: BatchRamp | None = None,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Start at a global step.

        Args:
            prepared: what to read.
            batch_size: rows of the global batch; each host gets ``batch_size / process_count`` of them.
            seed: the order of the rows, 0 to 2**32 - 1.
            start_step: the global step of the first batch.
            order, ramp: see above; None is no ramp.
            process_index, process_count: which host of how many.

        Raises:
            ConfigError: a batch size (of a ramp: a micro-batch) that the hosts do not divide, or a seed out of range.
        """
        import grain

        source, ramp = prepared.source("train"), ramp or BatchRamp(1, 1, 1, 0)
        count, micro = len(source), batch_size // ramp.full
        _local_rows(micro, process_index, process_count)
        if not 0 <= seed < 2**32:
            raise ConfigError("seed", seed, "a whole number from 0 to 4294967295")
        growth = dataclasses.asdict(ramp) if ramp.ramp_tokens else None
        self._identity = {"dataset": prepared.key, "seed": seed, "batch_size": batch_size, "ramp": growth}
        part, first = max(1, count // batch_size), corruption.generator(seed, 0, 0).integers(count)

        def consecutive(place: int) -> tuple[int, int]:
            step, row = divmod(place, batch_size)
            return int(first + row * part + step) % count, place // count

        at = prepared.order(seed) if order == "shuffled" else consecutive

        def read(step: int) -> Batch:
            start, taken = ramp.micro_batches_before(step) * micro, ramp.micro_batches(step)
            places = range(start + process_index, start + taken * micro, process_count)
            rows, epochs = zip(*map(at, places), strict=True)  # numbers first: a batch is then one bulk read
            batch = prepared.batch(source, rows, epochs, seed=seed)
            return {name: _among(x, taken, ramp.full) for name, x in batch.items()}

        batches = grain.MapDataset.range(sys.maxsize).map(read)
        # One thread: it feeds millions of tokens a second, and leaves the cores to XLA.
        self._iterator = iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
        self.set_state(self._identity | {"step": start_step})

    def __iter__(self) -> "TrainIterator":
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """The place in the stream, fit for JSON: ``step`` is that of the batch ``next`` gives."""
        return self._identity | {"step": self._iterator.get_state()["next_index"]}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a place in the stream; no batch before it is read.

        Raises:
            ConfigError: the state belongs to another dataset, seed, batch size or ramp, whose stream is another.
        """
        for field, own in self._identity.items():
            if state.get(field) != own:
                raise ConfigError(field, own, f"the run was begun with {state.get(field)!r}: its order is another")
        if not isinstance(state.get("step"), int) or state["step"] < 0:
            raise ConfigError("step", state.get("step"), "a whole number, at least 0")
        self._iterator.set_state(self._iterator.get_state() | {"next_index": state["step"]})


def eval_batches(
    prepared: Prepared,
    split: str,
    batch_size: int,
    *,
    order: Literal["text", "consecutive"] = "text",
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Every window of a split once; the last rows of the last batches are filled with weight 0.

    In the order of the text, or ``consecutive``: as ``TrainIterator``'s, from the first window on. All hosts get the
    same number of batches; host h of H has rows h, h + H, ... of each global batch.

    Raises:
        ConfigError: no such split, or a batch size that the hosts do not divide.
    """
    source = prepared.source(split)
    local, count = _local_rows(batch_size, process_index, process_count), len(source)
    steps = -(-count // batch_size)
    for step in range(steps):
        rows = range(process_index, batch_size, process_count)
        at = [step * batch_size + row if order == "text" else row * steps + step for row in rows]
        yield prepared.batch(source, [place for place in at if place < count], pad_to=local)


def _local_rows(batch_size: int, process_index: int, process_count: int) -> int:
    if not 0 <= process_index < process_count:
        raise ConfigError("process_index", process_index, f"0 to {process_count - 1}")
    if batch_size < 1 or batch_size % process_count:
        raise ConfigError("batch_size", batch_size, f"a positive multiple of the {process_count} hosts")
    return batch_size // process_count


def _among(rows: np.ndarray, taken: int, full: int) -> np.ndarray:
    """Rows of ``taken`` micro-batches as the first of ``full`` each, zeros behind them (row r is in r % taken)."""
    each = len(rows) // taken
    cut = rows.reshape(each, taken, *rows.shape[1:])
    padded = np.pad(cut, [(0, 0), (0, full - taken)] + [(0, 0)] * (rows.ndim - 1))
    return padded.reshape(each * full, *rows.shape[1:])

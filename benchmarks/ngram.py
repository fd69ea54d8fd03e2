"""N-gram models beside nltk: seconds to count and to score; and why orders past five do not pay.

    python benchmarks/ngram.py --seconds 300 --out ngram.json
    python benchmarks/ngram.py --orders 7 --picture orders.png     # a table and a picture instead

Kneser-Ney of order 5 on WikiText-2, in tokens of its bpe:4096. Both sides count the same grams of the same first tokens
of the train split, then give the first 200 tokens of the validation split their probabilities, which must agree to
1e-12. How many first tokens: by doubling, then extrapolating, as many as nltk gets through in the seconds given, all
tries together. Each side of each try is a process of its own; Python's garbage collector is off, which only helps nltk.
Then ours alone counts the whole corpus, scores the validation split, and writes.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from xylem.data import pipeline
from xylem.data.config import DataConfig
from xylem.models import ngram
from xylem.models.ngram import NGramConfig
from xylem.training.evaluate import figures
from xylem.training.objectives import Sums
from xylem.training.plots import INK, TRAIN, VALID

ORDER, DISCOUNT, SCORED = 5, 0.75, 200
SMALLEST = 20_000  # tokens of the first try
TOLERANCE = 1e-12  # between the probabilities of the two sides, relative
PROMPTS = (" The game was released in", " In 1914 , the", " The species is")


# --- one side's process -----------------------------------------------------------------------------------------------


def ours(documents: list[np.ndarray], text: np.ndarray, config: NGramConfig) -> dict[str, Any]:
    """Seconds to count and to score, and the probabilities."""
    start = time.perf_counter()
    tree = ngram.count(documents, config)
    counted = time.perf_counter()
    contexts, tokens = ngram.predictions([text], config)
    probabilities = np.exp(ngram.log_probs(config, tree, contexts, tokens)).tolist()
    return {"count": counted - start, "score": time.perf_counter() - counted, "probabilities": probabilities}


def theirs(documents: list[np.ndarray], text: np.ndarray, config: NGramConfig) -> dict[str, Any]:
    """The same of nltk, whose words are strings."""
    from nltk.lm import KneserNeyInterpolated, Vocabulary

    def padded(document: np.ndarray) -> list[str]:
        return [str(token) for token in (*[config.end_of_text] * (ORDER - 1), *document.tolist(), config.end_of_text)]

    def grams(document: np.ndarray) -> Iterator[tuple[str, ...]]:
        words = padded(document)
        for place in range(ORDER - 1, len(words)):
            for order in range(1, ORDER + 1):
                yield tuple(words[place - order + 1 : place + 1])

    # nltk's vocabulary always has one word more than it is given, which stands for all others: here the end of text.
    known = [str(token) for token in range(config.vocab_size) if token != config.end_of_text]
    vocabulary = Vocabulary(known, unk_cutoff=1, unk_label=str(config.end_of_text))
    start = time.perf_counter()
    model = KneserNeyInterpolated(ORDER, discount=DISCOUNT, vocabulary=vocabulary)
    model.fit(grams(document) for document in documents)
    counted = time.perf_counter()
    words = padded(text)
    probabilities = [model.score(words[at], words[at - ORDER + 1 : at]) for at in range(ORDER - 1, len(words))]
    return {"count": counted - start, "score": time.perf_counter() - counted, "probabilities": probabilities}


def first_tokens(documents: list[np.ndarray], tokens: int) -> list[np.ndarray]:
    """The first documents, the last of them cut, with so many tokens together."""
    starts = np.cumsum([0, *map(len, documents)])
    return [each[: tokens - start] for each, start in zip(documents, starts, strict=False) if start < tokens]


def worker(side: str, tokens: int) -> None:
    """Print one JSON line: what ``ours`` or ``theirs`` gives, and the peak memory it took beyond that of the data."""
    import resource

    data = pipeline.prepare(DataConfig())
    documents, text = first_tokens(data.documents("train"), tokens), data.documents("validation")[0][: SCORED - 1]
    ids = data.tokenizer.vocab_size, data.tokenizer.end_of_text
    config = NGramConfig(*ids, ORDER, "kneser_ney", DISCOUNT, "unigram")
    memory = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # noqa: E731
    before = memory()
    gc.disable()
    result = {"ours": ours, "nltk": theirs}[side](documents, text, config)
    print(json.dumps({**result, "tokens": sum(map(len, documents)), "memory": memory() - before}))


def ask(side: str, tokens: int) -> dict[str, Any]:
    """Run one side in a fresh process; raises SystemExit with the end of its errors when it dies."""
    command = [sys.executable, __file__, "--worker", side, "--tokens", str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{side}, {tokens} tokens:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# --- the comparison ---------------------------------------------------------------------------------------------------


def compare(seconds: float, whole: int) -> list[dict[str, Any]]:
    """Tries of growing prefixes, nltk and ours in turn, until nltk's ``seconds`` are spent or the corpus is done."""
    row = "{:>10} {:>7} {:>9} {:>9} {:>9} {:>8} {:>8} {:>10}".format
    print(row("tokens", "side", "count, s", "score, s", "memory GB", "count x", "both x", "difference"))
    tries, tokens, left = [], SMALLEST, seconds
    while True:
        nltk, own = ask("nltk", tokens), ask("ours", tokens)
        tries.append({"nltk": nltk, "ours": own})
        spent, spent_by_us = (side["count"] + side["score"] for side in (nltk, own))
        pairs = zip(own["probabilities"], nltk["probabilities"], strict=True)
        difference = max(abs(a - b) / b if b else float(a != b) for a, b in pairs)
        ratios = f"{nltk['count'] / own['count']:.0f}", f"{spent / spent_by_us:.0f}", f"{difference:.0e}"
        for side, last in (("nltk", ("", "", "")), ("ours", ratios)):
            r = tries[-1][side]
            print(row(tokens, side, f"{r['count']:.3f}", f"{r['score']:.4f}", f"{r['memory'] / 1e9:.2f}", *last))
        if difference > TOLERANCE:
            raise SystemExit("the probabilities of the two sides are not the same")
        left -= spent
        affordable = min(whole, int(0.9 * left / spent * tokens))  # nltk's time grows in proportion
        if affordable < 1.2 * tokens:
            return tries
        # Double as long as that leaves enough for twice as much again.
        tokens = min(2 * tokens, whole) if affordable > 6 * tokens else affordable


def measure(data: pipeline.Prepared, config: NGramConfig, splits: tuple[str, ...]) -> tuple[ngram.Tree, dict[str, Any]]:
    """The tree of the whole train split; seconds to count it, its bytes and grams, and the figures of the splits."""
    documents = data.documents("train")
    start = time.perf_counter()
    tree = ngram.count(documents, config)
    result: dict[str, Any] = {"order": config.order, "count": time.perf_counter() - start}
    result["bytes"] = sum(array.nbytes for array in tree.values())
    result["grams"] = len(tree[f"grams/{config.order}/tokens"])
    for split in splits:
        documents = data.documents(split)
        start = time.perf_counter()
        score = ngram.score(config, tree, documents)
        result[split] = {"score": time.perf_counter() - start, "tokens": score.weight}
        result[split] |= figures([Sums(score.nll, score.nll, score.weight)], data.counts[split])
    return tree, result


def whole_corpus(data: pipeline.Prepared) -> dict[str, Any]:
    """Ours on everything, its discounts estimated; and what it writes."""
    config = NGramConfig(data.tokenizer.vocab_size, data.tokenizer.end_of_text, ORDER)
    tree, result = measure(data, config, ("validation",))
    on = result["validation"]
    print(
        f"\nours, whole: {data.counts['train']['tokens']:,} tokens counted in {result['count']:.1f} s, "
        f"{on['tokens']:,.0f} scored in {on['score']:.2f} s; {result['bytes'] / 1e6:.0f} MB of arrays; "
        f"validation perplexity {on['perplexity']:.2f}, {on['bits_per_byte']:.3f} bits per byte"
    )
    return {**result, "texts": write(data, config, tree)}


def write(data: pipeline.Prepared, config: NGramConfig, tree: ngram.Tree) -> list[str]:
    """Continue the prompts as a network does, printed with the tokens a second once it is compiled."""
    import jax
    import jax.numpy as jnp

    from xylem.generation.generator import Generator
    from xylem.generation.sampling import Sampling
    from xylem.models.ngram_lm import NGramLM

    generator = Generator(NGramLM(config), jax.tree.map(jnp.asarray, tree), data.tokenizer)
    sampling = Sampling(64, temperature=0.8)
    generator(PROMPTS, sampling)
    start = time.perf_counter()
    texts = generator(PROMPTS, sampling, jax.random.key(1))
    rate = sum(len(data.tokenizer.encode(text)) for text in texts) / (time.perf_counter() - start)
    print(f"ours, writing: about {rate:,.0f} tokens/s, {len(PROMPTS)} prompts together")
    for prompt, text in zip(PROMPTS, texts, strict=True):
        print(f"  {prompt}|{' '.join(text.split())}")
    return texts


# --- how much context pays --------------------------------------------------------------------------------------------


def orders(data: pipeline.Prepared, highest: int) -> list[dict[str, Any]]:
    """Perplexities by order of Kneser-Ney on what it counted and on what it did not, and of Laplace on the latter."""
    row = "{:>5} {:>12} {:>9} {:>9} {:>11} {:>11} {:>9} {:>11}".format
    print(row("order", "grams", "count, s", "MB", "train", "validation", "bits/byte", "(Laplace)"))
    rows = []
    for order in range(1, highest + 1):
        config = NGramConfig(data.tokenizer.vocab_size, data.tokenizer.end_of_text, order)
        _, result = measure(data, config, ("train", "validation"))
        _, plain = measure(data, NGramConfig(config.vocab_size, config.end_of_text, order, "laplace"), ("validation",))
        result["laplace"] = plain["validation"]
        rows.append(result)
        sizes = f"{result['grams']:,}", f"{result['count']:.1f}", f"{result['bytes'] / 1e6:.1f}"
        shown = [f"{result[name]['perplexity']:.2f}" for name in ("train", "validation", "laplace")]
        print(row(order, *sizes, *shown[:2], f"{result['validation']['bits_per_byte']:.3f}", shown[2]))
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Perplexity by order, as a PNG: what was counted, and what was not."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 4.2), dpi=150, layout="constrained", facecolor="white")
    axis = figure.subplots()
    numbers = [row["order"] for row in rows]
    for name, label, color, line in (
        ("train", "Kneser-Ney, training text", TRAIN, "-"),
        ("validation", "Kneser-Ney, validation text", VALID, "-"),
        ("laplace", "Laplace, validation text", VALID, ":"),
    ):
        values = [row[name]["perplexity"] for row in rows]
        axis.plot(numbers, values, line, color=color, marker="o", markersize=4, label=label)
        axis.annotate(f"{values[-1]:,.1f}", (numbers[-1], values[-1]), (7, -3), textcoords="offset points", color=color)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_yscale("log")
    axis.set_xticks(numbers)
    axis.set_xlabel("order", color=INK)
    axis.set_title("perplexity a token", loc="left", color=INK, fontsize=10)
    # The room between the curves.
    axis.legend(frameon=False, fontsize=9, labelcolor=INK, loc="center right", bbox_to_anchor=(1.0, 0.61))
    FigureCanvasAgg(figure).print_figure(path, format="png")


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0, help="what nltk may take, all tries together")
    parser.add_argument("--orders", type=int, help="instead: perplexities of the orders up to this one")
    parser.add_argument("--picture", type=Path, help="draw them here, as a PNG")
    parser.add_argument("--out", type=Path, help="write everything measured here, as JSON")
    parser.add_argument("--worker", choices=["ours", "nltk"], help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, args.tokens)
    data = pipeline.prepare(DataConfig())
    if args.orders:
        result: dict[str, Any] = {"orders": orders(data, args.orders)}
        if args.picture:
            draw(result["orders"], args.picture)
    else:
        counts = data.counts["train"]
        result = {"tries": compare(args.seconds, counts["tokens"] - counts["documents"]), "whole": whole_corpus(data)}
    if args.out:
        args.out.write_text(json.dumps(result, indent=1))
    return None


if __name__ == "__main__":
    main()

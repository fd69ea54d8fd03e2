"""g2p-en, a real encoder-decoder of GRU cells: words to phonemes as its own formulas and torch's cells spell them."""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from oracles import edited, error

from xylem.data.pretrained import pretrained
from xylem.errors import ConfigError
from xylem.models import g2p
from xylem.models.recurrent_seq2seq import decode, encode

BAR = 1e-5
START, END, MOST = 2, 3, 20  # g2p.py, ``predict``
SIGMOID = lambda x: 1.0 / (1.0 + np.exp(-x))  # noqa: E731
PHONEMES = re.findall(
    r"\S+",
    """<pad> <unk> <s> </s> AA0 AA1 AA2 AE0 AE1 AE2 AH0 AH1 AH2 AO0 AO1 AO2 AW0 AW1 AW2 AY0 AY1 AY2 B CH D DH EH0 EH1
    EH2 ER0 ER1 ER2 EY0 EY1 EY2 F G HH IH0 IH1 IH2 IY0 IY1 IY2 JH K L M N NG OW0 OW1 OW2 OY0 OY1 OY2 P R S SH T TH UH0
    UH1 UH2 UW UW0 UW1 UW2 V W Y Z ZH""",
)  # g2p.py, ``phonemes``
LETTERS = {"</s>": 2, **{letter: number for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz", 3)}}


class Twin:
    """The package's forward in NumPy and float64, one word at a time."""

    def __init__(self, arrays: dict):
        self.arrays = {name: np.float64(value) for name, value in arrays.items()}

    def step(self, side: str):
        """What one side does with (what comes in, state): the next state."""
        w_ih, w_hh, b_ih, b_hh = (self.arrays[f"{side}_{name}"] for name in ("w_ih", "w_hh", "b_ih", "b_hh"))

        def step(x: np.ndarray, h: np.ndarray) -> np.ndarray:
            (ri, zi, ni), (rh, zh, nh) = np.split(w_ih @ x + b_ih, 3), np.split(w_hh @ h + b_hh, 3)
            r, z = SIGMOID(ri + rh), SIGMOID(zi + zh)
            return (1 - z) * np.tanh(ni + r * nh) + z * h

        return step

    def __call__(self, word: str) -> tuple[list[int], np.ndarray]:
        """The ids that are written, the end among them, and the logits of each."""
        read, write = self.step("enc"), self.step("dec")
        h = np.zeros(self.arrays["enc_w_hh"].shape[1])
        for letter in [*word, "</s>"]:
            h = read(self.arrays["enc_emb"][LETTERS.get(letter, 1)], h)
        ids, logits, token = [], [], START
        while len(ids) < MOST and token != END:
            h = write(self.arrays["dec_emb"][token], h)
            logits.append(self.arrays["fc_w"] @ h + self.arrays["fc_b"])
            token = int(np.argmax(logits[-1]))
            ids.append(token)
        return ids, np.array(logits)


class Torch(Twin):
    """The same with torch's cells."""

    def step(self, side: str):
        import torch

        given = {name: torch.from_numpy(self.arrays[f"{side}_{name[:1]}_{name[-2:]}"])
                 for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}  # fmt: skip
        cell = torch.nn.GRUCell(given["weight_ih"].shape[1], given["weight_hh"].shape[1], dtype=torch.float64)
        cell.load_state_dict(given)

        @torch.no_grad()
        def step(x: np.ndarray, h: np.ndarray) -> np.ndarray:
            return cell(torch.from_numpy(x), torch.from_numpy(h)).numpy()

        return step


def words(rng: np.random.Generator, number: int) -> list[str]:
    """Words of our own prose, some with characters that the network does not know, and strings that are no words."""
    root = Path(__file__).parents[2]
    prose = " ".join(file.read_text("utf-8") for file in [*root.glob("*.md"), *root.glob("docs/*.md")])
    found = sorted(set(re.findall(r"[a-z'é]+", prose.lower())))
    strings = ["".join(rng.choice(list(LETTERS)[1:], length)) for length in rng.integers(1, 40, 20)]
    return ["tokenizer", "", "naïve", *rng.choice(found, number, replace=False).tolist(), *strings]


class Case:
    """Words, and what a twin makes of them."""

    def __init__(self, twin: Twin, rng: np.random.Generator, number: int = 300):
        self.words = words(rng, number)
        pairs = [twin(word) for word in self.words]
        self.ids, self.logits = [ids for ids, _ in pairs], np.concatenate([logits for _, logits in pairs])
        # Where two phonemes are all but equally likely, rounding may decide: such words do not count, and are few.
        best = [np.sort(logits, axis=1)[:, -2:] for _, logits in pairs]
        self.clear = np.array([(pair[:, 1] - pair[:, 0]).min() > 1e-5 * np.abs(pair).max() for pair in best])
        assert self.clear.mean() > 0.95

    def compare(self, pronounce: g2p.Pronouncer) -> tuple[float, float]:
        """The share of words that are spelled otherwise, and the error of the logits along the twin's spelling."""
        spelled = [[PHONEMES[i] for i in ids if i != END] for ids in self.ids]
        differ = np.array([one != other for one, other in zip(pronounce(self.words), spelled, strict=True)])
        targets = np.zeros((len(self.words), MOST), np.int32)
        for row, ids in zip(targets, self.ids, strict=True):
            row[: len(ids)] = [START, *ids[:-1]]
        tokens, real = map(jnp.asarray, g2p.batch(self.words))
        state = encode("gru", pronounce.params, tokens, real)
        logits = np.asarray(decode("gru", pronounce.params, jnp.asarray(targets), state)[0])
        along = np.concatenate([row[: len(ids)] for row, ids in zip(logits, self.ids, strict=True)])
        return float(differ[self.clear].mean()), error(along, self.logits)


def faulty(pronounce: g2p.Pronouncer) -> g2p.Pronouncer:
    """Reset and update gates of the decoder exchanged."""
    kernel = pronounce.params["decoder"]["cell"]["recurrent"]["kernel"]
    reset, update, candidate = jnp.split(kernel, 3, axis=1)
    exchanged = jnp.concatenate([update, reset, candidate], axis=1)
    return g2p.Pronouncer(edited(pronounce.params, **{"decoder/cell/recurrent/kernel": exchanged}))


def drawn_arrays(rng: np.random.Generator, width: int = 7) -> dict:
    """Random arrays of such a file, of another width."""
    array = lambda *shape: (shape[-1] ** -0.5 * rng.standard_normal(shape)).astype(np.float32)  # noqa: E731
    arrays = {"fc_w": array(74, width), "fc_b": array(74)}
    for side, symbols in (("enc", 29), ("dec", 74)):
        arrays |= {f"{side}_emb": array(symbols, width) * width**0.5}
        arrays |= {f"{side}_w_{part}": array(3 * width, width) for part in ("ih", "hh")}
        arrays |= {f"{side}_b_{part}": array(3 * width) for part in ("ih", "hh")}
    return arrays


def test_a_file_of_any_width_spells_as_its_twin(rng_seed, tmp_path):
    rng = np.random.default_rng(rng_seed)
    arrays = drawn_arrays(rng)
    np.savez(tmp_path / "a.npz", **arrays)
    pronounce = g2p.load(tmp_path / "a.npz")
    case = Case(Twin(arrays), rng, 40)
    differ, far = case.compare(pronounce)
    assert differ == 0 and far <= BAR
    assert case.compare(faulty(pronounce))[1] > BAR
    assert pronounce([]) == [] and pronounce(["Xylem"]) == pronounce(["xylem"])


def test_symbols_are_those_of_the_package():
    assert list(g2p.PHONEMES) == PHONEMES and len(g2p.GRAPHEMES) == 29


@pytest.mark.slow
@pytest.mark.parametrize("twin", [Twin, pytest.param(Torch, marks=pytest.mark.oracle)])
def test_g2p_en_spells_words_as_its_reference(twin, rng_seed, proof):
    file = pretrained("g2p-en")
    pronounce, rng = g2p.load(file), np.random.default_rng(rng_seed)
    assert pronounce(["tokenizer"]) == [["T", "OW1", "K", "AH0", "N", "AY2", "Z", "ER0"]]
    with np.load(file, allow_pickle=False) as arrays:
        case = Case(twin(dict(arrays)), rng)
    broken = case.compare(faulty(pronounce))
    assert broken[0] > 0 and broken[1] > BAR
    differ, far = case.compare(pronounce)
    oracle, fault = ("NumPy twin" if twin is Twin else "torch.nn.GRUCell"), "reset and update gates exchanged"
    proof("g2p-en: words to phonemes", f"{oracle}, share of words that differ", differ, 0.0, rng_seed, fault)
    proof("g2p-en: logits", f"{oracle} on the same weights", far, BAR, rng_seed, fault)


def test_a_file_that_holds_something_else_is_refused(rng_seed, tmp_path):
    file, arrays = tmp_path / "a.npz", drawn_arrays(np.random.default_rng(rng_seed))

    def refused(match: str, **changed) -> None:
        np.savez(file, **{name: value for name, value in {**arrays, **changed}.items() if value is not None})
        with pytest.raises(ConfigError, match=match):
            g2p.load(file)

    refused("lacks dec_emb", dec_emb=None)
    refused("lacks fc_w", fc_w=None)
    refused("no place for more", more=arrays["fc_b"])
    refused("enc_b_hh .* has this shape", enc_b_hh=arrays["enc_b_hh"][:-1])
    refused("no whole .npz", fc_b=np.array([{}]))  # a pickle
    np.savez(file, **arrays)
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(ConfigError, match=r"no whole \.npz"):
        g2p.load(file)
    file.write_bytes(b"text")
    with pytest.raises(ConfigError, match=r"no whole \.npz"):
        g2p.load(file)
    np.save(tmp_path / "b.npy", arrays["fc_b"])
    with pytest.raises(ConfigError, match=r"no whole \.npz"):
        g2p.load(tmp_path / "b.npy")
    with pytest.raises(ConfigError, match="no such file"):
        g2p.load(tmp_path / "absent.npz")

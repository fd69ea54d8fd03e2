"""Two real encoders of chemical reactions, an ALBERT and a BERT in torch's old format, each inside a Python package."""

import json
import re
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from oracles import error

from xylem.data import smiles
from xylem.data.pretrained import pretrained
from xylem.errors import ConfigError
from xylem.models import build, hub

REACTIONS = [
    "CC(C)S.CN(C)C=O.Fc1cccnc1F.O=C([O-])[O-].[K+].[K+]>>CC(C)Sc1ncccc1F",
    "C1COCCO1.CC(C)(C)OC(=O)CONC(=O)NCc1cccc2ccccc12.Cl>>O=C(O)CONC(=O)NCc1cccc2ccccc12",
    "C=CCN=C=S.CNCc1ccc(C#N)cc1.NNC(=O)c1cn2c(n1)CCCC2>>C=CCN1C(C2=CN3CCCCC3=N2)=NN=C1N(C)CC1=CC=C(C#N)C=C1",
    "BrCC.CC[O-]~[Na+].[H-]~[Na+]>>CCOCC",
]
# The expression that the field publishes for reactions (1711.04810, section 2.2).
PUBLISHED = r"\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|\/|:|~|@|\?|>>?|\*|\$|%[0-9]{2}|[0-9]"
# One layer applied twelve times carries its rounding on: 1.1e-5 was the most over 40 seeds, 1e-6 for the BERT.
BARS = {"rxnmapper": 1e-4, "rxnfp": 1e-5}


def masked(folder, rng: np.random.Generator):
    """The reactions between [CLS] and [SEP], padded, about one piece in eight hidden: true ids, ids, real places."""
    tokenizer = smiles.load(folder / "vocab.txt")
    rows = [[tokenizer.begin_of_text, *ids, tokenizer.end_of_text] for ids in tokenizer.encode_batch(REACTIONS)]
    length = max(map(len, rows)) + 3
    ids, real = (np.array([part(row) + [0] * (length - len(row)) for row in rows])
                 for part in (list, lambda row: [1] * len(row)))  # fmt: skip
    drawn = np.nonzero((rng.random(ids.shape) < 0.125) & (real == 1) & (ids > 14))
    hidden = ids.copy()
    hidden[drawn] = tokenizer.encode("[MASK]", parse_special=True)[0]
    return ids, hidden, real, drawn


def reference(kind: str, folder):
    """The masked-token model of transformers with the tensors that torch reads from the same file."""
    import torch
    import transformers

    raw = json.loads((folder / "config.json").read_text())
    made = getattr(transformers, f"{kind}Config").from_dict(raw)
    made._attn_implementation = "eager"
    model = getattr(transformers, f"{kind}ForMaskedLM")(made).eval()
    state = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    missing, unexpected = model.load_state_dict(state, strict=False)
    # BertForMaskedLM ties its decoder's bias to the one of the head, which the old file alone has.
    assert set(missing) <= {"cls.predictions.decoder.bias"}
    assert all("pooler" in name or "seq_relationship" in name for name in unexpected)
    model.tie_weights()
    model.double()  # what is measured is our rounding alone

    def run(ids, real):
        with torch.no_grad():
            inputs = torch.from_numpy(ids), torch.from_numpy(real)
            out = model(inputs[0], attention_mask=inputs[1], output_hidden_states=True)
        return out.hidden_states[-1].numpy(), out.logits.numpy()

    return run


def ours(config, params, ids, segments):
    out = build(config).apply({"params": params}, jnp.asarray(ids), segments=jnp.asarray(segments))
    return np.asarray(out.hidden), np.asarray(out.logits)


def compared(name: str, kind: str, rng_seed: int, fault):
    """Worst error of hidden states and logits at real places, of the faulty ones too, and how many pieces are found."""
    folder = pretrained(name)
    ids, hidden, real, drawn = masked(folder, np.random.default_rng(rng_seed))
    config, params = hub.load(folder)
    expected = reference(kind, folder)(hidden, real)
    where = real == 1

    def worst(found):
        return max(error(one[where], other[where]) for one, other in zip(found, expected, strict=True))

    found = ours(config, params, hidden, real)
    share = np.mean(found[1][drawn].argmax(-1) == ids[drawn])
    return worst(found), worst(fault(config, params, hidden, real)), share


@pytest.mark.oracle
@pytest.mark.slow
def test_rxnmapper_fills_in_reactions_as_albert_of_transformers(rng_seed, proof):
    shallow = lambda config, *rest: ours(replace(config, num_layers=11), *rest)  # noqa: E731
    measured, faulty, share = compared("rxnmapper", "Albert", rng_seed, shallow)
    assert faulty > BARS["rxnmapper"] and share > 0.5
    row, oracle = "rxnmapper: states and masked-token logits", "AlbertForMaskedLM on the same weights"
    proof(row, oracle, measured, BARS["rxnmapper"], rng_seed, "the shared layer applied 11 times")


@pytest.mark.oracle
@pytest.mark.slow
def test_rxnfp_fills_in_reactions_as_bert_of_transformers(rng_seed, proof):
    blind = lambda config, params, ids, real: ours(config, params, ids, np.ones_like(real))  # noqa: E731
    measured, faulty, share = compared("rxnfp", "Bert", rng_seed, blind)
    assert faulty > BARS["rxnfp"] and share > 0.5
    row, oracle = "rxnfp: states and masked-token logits", "BertForMaskedLM on the same weights"
    proof(row, oracle, measured, BARS["rxnfp"], rng_seed, "padding seen")


def test_reactions_are_cut_as_the_field_cuts_them(tmp_path):
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *{piece for text in REACTIONS for piece in
              re.findall(PUBLISHED, text)}]  # fmt: skip
    (tmp_path / "vocab.txt").write_text("\n".join(pieces))
    tokenizer = smiles.load(tmp_path / "vocab.txt")
    for text in REACTIONS:
        ids = tokenizer.encode(text)
        assert [pieces[i] for i in ids] == re.findall(PUBLISHED, text) and tokenizer.decode(ids) == text
    assert list(tokenizer.encode("Cl%99")) == [pieces.index("Cl"), 1]
    (tmp_path / "vocab.txt").write_text("\n".join([*pieces, "[PAD]"]))
    for file in ("vocab.txt", "absent.txt"):
        with pytest.raises(ConfigError, match=file):
            smiles.load(tmp_path / file)

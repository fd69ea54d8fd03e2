"""Package metadata and extras of Xylem (distribution ``xylem-lm``, import package ``xylem``)."""

from setuptools import find_packages, setup

CORE = [
    "jax>=0.10,<0.13",
    "flax>=0.12.8,<0.13",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8,<0.13",
    "tensorflow-datasets>=4.9.10",
    "einops>=0.8.1",
    "importlib_resources>=6.0",  # tensorflow-datasets imports it without saying so
    "numpy>=2.0",
    "scipy>=1.14",
    "grain>=0.2.18",
    "array-record>=0.8.1",
    "safetensors>=0.8",
    "gguf>=0.17",
    "tokenizers>=0.22",
    "jinja2>=3.1.6",
    "pyyaml>=6.0",
    "tyro>=1.0",
    "rich>=14.0",
    "tensorboardX>=2.6.4",
    "jaxtyping>=0.3.3",
    "matplotlib>=3.10",
]

EXTRAS = {
    # Lower bounds matter here: a resolver left free can fall back to a jax of years ago.
    "tpu": ["jax[tpu]>=0.10,<0.13"],
    "cuda12": ["jax[cuda12]>=0.10,<0.13"],
    "cuda13": ["jax[cuda13]>=0.10,<0.13"],
    "plan": ["libtpu>=0.0.42"],
    "hdf5": ["h5py>=3.12"],  # to read textgenrnn
    # The oracles have a CPU build for Python 3.11 alone; elsewhere the tests that need none of them run.
    "test": [
        "pytest>=8.4",
        "pytest-timeout>=2.4",
        "pytest-xdist>=3.8",
        "beartype>=0.22",
        "h5py>=3.12",
        "nltk>=3.10",
        "onnxruntime>=1.23",
        "torch==2.13.0; python_version < '3.12'",
        "transformers>=5.0,<6; python_version < '3.12'",
        "peft>=0.21,<0.22; python_version < '3.12'",
        "bitsandbytes>=0.50; python_version < '3.12'",
    ],
    "dev": ["ruff>=0.14", "pyright>=1.1.400"],
}

setup(
    name="xylem-lm",
    version="0.1.0",
    description="Language models in JAX and Flax: every idea in few lines, each proven against an oracle",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["xylem", "xylem.*"]),
    install_requires=CORE,
    extras_require=EXTRAS,
)

"""textgenrnn's weights, an HDF5 file of Keras 2 (https://github.com/minimaxir/textgenrnn), read into our tree.

They were trained with Keras's CuDNNLSTM. cuDNN keeps the matrix of each gate (out, in); its memory was written as if
it were (in, out), gates side by side in the order of ours, and is read here as what it is (keras/engine/topology.py of
Keras 2.1.5, ``preprocess_weights_for_loading``). Every gate has two biases: all that stand beside inputs come first.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from xylem.errors import ConfigError
from xylem.files import read_object
from xylem.models.conversion import Held, Row
from xylem.models.families.family import require, size
from xylem.models.state_config import CELL_GATES, WindowedConfig

WINDOW = 40  # textgenrnn.py, "max_length"
LONGEST = 1024  # of a text: no number of theirs, and nothing in the network depends on it


def open_file(path: Path) -> tuple[WindowedConfig, tuple[Row, ...], dict[str, Held]]:
    """Configuration, table and tensors of a ``NAME_weights.hdf5``; ``NAME_config.json`` is read where there is one.

    Raises:
        ConfigError: the file is missing, damaged or no textgenrnn's, or h5py is not installed.
    """
    if not path.is_file():
        raise ConfigError("checkpoint", str(path), "there is no such file")
    beside = path.with_name(path.name.replace("_weights", "_config").replace(".hdf5", ".json"))
    raw = read_object(beside, "checkpoint") if beside.is_file() else {}
    require(raw, "textgenrnn", dict.fromkeys(("word_level", "rnn_bidirectional", "single_text"), False))
    tensors = _tensors(path)
    num_layers = sum(name.endswith("/recurrent_kernel") for name in tensors)
    try:
        (vocab_size, d_embedding), (d_layer, gates) = (
            tensors[name].shape for name in ("embedding/embeddings", "rnn_1/recurrent_kernel")
        )
    except (KeyError, ValueError) as error:
        raise ConfigError("checkpoint", str(path), f"it is no textgenrnn: it lacks or misshapes {error}") from error
    if gates != CELL_GATES["lstm"] * d_layer:
        raise ConfigError("rnn_1/recurrent_kernel", (d_layer, gates), f"in {path}: an LSTM has four gates")
    for name, tensor in tensors.items():
        if name.endswith("kernel") and name.startswith("rnn_"):
            tensors[name] = from_cudnn(tensor)
    window = size(raw, "max_length", WINDOW)
    config = WindowedConfig("textgenrnn", vocab_size, LONGEST, window, num_layers, d_embedding, d_layer)
    return config, _rows(num_layers), {name: Held(tensor) for name, tensor in tensors.items()}


def from_cudnn(kernel: np.ndarray) -> np.ndarray:
    """An LSTM's kernel (in, gates * out) from the memory of its four matrices (out, in)."""
    if kernel.ndim != 2 or kernel.shape[1] % CELL_GATES["lstm"]:
        return kernel  # its shape is refused where all shapes are
    gates = np.split(kernel, CELL_GATES["lstm"], axis=1)
    return np.concatenate([gate.reshape(gate.shape[::-1]).T for gate in gates], axis=1)


def _rows(num_layers: int) -> tuple[Row, ...]:
    layers = []
    for number in range(num_layers):
        theirs, ours = f"rnn_{number + 1}", f"lstm_{number}"
        layers += [
            Row(f"{theirs}/kernel", (f"{ours}/input/kernel",)),
            Row(f"{theirs}/recurrent_kernel", (f"{ours}/recurrent/kernel",)),
            Row(f"{theirs}/bias", (f"{ours}/input/bias", f"{ours}/recurrent/bias")),
        ]
    return (
        Row("embedding/embeddings", ("embed/embedding",)),
        *layers,
        Row("attention/attention_W", ("attention/kernel",)),
        Row("output/kernel", ("head/kernel",)),
        Row("output/bias", ("head/bias",)),
    )


def _tensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of the file, by the name of its layer and its own: ``rnn_1/kernel``."""
    try:
        import h5py
    except ImportError as error:
        allowed = "reading HDF5 takes h5py, which is not installed: pip install 'xylem-lm[hdf5]', or h5py alone"
        raise ConfigError("checkpoint", str(path), allowed) from error
    found = {}

    def visit(name: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Dataset):
            # Neither other types nor what lies in other files: all that is read is what was hashed.
            if item.dtype != np.float32 or item.external or item.is_virtual:
                raise ConfigError(name, str(item.dtype), f"in {path}: only float32 weights inside the file are read")
            first, *_, last = name.split("/")
            found[f"{first}/{last.removesuffix(':0')}"] = np.asarray(item)

    try:
        with h5py.File(path, "r") as file:
            file.visititems(visit)
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise ConfigError("checkpoint", str(path), f"it is no whole HDF5 file ({error})") from error
    return found

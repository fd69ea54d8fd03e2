"""Four-bit weights are those of bitsandbytes, bit for bit, and no decoded matrix outlives its product."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from operations import apart, normal
from scipy.stats import norm

from xylem.models.leaves import Quantized
from xylem.models.quantized import SCALES, VALUES, Quantized4, quantize4

BLOCK = 64
decoded = jax.jit(lambda leaf: leaf.materialize())


def bits(x) -> np.ndarray:
    """As whole numbers: a negative zero is none."""
    array = np.asarray(x)
    return array.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[array.itemsize])


def differ(ours: list, theirs: list) -> float:
    """The share of numbers that are not the same to the bit."""
    wrong = [bits(x).ravel() != bits(y).ravel() for x, y in zip(ours, theirs, strict=True)]
    return float(np.mean(np.concatenate(wrong)))


def case(rng: np.random.Generator, dtype: str = "float32", held: str = "bfloat16") -> jax.Array:
    """A stack of matrices, of values that ``held`` has: of bfloat16's, as published ones are, sums of few are exact
    whatever their order."""
    layers, rows, columns = (int(rng.integers(low, high)) for low, high in ((1, 3), (2, 260), (5, 60)))
    weight = normal(rng, layers, rows, columns, std=0.02).astype(held).astype(dtype)
    return weight.at[0, :BLOCK, 0].set(0)


def bitsandbytes(weight: jax.Array, kind: str, statistics: str):
    """Codes, scales and decoded values of one matrix as torch stores it, its columns filled up to whole blocks."""
    import bitsandbytes.functional as bnb
    import torch

    torch.set_num_threads(1)
    rows = weight.shape[0]
    padded = np.pad(np.asarray(weight, np.float32).T, ((0, 0), (0, -rows % BLOCK)))
    matrix = torch.from_numpy(padded).to(getattr(torch, weight.dtype.name))
    state: Any
    codes, state = bnb.quantize_4bit(matrix, quant_type=kind, compress_statistics=statistics == "double")
    # FP4 has two zeros; whether the second one's sign is decoded depends on the machine's vector units.
    decoded = bnb.dequantize_4bit(codes, state)[:, :rows] + 0.0
    kept = [codes.numpy(), state.absmax.numpy()]
    if statistics == "double":
        kept += [state.state2.absmax.numpy(), state.offset.numpy()]
    return kept, decoded.view(torch.int16).numpy() if weight.dtype == jnp.bfloat16 else decoded.numpy()


def ours(leaf: Quantized4) -> list:
    """The same of ours, a pair for each layer."""
    whole = np.asarray(decoded(leaf))
    assert whole.shape == leaf.shape and whole.dtype == leaf.dtype
    held = [np.asarray(x) for x in (leaf.codes.mT, leaf.scales.mT)]
    held += [] if leaf.peaks is None else [np.asarray(leaf.peaks), np.asarray(leaf.offset)]
    return [([x[i] for x in held], whole[i].T) for i in range(len(whole))]


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("statistics", "held"), [("single", "float32"), ("single", "bfloat16"), ("double", "bfloat16")]
)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_codes_scales_and_values_are_those_of_bitsandbytes(kind, statistics, held, rng_seed, proof):
    rng = np.random.default_rng(rng_seed)
    weight = case(rng, str(rng.choice(["float32", held])), held)
    assert quantize4(weight, kind, statistics).shape == weight.shape
    theirs = [bitsandbytes(matrix, kind, statistics) for matrix in weight]
    far = lambda weight: [  # noqa: E731
        differ([*kept, values], [*codes, reference])
        for (kept, values), (codes, reference) in zip(ours(quantize4(weight, kind, statistics)), theirs, strict=True)
    ]
    shares = far(weight)
    assert min(far(weight[:, ::-1])) > 0.01
    row = f"{kind.upper()}, {statistics} statistics, weights of {held}: codes, scales, values"
    proof(row, "bitsandbytes on a CPU, share that differs", max(shares), 0.0, rng_seed, "rows in reverse order")


@pytest.mark.oracle
def test_double_statistics_of_any_weight_are_near_those_of_bitsandbytes(rng_seed):
    """Where a mean of scales has no exact sum, torch's last place depends on the machine it runs on."""
    weight = normal(np.random.default_rng(rng_seed), 1, 2 * BLOCK, 97, std=0.02)
    ((kept, found),), (codes, values) = ours(quantize4(weight)), bitsandbytes(weight[0], "nf4", "double")
    assert differ(kept[:1], codes[:1]) == 0 and differ(kept[1:2], codes[1:2]) < 0.05
    assert apart([found], [values]) < 2e-2 and float(np.mean(np.abs(found - values))) < 1e-5


@pytest.mark.oracle
def test_the_table_of_scales_is_that_of_bitsandbytes():
    import bitsandbytes.functional as bnb

    np.testing.assert_array_equal(SCALES, bnb.create_dynamic_map().numpy())


@pytest.mark.oracle
def test_int8_codes_are_those_of_bitsandbytes(rng_seed, proof):
    import bitsandbytes.functional as bnb
    import torch

    weight = case(np.random.default_rng(rng_seed), "float32")[0] + 1e-4
    codes, peaks, _ = bnb.int8_vectorwise_quant(torch.from_numpy(np.array(weight.T)))
    leaf = Quantized.quantize(weight)
    np.testing.assert_allclose(leaf.scales[0] * 127, peaks.numpy(), rtol=1e-6)
    wrong = Quantized.quantize(weight.T).values.T
    assert np.mean(codes.numpy() != np.asarray(wrong).T) > 0.01
    error = float(np.mean(codes.numpy() != np.asarray(leaf.values).T))
    proof("int8 by columns: codes", "bitsandbytes on a CPU, share that differs", error, 0.0, rng_seed, "scales of rows")


def test_nf4_values_are_quantiles_of_a_normal_distribution(rng_seed, proof):
    """2305.14314, appendix E: 8 quantiles below zero, 7 above, and zero, over the largest."""

    def quantiles(outermost: float) -> np.ndarray:
        """Of probabilities in float32, as the published values are."""
        grid = lambda count: np.linspace(np.float32(outermost), 0.5, count, dtype=np.float32)[:-1]  # noqa: E731
        found = np.sort(np.concatenate([-norm.ppf(grid(8).astype(float)), [0.0], norm.ppf(grid(9).astype(float))]))
        return found / found.max()

    assert np.max(np.abs(quantiles(0.97) - VALUES["nf4"])) > 1e-4
    error = float(np.max(np.abs(quantiles(0.9677083) - VALUES["nf4"])))
    proof("NF4: the sixteen values", "scipy.stats.norm.ppf", error, 1e-7, rng_seed, "outermost quantile 0.97")


def test_normal_float_loses_less_than_integers_and_these_less_than_floats(rng_seed):
    """2305.14314, section 4: of a normal distribution in blocks of 64."""
    weight = normal(np.random.default_rng(rng_seed), 512, 64)
    size = lambda error: float(jnp.sqrt(jnp.mean(error**2)))  # noqa: E731
    blocks = weight.reshape(-1, BLOCK, 64)
    step = jnp.max(jnp.abs(blocks), axis=1, keepdims=True) / 7
    int4 = size(jnp.round(blocks / step) * step - blocks)
    nf4, fp4 = (size(decoded(quantize4(weight, kind, "single")) - weight) for kind in ("nf4", "fp4"))
    assert nf4 < int4 < fp4
    assert (nf4, int4, fp4) == pytest.approx((0.0921, 0.1077, 0.1220), rel=0.03)
    assert size(decoded(quantize4(weight, "nf4")) - weight) == pytest.approx(nf4, rel=0.01)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_blocks_of_zeros_and_columns_of_part_blocks(kind, rng_seed):
    zero = quantize4(jnp.zeros((2, 70, 3)), kind)
    assert not jnp.any(decoded(zero)) and zero.shape == (2, 70, 3)
    weight = normal(np.random.default_rng(rng_seed), 69, 5)
    leaf = quantize4(weight, kind, block=6, group=7)
    whole, ids = decoded(leaf), jnp.array([[3, 68], [0, 41]])
    assert leaf.scales.shape == (12, 5) and leaf.peaks.shape == (9,)
    np.testing.assert_array_equal(jax.jit(lambda leaf: leaf.take(ids))(leaf), whole[ids])
    assert apart([whole], [weight]) < 0.2


def test_gradient_decodes_again_and_is_that_of_the_decoded_matrix(rng_seed):
    rng = np.random.default_rng(rng_seed)
    weight, x = normal(rng, 2 * BLOCK, 33), normal(rng, 3, 2 * BLOCK)
    for leaf in (quantize4(weight), Quantized.quantize(weight)):
        dense = decoded(leaf)
        for equation, argument in (("...i,io->...o", x), ("...o,io->...i", normal(rng, 3, 33))):
            y, pull = jax.vjp(lambda x, leaf=leaf, equation=equation: leaf.einsum(equation, x), argument)
            reference, plain_pull = jax.vjp(lambda x, d=dense, e=equation: jnp.einsum(e, x, d), argument)
            assert apart([y, *pull(y)], [reference, *plain_pull(y)]) <= 1e-6
            sizes = [held.size for held in jax.tree.leaves(pull) if held.dtype == weight.dtype]
            assert max(sizes, default=0) < weight.size / 8, "what is kept for the gradient is no matrix"
            assert max(held.size for held in jax.tree.leaves(plain_pull)) >= weight.size

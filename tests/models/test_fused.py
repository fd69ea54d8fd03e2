"""Hand-written derivatives against their plain twins and under every transformation the models use."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from operations import BAR, apart, cross_entropy_case, head, normal, with_gradients

from xylem import models
from xylem.models import fused, fused_attention
from xylem.models.attention import attend
from xylem.models.config import RopeScaling
from xylem.models.fused_cross_entropy import cross_entropy, cross_entropy_plain
from xylem.models.gpt import gpt
from xylem.models.masks import Mask
from xylem.models.positions import rope_tables, rotate
from xylem.models.settings import Compute


def cases(rng: np.random.Generator) -> dict:
    """name -> (fused, plain twin, arguments); sizes odd and distinct."""
    m, i, o = 17, 5, 7
    x, row = normal(rng, m, i, std=0.3), partial(normal, rng, i)
    query, key, value = normal(rng, 2, 13, 6, 5), normal(rng, 2, 13, 3, 5), normal(rng, 2, 13, 3, 5)
    params, hidden, labels, weights = cross_entropy_case(rng)
    learned = {name: params[name] for name in ("kernel", "bias")}

    def loss(function, *sizes):
        return lambda p, h, w: function(head, {**p, "code": params["code"]}, h, labels, w, 0.1, 0.01, *sizes)[0]

    made = {
        "matmul": (fused.matmul, fused.matmul_plain, (normal(rng, m, i), normal(rng, i, o))),
        "low_rank": (
            fused.low_rank,
            fused.low_rank_plain,
            (normal(rng, m, i), normal(rng, i, o), normal(rng, i, 3), normal(rng, 3, o)),
        ),
        "few_rows": (fused.few_rows, fused.few_rows_plain, (normal(rng, m, i), normal(rng, o, i))),
        "wide_product": (
            partial(fused.wide_product, transposed=False),
            partial(fused.wide_product_plain, transposed=False),
            (normal(rng, 3, m, i), normal(rng, i, o)),
        ),
        "wide_product, transposed": (
            partial(fused.wide_product, transposed=True),
            partial(fused.wide_product_plain, transposed=True),
            (normal(rng, 3, m, i), normal(rng, o, i)),
        ),
        "add_bias": (fused.add_bias, fused.add_bias_plain, (normal(rng, m, o), normal(rng, o))),
        "layer_norm": (
            lambda *a: fused.layer_norm(*a, 1e-3),
            lambda *a: fused.layer_norm_plain(*a, 1e-3),
            (x, row(), row()),
        ),
        "rms_norm": (lambda *a: fused.rms_norm(*a, 1e-3), lambda *a: fused.rms_norm_plain(*a, 1e-3), (x, row())),
        "attention": (
            lambda *a: fused_attention.attention(*a, Mask(), a[0].shape[-1] ** -0.5, 4),
            lambda *a: attend(*a, Mask()),
            (query, key, value),
        ),
        "biased attention": (
            lambda *a: fused_attention.attention(*a[:3], Mask(), 0.4, 4, a[3][:1]),
            lambda *a: attend(*a[:3], Mask(), scale=0.4, bias=a[3][:1]),
            (query, key, value, normal(rng, 2, 6, 13, 13)),
        ),
        "scores": (
            partial(fused_attention.scores, block=4),
            fused_attention.scores_plain,
            (normal(rng, 2, 3, 5, 2, 7), normal(rng, 2, 12, 3, 7)),
        ),
        "cross_entropy": (
            loss(cross_entropy, 4),
            loss(cross_entropy_plain),
            (learned, hidden, weights),
        ),
    }
    for name in fused.ACTIVATIONS:
        made[name] = partial(fused.activation, name), partial(fused.activation_plain, name), (normal(rng, m, i),)
    for name in fused.GATES:
        args = normal(rng, m, i), normal(rng, m, i)
        made[name] = partial(fused.gated, name), partial(fused.gated_plain, name), args
    return made


EACH = pytest.mark.parametrize("name", list(cases(np.random.default_rng(0))))


@EACH
def test_fused_equals_plain(name, rng_seed):
    ours, plain, args = cases(np.random.default_rng(rng_seed))[name]
    left, right = (with_gradients(jax.jit(function), args, rng_seed) for function in (ours, plain))
    assert apart(left, right) <= BAR


@EACH
def test_fused_survives_transformations(name, rng_seed):
    ours, plain, args = cases(np.random.default_rng(rng_seed))[name]
    doubled = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), args)

    def scanned(function):
        def body(carry, each):
            out = jax.checkpoint(function)(*each)
            return carry + sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(out)), None

        return lambda *a: jax.lax.scan(body, jnp.zeros(()), a)[0]

    for transform in (scanned, jax.vmap):
        left = with_gradients(jax.jit(transform(ours)), doubled, rng_seed)
        assert apart(left, with_gradients(jax.jit(transform(plain)), doubled, rng_seed)) <= BAR


@EACH
def test_fused_bfloat16_stays_near_float32(name, rng_seed):
    ours, plain, args = cases(np.random.default_rng(rng_seed))[name]
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), args)
    if name == "cross_entropy":
        narrow = (*narrow[:2], args[2])  # weights are float32 always
    out, gradients = with_gradients(jax.jit(ours), narrow, rng_seed)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), narrow)
    rng = np.random.default_rng(rng_seed)
    expected, pull = jax.vjp(plain, *wide)
    reference = expected, pull(jax.tree.map(lambda x: normal(rng, *x.shape).astype(x.dtype), out).astype(jnp.float32))
    assert jax.tree.map(lambda x: x.dtype, gradients) == jax.tree.map(lambda x: x.dtype, narrow)
    # bfloat16 keeps 8 bits, and weights, scores' gradients and logits are rounded to it between products.
    assert apart((out, gradients), reference) <= 0.05


@pytest.mark.parametrize(
    "name", ["matmul", "low_rank", "layer_norm", "rms_norm", "gelu", "swiglu", "attention", "biased attention"]
)
def test_fused_sharded_equals_unsharded(name, rng_seed):
    rng = np.random.default_rng(rng_seed)
    ours, _, args = cases(rng)[name]
    weights = {"matmul": 1, "low_rank": 3, "rms_norm": 1, "layer_norm": 2}.get(name, 0)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    args = [x if i >= len(args) - weights else normal(rng, 16, *x.shape[1:]) for i, x in enumerate(args)]
    where = [NamedSharding(mesh, PartitionSpec("data" if x.shape[0] == 16 else None)) for x in args]
    placed = [jax.device_put(x, place) for x, place in zip(args, where, strict=True)]
    run = jax.jit(lambda *a: with_gradients(ours, a, rng_seed))
    assert apart(run(*placed), run(*args)) <= BAR


def test_fused_cross_entropy_sharded_equals_unsharded(rng_seed):
    params, hidden, labels, weights = cross_entropy_case(np.random.default_rng(rng_seed), batch=8, vocab=16)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))  # noqa: E731
    specs = {"kernel": (None, "tensor"), "bias": ("tensor",), "code": ()}

    @jax.jit
    def run(params, hidden, labels, weights):
        loss = lambda p, h: cross_entropy(head, p, h, labels, weights, 0.1, 0.01, 3)[0]  # noqa: E731
        return jax.value_and_grad(loss, (0, 1), allow_int=True)(params, hidden)

    out = run(
        {name: place(x, *specs[name]) for name, x in params.items()},
        *(place(x, "data") for x in (hidden, labels, weights)),
    )
    numbers = lambda tree: [x for x in jax.tree.leaves(tree) if x.dtype == jnp.float32]  # noqa: E731
    assert apart(numbers(out), numbers(run(params, hidden, labels, weights))) <= BAR
    assert out[1][1].sharding.spec[0] == "data"


# --- attention --------------------------------------------------------------------------------------------------------


def masks(rng: np.random.Generator) -> dict[str, Mask]:
    """Masks for 2 rows of 13 tokens; the packed one ends in padding."""
    packed = jnp.asarray([[1] * 4 + [2] * 7 + [0] * 2, [3] * 9 + [4] * 3 + [0]], jnp.int32)
    keys = jnp.where(packed == 0, -1, packed)  # padding sees nothing
    prefix = jnp.asarray(rng.integers(1, 9, 2), jnp.int32)
    return {
        "causal": Mask(),
        "all": Mask(causal=False),
        "window": Mask(window=3),
        "traced window": Mask(window=jnp.asarray(5)),
        "prefix": Mask(prefix=prefix),
        "windowed prefix": Mask(window=2, prefix=prefix),
        "segments": Mask(query_segments=packed, key_segments=keys),
        "windowed segments": Mask(window=3, query_segments=packed, key_segments=keys),
        "segments, all": Mask(causal=False, query_segments=packed, key_segments=keys),
        "offset": Mask(offset=jnp.asarray([0, 2], jnp.int32)),
    }


@pytest.mark.parametrize("chunk", [4, 64])
@pytest.mark.parametrize("name", list(masks(np.random.default_rng(0))))
def test_fused_attention_obeys_every_mask(name, chunk, rng_seed):
    rng = np.random.default_rng(rng_seed)
    mask = masks(rng)[name]
    args = normal(rng, 2, 13, 6, 5), normal(rng, 2, 13, 2, 5), normal(rng, 2, 13, 2, 5)

    def run(function, mask, *args):
        return with_gradients(lambda *a: function(*a, mask), args, rng_seed)

    # The arrays of a mask are traced, as in a model; a window that is a number stays one and skips blocks.
    static = isinstance(mask.window, int)
    compiled = lambda f: jax.jit(partial(run, f, mask)) if static else partial(jax.jit(partial(run, f)), mask)  # noqa: E731
    ours = compiled(lambda *a: fused_attention.attention(*a, 5**-0.5, chunk))(*args)
    assert apart(ours, compiled(attend)(*args)) <= BAR


@pytest.mark.parametrize("rows", [1, 2])
def test_fused_attention_adds_a_bias_to_the_scores(rows, rng_seed):
    rng = np.random.default_rng(rng_seed)
    args = normal(rng, 2, 5, 6, 3), normal(rng, 2, 11, 3, 3), normal(rng, 2, 11, 3, 3), normal(rng, rows, 6, 5, 11)
    segments = jnp.asarray([[1] * 3 + [2] * 2, [1] * 4 + [0]]), jnp.asarray([[1] * 4 + [2] * 7, [1] * 11])
    packed = Mask(causal=False, query_segments=segments[0], key_segments=segments[1])
    for mask in (Mask(causal=False), Mask(window=2), packed):
        ours = jax.jit(lambda q, k, v, b, mask=mask: fused_attention.attention(q, k, v, mask, 0.7, 2, b))
        plain = jax.jit(lambda q, k, v, b, mask=mask: attend(q, k, v, mask, scale=0.7, bias=b))
        assert apart(with_gradients(ours, args, rng_seed), with_gradients(plain, args, rng_seed)) <= BAR


def test_fused_attention_takes_more_keys_than_queries(rng_seed):
    rng = np.random.default_rng(rng_seed)
    args = normal(rng, 2, 5, 6, 3), normal(rng, 2, 11, 3, 3), normal(rng, 2, 11, 3, 3)
    for mask in (Mask(causal=False), Mask(), Mask(offset=jnp.asarray([6, 2], jnp.int32))):
        ours = jax.jit(lambda *a, mask=mask: fused_attention.attention(*a, mask, 3**-0.5, 2))
        plain = jax.jit(lambda *a, mask=mask: attend(*a, mask))
        assert apart(with_gradients(ours, args, rng_seed), with_gradients(plain, args, rng_seed)) <= BAR


def test_fused_attention_of_padding_is_zero(rng_seed):
    rng = np.random.default_rng(rng_seed)
    mask = masks(rng)["segments"]
    args = normal(rng, 2, 13, 6, 5), normal(rng, 2, 13, 2, 5), normal(rng, 2, 13, 2, 5)
    run = jax.jit(lambda *a: with_gradients(lambda *b: fused_attention.attention(*b, mask, 0.4, 4), a, rng_seed))
    out, gradients = run(*args)
    padding = np.asarray(mask.query_segments) == 0
    for array in (out, *gradients):
        assert np.all(np.isfinite(array)) and np.all(np.asarray(array)[padding] == 0.0)
    assert np.all(np.asarray(out)[~padding] != 0.0)


def test_fused_attention_skips_hidden_blocks():
    shape = jax.ShapeDtypeStruct((1, 12, 2, 4), jnp.float32)

    def flops(mask, chunk):
        run = jax.jit(lambda *a: fused_attention.attention(*a, mask, 0.5, chunk)).lower(shape, shape, shape)
        return sum(a * b for (a, b) in _score_sizes(run.as_text()))

    whole = flops(Mask(causal=False), 3)
    assert flops(Mask(), 3) == whole * (3 + 6 + 9 + 12) / 48
    assert flops(Mask(window=3), 3) == whole * (3 + 5 + 5 + 5) / 48


def _score_sizes(text: str) -> list[tuple[int, int]]:
    """(queries, keys) of each product that gives scores, from StableHLO: results of shape 1x2x1xTxS before the mask."""
    import re

    found = re.findall(r"dot_general .*-> tensor<1x2x(?:1x)?(\d+)x(?:1x)?(\d+)xf32>", text)
    return [(int(a), int(b)) for a, b in found if int(b) != 4]


@pytest.mark.parametrize(
    "batch, blocks, parts",
    [(8, 1, 2), (8, 4, 2), (8, 6, 1), (6, 3, 2), (2, 1, 2), (5, 1, 1), (1, 1, 1)],
)
def test_fused_attention_cuts_the_batch_where_blocks_are_few(batch, blocks, parts):
    shape = jax.ShapeDtypeStruct((batch, 12, 2, 4), jnp.float32)
    run = lambda *a: fused_attention.attention(*a, Mask(), 0.5, -(-12 // blocks))  # noqa: E731

    def calls() -> list[int]:
        """Rows of each call of the hand-written derivative."""
        equations = jax.make_jaxpr(run)(shape, shape, shape).eqns
        return [each.invars[0].aval.shape[0] for each in equations if each.primitive.name == "custom_vjp_call"]

    assert calls() == [batch // parts] * parts
    with jax.set_mesh(jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))):
        assert calls() == [batch], "rows that a mesh has split are left alone"


def test_fused_attention_of_a_long_text_has_a_bounded_number_of_blocks():
    shape = jax.ShapeDtypeStruct((1, 50, 2, 4), jnp.float32)
    jaxpr = jax.make_jaxpr(lambda *a: fused_attention.attention(*a, Mask(), 0.5, 2))(shape, shape, shape)
    assert str(jaxpr).count("dot_general") == 2 * 13, "chunks of 4, the least that give at most 16 blocks"


def test_fused_attention_needs_less_than_half_the_memory_of_the_square():
    def temporary(function):
        shape = jax.ShapeDtypeStruct((1, 1024, 2, 4), jnp.float32)
        slope = jax.grad(lambda *a: function(*a).sum(), (0, 1, 2))
        return jax.jit(slope).lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes

    # Not linear in the length: XLA:CPU schedules the chunks, which do not depend on each other, side by side.
    ours = lambda *a: fused_attention.attention(*a, Mask(), 0.5, 64)  # noqa: E731
    assert temporary(ours) < 0.5 * temporary(lambda *a: attend(*a, Mask()))


# --- rotary tables ----------------------------------------------------------------------------------------------------


def test_fused_rope_tables_are_the_plain_ones_computed_once(rng_seed):
    rng = np.random.default_rng(rng_seed)
    x, positions = normal(rng, 2, 7, 3, 10), jnp.asarray(rng.integers(0, 1000, (2, 7)), jnp.int32)
    mixing = normal(rng, 10, 10)

    def compiled(tables):
        def layers(x, positions):
            both = tables(positions, 10, 731.0, RopeScaling(8.0, 1.0, 4.0, 32))
            for _ in range(3):  # a product between rotations, so that each is a fusion of its own
                x = rotate(x, both) @ mixing
            return x

        return jax.jit(layers).lower(x, positions).compile()

    ours, plain = compiled(fused.rope_tables), compiled(rope_tables)
    assert apart(ours(x, positions), plain(x, positions)) <= BAR
    assert ours.as_text().count(" sine(") == 1 < plain.as_text().count(" sine(")


# --- cross-entropy ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 1, 4, 11, 50])
@pytest.mark.parametrize("smoothing, z_loss", [(0.0, 0.0), (0.2, 0.0), (0.0, 0.03), (0.1, 0.02)])
def test_fused_cross_entropy_equals_plain(smoothing, z_loss, chunk, rng_seed):
    rng = np.random.default_rng(rng_seed)
    params, hidden, labels, weights = cross_entropy_case(rng)
    factor = float(rng.uniform(0.1, 3.0))

    def both(function, *sizes):
        def total(p, h, w):
            loss, nll = function(head, {**p, "code": params["code"]}, h, labels, w, smoothing, z_loss, *sizes)
            return factor * loss + 7.0 * nll, (loss, nll)  # nll must add nothing to the gradient

        learned = {name: params[name] for name in ("kernel", "bias")}
        return jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(learned, hidden, weights)

    assert apart(both(cross_entropy, chunk), both(cross_entropy_plain)) <= BAR


def test_fused_cross_entropy_pays_only_for_what_is_asked(rng_seed):
    params, hidden, labels, weights = cross_entropy_case(np.random.default_rng(rng_seed))

    def loss(p, h):
        return cross_entropy(head, p, h, labels, weights, 0.0, 0.0, 11)[0]

    def products(function):
        return str(jax.make_jaxpr(function)(params, hidden)).count("dot_general")

    sums = 1  # of rows, by a vector of ones
    assert products(jax.jit(loss)) == 1 + sums
    assert products(jax.jit(jax.grad(loss, 1))) == 2 + sums  # the head is frozen
    assert products(jax.jit(jax.grad(loss, (0, 1), allow_int=True))) == 3 + sums


def test_fused_cross_entropy_memory_is_a_chunk():
    batch, length, width, vocab = 2, 64, 8, 4096
    params = {
        "kernel": jax.ShapeDtypeStruct((width, vocab), jnp.float32),
        "bias": jax.ShapeDtypeStruct((vocab,), jnp.float32),
        "code": jax.ShapeDtypeStruct((1,), jnp.int8),
    }
    hidden = jax.ShapeDtypeStruct((batch, length, width), jnp.float32)
    labels = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    weights = jax.ShapeDtypeStruct((batch, length), jnp.float32)

    def temporary(function, *sizes):
        def loss(p, h, labels, weights):
            return function(head, p, h, labels, weights, 0.1, 0.01, *sizes)[0]

        slope = jax.jit(jax.grad(loss, (0, 1), allow_int=True)).lower(params, hidden, labels, weights)
        return slope.compile().memory_analysis().temp_size_in_bytes

    logits = 4 * batch * length * vocab
    assert temporary(cross_entropy, 4) < logits / 2 < logits <= temporary(cross_entropy_plain)


def test_choose_settles_auto_by_backend():
    assert fused.choose(Compute(), "cpu") == fused.MEASURED["cpu"]
    assert fused.choose(Compute(), "tpu") == fused.PLAIN
    assert fused.choose(Compute(kernels="plain", layers="unroll"), "cpu").unroll
    assert fused.choose(Compute(kernels="plain"), "cpu").attention == "plain"
    assert fused.choose(Compute(kernels="fused"), "tpu").attention == "chunked"
    assert fused.choose(Compute(), "gpu").attention == "cudnn" and fused.choose(Compute(), "gpu").wide_product
    assert not fused.choose(Compute(layers="scan"), "cpu").unroll
    assert not fused.choose(Compute(remat="full"), "cpu").unroll  # unrolled, recomputation saves no memory there


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_gradients_of_a_head_are_products_of_bfloat16_where_that_was_chosen(kind, rng_seed, monkeypatch):
    config = dataclasses.replace(gpt(1, 8, 2, vocab_size=11, max_length=7), head=kind)
    params = {"embed": {"embedding": jnp.ones((11, 8))}, "head": {"kernel": jnp.ones((8, 11))}}
    hidden = jax.random.normal(jax.random.key(rng_seed), (2, 3, 8)).astype(jnp.bfloat16)

    def products(wide: bool) -> list[set]:
        monkeypatch.setattr(fused, "choose", lambda *_: dataclasses.replace(fused.PLAIN, wide_product=wide))
        loss = lambda *a: jnp.sin(models.build(config).head(*a)).sum()  # noqa: E731
        found = jax.make_jaxpr(jax.grad(loss, (0, 1)))(params, hidden).jaxpr.eqns
        return [{str(x.aval.dtype) for x in one.invars} for one in found if one.primitive.name == "dot_general"]

    assert products(True)[-2:] == [{"bfloat16"}] * 2
    assert {"float32"} <= set().union(*products(False)[-2:])


def test_choice_loss_chunk_bounds_the_logits(rng_seed):
    choice = fused.MEASURED["cpu"]
    rng = np.random.default_rng(rng_seed)
    for _ in range(20):
        batch, length, vocab = (int(n) for n in rng.integers([1, 1, 2], [64, 4096, 200_000]))
        chunk = choice.loss_chunk(batch, length, vocab)
        held = batch * (chunk or length) * vocab
        assert held <= max(choice.loss_logits, batch * vocab) and (chunk is None or 1 <= chunk < length)

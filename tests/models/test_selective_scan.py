"""The forms of the selective scan against a NumPy loop, and against each other under all that models do with them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh
from operations import BAR, apart, normal, scan_loop, with_gradients

from xylem.models import selective_scan as scans
from xylem.models import selective_scan_gpu, selective_scan_pallas
from xylem.models.selective_scan import selective_scan
from xylem.models.settings import Compute
from xylem.sharding import make_mesh

B, T, INNER, Z = 3, 13, 7, 5
ON_GPU = "kernel for GPUs"
RULES = pytest.mark.parametrize("rule", ["euler", "zoh"])


@pytest.fixture(params=[*scans.FORMS, ON_GPU])
def label(request) -> str:
    return request.param


@pytest.fixture
def form(label, monkeypatch) -> str:
    """The form by its name; a kernel is interpreted here, the one for TPUs unless that for GPUs is asked for."""
    if label == ON_GPU:
        monkeypatch.setattr(selective_scan_pallas, "INTERPRETED", selective_scan_gpu)
        return "kernel"
    return label


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks that cut 13 tokens into several, the last one shorter."""
    monkeypatch.setattr(scans, "CHUNK", 4)
    monkeypatch.setattr(selective_scan_pallas, "CHUNK", 8)


def case(rng: np.random.Generator, length: int = T, batch: int = B, inner: int = INNER) -> dict[str, jax.Array]:
    """All arguments at random; every row begins with a state, and a document begins inside every row of some length."""
    keep = (rng.random((batch, length)) > 0.2).astype(np.float32)
    keep[:, length // 2] = 0.0
    return {
        "x": normal(rng, batch, length, inner),
        "delta": jnp.exp(normal(rng, batch, length, inner) - 1.0),
        "A": -jnp.exp(normal(rng, inner, Z)),
        "B": normal(rng, batch, length, Z),
        "C": normal(rng, batch, length, Z),
        "D": normal(rng, inner),
        "start": normal(rng, batch, Z, inner),
        "keep": jnp.asarray(keep),
    }


@RULES
def test_scan_equals_a_numpy_loop(label, form, rule, rng_seed, proof):
    args = case(np.random.default_rng(rng_seed))
    expected = scan_loop(rule, **{name: np.asarray(value, np.float64) for name, value in args.items()})
    run = lambda rule: jax.jit(partial(selective_scan, rule=rule, form=form))(**args)  # noqa: E731
    assert apart(run("zoh" if rule == "euler" else "euler"), expected) > BAR
    row = f"selective scan, {label} ({rule})"
    proof(row, "a float64 NumPy loop", apart(run(rule), expected), BAR, rng_seed, "the other discretisation")


@RULES
def test_scan_gradients_equal_those_of_the_numpy_loop(label, form, rule, rng_seed, proof):
    """Along one random direction of every argument, by a complex step, which is exact to rounding (Squire 1998)."""
    rng = np.random.default_rng(rng_seed)
    args = case(rng)
    keep = args.pop("keep")
    cotangents = normal(rng, B, T, INNER), normal(rng, B, Z, INNER)
    _, pull = jax.vjp(jax.jit(lambda args: selective_scan(**args, keep=keep, rule=rule, form=form)), args)
    (slopes,) = pull(cotangents)
    errors, faults = [], []
    for name, slope in slopes.items():
        direction = rng.standard_normal(slope.shape)
        moved = {each: np.asarray(value, np.complex128) for each, value in args.items()}
        moved[name] = moved[name] + 1e-30j * direction
        y, last = scan_loop(rule, **moved, keep=np.asarray(keep, np.float64))
        exact = sum(np.sum(out.imag * np.asarray(g, np.float64)) for out, g in zip((y, last), cotangents, strict=True))
        ours = np.asarray(slope, np.float64)
        scale = np.linalg.norm(ours) * np.linalg.norm(direction) or 1.0  # no start is read where every row begins anew
        errors.append(abs(np.sum(ours * direction) - exact / 1e-30) / scale)
        faults.append(abs(np.sum(np.roll(ours, 1, axis=-1) * direction) - exact / 1e-30) / scale)
    assert max(faults) > BAR
    row = f"selective scan, {label} ({rule}): gradients"
    oracle = "complex steps of a NumPy loop"
    proof(row, oracle, max(errors), BAR, rng_seed, "gradients shifted by one place along their last axis")


@pytest.mark.parametrize(("length", "rule"), [(1, "euler"), (4, "zoh"), (16, "euler"), (19, "euler"), (19, "zoh")])
@pytest.mark.parametrize("label", ["chunked", "kernel", ON_GPU], indirect=True)
def test_forms_agree_at_every_length_with_gradients(form, length, rule, rng_seed):
    args = case(np.random.default_rng(rng_seed), length)
    keep = args.pop("keep")
    run = lambda form: with_gradients(  # noqa: E731
        jax.jit(lambda args: selective_scan(**args, keep=keep, rule=rule, form=form)), (args,), rng_seed
    )
    assert apart(run(form), run("sequential")) <= BAR


def test_scan_begins_from_nothing_unless_told_otherwise(form, rng_seed):
    args = case(np.random.default_rng(rng_seed))
    told = args | {"start": jnp.zeros_like(args["start"]), "keep": jnp.ones_like(args["keep"])}
    bare = {name: value for name, value in args.items() if name not in ("start", "keep")}
    assert apart(selective_scan(**bare, form=form), selective_scan(**told, form=form)) == 0.0


def test_scan_goes_on_where_it_stopped(form, rng_seed):
    args = case(np.random.default_rng(rng_seed))
    run = jax.jit(partial(selective_scan, form=form))
    y, last = run(**args)
    early, late = ({name: v[:, part] if v.shape[:2] == (B, T) else v for name, v in args.items()}
                   for part in (slice(0, 9), slice(9, T)))  # fmt: skip
    first, middle = run(**early)
    second, end = run(**late | {"start": middle})
    assert apart((jnp.concatenate([first, second], 1), end), (y, last)) <= BAR


@RULES
def test_a_step_of_size_zero_leaves_no_trace(form, rule, rng_seed):
    args = case(np.random.default_rng(rng_seed)) | {"keep": jnp.ones((B, T))}
    still = args | {"delta": args["delta"].at[:, 9:].set(0.0)}
    short = {name: value[:, :9] if value.shape[:2] == (B, T) else value for name, value in args.items()}
    assert (
        apart(selective_scan(**still, rule=rule, form=form)[1], selective_scan(**short, rule=rule, form=form)[1]) == 0
    )


def test_documents_do_not_see_each_other_to_the_bit(form, rng_seed):
    rng = np.random.default_rng(rng_seed)
    args = case(rng) | {"keep": jnp.ones((B, T)).at[:, 6].set(0.0)}
    other = {name: normal(rng, *args[name][:, :6].shape) for name in ("x", "B", "C")}
    changed = args | {name: args[name].at[:, :6].set(value) for name, value in other.items()}
    run = jax.jit(partial(selective_scan, form=form))
    (y, last), (y_changed, last_changed) = run(**args), run(**changed)
    assert bool((y[:, 6:] == y_changed[:, 6:]).all()) and bool((last == last_changed).all())
    assert apart(y[:, :6], y_changed[:, :6]) > BAR


def test_scan_of_bfloat16_computes_in_float32(form, rng_seed):
    args = case(np.random.default_rng(rng_seed))
    narrow = {name: value.astype(jnp.bfloat16) for name, value in args.items()}
    y, last = selective_scan(**narrow, form=form)
    assert y.dtype == jnp.bfloat16 and last.dtype == jnp.float32
    wide = selective_scan(**{name: value.astype(jnp.float32) for name, value in narrow.items()}, form=form)
    assert apart(last, wide[1]) <= BAR
    assert apart(y, wide[0]) <= 2**-8  # the output is rounded once


def test_scan_on_eight_devices_equals_one(label, form, rng_seed, proof):
    rng = np.random.default_rng(rng_seed)
    args = case(rng, batch=4, inner=6)
    keep = args.pop("keep")
    run = jax.jit(
        lambda args: with_gradients(lambda a: selective_scan(**a, keep=keep, form=form), (args,), rng_seed),
    )
    one = run(args)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        eight = run(args)
    row = f"selective scan, {label}, on data 2 x fsdp 2 x tensor 2"
    faulty = jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), eight)
    assert apart(faulty, one) > BAR
    proof(row, "one device, gradients too", apart(eight, one), BAR, rng_seed, "rows shifted by one device")


def test_scan_of_what_no_mesh_divides_stays_whole(rng_seed):
    args = case(np.random.default_rng(rng_seed))
    alone = jax.jit(partial(selective_scan, form="chunked"))(**args)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        assert apart(jax.jit(partial(selective_scan, form="chunked"))(**args), alone) <= BAR


def test_chunked_keeps_one_state_a_chunk(monkeypatch):
    monkeypatch.setattr(scans, "CHUNK", 16)
    length, inner, states = 256, 32, 16
    shape = lambda *axes: jax.ShapeDtypeStruct(axes, jnp.float32)  # noqa: E731
    row, column = shape(1, length, inner), shape(1, length, states)
    args = row, row, shape(inner, states), column, column, shape(inner)

    def temporary(form):
        slope = jax.jit(jax.grad(lambda *a: selective_scan(*a, form=form)[0].sum(), range(6)))
        return slope.lower(*args).compile().memory_analysis().temp_size_in_bytes

    every_state = 4 * length * inner * states
    # One state a chunk, those of one chunk, and a few arrays as large as x.
    assert temporary("chunked") < every_state * (1 / 16 + 16 / length) + 10 * 4 * length * inner
    assert temporary("sequential") > every_state and temporary("parallel") > every_state


def test_choose_settles_auto_by_backend_and_length():
    settled = lambda length: [scans.choose(Compute(), backend, length) for backend in ("cpu", "tpu", "other")]  # noqa: E731
    assert settled(512) == ["chunked", "kernel", "parallel"] and set(settled(1)) == {"sequential"}
    assert scans.choose(Compute(kernels="plain"), "cpu", 512) == "sequential"
    assert scans.choose(Compute(scan="kernel", kernels="plain"), "cpu", 1) == "kernel"


@RULES
# jax 0.12 says so of all kernels of this kind.
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
def test_kernel_for_gpus_becomes_triton_code_in_both_directions(rule, rng_seed):
    """No GPU is needed to lower it."""
    args = case(np.random.default_rng(rng_seed), inner=130)
    loss = lambda args: selective_scan(**args, rule=rule, form="kernel")[0].sum()  # noqa: E731
    allowed = [jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
    gpu = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")  # jax 0.12 asks which one
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=gpu)):
        exported = jax.export.export(jax.jit(jax.grad(loss)), platforms=["cuda"], disabled_checks=allowed)(args)
    assert exported.mlir_module().count("__gpu$xla.gpu.triton") == 2, "one forward, one backward"

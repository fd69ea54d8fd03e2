"""What reaches cuDNN's attention, and what does not; on a GPU (see CONTRIBUTING.md) the kernels themselves."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from operations import apart, normal, with_gradients

from xylem.models import cudnn_attention, fused, selective_scan
from xylem.models.attention import attend, weigh
from xylem.models.llama import llama
from xylem.models.masks import Mask
from xylem.models.settings import Compute
from xylem.sharding import make_mesh

ON_GPU = jax.default_backend() == "gpu"
# jax's own attention takes the kernels' place where there are none: what is tested then is what we ask of them. The
# kernels round weights and results to bfloat16, of 8 bits.
DTYPE, BAR = (jnp.bfloat16, 2e-2) if ON_GPU else (jnp.float32, 1e-5)
B, T, S, N, K, H = 2, 14, 14, 6, 3, 8
CONFIG = llama(2, 48, N, K, 29, 31, 19, rope_theta=99.0, norm_eps=1e-5)
KERNELS = dataclasses.replace(fused.PLAIN, attention="cudnn")


def masks(rng: np.random.Generator) -> dict[str, Mask]:
    segments = jnp.asarray(np.sort(rng.integers(1, 4, (B, S)), axis=1))
    apart_from_all = segments.at[:, 3].set(9)  # queries of a document that no key is of
    return {
        "causal": Mask(),
        "everything": Mask(causal=False),
        "window": Mask(window=4),
        "traced window": Mask(window=jnp.int32(4)),
        "window both ways": Mask(causal=False, window=4),
        "prefix": Mask(prefix=jnp.array([3, 6])),
        "behind": Mask().behind(0, B),
        "documents": Mask(query_segments=segments, key_segments=segments),
        "windowed documents": Mask(window=3, query_segments=segments, key_segments=segments),
        "unseen": Mask(causal=False, query_segments=apart_from_all, key_segments=segments),
    }


@pytest.mark.parametrize("name", masks(np.random.default_rng(0)))
def test_every_mask_gives_what_attend_gives_with_gradients(name, rng_seed, proof, monkeypatch):
    rng = np.random.default_rng(rng_seed)
    mask, arrays = masks(rng)[name], [normal(rng, B, n, h, H) for n, h in ((T, N), (S, K), (S, K))]
    wide = [x.astype(DTYPE).astype(jnp.float32) for x in arrays]
    if not ON_GPU:
        monkeypatch.setattr(cudnn_attention, "IMPLEMENTATION", "xla")
    ours = lambda *a: cudnn_attention.attention(*(x.astype(DTYPE) for x in a), mask, 0.4).astype(jnp.float32)  # noqa: E731
    expected = with_gradients(lambda *a: attend(*a, mask, scale=0.4), tuple(wide), rng_seed)
    fault = mask.replace(causal=not mask.causal)
    assert apart(with_gradients(lambda *a: attend(*a, fault, scale=0.4), tuple(wide), rng_seed), expected) > BAR
    error = apart(with_gradients(ours, tuple(wide), rng_seed), expected)
    row = f"cuDNN's attention, mask: {name}" if ON_GPU else f"what cuDNN is asked for, mask: {name}"
    oracle = "attend(), gradients too" if ON_GPU else "attend(), by jax's own attention, gradients too"
    proof(row, oracle, error, BAR, rng_seed, "causal where it is not, or the other way round")


def on(monkeypatch, capability: str | None) -> None:
    """As if the first device had this compute capability, or none."""
    said = {} if capability is None else {"compute_capability": capability}
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(**said)])


@pytest.mark.parametrize(("capability", "generation"), [(None, 0), ("gfx90a", 0), ("7.5", 7), ("8.0", 8), ("12.0", 12)])
def test_kernels_are_for_nvidia_gpus_since_ampere(capability, generation, rng_seed, monkeypatch):
    rng = np.random.default_rng(rng_seed)
    query, key = normal(rng, B, T, N, H).astype(jnp.bfloat16), normal(rng, B, S, K, H).astype(jnp.bfloat16)
    on(monkeypatch, capability)
    assert cudnn_attention.nvidia_generation() == generation
    assert cudnn_attention.takes(query, key, None) == (generation >= 8)
    assert selective_scan.choose(Compute(), "gpu", 2000) == ("kernel" if generation >= 8 else "parallel")


def test_other_arrays_take_the_plain_path(rng_seed, monkeypatch):
    rng = np.random.default_rng(rng_seed)
    query, key = normal(rng, B, T, N, H).astype(jnp.bfloat16), normal(rng, B, S, K, H).astype(jnp.bfloat16)
    long = lambda x, head_dim: jnp.zeros((*x.shape[:3], head_dim), jnp.bfloat16)  # noqa: E731
    on(monkeypatch, "9.0")
    assert cudnn_attention.takes(query, key, None)
    assert cudnn_attention.takes(long(query, 128), long(key, 128), None)
    assert not cudnn_attention.takes(long(query, 136), long(key, 136), None)
    assert not cudnn_attention.takes(long(query, 12), long(key, 12), None)
    assert not cudnn_attention.takes(query, key, jnp.zeros((1, N, T, S)))
    assert not cudnn_attention.takes(query.astype(jnp.float32), key.astype(jnp.float32), None)
    assert not cudnn_attention.takes(query[:, 1:], key, None)
    assert not cudnn_attention.takes(query, key[:, 1:], None)
    monkeypatch.undo()
    wide = query.astype(jnp.float32), key.astype(jnp.float32), normal(rng, B, S, K, H)
    out = weigh(*wide, Mask(), CONFIG, KERNELS, None, None, cache=None)
    assert apart(out, attend(*wide, Mask())) == 0.0


@pytest.mark.parametrize(("heads", "local"), [((6, 3), 6), ((4, 2), 2), ((4, 1), 4)])
def test_the_layer_asks_for_its_own_mask_and_scale_and_devices_for_their_parts(heads, local, rng_seed, monkeypatch):
    """On a mesh of 4 x 2: heads are divided where those of the keys can be."""
    rng, (n, k), seen = np.random.default_rng(rng_seed), heads, []
    real = jax.nn.dot_product_attention

    def spy(query, key, value, **options):
        seen.append((query.shape, key.shape))
        return real(query, key, value, **options | {"implementation": None})

    monkeypatch.setattr(jax.nn, "dot_product_attention", spy)
    monkeypatch.setattr(cudnn_attention, "takes", lambda *_: True)
    arrays = normal(rng, 4, T, n, H), normal(rng, 4, S, k, H), normal(rng, 4, S, k, H)
    segments = jnp.asarray(np.sort(rng.integers(1, 4, (4, S)), axis=1))
    config = dataclasses.replace(CONFIG, attention=dataclasses.replace(CONFIG.attention, scale="none"))
    for mask in (Mask(), Mask(query_segments=segments, key_segments=segments), Mask(window=jnp.int32(4))):
        asked = lambda *a, mask=mask: weigh(*a, mask, config, KERNELS, None, None, cache=None)  # noqa: E731
        expected = attend(*arrays, mask, scale=1.0)
        assert apart([asked(*arrays)], [expected]) <= 1e-6
        with jax.set_mesh(make_mesh(4, 1, 2)):
            assert apart([jax.jit(asked)(*arrays)], [expected]) <= 1e-6
        assert seen[-1] == ((1, T, local, H), (1, S, k * local // n, H))
        assert apart([attend(*arrays, mask)], [expected]) > 1e-3

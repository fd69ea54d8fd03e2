"""The case that the tests of the model contracts share."""

import jax
import pytest
from small import B, T, random_weights, small

from xylem import models


@pytest.fixture(params=["gpt", "llama"])
def case(request, rng_seed):
    config = small(request.param)
    module = models.build(config)
    keys = jax.random.split(jax.random.key(rng_seed), 3)
    tokens = jax.random.randint(keys[0], (B, T), 0, config.vocab_size)
    params = random_weights(module, keys[2], tokens)
    return config, module, params, tokens

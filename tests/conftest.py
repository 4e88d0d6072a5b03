import gc

import jax
import pytest


jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
# For the tests of solves on several devices. All others run on the first.
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(autouse=True, scope="module")
def _free_compiled_programs():
    # Hundreds of compiled programs in one process run into the system's limits.
    yield
    jax.clear_caches()
    gc.collect()

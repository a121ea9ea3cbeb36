"""Only compiling takes time here, and what is compared does not depend on LLVM's passes."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def _compile_quickly():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)

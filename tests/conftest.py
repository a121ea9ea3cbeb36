"""All tests run on 8 virtual CPU devices, which are fixed before JAX is imported, and calls of the
layers are checked against the shapes and types of their signatures."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
import jaxtyping

import tests.typechecking

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/jspeed/test-xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

# Modules that are imported already stay unchecked, so this stands here and not beside their tests.
jaxtyping.install_import_hook(
    ["jspeed.nn", "jspeed.optim.newton_schulz"], f"{tests.typechecking.__name__}.check"
)

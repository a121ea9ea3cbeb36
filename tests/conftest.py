"""All tests run on 8 virtual CPU devices, which are fixed before JAX is imported."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/jspeed/test-xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

"""GPU kernels as pure functions of arrays, independent of jspeed: one folder per operation.

Each folder has `api.py` (signature, checks, choice of implementation), `reference.py` (plain
jnp) and a file per implementation; `benchmarks.gpu` times attention and AdamW,
`rms_norm.bench` the norm.
"""

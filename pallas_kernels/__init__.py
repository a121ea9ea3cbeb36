"""GPU kernels as pure functions of arrays, independent of jspeed: one folder per operation.

Each folder has `api.py` (signature, checks, choice of implementation), `reference.py` (plain
jnp), a file per implementation, and `bench.py`: of attention and AdamW it finds the fastest tiles,
of the norm it takes the times. `benchmarks.gpu` checks and times all of them beside their peers.
"""

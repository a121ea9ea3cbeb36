"""GPU kernels as pure functions of arrays, independent of jspeed: one folder per operation.

Each folder has `api.py` (signature, checks, choice of implementation), `reference.py` (plain
jnp), a file per implementation and `bench.py`.
"""

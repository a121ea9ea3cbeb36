"""jspeed's Adam on the host; the kind is its engine."""

from benchmarks.contestants.host_adam_problem import (
    BETAS,
    EPS,
    LEARNING_RATE,
    WEIGHT_DECAY,
    begin,
)

if __name__ == "__main__":
    task = begin()

    import itertools

    import ml_dtypes
    import numpy as np

    from jspeed.offload import AdamRule, HostAdam, host_zeros

    if task.kind not in ("numba", "xla"):
        raise SystemExit(f"kind {task.kind!r}; expected numba or xla.")
    rule = AdamRule(eps=EPS, weight_decay=WEIGHT_DECAY, decoupled=True, bias_corrected=True)
    adam = HostAdam(rule, "numba" if task.kind == "numba" else "xla", threads=task.threads)
    dtype = np.dtype(ml_dtypes.bfloat16 if task.sixteen_bit else np.float32)
    master, mu, nu = (adam.zeros(task.elements) for _ in range(3))
    master[:] = task.parameters()
    gradient = host_zeros(task.elements, dtype)
    gradient[:] = task.gradient()
    # In float32 the master is what goes up; so it is with the others.
    out = host_zeros(task.elements, dtype) if task.sixteen_bit else master
    counts = itertools.count(1)

    def step() -> None:
        adam.update(
            (master, mu, nu),
            gradient,
            out,
            learning_rate=LEARNING_RATE,
            betas=BETAS,
            count=next(counts),
            gradient_factor=1.0,
        )

    packages = ("jax", "numpy", *(("numba",) if task.kind == "numba" else ()))
    task.serve(step, master, *packages)

"""DeepSpeed's CPUAdam and torch's fused AdamW. Runs in an environment of its own."""

import os

from benchmarks.contestants.host_adam_problem import (
    BETAS,
    EPS,
    LEARNING_RATE,
    WEIGHT_DECAY,
    begin,
)

if __name__ == "__main__":
    task = begin()
    os.environ["DS_ACCELERATOR"] = "cpu"

    import torch

    torch.set_num_threads(task.threads)
    parameter = torch.nn.Parameter(torch.from_numpy(task.parameters()))
    parameter.grad = torch.from_numpy(task.gradient())
    settings = {"lr": LEARNING_RATE, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY}
    packages = ["torch"]
    if task.kind == "deepspeed":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        optimizer = DeepSpeedCPUAdam([parameter], adamw_mode=True, **settings)
        packages.append("deepspeed")
    elif task.kind == "torch":
        optimizer = torch.optim.AdamW([parameter], fused=True, **settings)
    else:
        raise SystemExit(f"kind {task.kind!r}; expected deepspeed or torch.")

    task.serve(lambda: optimizer.step() and None, parameter.detach().numpy(), *packages)

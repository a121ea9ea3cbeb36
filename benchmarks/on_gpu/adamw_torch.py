"""Times of torch's fused AdamW."""

from __future__ import annotations

import math

from benchmarks.on_gpu.adamw import DECAY, RATE
from benchmarks.on_gpu.flex import time_calls, torch_or_reason
from benchmarks.on_gpu.rows import Clock, Plan, Row

SECTION = "torch adamw"
BYTES = 28
"""Per parameter: three fp32 arrays read and written, an fp32 gradient read; there is no copy."""


def run(plan: Plan, clock: Clock) -> None:
    """One row: a step on arrays of the same shapes."""
    reason, torch = torch_or_reason()
    if torch is None:
        clock.emit(Row(SECTION, "torch fused", "step", "skipped", note=reason))
        return
    torch.manual_seed(plan.seed)
    params = [torch.randn(shape, device="cuda").mul_(0.02) for shape in plan.parameters]
    for one in params:
        one.grad = torch.randn_like(one).mul_(1e-3)
    optimizer = torch.optim.AdamW(params, lr=RATE, weight_decay=DECAY, fused=True)
    median, spread = time_calls(torch, optimizer.step, [()] * 10, plan.repeats)
    elements = sum(math.prod(shape) for shape in plan.parameters)
    clock.emit(
        Row(
            SECTION,
            "torch fused",
            "step",
            milliseconds=median,
            spread=spread,
            bytes=float(BYTES * elements),
            clock="events",
            note=f"torch {torch.__version__}, no 16-bit copy",
        )
    )

"""Times of torch's `flex_attention` with the same blocks, compiled."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.on_gpu.attention import problem_name
from benchmarks.on_gpu.problems import flops, layout_of, least_bytes
from benchmarks.on_gpu.rows import Attention, Clock, Plan, Row, reason_of

SECTION = "torch attention"


def run(plan: Plan, clock: Clock) -> None:
    """The problems of blocks that `flex_attention` has: 128 tokens."""
    reason, torch = torch_or_reason()
    if torch is None:
        clock.emit(Row(SECTION, "flex_attention", "all", "skipped", note=reason))
        return
    for backward in (False, True):
        for problem in plan.attention:
            name = problem_name(problem, backward)
            if problem.dense or problem.block != 128 or (backward and not problem.backward):
                continue
            if clock.over(SECTION, "flex_attention", name):
                continue
            try:
                clock.emit(_time(torch, plan, problem, name, backward))
            except Exception as error:
                clock.emit(Row(SECTION, "flex_attention", name, "failed", note=reason_of(error)))


def torch_or_reason() -> tuple[str, Any]:
    """torch if it is installed and sees a GPU, or why not."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        return "torch is not installed", None
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU", None
    return "", torch


def time_calls(torch: Any, call: Any, sets: list[Any], repeats: int) -> tuple[float, float]:
    """Milliseconds per call by events on the device: median, and distance of the quartiles."""
    for arrays in sets:
        call(*arrays)
    times = []
    for _ in range(max(2, repeats)):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for arrays in sets:
            call(*arrays)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / len(sets))
    low, middle, high = statistics.quantiles(times, n=4)
    return middle, high - low


def _time(torch: Any, plan: Plan, problem: Attention, name: str, backward: bool) -> Row:
    from torch.nn.attention.flex_attention import (  # pyright: ignore[reportMissingImports]
        flex_attention,
    )

    layout = layout_of(problem)
    blocks = _block_mask(torch, problem, layout.mask[0])
    attend = torch.compile(flex_attention, dynamic=False)
    torch.manual_seed(plan.seed)
    shape = (1, problem.heads, problem.seq, problem.dim)

    def random() -> Any:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=backward)

    count = max(1, -(-plan.l2_bytes // (3 * 2 * problem.seq * problem.heads * problem.dim)))
    sets = [(random(), random(), random()) for _ in range(count)]

    def call(q: Any, k: Any, v: Any) -> None:
        out = attend(q, k, v, block_mask=blocks)
        if backward:
            torch.autograd.grad(out, (q, k, v), out.detach())

    median, spread = time_calls(torch, call, sets, plan.repeats)
    return Row(
        SECTION,
        "flex_attention",
        name,
        milliseconds=median,
        spread=spread,
        flops=flops(problem, layout, backward=backward),
        bytes=least_bytes(problem, backward=backward),
        clock="events",
        note=f"torch {torch.__version__}",
    )


def _block_mask(torch: Any, problem: Attention, mask: Any) -> Any:
    """The layout as torch's lists. All active blocks are full unless masking is causal."""
    from torch.nn.attention.flex_attention import (  # pyright: ignore[reportMissingImports]
        BlockMask,
    )

    active = torch.from_numpy(mask.copy()).cuda()
    full, partial = active, torch.zeros_like(active)
    if problem.causal:
        diagonal = torch.eye(len(active), dtype=torch.bool, device="cuda")
        full, partial = active.tril(-1), active & diagonal

    def lists(which: Any) -> tuple[Any, Any]:
        counts = which.sum(-1, dtype=torch.int32)
        order = torch.argsort(which.to(torch.int32), dim=-1, descending=True, stable=True)
        return counts[None, None], order.to(torch.int32)[None, None].contiguous()

    options: dict[str, Any] = {"mask_mod": lambda b, h, q, k: q >= k} if problem.causal else {}
    return BlockMask.from_kv_blocks(
        *lists(partial), *lists(full), BLOCK_SIZE=problem.block, **options
    )

"""The search for blocks runs where there is no GPU."""

from __future__ import annotations

from pallas_kernels.fused_adamw import bench
from pallas_kernels.fused_adamw.triton import BLOCK, NUM_WARPS


def test_a_line_for_each_candidate_and_the_best(capsys):
    bench.main(["--smoke"])
    first, line, *best = capsys.readouterr().out.splitlines()
    assert first.endswith(", smoke")
    assert line.split()[:4] == ["block", str(BLOCK), "warps", str(NUM_WARPS)]
    assert best == [f"BLOCK = {BLOCK}", f"NUM_WARPS = {NUM_WARPS}"]
    assert (BLOCK, NUM_WARPS) in bench.CANDIDATES

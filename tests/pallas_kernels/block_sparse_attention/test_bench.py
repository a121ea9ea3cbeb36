"""The search for tiles runs where there is no GPU, and prints what the table is made of."""

from __future__ import annotations

import ast

from pallas_kernels.block_sparse_attention import bench
from pallas_kernels.block_sparse_attention.tiles import TABLE, Tile


def test_a_row_for_each_kernel(capsys):
    bench.main(["--smoke"])
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.endswith(", smoke")
    table = "\n".join(lines).replace("Tile", "")
    rows = ast.literal_eval("{" + table + "}")
    assert {key: list(row) for key, row in rows.items()} == {(64, 4): ["forward", "dq", "dkv"]}
    for kernel, tiles in rows[64, 4].items():
        assert [Tile(*tile) for tile in tiles.values()] == bench.candidates(kernel, 4)[:1]


def test_candidates_are_those_of_all_tables():
    for kernel in ("forward", "dq", "dkv"):
        for size in (2, 4):
            found = bench.candidates(kernel, size)
            assert len(found) == len(set(found)) >= 3
            for table in TABLE.values():
                assert set(table[128, size][kernel].values()) <= set(found)

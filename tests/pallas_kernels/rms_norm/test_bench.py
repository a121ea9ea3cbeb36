"""The benchmark runs where there is no GPU."""

from __future__ import annotations

import re

from pallas_kernels.rms_norm import bench


def test_a_line_for_each_pass_and_implementation(capsys):
    bench.main(["--smoke"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(", smoke")
    found = [re.match(r" +96 (\w+) +(\w+) +[\d.]+ ms +[\d.]+% of copy", line) for line in lines[1:]]
    assert [match.groups() for match in found if match] == [
        (name, one) for one in ("xla", "triton") for name in ("forward", "backward")
    ]

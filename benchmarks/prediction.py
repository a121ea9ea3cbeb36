"""What `jspeed sweep` predicts beside what is measured, on the devices of a CPU.

    python -m benchmarks.prediction

Two parts. `layouts` sweeps more than 60 layouts of a tiny GPT on 8 virtual devices, kills the sweep
in the middle, lets it go on, and trains every layout: each must give the losses of one device.
`times` sweeps microbatch x remat x stage of a larger one on 1 and on 2 devices, pinned to a core
each, and trains them all. Writes `docs/prediction.md`. The status is 1 where losses differ, a
layout fails, or the kill costs a finished row. `jspeed targets --measure` must have been run.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import typer

from jspeed.planner.pool import Ending
from jspeed.planner.resources import cores
from jspeed.planner.sweep import Candidate, Row, RunFile
from jspeed.planner.sweep.measure import Place, measure, on_cpu, spearman

PAGE = Path(__file__).resolve().parent.parent / "docs" / "prediction.md"
LOSS_LIMIT = 2e-5
"""Relative; fp32 sums in another order differ by some units of 1e-7 a step."""
_KILLED_AT = 20

_TENSOR_RULES = [
    ["blocks/attn/qkv/kernel", [None, None, None, "tensor"]],
    ["blocks/attn/qkv/bias", [None, None, "tensor"]],
    ["blocks/mlp/fc/kernel", [None, None, "tensor"]],
    ["blocks/mlp/fc/bias", [None, "tensor"]],
    ["blocks/(attn|mlp)/proj/kernel", [None, "tensor", None]],
]


def tiny_run(**changes: Any) -> dict[str, Any]:
    """GPT-2, small enough for 8 devices on one core, in fp32."""
    run: dict[str, Any] = {
        "train_batch_size": 16,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1}},
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "mesh": {"rules": _TENSOR_RULES},
        "model": {"family": "gpt2", "layers": 2, "hidden_size": 32, "heads": 4,
                  "sequence_length": 32},
        "data": {"source": "golden", "sequence_length": 32, "tokenizer": {"kind": "byte"}},
        "sweep": {"replica": [1, 2], "tensor": [1, 2], "micro_batch_sizes": [1, 2, 4],
                  "measure_first_step": 2, "measure_last_step": 6},
        "run": {"dir": "run", "steps": 6},
    }  # fmt: skip
    return {**run, **changes}


def timed_run(micro: Sequence[int]) -> dict[str, Any]:
    """GPT-2 whose steps take long enough to be timed beside what else a machine does."""
    return tiny_run(
        mesh={},
        model={"family": "gpt2", "layers": 4, "hidden_size": 128, "heads": 4,
               "sequence_length": 128},
        data={"source": "golden", "sequence_length": 128, "tokenizer": {"kind": "byte"}},
        sweep={"axes": ["data"], "micro_batch_sizes": list(micro), "measure_first_step": 2,
               "measure_last_step": 12},
        run={"dir": "run", "steps": 12},
    )  # fmt: skip


def command(run: Path, gpus: int, output: Path, *more: str) -> list[str]:
    """`jspeed sweep` for the CPU."""
    options = ["--gpu", "cpu", "--gpus", str(gpus), "--output", str(output), *more]
    return [sys.executable, "-m", "jspeed.cli", "sweep", str(run), *options]


@dataclass(frozen=True)
class Layouts:
    """What the first part found.

    Attributes:
      result: `sweep.json`.
      kept: rows that were finished when the sweep was killed.
      lost: of those, how many the second try compiled again.
      reference: losses on one device.
    """

    result: Mapping[str, Any]
    kept: int
    lost: int
    reference: np.ndarray

    @property
    def differences(self) -> list[float]:
        """Per layout that trained: the largest relative difference of a step's loss."""
        return [
            float(np.max(np.abs(np.asarray(trial["losses"]) - self.reference) / self.reference))
            for trial in self.result["measured"]["trials"]
            if trial["error"] is None
        ]

    @property
    def failed(self) -> list[str]:
        """Layouts that could not be compiled or trained, with the errors."""
        rows = [f"{row['label']}: {row['error']}" for row in self.result["rows"] if row["error"]]
        trials = self.result["measured"]["trials"]
        return rows + [f"{one['label']}: {one['error']}" for one in trials if one["error"]]


def sweep_layouts(folder: Path) -> Layouts:
    """Sweeps, is killed, goes on, and trains every layout."""
    run, output = folder / "layouts.json", folder / "layouts"
    run.write_text(json.dumps(tiny_run()))
    rows = output / "rows.jsonl"
    with subprocess.Popen(command(run, 8, output)) as first:
        while len(lines(rows)) < _KILLED_AT:
            if first.poll() is not None:
                raise SystemExit("the sweep ended before it could be killed")
            time.sleep(0.1)
        first.send_signal(signal.SIGKILL)
    before = lines(rows)[:-1]  # the last may be torn
    subprocess.run(command(run, 8, output, "--measure", "--measure-top", "all"), check=True)
    after = lines(rows)
    keys = [json.loads(line)["key"] for line in after]
    result = json.loads((output / "sweep.json").read_text())
    return Layouts(
        result, len(before), len(keys) - len(set(keys)), one_device(run, folder / "reference")
    )


def one_device(run: Path, directory: Path) -> np.ndarray:
    """The losses of the same run on one device, without ZeRO and accumulation."""
    file = RunFile.read(run)
    batch = file.config.batch.train_batch_size
    assert batch is not None
    candidate = Candidate(1, 1, 1, 0, batch, 1, "none")
    row = Row(candidate, "one-device", Ending.DONE, None, "", 0.0)
    place = Place(on_cpu(1, cores()), directory)
    [trial] = measure(file, [row], place, told=lambda _: None).trials
    if trial.error:
        raise SystemExit(f"one device: {trial.error}")
    return np.asarray(trial.losses)


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines() if path.exists() else []


def sweep_times(folder: Path) -> dict[int, Mapping[str, Any]]:
    """`sweep.json` by number of devices."""
    found: dict[int, Mapping[str, Any]] = {}
    for devices, micro in ((1, (1, 4, 16)), (2, (1, 2, 8))):
        run, output = folder / f"times{devices}.json", folder / f"times{devices}"
        run.write_text(json.dumps(timed_run(micro)))
        more = ("--measure", "--measure-top", "all")
        subprocess.run(command(run, devices, output, *more), check=True)
        found[devices] = json.loads((output / "sweep.json").read_text())
    return found


def layouts_text(layouts: Layouts) -> str:
    """The section on losses."""
    measured, discarded = layouts.result["measured"], layouts.result["discarded"]
    return paragraph(
        "## Every layout trains as one device does\n",
        f"{len(layouts.result['rows'])} layouts of a tiny GPT (2 layers, width 32, fp32) on 8 "
        "virtual devices: replica x data x tensor, ZeRO stages 0 to 3, microbatches of 1, 2 and 4 "
        "rows, remat or not, one global batch of 16. The sweep was killed (SIGKILL) with "
        f"{layouts.kept} rows finished; the same command went on, and compiled {layouts.lost} of "
        f"them again. {len(discarded)} combinations were discarded with a reason.\n",
        f"{len(layouts.differences)} layouts were trained for {measured['last_step']} steps, and "
        f"{len(layouts.failed)} failed. Their losses differ from those of one device by at most "
        f"**{max(layouts.differences):.1e}** (relative, at any step; the limit is "
        f"{LOSS_LIMIT:.0e}).\n",
    )


def times_text(devices: int, result: Mapping[str, Any]) -> str:
    """The section on the times of so many devices."""
    measured = result["measured"]
    trials = [trial for trial in measured["trials"] if trial["error"] is None]
    ratios = [trial["measured_seconds"] / trial["predicted_seconds"] for trial in trials]
    fastest = min(trial["measured_seconds"] for trial in trials)
    chosen = trials[0]["measured_seconds"]
    undisturbed = spearman(
        [trial["predicted_seconds"] for trial in trials],
        [min(trial["measured_steps"]) for trial in trials],
    )
    plural = "s" if devices > 1 else ""
    return paragraph(
        f"### {devices} device{plural} on {devices} core{plural}\n",
        f"{len(trials)} layouts: rank correlation (Spearman) "
        f"**{measured['rank_correlation']:.2f}** (by each layout's fastest step, which other work "
        f"on the machine disturbs least: {undisturbed:.2f}). Measured over predicted: "
        f"{min(ratios):.2f} to "
        f"{max(ratios):.2f}, median {statistics.median(ratios):.2f}. The layout that was predicted "
        f"to be the fastest takes {chosen / fastest:.2f} times as long as the fastest.\n",
        table(trials),
        "",
    )


def paragraph(*parts: str) -> str:
    return "\n".join(parts)


def table(trials: Sequence[Mapping[str, Any]]) -> str:
    """A row per layout, the one predicted to be the fastest first."""
    head = "| layout | predicted | measured | ratio |\n|---|--:|--:|--:|"
    rows = [
        f"| {one['label']} | {1e3 * one['predicted_seconds']:.1f} ms | "
        f"{1e3 * one['measured_seconds']:.1f} ms | "
        f"{one['measured_seconds'] / one['predicted_seconds']:.2f} |"
        for one in trials
    ]
    return "\n".join([head, *rows])


def page(layouts: Layouts, times: Mapping[int, Mapping[str, Any]], load: float) -> str:
    """The whole page; `load` is the load average at the end of the timed part."""
    return paragraph(
        "# Predictions beside measurements\n",
        f"Written by `python -m benchmarks.prediction` on {cores()} cores "
        f"({platform.machine()}), JAX {jax.__version__}, Python {platform.python_version()}; "
        f"the load average over the last 15 minutes of the timed part was {load:.1f}, and what of "
        f"it is above {cores()} is other work that the times below are disturbed by.\n",
        "What this can show is limited. A mesh on described GPUs cannot be timed without them, so "
        "no prediction for a GPU is tested here: only whether the compiled program, the FLOPs, "
        "bytes and collectives counted in it, and the measured figures of a device give "
        "an order that "
        "the device confirms. On CPUs the network is shared memory and nothing overlaps.\n",
        "It is no blind test: the model of a CPU was mended once after a first comparison on these "
        "layouts. [sweep.md](sweep.md) says what was different, and has layouts that played no "
        "part.\n",
        layouts_text(layouts),
        "## Predicted and measured step times\n",
        "A GPT-2 of 4 layers and width 128, 128 tokens a row, 16 rows a step, fp32; every "
        "microbatch x remat x ZeRO stage. The prediction is the plan's for the target `cpu`, whose "
        "figures `jspeed targets --measure` took from one core. The measurement is the median of "
        "steps 3 to 12 of the training loop, each layout in a process of its own, on as many cores "
        "as it has devices.\n",
        *(times_text(devices, result) for devices, result in times.items()),
    )


def main(
    keep: Annotated[
        Path | None, typer.Option(help="Where the sweeps stay; their finished rows are reused.")
    ] = None,
) -> None:
    """Runs both parts and writes the page."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = (keep or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)
        times = sweep_times(folder)
        load = os.getloadavg()[2]
        layouts = sweep_layouts(folder)
    PAGE.write_text(page(layouts, times, load))
    print(PAGE.read_text())
    for failure in layouts.failed:
        print(failure, file=sys.stderr)
    wrong = layouts.failed or layouts.lost or max(layouts.differences) > LOSS_LIMIT
    raise typer.Exit(1 if wrong else 0)


if __name__ == "__main__":
    typer.run(main)

"""Compares elastic batch sizes with those of an installed DeepSpeed, on random settings.

    python -m tests.config.elastic_peer --settings 8000 --seed 2 --write

Needs a DeepSpeed that still has elasticity (0.19.6 has, 0.19.8 has not); neither JAX nor a GPU.
`--write` makes `elastic_batches.json` anew, which `test_elastic_batch.py` reads.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
from collections import Counter
from pathlib import Path
from typing import Any

from jspeed.config.elastic_batch import ElasticBatch, choose
from jspeed.config.problem import Problem
from jspeed.config.sections import ElasticityConfig

TABLE = Path(__file__).parent / "elastic_batches.json"
_ROWS = 24  # of each version
_FEW = 24  # counts of a row that fits on a page
Row = dict[str, Any]


def draw(rng: random.Random) -> tuple[Row, int]:
    """Settings, and a number of devices; 0 for none."""
    low = rng.choice([1, 1, rng.randint(1, 64)])
    section = {
        "max_train_batch_size": rng.choice(
            [rng.randint(1, 100), rng.randint(100, 3000), rng.randint(3000, 60000)]
        ),
        "micro_batch_sizes": [
            rng.choice([rng.randint(1, 8), rng.randint(1, 64), 2 ** rng.randint(0, 6)])
            for _ in range(rng.randint(1, 5))
        ],
        "min_gpus": low,
        "max_gpus": rng.choice([10000, low + rng.randint(0, 200), rng.randint(low, 5000)]),
        "version": rng.choice([0.1, 0.2]),
        "prefer_larger_batch": rng.random() < 0.7,
    }
    if section["version"] == 0.1:
        return section, rng.choice([0, rng.randint(1, 64)])
    section["num_gpus_per_node"] = rng.choice([1, 2, 4, 8])
    section["model_parallel_size"] = rng.choice([1, 1, 2, 4])
    nodes = section["num_gpus_per_node"] * rng.randint(1, 16)
    return section, rng.choice([rng.randint(1, 64), nodes])


def theirs(section: Row, world_size: int) -> Row | None:
    """What DeepSpeed returns; None where it raises, or finds no number of devices."""
    from deepspeed.elasticity import compute_elastic_config  # pyright: ignore

    try:
        batch, counts, *micro = compute_elastic_config(
            {"elasticity": {"enabled": True, **section}}, "0.19.6", world_size=world_size
        )
    except Exception:  # its own errors, and TypeErrors where it finds nothing
        return None
    if not counts:
        return None
    rows = int(micro[0]) if micro and micro[0] is not None else None
    counts = sorted(map(int, counts))
    return {"batch": int(batch), "counts": counts, "micro": rows}


def ours(section: Row) -> ElasticBatch | Problem:
    fields = {"num_gpus_per_node": 1, "model_parallel_size": 1, **section}
    fields["micro_batch_sizes"] = tuple(fields["micro_batch_sizes"])
    return choose(ElasticityConfig(**fields))


def verdict(section: Row, world_size: int, found: Row | None) -> str:
    """How the two compare, in a few words."""
    batch = ours(section)
    copy = section.get("model_parallel_size", 1)
    if isinstance(batch, Problem):
        return "refused by both" if found is None else "refused by jspeed alone"
    fits = world_size % copy == 0 and world_size // copy in batch.data_parallel_sizes
    if found is None:
        if world_size and not fits:
            return "number of devices refused by both"
        return "number of devices refused by DeepSpeed alone"
    if section["version"] == 0.2 and not fits:
        return "0.2 on a number of devices that does not hold: another batch by DeepSpeed"
    same = (found["batch"], found["counts"]) == (
        batch.train_batch_size,
        list(batch.data_parallel_sizes),
    )
    if not same:
        per_node = section.get("num_gpus_per_node", 1)
        whole = section["min_gpus"] % per_node == 0 or section["min_gpus"] < per_node
        return "different" if whole else "different: min_gpus is no whole number of nodes"
    if found["micro"] is None:
        return "the same"
    if found["micro"] == batch.micro_batch_size(world_size // copy):
        return "the same, microbatch included"
    return "different microbatch" + (" (several devices for a copy)" if copy > 1 else "")


def _first(rows: list[Row], version: float) -> list[Row]:
    return [row for row in rows if row["elasticity"]["version"] == version][:_ROWS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", type=int, default=8000)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    rng, counts, rows = random.Random(options.seed), Counter[tuple[float, str]](), []
    for _ in range(options.settings):
        section, world_size = draw(rng)
        found = theirs(section, world_size)
        text = verdict(section, world_size, found)
        counts[section["version"], text] += 1
        if text.startswith("the same") and found and len(found["counts"]) <= _FEW:
            rows.append({"elasticity": section, "world_size": world_size, **found})
    for (version, text), count in sorted(counts.items()):
        print(f"{count:6}  {version}  {text}")
    if options.write:
        kept = [*_first(rows, 0.1), *_first(rows, 0.2)]
        source = "compute_elastic_config of deepspeed 0.19.6, random settings"
        lines = ",\n".join(f"    {json.dumps(row)}" for row in kept)
        TABLE.write_text(f'{{\n  "source": "{source}",\n  "rows": [\n{lines}\n  ]\n}}\n')


if __name__ == "__main__":
    main()

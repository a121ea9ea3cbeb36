"""Two processes, each with one device, read and write a folder together."""

from __future__ import annotations

import pytest

from tests.engine.test_processes import run

tiny = pytest.importorskip("tests.hf.tiny")

PROGRAM = """
import json, sys
import jax

port, process, folder = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", 2, int(process))
import jspeed
import jspeed.engine.pretrained as pretrained
from jspeed.models import model_from_hf

read = []

class Counting(pretrained.Folder):
    def __exit__(self, *error):
        read.append(self.bytes_read)
        super().__exit__(*error)

pretrained.Folder = Counting
model = model_from_hf(folder + "/theirs")
engine = jspeed.initialize(
    model=model,
    loss_fn=model.loss_fn,
    config={
        "train_batch_size": 2,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    },
)
engine.save_hf_model(folder + "/ours", max_shard_size=20_000)
leaves = jax.tree.leaves(engine.state.master)
own = sum(leaf.addressable_data(0).nbytes for leaf in leaves)
print(json.dumps([read, own, sum(leaf.nbytes for leaf in leaves)]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_each_process_reads_its_own_part(name, tmp_path):
    source, _ = tiny.saved(tmp_path / "theirs", name)
    for read, own, whole in run(PROGRAM, tmp_path):
        assert read == [own]
        assert own < 0.6 * whole
    assert tiny.contents(tmp_path / "ours") == tiny.contents(source)
    ours, theirs = tiny.read_back(tmp_path / "ours", name), tiny.read_back(source, name)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert tiny.torch.equal(one, other)

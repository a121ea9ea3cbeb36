"""A changed run file says what a candidate is and is otherwise what was written."""

from __future__ import annotations

from jspeed.config import load_config
from jspeed.planner.sweep import Candidate, RunFile
from tests.planner.sweep.runs import run_file, run_tree

CANDIDATE = Candidate(2, 4, 1, 1, 2, 2, "full")


def test_a_candidate_changes_what_it_names_and_nothing_else() -> None:
    run = run_file(sweep={"stages": [1]}, autotuning={"fast": True})
    changed = run.changed(CANDIDATE.changes())
    assert changed["mesh"] == {"replica": 2, "data": 4, "tensor": 1}
    assert changed["zero_optimization"] == {"stage": 1, "stage3_param_persistence_threshold": 0}
    assert changed["model"]["remat"] == "full"
    assert "sweep" not in changed
    assert "autotuning" not in changed
    for name in ("optimizer", "data", "run", "bf16", "gradient_clipping", "train_batch_size"):
        assert changed[name] == run.tree[name]
    assert list(changed)[: len(run_tree())] == list(run_tree()), "the order is the file's"
    config = load_config(changed)
    assert (config.mesh.replica, config.zero.stage, config.batch.micro_batch_size) == (2, 1, 2)


def test_defaults_that_hang_on_the_stage_follow_it() -> None:
    run = run_file()
    assert run.config.zero.overlap_comm
    assert not load_config(run.changed(CANDIDATE.changes())).zero.overlap_comm


def test_older_spellings_and_overrides_give_way() -> None:
    tree = run_tree(tensor_model_parallel_size=2, data_parallel_size=4, zero_optimization=True)
    tree["gradient_accumulation_steps"] = 4
    run = RunFile.read(tree, ["model.layers=3"])
    assert run.config.mesh.tensor == 2
    changed = run.changed(CANDIDATE.changes())
    assert "tensor_model_parallel_size" not in changed
    assert "data_parallel_size" not in changed
    assert "gradient_accumulation_steps" not in changed
    assert changed["zero_optimization"] == {"stage": 1}
    assert changed["model"]["layers"] == 3
    assert load_config(changed).mesh.tensor == 1


def test_the_original_is_not_touched() -> None:
    run = run_file()
    before = str(run.tree)
    run.changed(CANDIDATE.changes())["model"]["layers"] = 9
    assert str(run.tree) == before

"""A budget of memory becomes a policy: what is tried, what is taken, and why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from jspeed.core.errors import ConfigError, JspeedError
from jspeed.models import build_model
from jspeed.planner.pool import Ending, Job, Outcome
from jspeed.planner.remat_budget import NAMES, Chosen, choose
from jspeed.planner.run_file import RunFile
from jspeed.planner.suggest import Where

LIMIT = 1000
# Of an imagined compiler: bytes that saving a tensor costs, and FLOPs that it saves. Norms save no
# product; `attention_proj` saves the same product as `layer_mid` does.
BYTES = dict.fromkeys(NAMES, 50) | {"attention_out": 60, "mlp_in": 200, "attention_qkv": 150}
FLOPS = dict.fromkeys(NAMES, 0.0) | {
    "attention_out": 30.0, "mlp_in": 80.0, "attention_qkv": 90.0, "attention_proj": 20.0,
    "layer_mid": 20.0,
}  # fmt: skip
FULL_BYTES, FULL_FLOPS, NONE_BYTES = 300, 1000.0, 900


def compiler(jobs: Iterable[Job]) -> Iterator[Outcome]:
    for job in jobs:
        yield Outcome(job.key, Ending.DONE, imagined(job.request["config"]), "", 1.0)


def imagined(config: dict[str, Any]) -> dict[str, Any]:
    policy = config["model"]["remat"]
    if policy == "none":
        peak, flops = NONE_BYTES, FULL_FLOPS - 250
    else:
        saved = set() if policy == "full" else set(policy.get("save", ()))
        worth = saved - {"attention_proj"} if "layer_mid" in saved else saved
        peak = FULL_BYTES + sum(BYTES[name] for name in saved)
        flops = FULL_FLOPS - sum(FLOPS[name] for name in worth)
        if policy != "full" and policy.get("offload"):
            peak -= 100
    return {
        "memory": {"peak_bytes": peak, "limit_bytes": LIMIT},
        "flops": flops,
        "mesh": {"pipe": config.get("mesh", {}).get("pipe", 1)},
    }


def chosen(budget: Any, **more: Any) -> Chosen:
    model = {"family": "gpt2", "layers": 2, "hidden_size": 64, "heads": 4, "sequence_length": 64,
             "remat": budget}  # fmt: skip
    run = RunFile.read({"train_batch_size": 8, "model": model, **more})
    return choose(run, Where("h200", 1, 1), compiler)


@pytest.mark.parametrize(
    ("budget", "policy"),
    [
        ({"budget": "auto"}, "none"),
        ({"budget_bytes": 900}, "none"),
        (
            {"budget_bytes": 899},
            {"save": ["attention_qkv", "attention_out", "attention_proj", "mlp_in"]},
        ),
        ({"budget_bytes": 759}, {"save": ["attention_qkv", "attention_out", "attention_proj"]}),
        ({"budget_bytes": 509}, {"save": ["attention_qkv", "attention_proj"]}),
        ({"budget_bytes": 449}, {"save": ["attention_out", "attention_proj"]}),
        ({"budget_bytes": 349}, "full"),
        ({"budget_bytes": 299}, {"offload": ["layer_in"]}),
        ({"budget_bytes": 100}, {"offload": ["layer_in"]}),
    ],
)
def test_tensors_are_taken_by_flops_per_byte_as_far_as_they_fit(budget, policy):
    found = chosen(budget)
    assert found.policy == policy
    assert found.plan == imagined({"model": {"remat": policy}})


def test_every_step_says_why():
    found = [(entry["policy"], entry["reason"]) for entry in chosen({"budget_bytes": 809}).tried]
    assert found == [
        ("none", "does not fit"),
        ("full", "fits; tensors are added to it"),
        ({"save": ["attention_qkv"]}, "taken: 90 FLOPs less for 150 bytes"),
        ({"save": ["attention_qkv", "attention_out"]}, "taken: 30 FLOPs less for 60 bytes"),
        (
            {"save": ["attention_qkv", "attention_out", "attention_proj"]},
            "taken: 20 FLOPs less for 50 bytes",
        ),
        (
            {"save": ["attention_qkv", "attention_out", "attention_proj", "layer_mid"]},
            "saves no further product",
        ),
        (
            {"save": ["attention_qkv", "attention_out", "attention_proj", "mlp_in"]},
            "taken: 80 FLOPs less for 200 bytes",
        ),
        ({"save": ["attention_norm"]}, "saves no product"),
        ({"save": ["mlp_norm"]}, "saves no product"),
        ({"save": ["mlp_out"]}, "saves no product"),
    ]


def test_pipelines_keep_nothing_in_host_memory():
    assert chosen({"budget_bytes": 100}, mesh={"pipe": 2}).policy == "full"


def test_a_step_that_does_not_compile_is_an_error():
    def broken(jobs: Iterable[Job]) -> Iterator[Outcome]:
        for job in jobs:
            yield Outcome(job.key, Ending.ABORTED, None, "XLA ended", 1.0)

    model = {"family": "gpt2", "layers": 2, "hidden_size": 64, "heads": 4, "sequence_length": 64,
             "remat": {"budget": "auto"}}  # fmt: skip
    run = RunFile.read({"train_batch_size": 8, "model": model})
    with pytest.raises(JspeedError, match=r'"model\.remat": none: XLA ended'):
        choose(run, Where("h200", 1, 1), broken)


def test_training_refuses_a_budget_and_says_where_to_get_a_policy():
    model = {"family": "gpt2", "layers": 2, "hidden_size": 64, "heads": 4, "sequence_length": 64,
             "remat": {"budget": "auto"}}  # fmt: skip
    section = RunFile.read({"train_batch_size": 8, "model": model}).config.model
    assert section is not None
    with pytest.raises(ConfigError) as error:
        build_model(section, vocab_size=64, platform="cpu")
    assert str(error.value) == (
        '"model.remat" is a budget, from which a policy is still to be chosen. `jspeed plan` '
        "chooses by compiling for the target and prints the policy; write that instead."
    )

"""jspeed/config/auto.py: "auto" resolves where it should, and says what it needs elsewhere."""

import pytest

from jspeed.config import AutoFacts, load_config, resolve_batch
from jspeed.core.errors import ConfigError

MODEL = {"family": "gpt2", "layers": 2, "hidden_size": 64, "heads": 4, "sequence_length": 32}
AUTO_ZERO = {
    "stage": 3,
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
}


def error_of(config, facts=None) -> list[str]:
    with pytest.raises(ConfigError) as error:
        config.resolve_auto(facts)
    return str(error.value).split("\n")


def test_bucket_sizes_come_from_the_width():
    config = load_config({"train_batch_size": 8, "zero_optimization": AUTO_ZERO})
    assert len(config.autos) == 3
    zero = config.resolve_auto(AutoFacts(hidden_size=1000)).zero
    assert zero.reduce_bucket_size == 1_000_000
    assert zero.prefetch_bucket_size == 900_000
    assert zero.persistence_threshold == 10_000


def test_the_model_section_resolves_them_at_loading():
    config = load_config({"train_batch_size": 8, "zero_optimization": AUTO_ZERO, "model": MODEL})
    assert config.autos == ()
    assert config.zero.reduce_bucket_size == 64 * 64
    assert config.zero.persistence_threshold == 640


def test_facts_of_the_program_beat_the_model_section():
    config = load_config({"train_batch_size": 8, "zero_optimization": AUTO_ZERO, "model": MODEL})
    assert config.resolve_auto(AutoFacts(hidden_size=10)).zero.reduce_bucket_size == 100


def test_what_nothing_resolves_is_named_with_what_would():
    config = load_config(
        {
            "train_batch_size": "auto",
            "gradient_accumulation_steps": "auto",
            "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
            "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto"}},
            "zero_optimization": {"reduce_bucket_size": "auto"},
        }
    )
    expected = [
        '"gradient_accumulation_steps": "auto" cannot be resolved here; it needs a number for '
        '"train_batch_size" or "train_micro_batch_size_per_gpu".',
        '"optimizer.params.lr": "auto" cannot be resolved here; it needs the learning rate: '
        '"optimizer.params.lr" or "scheduler.params.warmup_max_lr" as a number.',
        '"scheduler.params.total_num_steps": "auto" cannot be resolved here; it needs the length '
        'of the run: "run.steps".',
        '"train_batch_size": "auto" cannot be resolved here; it needs a number for '
        '"train_batch_size" or "train_micro_batch_size_per_gpu".',
        '"zero_optimization.reduce_bucket_size": "auto" cannot be resolved here; it needs the '
        'width of the model: "model.hidden_size" in a run file, an attribute hidden_size of the '
        'model or of its config, or a number in place of the "auto".',
    ]
    assert sorted(error_of(config)) == expected
    with pytest.raises(ConfigError) as error:
        config.require_trainable()
    assert sorted(str(error.value).split("\n")) == expected
    with pytest.raises(ConfigError, match='"train_batch_size": missing'):
        resolve_batch(config, 4)


def test_the_hugging_face_block_resolves_completely():
    config = load_config("tests/config/good/zero2_offload.json")
    resolved = config.resolve_auto(
        AutoFacts(
            learning_rate=3e-4,
            warmup_steps=50,
            micro_batch_size=2,
            gradient_accumulation_steps=3,
            max_grad_norm=0.5,
            compute_dtype="float16",
            data_parallel_size=4,
        )
    )
    assert resolved.autos == ()
    assert resolved.optimizer is not None
    assert resolved.scheduler is not None
    assert resolved.optimizer.params["lr"] == 3e-4
    assert resolved.optimizer.params["betas"] == (0.9, 0.999)
    assert resolved.scheduler.params["warmup_max_lr"] == 3e-4
    assert resolved.scheduler.params["warmup_min_lr"] == 0.0
    assert resolved.scheduler.params["warmup_num_steps"] == 50
    assert resolved.gradient_clipping == 0.5
    assert resolved.precision.compute_dtype == "float16"
    assert resolve_batch(resolved, 4).train_batch_size == 24
    rows = {row.path: row for row in resolved.report}
    assert rows["optimizer.params.lr"].source == "auto"
    assert rows["optimizer.params.lr"].reason.startswith('resolved from "auto"; ')
    assert rows["train_batch_size"].reason.startswith("completed by the batch triangle; ")


def test_without_facts_precision_is_fp32_and_clipping_deepspeeds():
    config = load_config(
        {
            "train_batch_size": 8,
            "fp16": {"enabled": "auto"},
            "bf16": {"enabled": "auto"},
            "gradient_clipping": "auto",
        }
    )
    assert (config.precision.compute_dtype, config.gradient_clipping) == ("float32", 1.0)
    assert config.autos == ()
    facts = AutoFacts(compute_dtype="bfloat16", max_grad_norm=0)
    resolved = config.resolve_auto(facts)
    assert (resolved.precision.compute_dtype, resolved.gradient_clipping) == ("bfloat16", 0)


def test_rates_resolve_from_each_other():
    scheduler = {"type": "WarmupLR", "params": {"warmup_max_lr": "auto"}}
    optimizer = {"type": "Adam", "params": {"lr": 0.25}}
    tree = {"train_batch_size": 8, "optimizer": optimizer, "scheduler": scheduler}
    config = load_config(tree)
    assert config.scheduler is not None
    assert config.scheduler.params["warmup_max_lr"] == 0.25
    scheduler["params"]["warmup_max_lr"] = [0.5]
    optimizer["params"]["lr"] = "auto"
    config = load_config(tree)
    assert config.optimizer is not None
    assert config.optimizer.params["lr"] == 0.5
    scheduler["params"]["warmup_max_lr"] = "auto"
    del optimizer["params"]["lr"]
    config = load_config(tree)
    assert config.scheduler is not None
    assert config.scheduler.params["warmup_max_lr"] == 1e-3  # Adam's default


def test_the_length_of_the_run_ends_the_schedule():
    tree = {
        "train_batch_size": 8,
        "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": "auto"}},
        "run": {"dir": "x", "steps": 70},
    }
    config = load_config(tree, ("run.steps=90",))
    assert config.scheduler is not None
    assert config.scheduler.params["total_num_steps"] == 90
    (message,) = error_of(load_config(tree, ("run.steps=0",)))
    assert message.startswith('"scheduler.params.total_num_steps": "auto" cannot be resolved')


def test_auto_batch_sizes_are_completed_by_the_triangle():
    tree = {"train_batch_size": 32, "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto"}  # fmt: skip
    batch = resolve_batch(load_config(tree), 8)
    assert (batch.micro_batch_size, batch.accumulation) == (4, 1)
    tree = {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": 3,
            "gradient_accumulation_steps": 2}  # fmt: skip
    assert resolve_batch(load_config(tree), 2).train_batch_size == 12


def test_data_parallel_size_checks_the_triangle():
    config = load_config({"train_batch_size": 32, "train_micro_batch_size_per_gpu": 2})
    (message,) = error_of(config, AutoFacts(data_parallel_size=3))
    assert "micro batch 2 x 3 data-parallel devices = 6 (remainder 2)" in message


def test_inside_deepspeeds_typed_sections_auto_is_the_default():
    config = load_config(
        {
            "train_batch_size": 8,
            "zero_optimization": {"stage": 3, "overlap_comm": "auto", "sub_group_size": "auto"},
            "wandb": {"enabled": True, "group": "auto"},
            "fp16": {"loss_scale": "auto"},
        }
    )
    assert config.zero.overlap_comm is True
    assert config.wandb.group is None
    assert config.autos == ()
    row = next(row for row in config.report if row.path == "fp16.loss_scale")
    assert (row.value, row.source) == (0.0, "auto")
    assert row.reason.startswith('"auto" stands for the default; ')


def test_resolving_twice_starts_from_the_file_again():
    config = load_config({"train_batch_size": 8, "zero_optimization": AUTO_ZERO})
    once = config.resolve_auto(AutoFacts(hidden_size=10))
    assert once.resolve_auto(AutoFacts(hidden_size=20)).zero.reduce_bucket_size == 400

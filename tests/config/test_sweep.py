"""The `sweep` section, and DeepSpeed's `autotuning` that leads into it."""

from __future__ import annotations

from typing import Any

import pytest

from jspeed.config import Config, load_config
from jspeed.core.errors import ConfigError


def load(**sections: Any) -> Config:
    return load_config({"train_batch_size": 8, **sections})


def test_every_configuration_has_one_and_only_what_is_given_is_dumped() -> None:
    plain = load()
    assert plain.sweep.stages == (0, 1, 2, 3)
    assert plain.sweep.remat == ("none", "full")
    assert plain.sweep.axes is None
    assert "sweep" not in plain.to_dict()
    given = load(sweep={"stages": 3, "tensor": [1, 2], "axes": ["data", "tensor"]})
    assert (given.sweep.stages, given.sweep.tensor) == ((3,), (1, 2))
    assert load_config(given.to_dict()) == given


def test_autotuning_keys_are_sweep_keys_under_other_names() -> None:
    config = load(
        autotuning={
            "enabled": True,
            "results_dir": "tuned",
            "start_profile_step": 2,
            "end_profile_step": 6,
            "mp_size": 4,
            "min_train_micro_batch_size_per_gpu": 2,
            "max_train_micro_batch_size_per_gpu": 16,
            "num_tuning_micro_batch_sizes": 3,
            "fast": False,
            "tuner_type": "model_based",
        }
    )
    sweep = config.sweep
    assert (sweep.output, sweep.tensor) == ("tuned", (4,))
    assert (sweep.measure_first_step, sweep.measure_last_step) == (2, 6)
    assert (sweep.min_micro_batch_size, sweep.max_micro_batch_size) == (2, 16)
    assert sweep.micro_batch_count == 3
    config.require_trainable()
    assert load_config(config.to_dict()).sweep == sweep


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"autotuning": {"max_train_batch_size": 64}},
            '"autotuning.max_train_batch_size": 64 is refused: a sweep leaves train_batch_size as '
            "it is, so that it never changes the training.",
        ),
        (
            {"autotuning": {"mp_size": 2}, "sweep": {"tensor": [1, 4]}},
            '"autotuning.mp_size": 2 contradicts "sweep.tensor": [1, 4].',
        ),
        ({"sweep": {"stages": [4]}}, '"sweep.stages": [4] is not a list of values, each an'),
        ({"sweep": {"axes": ["expert"]}}, '"sweep.axes": ["expert"] is not a list of values, each'),
        (
            {"sweep": {"measure_first_step": 9}},
            '"sweep.measure_first_step": 9 is above "sweep.measure_last_step" 8.',
        ),
        ({"sweep": {"stage": 3}}, '"sweep.stage": unknown key. Did you mean "stages"?'),
    ],
)
def test_what_is_wrong_with_a_sweep(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(**sections)
    assert str(error.value).startswith(message)

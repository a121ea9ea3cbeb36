"""`jspeed.get_model_profile`: what DeepSpeed's function tells, of Flax models."""

from __future__ import annotations

import contextlib
from pathlib import Path

import flax.linen as linen
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jspeed
from jspeed.core.errors import ModelError
from jspeed.engine import model_profile
from tests.engine.caches import compilation_cache_in


class LinenMLP(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array, *, double: bool = False) -> jax.Array:
        x = linen.Dense(32, name="up")(2 * x if double else x)
        return linen.Dense(4, name="down")(linen.relu(x))


class Convolution(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(3, 8, (3, 3), padding="VALID", rngs=rngs)
        self.head = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.conv(x).mean((1, 2)))


def test_a_linen_module_is_counted_without_being_run(capsys: pytest.CaptureFixture[str]) -> None:
    flops, macs, params = jspeed.get_model_profile(
        LinenMLP(),
        args=(jax.ShapeDtypeStruct((6, 8), jnp.float32),),
        kwargs={"double": True},
        as_string=False,
    )
    assert flops == 2 * 6 * (8 * 32 + 32 * 4)
    assert macs == flops / 2
    assert params == 9 * 32 + 33 * 4
    table = capsys.readouterr().out
    assert "\nLinenMLP " in table
    assert "\n  up " in table


def test_an_nnx_module_with_a_convolution() -> None:
    flops, macs, params = jspeed.get_model_profile(
        Convolution(nnx.Rngs(0)), (2, 10, 10, 3), print_profile=False, as_string=False
    )
    assert flops == 2 * (2 * 8 * 8 * 8 * 27 + 2 * 8 * 2)
    assert (macs, params) == (flops / 2, 28 * 8 + 9 * 2)


def test_texts_and_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "profile.txt"
    model = nnx.Linear(100, 100, rngs=nnx.Rngs(0))
    profile = jspeed.get_model_profile(model, (50, 100), output_file=str(path), detailed=False)
    assert profile == ("1.00 M", "500.00 K", "10.10 K")
    assert capsys.readouterr().out == ""
    assert path.read_text().startswith("most FLOPs by depth")


def test_names_are_not_those_of_an_older_program_in_the_compilation_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def table() -> str:
        jspeed.get_model_profile(Convolution(nnx.Rngs(0)), (2, 10, 10, 3))
        return capsys.readouterr().out

    with compilation_cache_in(tmp_path):
        with monkeypatch.context() as older:
            older.setattr(model_profile, "module_scopes", lambda _: contextlib.nullcontext())
            older.setattr(model_profile, "metadata_as_it_is", contextlib.nullcontext)
            table()
        assert any(tmp_path.iterdir())
        jax.clear_caches()
        after = table()
    (head,) = [line.split() for line in after.splitlines() if line.startswith("  head ")]
    assert head[2] == "64"  # 2 * 2 * 8 * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": len, "input_shape": (1,)}, "model is builtin_function_or_method; expected a Fl"),
        ({"input_shape": (1, 8), "args": (1,)}, "give input_shape, or args and kwargs; not both"),
        ({}, r"no input\. Give input_shape"),
        ({"input_shape": (1, 8), "mode": "generate"}, "mode is 'generate'; expected \"forward\""),
    ],
)
def test_what_cannot_be_counted(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        jspeed.get_model_profile(**{"model": LinenMLP(), **arguments})  # pyright: ignore

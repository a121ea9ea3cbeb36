"""Models of every library as programs, and what is said to those that keep no contract."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jspeed
from jspeed.core.errors import DataError, ModelError
from jspeed.core.tree import named_leaves
from jspeed.training.contracts import carried
from jspeed.training.program import loss_parts, make_program

KEY = jax.random.key(0)


class Deep(nnx.Module):
    """More than ten layers in a list, so that names sort otherwise than numbers."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs) for _ in range(12)])
        self.tied = self.layers[3].kernel
        self.no_bias = nnx.Linear(2, 2, use_bias=False, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.noise = rngs
        self.count = nnx.Variable(3)

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return self.dropout(x @ self.tied) + self.noise.normal(x.shape)


def mean_loss(model: Any, batch: Any, rng: jax.Array) -> jax.Array:
    return model(batch).mean()


def test_an_nnx_module_goes_apart_and_together():
    module = Deep(rngs=nnx.Rngs(0, dropout=1))
    program = make_program(module)
    params, mutable = program.given()
    names = [path for path, _ in named_leaves(params)]
    assert [name for name in names if name.endswith("bias")] == [
        f"layers/{layer}/bias" for layer in range(12)
    ]
    assert sum(name in ("tied", "layers/3/kernel") for name in names) == 1
    again = program.bind(params, mutable)
    for layer in range(12):
        np.testing.assert_array_equal(
            again.layers[layer].kernel[...], module.layers[layer].kernel[...]
        )
    assert again.tied is again.layers[3].kernel
    assert mutable["count"].dtype == np.int32


def test_a_call_returns_the_result_and_leaves_keys_as_they_were():
    module = Deep(rngs=nnx.Rngs(0))
    program = make_program(module)
    params, mutable = program.given()
    first, after = program.call(mean_loss, params, mutable, jnp.ones((4, 2)), KEY, train=True)
    second, _ = program.call(
        mean_loss, params, mutable, jnp.ones((4, 2)), jax.random.key(1), train=True
    )
    assert float(first) != float(second)
    for (path, old), (_, new) in zip(named_leaves(mutable), named_leaves(after), strict=True):
        old, new = (
            jax.random.key_data(leaf) if "key" in path else np.asarray(leaf) for leaf in (old, new)
        )
        np.testing.assert_array_equal(old, new, err_msg=path)


@pytest.mark.parametrize("make", [Deep, functools.partial(Deep), lambda rngs: Deep(rngs=rngs)])
def test_functions_and_classes_make_nnx_modules(make):
    program = make_program(make)
    assert program.given() is None
    params, mutable = jax.eval_shape(program.init, KEY)
    shapes = {path: leaf.shape for path, leaf in named_leaves(params)}
    assert shapes["layers/11/kernel"] == (2, 2)
    created, state = program.init(KEY)
    result, _ = program.call(mean_loss, created, state, jnp.ones((4, 2)), KEY, train=True)
    assert np.isfinite(result)
    assert jax.tree.structure(state) == jax.tree.structure(mutable)


def test_initial_values_follow_the_key():
    program = make_program(Deep)
    one, two = program.init(KEY)[0], program.init(jax.random.key(1))[0]
    assert np.abs(one["layers"][0]["kernel"] - two["layers"][0]["kernel"]).max() > 0.01
    assert np.abs(one["layers"][0]["kernel"] - one["layers"][1]["kernel"]).max() > 0.01


def test_the_mode_of_a_given_module_is_respected_and_evaluation_is_eval():
    module = nnx.Sequential(nnx.Linear(2, 64, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1)))
    x = jnp.ones((4, 2))

    def zeros(module: nnx.Module, *, train: bool) -> int:
        program = make_program(module)

        def loss(model: Any, batch: Any, rng: jax.Array) -> jax.Array:
            return (model(batch) == 0).sum().astype(jnp.float32)

        return int(program.call(loss, *program.given(), x, KEY, train=train)[0])

    assert zeros(module, train=True) > 64
    assert zeros(module, train=False) == 0
    assert not module.layers[1].deterministic  # evaluation left the user's module as it was
    module.eval()
    assert zeros(module, train=True) == 0


def test_sharding_annotations_of_an_nnx_model_are_left_to_the_layout():
    def make(rngs: nnx.Rngs) -> nnx.Module:
        init = nnx.with_partitioning(nnx.initializers.ones, (None, "model"))
        return nnx.Linear(2, 2, kernel_init=init, rngs=rngs)

    program = make_program(make)
    params, mutable = program.init(KEY)
    loss, _ = program.call(mean_loss, params, mutable, jnp.ones((4, 2)), KEY, train=True)
    assert float(loss) == 2.0


def test_sharding_annotations_of_a_linen_model_are_unboxed():
    init = nn.with_partitioning(nn.initializers.ones, (None, "model"))
    module = nn.Dense(2, kernel_init=init)
    program = make_program(module, lambda key: module.init(key, jnp.ones((1, 2))))
    params, mutable = program.init(KEY)
    assert params["kernel"].shape == (2, 2)
    assert (
        float(program.call(mean_loss, params, mutable, jnp.ones((4, 2)), KEY, train=True)[0]) == 2
    )


def test_a_linen_model_is_called_like_its_apply():
    class Two(nn.Module):
        def setup(self) -> None:
            self.dense = nn.Dense(2, kernel_init=nn.initializers.ones)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.dense(x)

        def doubled(self, x: jax.Array, *, times: int) -> jax.Array:
            return times * self.dense(x)

    module = Two()
    program = make_program(module, module.init(KEY, jnp.ones((1, 2))))

    def loss(model: Any, batch: Any, rng: jax.Array) -> jax.Array:
        assert model.training
        assert model.params["dense"]["kernel"].shape == (2, 2)
        return model(batch, method="doubled", times=3).mean()

    assert float(program.call(loss, *program.given(), jnp.ones((4, 2)), KEY, train=True)[0]) == 6.0


class Noisy(nn.Module):
    """Draws from streams of its own beside dropout's."""

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        x = nn.Dense(2)(x)
        names = ("noise", "sample", "noise")
        draws = [jax.random.normal(self.make_rng(name), (4,)) for name in names]
        kept = nn.Dropout(0.5, deterministic=False)(jnp.ones(64))
        return {"draws": jnp.stack(draws), "kept": kept, "x": x}


def test_linen_streams_of_any_name_have_keys_that_differ():
    module = Noisy()
    program = make_program(
        module, module.init({"params": KEY, "dropout": KEY, "noise": KEY}, jnp.ones((1, 2)))
    )
    seen: dict[str, Any] = {}

    def loss(model: Any, batch: Any, rng: jax.Array) -> jax.Array:
        seen["first"], seen["second"] = model(batch), model(batch)
        seen["given"] = model(batch, rngs={"dropout": KEY, "noise": KEY, "sample": KEY})
        return seen["first"]["x"].mean()

    for step in (0, 1):
        key = jax.random.key(step)
        program.call(loss, *program.given(), jnp.ones((4, 2)), key, train=True)
        seen[f"step {step}"] = seen["first"]
    draws = [
        *seen["first"]["draws"],
        *seen["second"]["draws"],
        *seen["step 0"]["draws"],
        *seen["given"]["draws"][:1],
    ]
    assert len({tuple(map(float, draw)) for draw in draws}) == len(draws)
    assert 10 < int((seen["first"]["kept"] == 0).sum()) < 54
    assert (seen["first"]["kept"] != seen["second"]["kept"]).any()


def test_bound_values_are_what_the_library_takes():
    module = nn.BatchNorm(use_running_average=True)
    variables = module.init(KEY, jnp.ones((1, 2)))
    program = make_program(module, variables)
    assert program.bind(*program.given()).keys() == {"params", "batch_stats"}
    np.testing.assert_array_equal(
        module.apply(program.bind(*program.given()), jnp.ones((3, 2))),
        module.apply(variables, jnp.ones((3, 2))),
    )
    pair = make_program((lambda key: {"w": jnp.ones(2)}, lambda p, x: x @ p["w"]))
    assert pair.bind({"w": 1}, {}) == {"w": 1}


# --- errors


def error_of(make: Any) -> str:
    with pytest.raises(ModelError) as caught:
        make()
    return str(caught.value)


@pytest.mark.parametrize(
    ("model", "parameters", "text"),
    [
        (nn.Dense(2), None, "The Linen module Dense needs its variables"),
        (nn.Dense(2), {"kernel": 1}, 'without a "params" collection (found: kernel)'),
        (nn.Dense(2), {"params": {}}, "The Linen module Dense has no parameters"),
        (nn.Dense(2), lambda: 0, "model_parameters takes (), but is called as model_parameters(k"),
        (nn.Dense, None, "model is the Linen class Dense; expected an instance: Dense(…)"),
        (nnx.Dropout(0.5), None, "The NNX module Dropout has no nnx.Param"),
        (lambda rngs: 3, None, "model is a function that returned int"),
        (Deep, {"a": 1}, "an NNX model carries its own parameters. Leave model_parameters out"),
        ((lambda key: {}, lambda p: 0), {}, "The pair has no parameters"),
        ((lambda: {"a": 1}, lambda p: 0), None, "init takes (), but is called as init(key)"),
        (3, None, "model is int; expected a Flax NNX module, a function rngs -> NNX module, a L"),
    ],
)
def test_models_that_cannot_be_trained(model, parameters, text):
    assert text in error_of(lambda: make_program(model, parameters))


def test_torch_modules_are_recognised():
    torch_like = type("Net", (), {"__module__": "torch.nn.modules.linear", "__call__": len})()
    assert "model is the torch module Net; jspeed trains JAX" in error_of(
        lambda: make_program(torch_like)
    )


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (
            (jnp.ones(()), {"accuracy": 1}),
            "loss_fn returned a tuple of 2 (an array float32[], a dict); expected a scalar mean or "
            "jspeed.LossSum(total, weight) of two scalars. A step has no auxiliary outputs: return "
            "the loss alone, and measure other things with eval_fn and eval_batch.",
        ),
        (jnp.ones(3), "loss_fn returned an array float32[3]; expected a scalar mean"),
        (jnp.ones(3), "Return losses.mean(), or LossSum(losses.sum(), losses.size)."),
        (None, "loss_fn returned None; expected a scalar mean or jspeed.LossSum(total, weight) of"),
        (0.5, "loss_fn returned a float; expected"),
        (jnp.int32(1), "The loss must be computed from the model's parameters, in floating point."),
        (jspeed.LossSum(jnp.ones(2), jnp.ones(())), "float32[2] as a LossSum's total; expected"),
        (jspeed.LossSum(jnp.ones(()), jnp.ones(2)), "float32[2] as a LossSum's weight; expected"),
    ],
)
def test_losses_that_are_none(result, text):
    assert text in error_of(lambda: loss_parts(result))


def test_losses_come_in_any_float_and_are_added_in_fp32():
    total, weight = loss_parts(jnp.bfloat16(2))
    assert (total.dtype, float(weight)) == (np.float32, 1.0)
    total, weight = loss_parts(jspeed.LossSum(jnp.float16(2), 3))
    assert (total.dtype, float(weight)) == (np.float32, 3.0)


@pytest.mark.parametrize(
    ("loss_fn", "text"),
    [
        (lambda model, batch: 0, "loss_fn takes (model, batch), but is called as loss_fn(model, b"),
        (lambda m, b, r, extra: 0, "missing a required argument: 'extra'. Give it these 3 posit"),
        ("cross_entropy", "loss_fn is a str; expected a function loss_fn(model, batch, rng)"),
    ],
)
def test_loss_functions_of_another_kind(loss_fn, text):
    program = make_program(Deep(rngs=nnx.Rngs(0)))
    call = functools.partial(program.call, loss_fn, *program.given(), jnp.ones((4, 2)), KEY)
    assert text in error_of(lambda: call(train=True))


class Lazy(nnx.Module):
    """Adds a Variable of a kind at its first call."""

    def __init__(self, kind: type[nnx.Variable]) -> None:
        self.weight = nnx.Param(jnp.ones(2))
        self.kind = kind
        self.late = nnx.data(None)

    def __call__(self, x: jax.Array) -> jax.Array:
        self.late = self.kind(jnp.ones(2))
        return x * self.weight


def test_nnx_state_made_in_a_call():
    def call(kind: type[nnx.Variable]) -> Any:
        program = make_program(Lazy(kind))
        return program.call(mean_loss, *program.given(), jnp.ones((4, 2)), KEY, train=True)

    assert "parameter late appeared during the call, so it would" in error_of(
        lambda: call(nnx.Param)
    )
    assert "the model's state late appeared" in error_of(lambda: call(nnx.BatchStat))
    assert call(nnx.Intermediate)[1] == {}  # sown values are for loss_fn and go with it


def test_carried_state_keeps_its_dtype_and_shape():
    old = {"mean": jnp.zeros(2), "count": jnp.int32(0)}
    new = carried({"count": jnp.int32(1), "mean": jnp.ones(2, jnp.bfloat16)}, old)
    assert (new["mean"].dtype, int(new["count"])) == (np.float32, 1)
    text = error_of(lambda: carried({"count": jnp.int32(1), "mean": jnp.ones(3)}, old))
    assert "the model's state mean changed its shape from [2] to [3] during the call" in text
    assert "the model's state mean was removed" in error_of(
        lambda: carried({"count": jnp.int32(1)}, old)
    )


CONFIG = {"train_batch_size": 16, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}


def test_integer_parameters_are_an_error_that_names_them():
    with pytest.raises(ModelError, match="parameter table has dtype int32; parameters must be"):
        jspeed.initialize(
            model=(lambda key: {"table": jnp.arange(4)}, lambda p, x: x),
            loss_fn=mean_loss,
            config=CONFIG,
        )


def test_batches_whose_rows_do_not_match_are_an_error_that_names_the_leaf():
    engine = jspeed.initialize(
        model=(lambda key: {"w": jnp.ones(4)}, lambda p, x: x @ p["w"]),
        loss_fn=lambda model, batch, rng: (model(batch["x"]) - batch["y"]).mean(),
        config=CONFIG,
    )
    with pytest.raises(DataError) as caught:
        engine.train_batch({"x": np.ones((16, 4)), "y": np.ones(12)})
    assert str(caught.value).startswith("batch['y'] has shape [12]; expected 16 examples first")


class Named(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.named = nnx.Param(jnp.ones((2, 3)), logical_axes=("embed", "mlp"))
        self.unnamed = nnx.Linear(2, 3, rngs=rngs)
        self.wrong = nnx.Param(jnp.ones((2, 3)), logical_axes=("embed",))


def test_names_of_dimensions_are_read_where_they_fit():
    expected = {"named": ("embed", "mlp")}
    assert make_program(Named).logical_axes == expected
    assert make_program(Named(rngs=nnx.Rngs(0))).logical_axes == expected


def test_models_without_names_have_none():
    assert make_program(Deep).logical_axes == {}
    pair = (lambda key: {"w": jnp.ones((2, 2))}, lambda params, x: x @ params["w"])
    assert make_program(pair).logical_axes == {}
    variables = {"params": {"kernel": jnp.ones((2, 2))}}
    assert make_program(nn.Dense(2), variables).logical_axes == {}

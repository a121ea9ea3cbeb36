"""Unmodified NNX, Linen and plain models under ZeRO 0-3 learn what they learn on one device."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jspeed
from jspeed.core.tree import named_leaves
from tests.training.curves import Curve, loss_error
from tests.training.zoo import BATCH, CASES, Case, apply_plain, init_plain, token_batch, token_loss

STEPS, RATE, MOMENTUM = 4, 0.1, 0.9
# fp32 sums in another order.
TOLERANCE = 1e-5
# Most styles under stage 3, whose parameters are gathered at use, one under stage 2, whose
# gradients are scattered there; `make test-all` runs every case under every stage.
SPANNING = {
    ("nnx_unrolled", 3),
    ("nnx_scanned_remat", 3),
    ("nnx_odd", 3),
    ("nnx_odd", 2),
    ("linen_scanned", 3),
    ("linen_shared", 3),
    ("plain_dict", 1),
    ("plain_checkpoint", 3),
}
pytestmark = pytest.mark.filterwarnings("ignore:'.value' access:DeprecationWarning")


@pytest.fixture(scope="module", autouse=True)
def _compile_quickly():
    """Only compiling takes time here, and what is compared does not depend on LLVM's passes."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def case_batches(case: Case) -> list[Any]:
    rng = np.random.default_rng(0)
    return [case.batch(rng) for _ in range(STEPS)]


@functools.cache
def one_device(name: str) -> Curve:
    """The curve of a plain JAX and optax loop on whole batches, without jspeed."""
    case = CASES[name]
    model = case.model()
    if isinstance(model, nnx.Module):
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        pure, bind = (
            nnx.to_pure_dict(params),
            lambda p: nnx.merge(graph, _replaced(params, p), rest),
        )
    else:
        apply = model[1] if isinstance(model, tuple) else _linen_function(model)
        assert case.model_parameters is not None
        variables = case.model_parameters(jax.random.key(1))
        pure = variables if isinstance(model, tuple) else variables["params"]
        bind = lambda p: functools.partial(apply, p)  # noqa: E731
    optimizer = optax.sgd(RATE, momentum=MOMENTUM)

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        def loss_of(params: Any) -> jax.Array:
            loss = case.loss_fn(bind(params), batch, jax.random.key(0))
            return loss.total / loss.weight if isinstance(loss, jspeed.LossSum) else loss

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, losses = optimizer.init(pure), []
    for batch in case_batches(case):
        pure, state, loss = step(pure, state, jax.tree.map(jnp.asarray, batch))
        losses.append(float(loss))
    return Curve(np.asarray(losses), {path: np.asarray(leaf) for path, leaf in named_leaves(pure)})


def _replaced(state: Any, pure: Any) -> Any:
    return jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(pure))


def _linen_function(module: Any) -> Any:
    return lambda params, *args: module.apply({"params": params}, *args)


def make_engine(
    case: Case,
    stage: int,
    *,
    devices: int = 8,
    model: Any = None,
    stacked: Sequence[str] = (),
    **more: Any,
) -> jspeed.Engine:
    """The engine of a case, with two microbatches per step and nothing kept whole."""
    parameters = case.model_parameters
    return jspeed.initialize(
        model=case.model() if model is None else model,
        loss_fn=case.loss_fn,
        model_parameters=None if parameters is None else parameters(jax.random.key(1)),
        config={
            "train_batch_size": BATCH,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 0.0,
            "optimizer": {"type": "SGD", "params": {"lr": RATE, "momentum": MOMENTUM}},
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            **more,
        },
        devices=jax.devices()[:devices],
        stacked=stacked,
    )


def engine_curve(engine: jspeed.Engine, case: Case) -> Curve:
    losses = [float(engine.train_batch(batch)["loss"]) for batch in case_batches(case)]
    return Curve(np.asarray(losses), engine.parameters())


def parameter_error(curve: Curve, reference: Curve) -> float:
    assert curve.parameters.keys() == reference.parameters.keys()
    return max(
        float(np.linalg.norm(curve.parameters[path] - value) / np.linalg.norm(value))
        for path, value in reference.parameters.items()
    )


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        pytest.param(name, stage, marks=[] if (name, stage) in SPANNING else [pytest.mark.slow])
        for name in CASES
        for stage in range(4)
    ],
)
def test_equals_one_device(name, stage):
    case, reference = CASES[name], one_device(name)
    engine = make_engine(case, stage)
    curve = engine_curve(engine, case)
    assert loss_error(curve, reference) < TOLERANCE
    assert parameter_error(curve, reference) < TOLERANCE
    assert abs(reference.losses[-1] - reference.losses[0]) > 1e-3  # something was learnt
    if stage == 3:
        split = [path for path in engine.layout.leaves if engine.layout.gathered(path)]
        assert len(split) > len(engine.layout.leaves) / 2


# How many parameters AutoTP splits of each; of a convolutional network it leaves all alone.
AUTOTP = {
    "nnx_unrolled": 15,
    "nnx_scanned_remat": 8,
    "nnx_convnet": 0,
    "linen_scanned": 8,
    "linen_shared": 8,
    "plain_dict": 4,
    "plain_checkpoint": 2,
}


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("nnx_unrolled", 3),
        ("linen_scanned", 1),
        ("plain_checkpoint", 3),
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in (
                ("nnx_scanned_remat", 2),
                ("nnx_convnet", 1),
                ("linen_shared", 3),
                ("plain_dict", 0),
            )
        ),
    ],
)
def test_autotp_equals_one_device(name, stage):
    case, reference = CASES[name], one_device(name)
    engine = make_engine(case, stage, tensor_parallel={"autotp_size": 2})
    split = [path for path, leaf in engine.layout.leaves.items() if "tensor" in leaf.base]
    assert len(split) == AUTOTP[name]
    curve = engine_curve(engine, case)
    assert loss_error(curve, reference) < TOLERANCE
    assert parameter_error(curve, reference) < TOLERANCE


STACKED = ("(blocks|layers|Scan.*)/.*",)


@pytest.mark.parametrize(
    ("name", "stage", "schedule"),
    [
        ("linen_scanned", 2, "1f1b"),
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in (
                ("nnx_scanned_remat", 3, "1f1b"),
                ("linen_scanned_remat", 1, "zb-h1"),
                ("plain_scan", 3, "zb-h1"),
                ("plain_checkpoint", 0, "gpipe"),
            )
        ),
    ],
)
def test_pipelines_equal_one_device(name, stage, schedule):
    """Any model with a scan over its layers is cut between two of them."""
    case, reference = CASES[name], one_device(name)
    pipeline = {"mesh": {"pipe": 2}, "pipeline": {"schedule": schedule}}
    engine = make_engine(case, stage, stacked=STACKED, **pipeline)
    assert engine.layout.stages == 2
    curve = engine_curve(engine, case)
    assert loss_error(curve, reference) < TOLERANCE
    assert parameter_error(curve, reference) < TOLERANCE


@pytest.mark.parametrize(
    "precision",
    [{"fp16": {"enabled": True, "initial_scale_power": 8}}, {"bf16": {"enabled": True}}],
)
@pytest.mark.slow
def test_half_precision_in_a_pipeline_equals_that_without(precision):
    """Microbatches and stages only change the order of fp32 sums of rounded products."""
    case = CASES["linen_scanned"]
    piped = engine_curve(make_engine(case, 2, stacked=STACKED, mesh={"pipe": 2}, **precision), case)
    plain = engine_curve(make_engine(case, 2, devices=4, **precision), case)
    assert loss_error(piped, plain) < 2e-3
    assert parameter_error(piped, plain) < 2e-2
    assert loss_error(piped, one_device("linen_scanned")) > 1e-6  # it is another precision


def test_parameters_that_cannot_be_split_stay_whole_and_frozen_ones_stay_put():
    case, before = CASES["nnx_odd"], CASES["nnx_odd"].model()
    engine = make_engine(case, 3)
    leaves = engine.layout.leaves
    whole = {path for path, leaf in leaves.items() if leaf.zero_dim is None}
    assert whole == {"scalar", "odd", "table/a"}
    assert all(leaves[path].whole_because for path in whole)
    assert ("tied" in leaves) != ("twice" in leaves)  # one parameter, not two
    engine.train_batch(case_batches(case)[0])
    after = engine.parameters()
    np.testing.assert_array_equal(after["frozen"], before.frozen[...])
    np.testing.assert_array_equal(after["unused"], before.unused[...])
    assert np.abs(after["tied"] - before.twice[...]).max() > 1e-4


@pytest.mark.parametrize("devices", [1, 8])
def test_a_given_model_is_copied_and_stays_usable(devices):
    """The step consumes its state's arrays, which must not be the user's."""
    case = CASES["plain_dict"]
    params = init_plain(jax.random.key(1))
    params["layers"][1] = params["layers"][0]  # the same arrays twice
    before = jax.tree.map(np.array, params)
    engine = jspeed.initialize(
        model=(init_plain, apply_plain),
        model_parameters=params,
        loss_fn=case.loss_fn,
        config={"train_batch_size": BATCH, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}},
        devices=jax.devices()[:devices],
    )
    for batch in case_batches(case)[:2]:
        engine.train_batch(batch)
    jax.tree.map(np.testing.assert_array_equal, params, before)
    trained = engine.parameters()
    assert np.abs(trained["layers/0/up"] - before["layers"][0]["up"]).max() > 1e-4
    assert np.isfinite(apply_plain(params, jnp.zeros((1, 2), jnp.int32))).all()


def test_uneven_weights_are_exact_over_microbatches_and_shards():
    """A mean of the shards' means would be visibly another number."""
    case = CASES["plain_dict"]
    batch = token_batch(np.random.default_rng(3))
    params = init_plain(jax.random.key(1))
    model = functools.partial(apply_plain, params)
    losses = [
        token_loss(model, jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], batch), None)
        for row in range(BATCH)
    ]
    exact = sum(float(part.total) for part in losses) / sum(float(part.weight) for part in losses)
    mean_of_means = np.mean([float(part.total / part.weight) for part in losses])
    engine = jspeed.initialize(
        model=case.model(),
        model_parameters=params,
        loss_fn=token_loss,
        config={
            "train_batch_size": BATCH,
            "gradient_accumulation_steps": 2,
            "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        },
    )
    metrics = engine.train_batch(batch)
    assert abs(exact - mean_of_means) > 0.01
    assert float(metrics["loss"]) == pytest.approx(exact, rel=1e-6)
    assert float(metrics["weight"]) == batch["weights"].sum()

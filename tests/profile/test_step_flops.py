"""FLOPs by module, counted in compiled programs of small models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jspeed.config import Remat
from jspeed.nn.layers import scan_layers, stack_layers
from jspeed.profile.flops import products, unknown_kernels
from jspeed.profile.hlo import parse_module
from jspeed.profile.owners import Owners, Phase, module_paths
from jspeed.profile.step_flops import StepFlops, even_parts, step_flops
from jspeed.profile.tree import walk
from jspeed.training.module_scopes import module_scopes

ROWS, WIDTH, INNER, LAYERS = 6, 8, 32, 3
LAYER_FLOPS = 2 * 2 * ROWS * WIDTH * INNER  # two products forward


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(WIDTH, INNER, rngs=rngs)
        self.down = nnx.Linear(INNER, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down(jnp.tanh(self.up(x)))


class Unrolled(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([Layer(rngs) for _ in range(LAYERS)])
        self.table = nnx.Param(jnp.ones((WIDTH, WIDTH)))

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return x @ self.table[...]


class Scanned(nnx.Module):
    remat: Remat = "none"

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = stack_layers(Layer, LAYERS, rngs)
        self.table = nnx.Param(jnp.ones((WIDTH, WIDTH)))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = scan_layers(self.layers, x, lambda layer, x, _: layer(x), remat=self.remat)
        return x @ self.table[...]


class Rematted(Scanned):
    remat = "full"


def flops_of(make: Callable[[nnx.Rngs], Any], devices: int = 1) -> StepFlops:
    """FLOPs of the gradients of a model, by its parameters and by its input."""
    model = make(nnx.Rngs(0))
    graph, state = nnx.split(model)

    def loss(state: nnx.State, x: jax.Array) -> jax.Array:
        merged = nnx.merge(graph, state)
        with module_scopes(merged):
            return (merged(x) ** 2).sum()

    x = jnp.ones((ROWS, WIDTH))
    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(state, x).compile().as_text()
    sizes = {"/".join(map(str, path)): v.size for path, v in nnx.to_flat_state(state)}
    module = parse_module(text)
    return step_flops(
        module,
        Owners(text, model, sizes),
        sizes,
        name="Model",
        parts=even_parts(module, devices),
    )


@pytest.fixture(scope="module")
def scanned() -> StepFlops:
    return flops_of(Scanned)


def test_the_count_by_hand_holds_loops_included(scanned: StepFlops) -> None:
    head = 2 * ROWS * WIDTH * WIDTH
    assert scanned.total == 3 * (LAYERS * LAYER_FLOPS + head)
    assert scanned.dtypes == {"float32": scanned.total}
    phases = scanned.model.flops
    assert phases[Phase.FORWARD] == LAYERS * LAYER_FLOPS + head
    assert phases[Phase.BACKWARD] == 2 * phases[Phase.FORWARD]
    assert scanned.recomputed == 0


def test_scanned_layers_count_as_unrolled_ones(scanned: StepFlops) -> None:
    unrolled = flops_of(Unrolled)
    assert unrolled.total == scanned.total
    assert unrolled.model.flops == scanned.model.flops
    assert unrolled.model.parameters == scanned.model.parameters


def test_modules_add_up_to_the_step(scanned: StepFlops) -> None:
    nodes = {node.path or node.name: node for _, node in walk(scanned.model)}
    assert nodes["layers/up"].total == nodes["layers/down"].total == 3 * LAYERS * LAYER_FLOPS / 2
    assert nodes["layers/up"].parameters == LAYERS * (WIDTH + 1) * INNER
    for _, node in walk(scanned.model):
        if node.children:
            assert sum(child.total for child in node.children) == node.total, node.path
    assert scanned.model.parameters == LAYERS * ((WIDTH + 1) * INNER + (INNER + 1) * WIDTH) + 64


def test_what_a_model_computes_in_its_own_call_bears_that_name() -> None:
    nodes = {node.name: node for _, node in walk(flops_of(Unrolled).model)}
    assert nodes["(Unrolled.__call__)"].total == 3 * 2 * ROWS * WIDTH * WIDTH
    assert "(loss)" not in nodes


def test_rematerialisation_shows_as_what_is_computed_again(scanned: StepFlops) -> None:
    rematted = flops_of(Rematted)
    # XLA drops the second product of each layer: no gradient needs its result.
    assert rematted.recomputed == LAYERS * LAYER_FLOPS / 2
    assert rematted.total - rematted.recomputed == scanned.total
    again = {node.path for _, node in walk(rematted.model) if node.flops[Phase.RECOMPUTED]}
    assert again == {"", "layers", "layers/up"}


def test_devices_that_are_alike_multiply(scanned: StepFlops) -> None:
    assert flops_of(Scanned, devices=4).total == 4 * scanned.total


CONDITIONAL = """HloModule step, is_scheduled=true

%small (a: f32[2,3]) -> f32[2,2] {
  %a = f32[2,3]{1,0} parameter(0)
  ROOT %ab = f32[2,2]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

%none (b: f32[2,3]) -> f32[2,2] {
  %b = f32[2,3]{1,0} parameter(0)
  %nought = f32[] constant(0)
  ROOT %zeros = f32[2,2]{1,0} broadcast(%nought), dimensions={}
}

ENTRY %main (x: f32[2,3], which: pred[]) -> f32[2,2] {
  %x = f32[2,3]{1,0} parameter(0)
  %which = pred[] parameter(1)
  %kernel = f32[2,3]{1,0} custom-call(%x), custom_call_target="__gpu$xla.gpu.triton"
  %checked = f32[2,3]{1,0} custom-call(%x), custom_call_target="Sharding"
  ROOT %out = f32[2,2]{1,0} conditional(%which, %kernel, %kernel), true_computation=%none, false_computation=%small
}
"""  # noqa: E501


def test_of_a_conditional_the_branch_with_most_flops_counts_unless_it_is_known() -> None:
    module = parse_module(CONDITIONAL)
    assert [one.total for one in products(module)] == [24.0]
    assert [one.total for one in products(module, {"out": [1, 4]})] == [96.0]
    assert products(module, {"out": [3]}) == []


def test_kernels_whose_products_are_not_known_are_named() -> None:
    assert unknown_kernels(parse_module(CONDITIONAL)) == ("__gpu$xla.gpu.triton",)


@pytest.mark.parametrize(
    ("op_name", "phase"),
    [
        ("jit(f)/jvp()/while/body/blocks/dot_general", Phase.FORWARD),
        ("jit(f)/transpose(jvp())/while/body/blocks/dot_general", Phase.BACKWARD),
        ("jit(f)/transpose(jvp())/checkpoint/rematted_computation/dot", Phase.RECOMPUTED),
        ("", Phase.FORWARD),
    ],
)
def test_phases(op_name: str, phase: Phase) -> None:
    assert Owners("HloModule m", None, [], trains=True).phase(op_name) is phase


def test_what_is_not_differentiated_is_the_update_of_a_train_step() -> None:
    op_name = "jit(train_step)/orthogonalize/dot_general"
    assert Owners("HloModule m", None, [], trains=True).phase(op_name) is Phase.UPDATE
    assert Owners("HloModule m", None, []).phase(op_name) is Phase.FORWARD


@pytest.mark.parametrize(
    ("op_name", "path"),
    [
        ("jit(step)/jvp(GPT)/h_0/attn/dot_general", "h_0/attn"),
        ("jit(step)/transpose(jvp(GPT))/h_0/attn.attend/dot_general", "h_0/attn"),
        ("jit(step)/jvp(h_1/attn)/dot_general", "h_1/attn"),
        ("jit(step)/attn/h_0/dot_general", "h_0"),
        ("jit(step)/optimizer/dot_general", ""),
    ],
)
def test_scopes_name_modules(op_name: str, path: str) -> None:
    owners = Owners("HloModule m", None, ["h_0/attn/kernel", "h_1/attn/kernel", "wte"])
    assert owners.paths == ("h_0", "h_0/attn", "h_1", "h_1/attn")
    assert owners.of_name(op_name).path == path


def test_modules_without_parameters_have_paths_too() -> None:
    class Tiny(nnx.Module):
        def __init__(self) -> None:
            self.drop = nnx.Dropout(0.5)

    assert module_paths(Tiny(), ["linear/kernel"]) == ("linear", "drop")

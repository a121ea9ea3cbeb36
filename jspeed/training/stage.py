"""What a pipeline stage computes: its layers, and the embedding and the head where it owns them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jspeed.layout.at_use import call_with_gather_at_use
from jspeed.layout.mesh import PIPE
from jspeed.layout.zero import Layout
from jspeed.pipeline.executor import Buffers, Carry, load
from jspeed.pipeline.linearised import (
    Linearised,
    SplitBackward,
    is_differentiable,
    linearise,
    split_backward,
)
from jspeed.pipeline.operations import SENDS_GRADIENT
from jspeed.pipeline.program import Cell
from jspeed.pipeline.split import Split
from jspeed.pipeline.wire import Wire
from jspeed.training.local_parameters import Arrays, LocalParameters
from jspeed.training.shard import Shard


class Parts:
    """A model's three parts on one device's shards of the parameters.

    Args:
      split: of the loss.
      shard: what the device has at hand.
      chunks: that its layers are cut into.
    """

    def __init__(self, split: Split, shard: Shard, chunks: int) -> None:
        self.split = split
        self.shard = shard
        self.chunks = chunks
        names = list(shard.local.layout.leaves)
        self.stacked = [names[i] for i in split.stacked]
        self.of_layers = [names[i] for i in sorted({*split.stacked, *split.used_layers})]
        self.of_first = [names[i] for i in split.used_first]
        self.of_last = [names[i] for i in split.used_last]
        order = self.layout.order
        assert order is not None, "a pipeline has stages"
        self.order = order
        self.rows = order.rows_per_chunk
        self._position = {name: i for i, name in enumerate(names)}
        self._stage = jax.lax.axis_index(PIPE)

    @property
    def local(self) -> LocalParameters:
        return self.shard.local

    @property
    def layout(self) -> Layout:
        return self.local.layout

    def inputs(self, cell: Cell) -> list[Any]:
        """A microbatch as the split function takes it."""
        micro, key = self.shard.microbatch(cell.microbatch)
        return jax.tree.leaves((self.shard.mutable, micro, key))

    def weights(self, paths: Sequence[str]) -> Arrays:
        """What is differentiated."""
        return self.local.differentiated(self.shard.master, self.shard.copies, paths)

    def first(self, weights: Arrays, inputs: Sequence[Any]) -> Carry:
        """The embedding."""
        return tuple(self._call(self.split.first, weights, self.shard_values(weights), inputs))

    def last(
        self, weights: Arrays, carry: Sequence[Any], inputs: Sequence[Any]
    ) -> tuple[jax.Array, jax.Array]:
        """The head: the loss's total and weight."""
        return self._call(self.split.last, weights, self.shard_values(weights), list(carry), inputs)

    def layers(self, weights: Arrays, others: LayerInputs, carry: Sequence[Any]) -> Carry:
        """The layers of a chunk."""
        values = (others.master, others.copies)
        return tuple(
            self._call(
                self.split.run_layers,
                weights,
                values,
                list(carry),
                others.inputs,
                others.start,
                None if self.order.even else others.valid,
            )
        )

    def chunk(self, cell: Cell, inputs: Sequence[Any]) -> tuple[Arrays, LayerInputs]:
        """The weights of a chunk's layers, and what else they need."""

        def of_chunk(arrays: Arrays) -> Arrays:
            return {
                path: self._rows(leaf, cell) if path in self.stacked else leaf
                for path, leaf in arrays.items()
                if path in self.of_layers
            }

        master, copies = of_chunk(self.shard.master), of_chunk(self.shard.copies)
        virtual = jnp.asarray(cell.chunk) * self.layout.stages + self._stage
        start = jnp.asarray(self.order.first_layers, jnp.int32)[virtual]
        valid = jnp.asarray(self.order.counts, jnp.int32)[virtual]
        others = LayerInputs(master, copies, list(inputs), start, valid)
        return self.local.differentiated(master, copies, self.of_layers), others

    def _rows(self, leaf: jax.Array, cell: Cell) -> jax.Array:
        if self.chunks == 1:
            return leaf
        return jax.lax.dynamic_slice_in_dim(leaf, cell.chunk * self.rows, self.rows)

    def add_chunk(self, sums: Arrays, gradients: Arrays, cell: Cell) -> Arrays:
        """Sums with the gradients of a chunk's layers added."""
        if self.chunks == 1:
            return added(sums, gradients)
        new = dict(sums)
        for path, gradient in gradients.items():
            if path not in sums:  # frozen
                continue
            if path not in self.stacked:
                new |= added(new, {path: gradient})
                continue
            total = self._rows(new[path], cell) + gradient.astype(new[path].dtype)
            new[path] = jax.lax.dynamic_update_slice_in_dim(
                new[path], total, cell.chunk * self.rows, 0
            )
        return new

    def shard_values(self, weights: Arrays) -> tuple[Arrays, Arrays]:
        """Masters and copies of some parameters."""
        master, copies = self.shard.master, self.shard.copies
        return {p: master[p] for p in weights}, {p: copies[p] for p in weights if p in copies}

    def _call(
        self, part: Callable[..., Any], weights: Arrays, values: tuple[Arrays, Arrays], *args: Any
    ) -> Any:
        positions = [self._position[path] for path in weights]

        def run(wholes: list[jax.Array], *args: Any) -> Any:
            return part(dict(zip(positions, wholes, strict=True)), *args)

        return call_with_gather_at_use(
            run,
            self.local.homes(weights, *values),
            *args,
            refetch=self.layout.stage == 3,
            report=self.local.report,
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerInputs:
    """What layers need beside the weights that are differentiated.

    Attributes:
      master: path -> the chunk's part.
      copies: alike.
      inputs: of the microbatch.
      start: int32, the number of the first layer.
      valid: int32, how many of the chunk's rows are layers.
    """

    master: Arrays
    copies: Arrays
    inputs: list[Any]
    start: jax.Array
    valid: jax.Array


def added(sums: Arrays, gradients: Arrays) -> Arrays:
    """Sums with gradients added, in the dtype of the sums; of what is frozen there is none."""
    new = {
        path: sums[path] + g.astype(sums[path].dtype)
        for path, g in gradients.items()
        if path in sums
    }
    return {**sums, **new}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StageSums:
    """What a stage adds up over a step: gradients by path, the loss's total and its weight."""

    gradients: Arrays
    total: jax.Array
    weight: jax.Array


class TrainingStage:
    """Forward and backward passes of a stage; see `jspeed.pipeline.executor.Stage`.

    Branches that hand sums or buffers through are switches over an integer, with these as operands:
    of what a `lax.cond` hands through, XLA makes a copy in every turn.
    """

    def __init__(
        self, parts: Parts, wire: Wire, traced: Linearised, passes: SplitBackward | None
    ) -> None:
        self.parts = parts
        self.wire = wire
        self.traced = traced
        self.passes = passes

    def forward(
        self, cell: Cell, buffers: Buffers, sums: StageSums
    ) -> tuple[Buffers, StageSums, Carry]:
        inputs = self.parts.inputs(cell)
        carry = entering(self.parts, self.wire, cell, buffers, inputs)
        weights, others = self.parts.chunk(cell, inputs)
        out, kept = self.traced.forward(weights, others, carry)
        buffers = buffers.put("kept", cell.kept, kept)

        def keep(output: Carry) -> Carry:
            return buffers._replace(output=output).put("output", cell.output, out).output

        output = jax.lax.switch(cell.last, [lambda output: output, keep], buffers.output)
        return buffers._replace(output=output), sums, out

    def head(self, cell: Cell, buffers: Buffers, sums: StageSums) -> tuple[StageSums, Carry]:
        arrived = load(buffers.gradient, cell.gradient)

        def received(sums: StageSums, arrived: Carry) -> tuple[StageSums, Carry]:
            return sums, self.wire.placed(arrived)

        def head(sums: StageSums, arrived: Carry) -> tuple[StageSums, Carry]:
            del arrived
            sums, gradient = self._head(cell, buffers, sums)
            return sums, self.wire.placed(gradient)

        taken = jnp.int32((cell.last == 1) & _goes_back(cell))
        return jax.lax.switch(taken, [received, head], sums, arrived)

    def backward(
        self, cell: Cell, buffers: Buffers, sums: StageSums, gradient: Carry
    ) -> tuple[Buffers, StageSums, Carry]:
        weights, others = self.parts.chunk(cell, self.parts.inputs(cell))
        kept = load(buffers.kept, cell.kept)
        if self.passes is not None:
            d_carry, taps = self.passes.input_pass(weights, others, kept, gradient)
            return buffers.put("taps", cell.taps, taps), sums, d_carry
        d_weights, d_carry = self.traced.backward(weights, others, kept, gradient)
        gradients = self.parts.add_chunk(sums.gradients, d_weights, cell)
        return buffers, StageSums(gradients, sums.total, sums.weight), d_carry

    def embedding(self, cell: Cell, sums: StageSums, gradient: Carry) -> StageSums:
        return jax.lax.switch(
            jnp.int32((cell.first == 1) & _goes_back(cell)),
            [
                lambda sums: sums,
                lambda sums: self._embedding(sums, self.parts.inputs(cell), gradient),
            ],
            sums,
        )

    def weights(self, cell: Cell, buffers: Buffers, sums: StageSums) -> tuple[Buffers, StageSums]:
        assert self.passes is not None, "only split backward passes have a weight pass"
        weights, others = self.parts.chunk(cell, self.parts.inputs(cell))
        kept, taps = load(buffers.kept, cell.kept), load(buffers.taps, cell.taps)
        d_weights = self.passes.weight_pass(weights, others, kept, taps)
        gradients = self.parts.add_chunk(sums.gradients, d_weights, cell)
        return buffers, StageSums(gradients, sums.total, sums.weight)

    def _head(self, cell: Cell, buffers: Buffers, sums: StageSums) -> tuple[StageSums, Carry]:
        inputs = self.parts.inputs(cell)
        output = load(buffers.output, cell.output)
        floats = tuple(value for value in output if is_differentiable(value))

        def loss(weights: Arrays, floats: Carry) -> Any:
            left = iter(floats)
            carry = [next(left) if is_differentiable(value) else value for value in output]
            total, weight = self.parts.last(weights, carry, inputs)
            return total * self.parts.shard.factor, (total, weight)

        (d_weights, d_floats), (total, weight) = jax.grad(loss, argnums=(0, 1), has_aux=True)(
            self.parts.weights(self.parts.of_last), floats
        )
        gradients = added(sums.gradients, d_weights)
        return StageSums(gradients, sums.total + total, sums.weight + weight), d_floats

    def _embedding(self, sums: StageSums, inputs: Sequence[Any], d_carry: Carry) -> StageSums:
        def embed(weights: Arrays) -> Carry:
            carry = self.parts.first(weights, inputs)
            return tuple(value for value in carry if is_differentiable(value))

        weights = self.parts.weights(self.parts.of_first)
        if not weights:
            return sums
        gradients = added(sums.gradients, jax.vjp(embed, weights)[1](d_carry)[0])
        return StageSums(gradients, sums.total, sums.weight)


class EvaluationStage:
    """Forward passes alone, with the loss at their end."""

    def __init__(self, parts: Parts, wire: Wire) -> None:
        self.parts = parts
        self.wire = wire

    def forward(
        self, cell: Cell, buffers: Buffers, sums: StageSums
    ) -> tuple[Buffers, StageSums, Carry]:
        inputs = self.parts.inputs(cell)
        carry = entering(self.parts, self.wire, cell, buffers, inputs)
        weights, others = self.parts.chunk(cell, inputs)
        out = self.parts.layers(weights, others, carry)

        def head() -> StageSums:
            total, weight = self.parts.last(self.parts.weights(self.parts.of_last), out, inputs)
            return StageSums(sums.gradients, sums.total + total, sums.weight + weight)

        return buffers, jax.lax.cond(cell.last == 1, head, lambda: sums), out


def _goes_back(cell: Cell) -> Any:
    sends = [cell.operation == operation for operation in SENDS_GRADIENT]
    return functools.reduce(jnp.logical_or, sends)


def entering(
    parts: Parts, wire: Wire, cell: Cell, buffers: Buffers, inputs: Sequence[Any]
) -> Carry:
    """What enters a chunk's first layer: the embedding's output, or what has arrived."""
    return jax.lax.cond(
        cell.first == 1,
        lambda: wire.placed(parts.first(parts.weights(parts.of_first), inputs)),
        lambda: wire.placed(load(buffers.activation, cell.activation)),
    )


def traced_layers(parts: Parts, *, two_passes: bool) -> tuple[Linearised, SplitBackward | None]:
    """The layers of a chunk and their derivative, traced once on shapes alone; with `two_passes`
    the backward pass also cut in two."""
    zero = jnp.int32(0)
    cell = Cell(*(zero for _ in Cell._fields))
    weights, others = jax.eval_shape(lambda: parts.chunk(cell, parts.inputs(cell)))
    carry = parts.split.carry
    traced = linearise(parts.layers, weights, others, carry)
    return traced, split_backward(traced, weights, others, carry) if two_passes else None

"""Runs any schedule: a loop over turns, in which each stage does what its cell of the table says.

Everything here runs inside a `shard_map` that is manual over `pipe` and the batch axes. In each
turn a stage receives, computes, and sends; transfers are neighbour permutes that stand outside
every branch, since a permute inside a branch that differs per stage is silently wrong. Where a turn
has two halves, a forward and a backward one, activations travel during the backward half and
gradients during the forward half.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp

from jspeed.layout.mesh import PIPE
from jspeed.pipeline.operations import SENDS_GRADIENT, Operation
from jspeed.pipeline.program import Cell, TurnTable
from jspeed.pipeline.wire import Wire

Carry = tuple[jax.Array, ...]


class Buffers(NamedTuple):
    """What a stage holds between turns; leaves `[slots, ...]`.

    Attributes:
      activation: arrived and not yet used.
      gradient: alike.
      kept: what forwards leave for backwards.
      taps: what input passes leave for weight passes.
      output: of the last virtual stage, for its head.
    """

    activation: Any
    gradient: Any
    kept: Any
    taps: Any
    output: Any


class ForwardStage(Protocol):
    """A stage in evaluation. `sums` is any pytree that accumulates over the loop."""

    def forward(self, cell: Cell, buffers: Buffers, sums: Any) -> tuple[Buffers, Any, Carry]:
        """Runs the layers of a chunk; returns what to send on."""
        ...


class Stage(ForwardStage, Protocol):
    """One stage's mathematics of training."""

    def head(self, cell: Cell, buffers: Buffers, sums: Any) -> tuple[Any, Carry]:
        """The loss and its gradient on the last virtual stage, what arrived on the others; returns
        the gradient that enters the backward pass. Called in every turn, whatever the cell says."""
        ...

    def backward(
        self, cell: Cell, buffers: Buffers, sums: Any, gradient: Carry
    ) -> tuple[Buffers, Any, Carry]:
        """The backward pass, or its input pass alone; returns the gradient to send back."""
        ...

    def embedding(self, cell: Cell, sums: Any, gradient: Carry) -> Any:
        """The backward pass of the embedding on the first virtual stage. Called in every turn."""
        ...

    def weights(self, cell: Cell, buffers: Buffers, sums: Any) -> tuple[Buffers, Any]:
        """The weight pass."""
        ...


def run_schedule(
    table: TurnTable, stage: ForwardStage, wire: Wire, buffers: Buffers, sums: Any
) -> Any:
    """Runs a schedule from its first turn to its last; returns the sums.

    Args:
      table: of the schedule.
      stage: what each operation does.
      wire: how activations and gradients travel.
      buffers: empty, with the table's numbers of slots.
      sums: before the first turn.
    """
    cells = jnp.asarray(table.cells)
    mine = jax.lax.axis_index(PIPE)

    def cell_of(turn: jax.Array, half: int) -> Cell:
        row = jax.lax.dynamic_index_in_dim(cells, turn, keepdims=False)[half]
        own = jax.lax.dynamic_index_in_dim(row, mine, keepdims=False)
        return Cell(*(own[column] for column in range(len(Cell._fields))))

    def paired(turn: jax.Array, state: _State) -> _State:
        buffers, sums, activation, gradient = state
        first, second = cell_of(turn, 0), cell_of(turn, 1)
        buffers = _store(buffers, first, gradient=wire.back(gradient))
        buffers, sums, activation, _ = _compute(table, (Operation.FORWARD,), stage, wire)(
            first, buffers, sums, activation, gradient
        )
        buffers = _store(buffers, second, activation=wire.forth(activation))
        backwards = tuple(table.operations - {Operation.FORWARD})
        buffers, sums, _, gradient = _compute(table, backwards, stage, wire)(
            second, buffers, sums, activation, gradient
        )
        return buffers, sums, activation, gradient

    def single(turn: jax.Array, state: _State) -> _State:
        buffers, sums, activation, gradient = state
        cell = cell_of(turn, 0)
        buffers = _store(buffers, cell, activation=wire.forth(activation))
        if table.operations != {Operation.FORWARD}:
            buffers = _store(buffers, cell, gradient=wire.back(gradient))
        compute = _compute(table, tuple(table.operations), stage, wire)
        return compute(cell, buffers, sums, activation, gradient)

    # A loop whose length XLA does not learn: of one that it can count, it moves collectives into
    # the turn before and compiles the body twice.
    length = jax.lax.optimization_barrier(jnp.int32(table.turns))
    start = (buffers, sums, wire.nothing(), wire.no_gradient())
    return jax.lax.fori_loop(0, length, paired if table.paired else single, start)[1]


_State = tuple[Buffers, Any, Carry, Carry]


def _compute(
    table: TurnTable, operations: Sequence[Operation], forward_stage: ForwardStage, wire: Wire
) -> Callable[..., _State]:
    """The function of one half of a turn: a switch over what the cell says."""
    stage = cast("Stage", forward_stage)  # only tables that go back call what it has more

    def idle(cell: Cell, *state: Any) -> _State:
        del cell
        return state  # pyright: ignore[reportReturnType]

    def forward(cell: Cell, buffers: Buffers, sums: Any, _: Carry, gradient: Carry) -> _State:
        return *stage.forward(cell, buffers, sums), gradient

    def backward(
        cell: Cell, buffers: Buffers, sums: Any, activation: Carry, gradient: Carry
    ) -> _State:
        buffers, sums, gradient = stage.backward(cell, buffers, sums, gradient)
        return buffers, sums, activation, gradient

    def weights(cell: Cell, buffers: Buffers, sums: Any, *sent: Carry) -> _State:
        activation, gradient = sent
        return *stage.weights(cell, buffers, sums), activation, gradient

    known = {
        Operation.FORWARD: forward,
        Operation.BACKWARD: backward,
        Operation.BACKWARD_INPUT: backward,
        Operation.BACKWARD_WEIGHT: weights,
    }
    ordered = sorted(operations)
    branch_of = [0] * (max(Operation) + 1)
    for number, operation in enumerate(ordered, start=1):
        branch_of[operation] = number
    branches = [idle, *(known[operation] for operation in ordered)]

    def run(cell: Cell, buffers: Buffers, sums: Any, activation: Carry, gradient: Carry) -> _State:
        branch = jnp.asarray(branch_of)[cell.operation]
        # The head and the embedding stand beside the layers' branches, not inside: XLA copies what
        # a branch within a branch hands through, and that would be a table of the vocabulary.
        goes_back = any(operation in SENDS_GRADIENT for operation in operations)
        if goes_back:
            sums, gradient = stage.head(cell, buffers, sums)
        state = jax.lax.switch(branch, branches, cell, buffers, sums, activation, gradient)
        if goes_back:
            buffers, sums, activation, gradient = state
            state = buffers, stage.embedding(cell, sums, gradient), activation, gradient
        return state

    return run


def _store(
    buffers: Buffers, cell: Cell, *, activation: Any = None, gradient: Any = None
) -> Buffers:
    """Puts what has arrived into its slots."""
    if activation is not None:
        arrived = store(buffers.activation, cell.activation_store, activation)
        buffers = buffers._replace(activation=arrived)
    if gradient is not None:
        arrived = store(buffers.gradient, cell.gradient_store, gradient)
        buffers = buffers._replace(gradient=arrived)
    return buffers


def store(buffer: Any, slot: Any, values: Any) -> Any:
    """A buffer with `values` in a slot; a buffer of no slots stays empty."""

    def put(leaf: jax.Array, value: jax.Array) -> jax.Array:
        if leaf.shape[0] == 0:
            return leaf
        return jax.lax.dynamic_update_index_in_dim(leaf, value.astype(leaf.dtype), slot, 0)

    return jax.tree.map(put, buffer, values)


def load(buffer: Any, slot: Any) -> Any:
    """What is in a slot."""
    return jax.tree.map(
        lambda leaf: jax.lax.dynamic_index_in_dim(leaf, slot, keepdims=False), buffer
    )


def empty(slots: int, shapes: Any) -> Any:
    """A buffer for arrays of these shapes."""
    return jax.tree.map(lambda s: jnp.zeros((slots, *s.shape), s.dtype), shapes)

"""Runs any schedule: a loop over turns, in which each stage does what its cell of the table says.

Everything here runs inside a `shard_map` that is manual over `pipe` and the batch axes. In each
turn a stage receives, computes, and sends; transfers are neighbour permutes that stand outside
every branch, since a permute inside a branch that differs per stage is silently wrong. Where a turn
has two halves, a forward and a backward one, activations travel during the backward half and
gradients during the forward half.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp

from jspeed.layout.mesh import PIPE
from jspeed.pipeline.operations import SENDS_GRADIENT, Operation
from jspeed.pipeline.program import Cell, TurnTable
from jspeed.pipeline.wire import Wire

Carry = tuple[jax.Array, ...]


SCOPE = "pipeline."
"""With the name of one of the buffers behind it, the scope of what is put there."""


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

    def put(self, field: str, slot: Any, values: Any) -> Buffers:
        """With values in a slot of one of them, by whose name the compiled program's are known."""
        with jax.named_scope(f"{SCOPE}{field}"):
            return self._replace(**{field: store(getattr(self, field), slot, values)})


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
    operations = sorted(table.operations)

    def cell_of(turn: jax.Array, half: int) -> Cell:
        row = jax.lax.dynamic_index_in_dim(cells, turn, keepdims=False)[half]
        own = jax.lax.dynamic_index_in_dim(row, mine, keepdims=False)
        return Cell(*(own[column] for column in range(len(Cell._fields))))

    def paired(turn: jax.Array, state: State) -> State:
        first, second = cell_of(turn, 0), cell_of(turn, 1)
        state = _gradient_arrives(first, state, wire)
        state = _compute(Operation.FORWARD, first, state, stage)
        state = _activation_arrives(second, state, wire)
        for operation in operations:
            if operation is not Operation.FORWARD:
                state = _compute(operation, second, state, stage)
        return state

    def single(turn: jax.Array, state: State) -> State:
        cell = cell_of(turn, 0)
        state = _activation_arrives(cell, state, wire)
        if table.operations != {Operation.FORWARD}:
            state = _gradient_arrives(cell, state, wire)
        for operation in operations:
            state = _compute(operation, cell, state, stage)
        return state

    # A loop whose length XLA does not learn: of one that it can count, it moves collectives into
    # the turn before and compiles the body twice.
    length = jax.lax.optimization_barrier(jnp.int32(table.turns))
    start = State(buffers, sums, wire.nothing(), wire.no_gradient())
    return jax.lax.fori_loop(0, length, paired if table.paired else single, start).sums


class State(NamedTuple):
    """What a stage has between turns.

    Attributes:
      buffers: what waits.
      sums: added up so far.
      activation: sent on, or about to be.
      gradient: sent back, or about to be.
    """

    buffers: Buffers
    sums: Any
    activation: Carry
    gradient: Carry


def _compute(operation: Operation, cell: Cell, state: State, stage: ForwardStage) -> State:
    """Runs one operation where the cell says so.

    Each operation is a switch of its own, of two branches, and the head and the embedding stand
    beside the layers' one: XLA updates in place what such a switch hands through, but copies whole
    buffers for switches of more branches, and for a branch within a branch.
    """
    full = cast("Stage", stage)  # only tables that go back call what it has more

    def forward(state: State) -> State:
        return State(*stage.forward(cell, state.buffers, state.sums), state.gradient)

    def backward(state: State) -> State:
        buffers, sums, gradient = full.backward(cell, state.buffers, state.sums, state.gradient)
        return State(buffers, sums, state.activation, gradient)

    def weights(state: State) -> State:
        buffers, sums = full.weights(cell, state.buffers, state.sums)
        return state._replace(buffers=buffers, sums=sums)

    function = {
        Operation.FORWARD: forward,
        Operation.BACKWARD: backward,
        Operation.BACKWARD_INPUT: backward,
        Operation.BACKWARD_WEIGHT: weights,
    }[operation]
    goes_back = operation in SENDS_GRADIENT
    if goes_back:
        sums, gradient = full.head(cell, state.buffers, state.sums)
        state = state._replace(sums=sums, gradient=gradient)
    taken = jnp.asarray(cell.operation == operation, jnp.int32)
    state = jax.lax.switch(taken, [lambda state: state, function], state)
    if goes_back:
        state = state._replace(sums=full.embedding(cell, state.sums, state.gradient))
    return state


def _activation_arrives(cell: Cell, state: State, wire: Wire) -> State:
    """Sends activations on, and puts what arrives into its slot."""
    arrived = wire.forth(state.activation)
    return state._replace(buffers=state.buffers.put("activation", cell.activation_store, arrived))


def _gradient_arrives(cell: Cell, state: State, wire: Wire) -> State:
    """Alike, backwards."""
    arrived = wire.back(state.gradient)
    return state._replace(buffers=state.buffers.put("gradient", cell.gradient_store, arrived))


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

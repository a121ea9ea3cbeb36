"""Cuts a backward pass in two: what the stage before waits for, and the gradients of the weights.

The backward pass is a jaxpr with two kinds of results. The *input pass* is all that the gradient of
the inputs depends on; the *weight pass* is the rest. What the second needs of the first is handed
over. So no product is computed twice, whatever the model: each product of the backward pass is in
one pass or in the other. Loops over layers are cut alike, into two loops.

This is what zero-bubble schedules (Qi et al. 2023, Zero Bubble Pipeline Parallelism, section 2)
need: a weight pass can wait until its stage would otherwise be idle.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from jspeed.core._compat import Jaxpr, Literal, equation_context, open_jaxpr, scan_counts
from jspeed.layout.homes import COSTLY, REMAT
from jspeed.layout.operations import Key, Operation, evaluate, flatten, read

Env = dict[Any, Any]


@dataclass(frozen=True, eq=False)
class _Piece:
    """Something to evaluate: an equation, or one of the two loops that a loop was cut into."""

    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    run: Callable[[Env], None]

    @property
    def reads(self) -> list[Any]:
        return [atom for atom in self.inputs if not isinstance(atom, Literal)]


@dataclass(frozen=True, eq=False)
class TwoPasses:
    """A jaxpr evaluated in two passes.

    Attributes:
      handed_over: keys of the values that the second pass needs of the first.
    """

    handed_over: tuple[Any, ...]
    _inputs: tuple[Any, ...]
    _constants: Env
    _first: tuple[_Piece, ...]
    _second: tuple[_Piece, ...]
    _first_results: tuple[Any, ...]
    _second_results: tuple[Any, ...]

    def first(self, arguments: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """The first results, and what is handed over; takes all arguments."""
        env = {**self._constants, **dict(zip(self._inputs, arguments, strict=True))}
        for piece in self._first:
            piece.run(env)
        return read(env, self._first_results), read(env, self.handed_over)

    def second(self, at_hand: Sequence[Any], handed_over: Sequence[Any]) -> list[Any]:
        """The second results; takes the arguments that are at hand, which are the leading ones."""
        env = {**self._constants, **dict(zip(self._inputs, at_hand, strict=False))}
        env.update(zip(self.handed_over, handed_over, strict=True))
        for piece in self._second:
            piece.run(env)
        return read(env, self._second_results)


def cut_in_two(
    jaxpr: Jaxpr, consts: Sequence[Any], *, first: Sequence[bool], at_hand: int
) -> TwoPasses:
    """Cuts a jaxpr by its results.

    Args:
      jaxpr: to be cut.
      consts: its constants.
      first: for each result, whether the first pass computes it.
      at_hand: how many of the leading arguments the second pass gets again.
    """
    flat = flatten(jaxpr, calls=REMAT)
    count = len(consts)
    constants = {**flat.constants, **dict(zip(flat.inputs[:count], consts, strict=True))}
    inputs = flat.inputs[count:]
    wanted = [a for a, is_first in zip(flat.outputs, first, strict=True) if is_first]
    others = [a for a, is_first in zip(flat.outputs, first, strict=True) if not is_first]
    first_pieces, second_pieces = _cut(flat.operations, wanted, others)
    known = {*constants, *inputs[:at_hand]}
    return TwoPasses(
        handed_over=_handed_over(second_pieces, others, known),
        _inputs=tuple(inputs),
        _constants=constants,
        _first=tuple(first_pieces),
        _second=tuple(second_pieces),
        _first_results=tuple(wanted),
        _second_results=tuple(others),
    )


def _handed_over(
    second: Sequence[_Piece], results: Sequence[Any], known: Collection[Any]
) -> tuple[Any, ...]:
    """What the second pass reads and neither defines nor knows."""
    defined = {key for piece in second for key in piece.outputs}
    read_there: dict[Any, None] = {}
    for piece in second:
        read_there.update(dict.fromkeys(piece.reads))
    read_there.update((atom, None) for atom in results if not isinstance(atom, Literal))
    return tuple(key for key in read_there if key not in defined and key not in known)


def _cut(
    operations: Sequence[Operation], wanted: Sequence[Any], others: Sequence[Any]
) -> tuple[list[_Piece], list[_Piece]]:
    """Operations that `wanted` depends on, and those that only `others` depends on.

    Of the others, what takes no product to make, as the gradient of a bias or of a norm's scale,
    is made with the first: it is small, and what it is made of would have to be handed over.
    """
    needed = {atom for atom in wanted if not isinstance(atom, Literal)}
    needed.update(_light(operations, needed, others))
    first: list[_Piece] = []
    second: list[_Piece] = []
    for operation in reversed(operations):
        mine = needed.intersection(operation.outputs)
        if not mine:
            second.append(_whole(operation))
        elif operation.name == "scan" and len(mine) < len(operation.outputs):
            loop, rest = _cut_scan(operation, mine)
            first.append(loop)
            second.append(rest)
            needed.update(loop.reads)
        else:
            first.append(_whole(operation))
            needed.update(operation.reads)
    return first[::-1], _reaching(second[::-1], others)


def _light(
    operations: Sequence[Operation], needed: Collection[Any], others: Sequence[Any]
) -> set[Any]:
    """Which of `others` need no costly operation beside those that lead to `needed`."""
    reached = set(needed)
    for operation in reversed(operations):
        if reached.intersection(operation.outputs):
            reached.update(operation.reads)
    costly: set[Any] = set()
    defined: set[Any] = set()
    for operation in operations:
        if reached.intersection(operation.outputs):
            continue
        defined.update(operation.outputs)
        if operation.name in COSTLY or costly.intersection(operation.reads):
            costly.update(operation.outputs)
    return {atom for atom in others if not isinstance(atom, Literal) and atom in defined - costly}


def _reaching(pieces: Sequence[_Piece], results: Sequence[Any]) -> list[_Piece]:
    """The pieces that results depend on."""
    wanted = {atom for atom in results if not isinstance(atom, Literal)}
    kept = []
    for piece in reversed(pieces):
        if wanted.intersection(piece.outputs):
            kept.append(piece)
            wanted.update(piece.reads)
    return kept[::-1]


def _whole(operation: Operation) -> _Piece:
    return _Piece(
        tuple(operation.inputs), tuple(operation.outputs), lambda env: evaluate([operation], env)
    )


def _cut_scan(operation: Operation, mine: set[Any]) -> tuple[_Piece, _Piece]:
    """A loop whose results are needed in part, as a loop for these and a loop for the rest."""
    eqn = operation.eqn
    n_consts, n_carry = scan_counts(eqn)
    jaxpr, closed_over = open_jaxpr(eqn.params["jaxpr"])
    flat = flatten(jaxpr, calls=REMAT)
    constants = {**flat.constants, **dict(zip(flat.inputs, closed_over, strict=False))}
    inputs = flat.inputs[len(closed_over) :]
    consts, carry, slices = (
        inputs[:n_consts],
        inputs[n_consts : n_consts + n_carry],
        inputs[n_consts + n_carry :],
    )
    carried = _needed_carry(flat.operations, flat.outputs, operation.outputs, mine, carry)
    is_mine = [i in carried for i in range(n_carry)] + [
        key in mine for key in operation.outputs[n_carry:]
    ]
    wanted = [a for a, own in zip(flat.outputs, is_mine, strict=True) if own]
    others = [a for a, own in zip(flat.outputs, is_mine, strict=True) if not own]
    first, second = _cut(flat.operations, wanted, others)
    own_carry = [key for i, key in enumerate(carry) if i not in carried]
    handed = _handed_over(second, others, {*constants, *consts, *own_carry, *slices})
    stacks = tuple(Key() for _ in handed)
    loop = _Loop(operation, constants, tuple(consts), tuple(slices))
    given, start, xs = (
        operation.inputs[:n_consts],
        operation.inputs[n_consts : n_consts + n_carry],
        operation.inputs[n_consts + n_carry :],
    )
    ys_keys = operation.outputs[n_carry:]

    def half(own: bool) -> tuple[list[int], list[int]]:
        numbers = [i for i in range(n_carry) if (i in carried) is own]
        return numbers, [i for i in range(len(ys_keys)) if (ys_keys[i] in mine) is own]

    def make(own: bool, pieces: list[_Piece], extra_xs: bool) -> _Piece:
        numbers, ys = half(own)
        results = [flat.outputs[i] for i in numbers]
        emitted = [flat.outputs[n_carry + i] for i in ys] + ([] if extra_xs else list(handed))
        outer_outputs = [
            *(operation.outputs[i] for i in numbers),
            *(ys_keys[i] for i in ys),
            *(() if extra_xs else stacks),
        ]
        needs = _handed_over(pieces, [*results, *emitted], set(constants))
        used_consts = [i for i, key in enumerate(consts) if key in needs]
        used_slices = [i for i, key in enumerate(slices) if key in needs]
        return loop.piece(
            pieces,
            consts=[(consts[i], given[i]) for i in used_consts],
            carry=[(carry[i], start[i]) for i in numbers],
            slices=[(slices[i], xs[i]) for i in used_slices]
            + (list(zip(handed, stacks, strict=True)) if extra_xs else []),
            results=results,
            emitted=emitted,
            outputs=outer_outputs,
        )

    return make(True, first, False), make(False, second, True)


def _needed_carry(
    operations: Sequence[Operation],
    results: Sequence[Any],
    outputs: Sequence[Any],
    mine: set[Any],
    carry: Sequence[Any],
) -> set[int]:
    """The parts of a carry that some outputs of a loop depend on, over any number of turns."""
    needed = {i for i in range(len(carry)) if outputs[i] in mine}
    while True:
        wanted = [
            atom
            for i, atom in enumerate(results)
            if (i in needed if i < len(carry) else outputs[i] in mine)
        ]
        keys = {atom for atom in wanted if not isinstance(atom, Literal)}
        for operation in reversed(operations):
            if keys.intersection(operation.outputs):
                keys.update(operation.reads)
        more = {i for i, key in enumerate(carry) if key in keys} | needed
        if more == needed:
            return needed
        needed = more


@dataclass(frozen=True, eq=False)
class _Loop:
    operation: Operation
    constants: Env
    consts: tuple[Any, ...]
    slices: tuple[Any, ...]

    def piece(
        self,
        pieces: Sequence[_Piece],
        *,
        consts: Sequence[tuple[Any, Any]],
        carry: Sequence[tuple[Any, Any]],
        slices: Sequence[tuple[Any, Any]],
        results: Sequence[Any],
        emitted: Sequence[Any],
        outputs: Sequence[Any],
    ) -> _Piece:
        """A loop over `pieces`; pairs are (the key inside, the atom outside)."""
        params = self.operation.eqn.params

        def run(env: Env) -> None:
            fixed = {**self.constants}
            fixed.update(
                zip([k for k, _ in consts], read(env, [a for _, a in consts]), strict=True)
            )

            def body(values: tuple[Any, ...], xs: tuple[Any, ...]) -> tuple[Any, Any]:
                inner = {**fixed}
                inner.update(zip([key for key, _ in carry], values, strict=True))
                inner.update(zip([key for key, _ in slices], xs, strict=True))
                for piece in pieces:
                    piece.run(inner)
                return tuple(read(inner, results)), tuple(read(inner, emitted))

            with equation_context(self.operation.eqn):
                last, stacked = jax.lax.scan(
                    body,
                    tuple(read(env, [atom for _, atom in carry])),
                    tuple(read(env, [atom for _, atom in slices])),
                    length=params["length"],
                    reverse=params["reverse"],
                    unroll=params["unroll"],
                )
            env.update(zip(outputs, [*last, *stacked], strict=True))

        atoms = [atom for pairs in (consts, carry, slices) for _, atom in pairs]
        return _Piece(tuple(atoms), tuple(outputs), run)

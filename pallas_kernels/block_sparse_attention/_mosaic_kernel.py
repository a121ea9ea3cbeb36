"""The body of block-sparse attention's Mosaic kernel: what each warpgroup of a CTA does."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import _compat
from pallas_kernels.block_sparse_attention._triton_tiles import MASKED

QUERY_TILE = 128
"""Rows of a CTA: two warpgroups of 64."""
ROWS = 64
GRANULE = 16
"""Rows and keys that a bit of the kernel's masks stands for: the smallest block of a layout."""
_GRANULE_BITS = 4
_COMPUTE_REGISTERS, _MEMORY_REGISTERS = 232, 40  # of 3 * 168
_SHARED_BYTES = 220 * 1024  # of 227 KiB; barriers, segments and log-sum-exps take the rest


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is known when the kernel is traced."""

    key_tile: int
    piece: int  # keys that lie beside each other; a tile is packed from such pieces
    layout_heads: int
    parts: int
    masked: bool
    query_tiles: int
    group: int
    dim: int
    dtype: Any
    causal: bool
    segments: bool
    remainder: bool
    scale: float  # for base 2
    interpret: bool

    @property
    def stages(self) -> int:
        """How many tiles of K and of V the ring holds: what fits beside Q, at most 4."""
        spare = _SHARED_BYTES - QUERY_TILE * self.dim * 2
        return min(4, spare // (2 * self.key_tile * self.dim * 2))

    @property
    def pieces(self) -> int:
        return self.key_tile // self.piece

    @property
    def segment_copies(self) -> int:
        """Copies that bring a tile's segments of keys: TMA writes to multiples of 128 bytes, so
        those of smaller pieces lie beside each other already when the kernel starts."""
        if not self.segments:
            return 0
        return self.pieces if self.piece * 4 % 128 == 0 else 1


class _Refs:
    """A CTA's operands, results and shared memory, and what its item of work says."""

    def __init__(self, problem: Problem, inputs: int, refs: Any, shared: Any) -> None:
        self.q, self.k, self.v, items, blocks, words, *segments = refs[:inputs]
        self.segments: Any = segments  # of queries and keys, or nothing
        self.out, self.lse, *more = refs[inputs:]
        self.rests: Any = more[: problem.remainder]  # what rounding the output left out, or nothing
        self.parts: Any = more[problem.remainder :]  # output and log-sum-exp, or nothing
        self.shared = shared
        self.batch, self.head = lax.axis_index("batch"), lax.axis_index("head")
        self.kv_head = lax.div(self.head, jnp.int32(problem.group))
        self.layout_head = self.head if problem.layout_heads > 1 else 0
        self.blocks, self.words = blocks.at[self.layout_head], words.at[self.layout_head]
        item = (self.layout_head, lax.axis_index("item"))
        self.tile, self.start, self.full, partial, self.part = (items[(*item, i)] for i in range(5))
        self.count = self.full + partial


def scratch(problem: Problem) -> dict[str, Any]:
    """Shared memory and barriers of a CTA. What TMA copies and wgmma reads is swizzled."""
    plgpu, tile, ring = _compat.mosaic, problem.key_tile, problem.stages
    swizzled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    of = {
        "q": plgpu.SMEM((2, ROWS, problem.dim), problem.dtype, transforms=swizzled),
        "k": plgpu.SMEM((ring, tile, problem.dim), problem.dtype, transforms=swizzled),
        "v": plgpu.SMEM((ring, tile, problem.dim), problem.dtype, transforms=swizzled),
        "lse": plgpu.SMEM((2, ROWS), jnp.float32),
        "q_ready": plgpu.Barrier(num_barriers=2, num_arrivals=1 + problem.segments),
        "k_ready": plgpu.Barrier(
            num_barriers=ring, num_arrivals=problem.pieces + problem.segment_copies
        ),
        "v_ready": plgpu.Barrier(num_barriers=ring, num_arrivals=problem.pieces),
        "k_free": plgpu.Barrier(num_barriers=ring, num_arrivals=2),
        "v_free": plgpu.Barrier(num_barriers=ring, num_arrivals=2),
        "turn": plgpu.Barrier(num_barriers=2),
    }
    if problem.segments:
        of["query_segments"] = plgpu.SMEM((2, ROWS), jnp.int32)
        of["key_segments"] = plgpu.SMEM((ring, tile), jnp.int32)
    if problem.interpret:
        of["weights"] = plgpu.SMEM((2, ROWS, tile), problem.dtype, transforms=swizzled)
    return of


def kernel(problem: Problem, inputs: int, *refs: Any, **shared: Any) -> None:
    """Two warpgroups compute, the third copies; they have registers accordingly."""
    plgpu = _compat.mosaic
    at = _Refs(problem, inputs, refs, shared)
    warpgroup = lax.axis_index("warpgroup")

    def compute() -> None:
        plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
        _compute(problem, at, warpgroup)

    def copy() -> None:
        plgpu.set_max_registers(_MEMORY_REGISTERS, action="decrease")
        _copy_tiles(problem, at)

    lax.cond(warpgroup < 2, compute, copy)


def _copy_tiles(problem: Problem, at: _Refs) -> None:
    """The memory warpgroup: each tile of K and V into the next free place of the ring."""
    plgpu, ring, size, shared = _compat.mosaic, problem.stages, problem.piece, at.shared

    def copy(source: Any, target: str, ready: str, step: Any, *of: Any) -> None:
        slot = lax.rem(step, jnp.int32(ring))
        for number in range(problem.pieces):
            block = at.blocks[(at.start + step) * problem.pieces + number]
            keys = source.at[(at.batch, pl.ds(block * size, size), *of)]
            place = shared[target].at[slot, pl.ds(number * size, size)]
            plgpu.copy_gmem_to_smem(keys, place, shared[ready].at[slot])

    def copy_segments(step: Any) -> None:
        slot = lax.rem(step, jnp.int32(ring))
        names = at.segments[1].at[at.batch, at.layout_head, at.start + step]
        plgpu.copy_gmem_to_smem(names, shared["key_segments"].at[slot], shared["k_ready"].at[slot])

    def wait_until_free(which: str, step: Any) -> None:
        @pl.when(step >= ring)
        def _() -> None:
            plgpu.barrier_wait(shared[which].at[lax.rem(step, jnp.int32(ring))])

    @pl.loop(0, at.count)
    def _(step: Any) -> None:
        wait_until_free("k_free", step)
        if problem.segment_copies == 1:
            copy_segments(step)
        elif problem.segments:
            copy(at.segments[1], "key_segments", "k_ready", step)
        copy(at.k, "k", "k_ready", step, at.kv_head)
        wait_until_free("v_free", step)
        copy(at.v, "v", "v_ready", step, at.kv_head)

    # Somebody waits for each barrier's last phase too, which the interpreter insists on.
    @pl.loop(jnp.maximum(at.count, ring), at.count + ring)
    def _(step: Any) -> None:
        wait_until_free("k_free", step)
        wait_until_free("v_free", step)


def _compute(problem: Problem, at: _Refs, warpgroup: Any) -> None:
    """A compute warpgroup: its 64 rows against all tiles of the item."""
    plgpu, shared, turn = _compat.mosaic, at.shared, at.shared["turn"]
    # Items that only fill up the list name a row past the last, and have no tiles.
    tile = jnp.minimum(at.tile, problem.query_tiles - 1)
    first_row = tile * QUERY_TILE + warpgroup * ROWS
    rows, ready = pl.ds(first_row, ROWS), shared["q_ready"].at[warpgroup]
    plgpu.copy_gmem_to_smem(at.q.at[at.batch, rows, at.head], shared["q"].at[warpgroup], ready)
    if problem.segments:
        names = shared["query_segments"].at[warpgroup]
        plgpu.copy_gmem_to_smem(at.segments[0].at[at.batch, rows], names, ready)
    plgpu.barrier_wait(ready)

    by_row = plgpu.Layout.WGMMA.reduce(1)
    carry = (
        plgpu.layout_cast(jnp.zeros((ROWS, problem.dim), jnp.float32), plgpu.Layout.WGMMA),
        plgpu.layout_cast(jnp.full(ROWS, -jnp.inf, jnp.float32), by_row),
        plgpu.layout_cast(jnp.zeros(ROWS, jnp.float32), by_row),
    )

    @pl.when(warpgroup == 1)  # the other warpgroup multiplies first
    def _() -> None:
        plgpu.barrier_wait(turn.at[1])

    step = functools.partial(_step, problem, at, warpgroup, first_row)
    unmasked = 0 if problem.segments else at.full
    if not problem.segments:
        carry = lax.fori_loop(0, unmasked, functools.partial(step, masked=False), carry)
    if problem.masked or problem.segments:
        masked = functools.partial(step, masked=True)
        carry = lax.fori_loop(unmasked, at.count, masked, carry)

    @pl.when(warpgroup == 0)
    def _() -> None:
        plgpu.barrier_arrive(turn.at[1])

    @pl.when(at.tile < problem.query_tiles)
    def _() -> None:
        _write(problem, at, warpgroup, first_row, *carry)


def _step(
    problem: Problem,
    at: _Refs,
    warpgroup: Any,
    first_row: Any,
    step: Any,
    carry: Any,
    *,
    masked: bool,
) -> Any:
    """One tile: scores, their softmax, the product with V. Begins and ends with the turn."""
    plgpu, shared, turn = _compat.mosaic, at.shared, at.shared["turn"]
    shape = (ROWS, problem.key_tile)
    acc, top, total = carry
    slot = lax.rem(step, jnp.int32(problem.stages))

    def multiply(scores: Any) -> jax.Array:
        keys = shared["k"].at[slot].transpose((1, 0))
        plgpu.wgmma(scores, shared["q"].at[warpgroup], keys)
        return scores[...]

    plgpu.barrier_wait(shared["k_ready"].at[slot])
    scores = pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))
    plgpu.barrier_arrive(turn.at[1 - warpgroup])

    factor = problem.scale
    if factor <= 0:  # then the largest product is not the largest score
        scores, factor = scores * factor, 1.0
    if masked:
        scores = _masked(problem, at, warpgroup, first_row, step, slot, scores)
        if problem.segments:
            plgpu.commit_smem()  # Ordinary reads of the ring are over before TMA writes there.
    plgpu.barrier_arrive(shared["k_free"].at[slot])

    new_top = jnp.maximum(top, scores.max(axis=1) * factor)
    # Of rows that have met no key yet -inf is not subtracted from -inf.
    base = jnp.where(new_top == -jnp.inf, 0.0, new_top) if masked else new_top
    weights = jnp.exp2(scores * factor - lax.broadcast_in_dim(base, shape, [0]))
    shrink = jnp.exp2(top - base)
    total = total * shrink + weights.sum(axis=1)
    acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
    weights = weights.astype(problem.dtype)

    plgpu.barrier_wait(shared["v_ready"].at[slot])
    plgpu.barrier_wait(turn.at[warpgroup])
    acc = _add_product(problem, at, warpgroup, acc, weights, slot)
    plgpu.barrier_arrive(shared["v_free"].at[slot])
    return acc, new_top, total


def _add_product(
    problem: Problem, at: _Refs, warpgroup: Any, acc: Any, weights: Any, slot: Any
) -> Any:
    """`acc + weights @ V`. Mosaic's interpreter has neither operands in registers nor accumulators
    with a value, so there it goes through shared memory and a second accumulator."""
    plgpu, values = _compat.mosaic, at.shared["v"].at[slot]
    if not problem.interpret:

        def add(accumulator: Any) -> None:
            plgpu.wgmma(accumulator, weights, values)

        return pl.run_state(add)(plgpu.ACC.init(acc))

    staged = at.shared["weights"].at[warpgroup]
    staged[...] = weights
    plgpu.commit_smem()

    def product(accumulator: Any) -> jax.Array:
        plgpu.wgmma(accumulator, staged, values)
        return accumulator[...]

    return acc + pl.run_scoped(product, plgpu.ACC(acc.shape, jnp.float32))


def _masked(
    problem: Problem,
    at: _Refs,
    warpgroup: Any,
    first_row: Any,
    step: Any,
    slot: Any,
    scores: jax.Array,
) -> jax.Array:
    """The scores `[64, key_tile]` of a tile, -inf where the row does not attend to the key.

    Each mask is applied at once: three of them together take registers that there are not.
    """
    plgpu, shared = _compat.mosaic, at.shared
    shape, layout = (ROWS, problem.key_tile), plgpu.Layout.WGMMA
    by_row, by_key = layout.reduce(1), layout.reduce(0)
    row = plgpu.broadcasted_iota(jnp.int32, shape[:1], 0, layout=by_row)
    key = plgpu.broadcasted_iota(jnp.int32, shape[1:], 0, layout=by_key)

    def where(operation: Any, rows: Any, keys: Any, scores: jax.Array) -> jax.Array:
        rows, keys = lax.broadcast_in_dim(rows, shape, [0]), lax.broadcast_in_dim(keys, shape, [1])
        return lax.optimization_barrier(jnp.where(operation(rows, keys), scores, -jnp.inf))

    tile = at.start + step
    words = (row >> _GRANULE_BITS) * (problem.key_tile // GRANULE)
    words = at.words[tile, warpgroup] >> words
    bit_set = lambda word, bit: ((word >> bit) & 1) != 0  # noqa: E731
    scores = where(bit_set, words, key >> _GRANULE_BITS, scores)
    if problem.causal:
        size, first = problem.piece, tile * problem.pieces
        token = key + at.blocks[first] * size
        for number in range(1, problem.pieces):
            offset = (at.blocks[first + number] - number) * size
            token = jnp.where(key >= number * size, key + offset, token)
        scores = where(operator.ge, row + first_row, token, scores)
    if problem.segments:
        of_rows = plgpu.load(shared["query_segments"].at[warpgroup], layout=by_row)
        of_keys = plgpu.load(shared["key_segments"].at[slot], layout=by_key)
        scores = where(operator.eq, of_rows, of_keys, scores)
    return scores


def _write(
    problem: Problem, at: _Refs, warpgroup: Any, first_row: Any, acc: Any, top: Any, total: Any
) -> None:
    """Normalises, and writes the rows' output, log-sum-exp and remainder."""
    plgpu, out, lse = _compat.mosaic, at.shared["q"].at[warpgroup], at.shared["lse"].at[warpgroup]
    empty = total == 0.0
    total = jnp.where(empty, 1.0, total)
    acc = acc * lax.broadcast_in_dim(1.0 / total, acc.shape, [0])
    lse[...] = jnp.where(empty, -MASKED, top + jnp.log(total) * (1 / math.log(2)))

    def result() -> None:
        rows = pl.ds(first_row, ROWS)
        out[...] = acc.astype(problem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out, at.out.at[at.batch, rows, at.head])
        plgpu.copy_smem_to_gmem(lse, at.lse.at[at.batch, at.head, rows])
        plgpu.wait_smem_to_gmem(0)
        for rest in at.rests:
            # By the same place, from what was rounded there: kept in registers it would spill.
            out[...] = (acc - out[...].astype(jnp.float32)).astype(problem.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out, rest.at[at.batch, rows, at.head])
            plgpu.wait_smem_to_gmem(0)

    def part() -> None:
        to = (at.batch, at.head, at.part, pl.ds(warpgroup * ROWS, ROWS))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(lse, at.parts[1].at[to])
        at.parts[0][to] = acc
        plgpu.wait_smem_to_gmem(0)

    if problem.parts:
        lax.cond(at.part < 0, result, part)
    else:
        result()

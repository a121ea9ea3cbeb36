"""The schedules that jspeed knows, each as a table.

Ticks are lockstep: all stages exchange activations and gradients after each, so a tick lasts as
long as its slowest stage. A forward beside a whole backward, which costs twice as much, would leave
its stage idle for half of the tick without an idle cell to show it. So the tables of `gpipe`,
`1f1b` and `interleaved-1f1b` never mix the two, and then cost exactly what the textbook says; those
of `zb-h1` mix freely, since its operations all cost the same.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from jspeed.config.problem import did_you_mean, quoted, shown
from jspeed.core.errors import ConfigError
from jspeed.pipeline.operations import Operation, Schedule, Table
from jspeed.pipeline.packing import Step, pack

GPIPE, ONE_F_ONE_B, INTERLEAVED, ZERO_BUBBLE = "gpipe", "1f1b", "interleaved-1f1b", "zb-h1"
FORWARD_ONLY = "forward"
# Those one can train with.
KINDS = (GPIPE, ONE_F_ONE_B, INTERLEAVED, ZERO_BUBBLE)


def make_schedule(kind: str, *, stages: int, microbatches: int, chunks: int = 1) -> Schedule:
    """Returns the table of a schedule.

    With S stages, M microbatches and v chunks per stage, on stage s:

    - `gpipe` (Huang et al. 2019): all forwards, then all backwards. M microbatches are live at the
      peak.
    - `1f1b` (Narayanan et al. 2019, PipeDream-Flush): a forward tick and a backward tick alternate,
      which is a round; microbatch m goes forward in round m + s and backward in round
      m + 2(S-1) - s. At most 2(S-1-s) + 1 microbatches are live where the textbook has S - s: there
      a microbatch moves on when it can, here by one stage per round of a forward and a backward. It
      is what exact textbook time costs in lockstep, and does not grow with M.
    - `interleaved-1f1b` (Narayanan et al. 2021, section 2.2): the same over groups of about S
      microbatches, which pass chunk after chunk; the bubble is v times smaller. At most
      (v-1)G + 2(S-1-s) + 1 chunks of microbatches are live, of which each is 1/v of a stage's; G is
      the size of the largest group. G is S if M is a multiple of S, as in Megatron-LM, with the
      same peak. Any other M >= S makes groups of up to 2S - 1, at the same cost in time.
    - `zb-h1` (Qi et al. 2023, Zero Bubble Pipeline Parallelism, section 2.2): backwards are split,
      and those of the weights fill the bubble: 3M + S - 1 ticks for M >= S. At most min(S, M)
      microbatches are live on every stage, which is the most that textbook 1F1B has on any; a
      microbatch counts until its weight gradients are made.
    - `forward`: forwards only, for evaluation, with any number of chunks.

    Args:
      kind: one of those.
      stages: devices along the axis `pipe`.
      microbatches: of a step, the gradient accumulation.
      chunks: per stage; 2 or more for `interleaved-1f1b`, and 1 for the others that train.

    Raises:
      ConfigError: there is no such schedule.
    """
    check_schedule(kind, stages=stages, microbatches=microbatches, chunks=chunks)
    if kind == ZERO_BUBBLE:
        table = pack([_zb_h1_order(stages, microbatches, s) for s in range(stages)])
    else:
        table = _lockstep(kind, stages, microbatches, chunks)
    return Schedule(kind, stages, microbatches, chunks, table)


def check_schedule(kind: str, *, stages: int, microbatches: int, chunks: int = 1) -> None:
    """Checks what `make_schedule` is asked for, without making the table.

    Raises:
      ConfigError: there is no such schedule.
    """
    known = (*KINDS, FORWARD_ONLY)
    if kind not in known:
        raise ConfigError(
            f'"pipeline.schedule": {shown(kind)} is no schedule.{did_you_mean(str(kind), known)} '
            f"Known: {', '.join(known)}."
        )
    sizes = {
        "mesh.pipe": stages,
        "gradient_accumulation_steps": microbatches,
        "pipeline.chunks": chunks,
    }
    for key, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
            raise ConfigError(f"{quoted(key)}: {shown(size)} is no count. Use 1 or more.")
    if kind == INTERLEAVED and chunks == 1:
        raise ConfigError(
            f'"pipeline.chunks": 1 leaves {shown(INTERLEAVED)} nothing to interleave. Use 2 or '
            f'more, or "pipeline.schedule": {shown(ONE_F_ONE_B)}.'
        )
    if kind not in (INTERLEAVED, FORWARD_ONLY) and chunks > 1:
        raise ConfigError(
            f'"pipeline.chunks": {chunks}, but {shown(kind)} has one chunk per stage. Use 1, or '
            f'"pipeline.schedule": {shown(INTERLEAVED)}.'
        )
    if kind == INTERLEAVED and microbatches < stages:
        raise ConfigError(
            f'"gradient_accumulation_steps": {microbatches} is fewer than {shown(INTERLEAVED)}'
            f" needs over {stages} stages. Use {stages} microbatches or more, at most "
            f'{microbatches} stages, or "pipeline.schedule": {shown(ONE_F_ONE_B)}.'
        )


# Forward ticks and backward ticks in rounds -------------------------------------------------------


def _lockstep(kind: str, stages: int, microbatches: int, chunks: int) -> Table:
    """A table of rounds, of a forward tick and a backward tick each; all-idle ticks are left out.

    Every stage goes through the same sequence of (microbatch, chunk), each one round after the
    stage before it; backwards it is that sequence with the chunks reversed, the last stage first.
    """
    slot, microbatch, chunk, stride = _sequence(stages, microbatches, chunks)
    stage = np.arange(stages)[:, None]
    # The last virtual stage goes backward in the very round of its forward.
    offset = (chunks - 1) * stride + stages - 1
    if kind == GPIPE:
        offset += microbatches  # or after the last of all forwards
    forward = slot + stage
    backward = slot + offset + (stages - 1 - stage)
    table = np.zeros((2 * (int(backward.max()) + 1), stages, 3), np.int32)
    _place(table, 2 * forward, stage, Operation.FORWARD, microbatch, chunk)
    if kind != FORWARD_ONLY:
        _place(table, 2 * backward + 1, stage, Operation.BACKWARD, microbatch, chunks - 1 - chunk)
    return table[(table[:, :, 0] != Operation.IDLE).any(axis=1)]


def _sequence(
    stages: int, microbatches: int, chunks: int
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp], int]:
    """The order in which each stage takes the chunks of microbatches.

    Microbatches pass in groups, chunk after chunk. A group comes back from the last stage to the
    first one's next chunk after `stages` rounds, so that it fills the pipeline by itself only with
    as many microbatches or more.

    Returns:
      Round on stage 0, microbatch and chunk, each `[microbatches * chunks]`, and the largest number
      of rounds from one chunk of a microbatch to its next.
    """
    groups = np.array_split(np.arange(microbatches), max(1, microbatches // stages))
    slots, ids, of_chunk = [], [], []
    for group in groups:
        stride = max(len(group), stages) if chunks > 1 else len(group)
        for chunk in range(chunks):
            slots.append(group[0] * chunks + chunk * stride + np.arange(len(group)))
            ids.append(group)
            of_chunk.append(np.full(len(group), chunk))
    largest = max(len(groups[0]), stages)
    return np.concatenate(slots), np.concatenate(ids), np.concatenate(of_chunk), largest


def _place(
    table: Table,
    tick: NDArray[np.intp],
    stage: NDArray[np.intp],
    operation: Operation,
    microbatch: NDArray[np.intp],
    chunk: NDArray[np.intp],
) -> None:
    """Writes operations into a table; all arrays broadcast to `[stages, operations]`."""
    table[tick, stage, 0] = operation
    table[tick, stage, 1] = microbatch
    table[tick, stage, 2] = chunk


# Zero bubble --------------------------------------------------------------------------------------


def _zb_h1_order(stages: int, microbatches: int, stage: int) -> list[Step]:
    """What a stage does one after the other, as soon as it can.

    Forwards and input-backwards come as in textbook 1F1B, with S - s forwards to warm up.
    Weight-backwards lag s microbatches behind, which keeps S microbatches live on every stage and
    leaves s of them for the end, when the stage would otherwise wait.
    """
    warm_up = min(microbatches, stages - stage)
    order = [Step(Operation.FORWARD, m) for m in range(warm_up)]
    for m in range(microbatches):
        order.append(Step(Operation.BACKWARD_INPUT, m))
        if m >= stage:
            order.append(Step(Operation.BACKWARD_WEIGHT, m - stage))
        if m + warm_up < microbatches:
            order.append(Step(Operation.FORWARD, m + warm_up))
    first_left = max(0, microbatches - stage)
    order += [Step(Operation.BACKWARD_WEIGHT, m) for m in range(first_left, microbatches)]
    return order

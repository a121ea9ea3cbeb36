"""DeepSpeed's names of communication operations, by the collective of XLA that does the same."""

from collections.abc import Iterable, Mapping

OPS_OF_KIND: Mapping[str, tuple[str, ...]] = {
    "all-reduce": (
        "all_reduce",
        "inference_all_reduce",
        "all_reduce_coalesced",
        "reduce",
    ),
    "all-gather": (
        "all_gather_into_tensor",
        "all_gather",
        "all_gather_base",
        "all_gather_coalesced",
        "allgather_fn",
        "gather",
    ),
    "reduce-scatter": (
        "reduce_scatter_tensor",
        "reduce_scatter",
        "reduce_scatter_base",
        "reduce_scatter_fn",
    ),
    "all-to-all": ("all_to_all_single", "all_to_all"),
    "ragged-all-to-all": ("ragged_all_to_all",),
    "collective-permute": ("send", "recv", "isend", "irecv"),
    "collective-broadcast": ("broadcast", "scatter"),
}
"""XLA's collective -> DeepSpeed's operations, the usual name first."""

# A step of XLA has none: taken, and never met.
_NEVER = ("barrier", "monitored_barrier")


def op_names() -> tuple[str, ...]:
    """All names that `comms_logger.prof_ops` takes: DeepSpeed's, and XLA's own."""
    return (*(name for names in OPS_OF_KIND.values() for name in names), *OPS_OF_KIND, *_NEVER)


def kinds_of(names: Iterable[str]) -> frozenset[str]:
    """The collectives of XLA that operations are named for."""
    asked = set(names)
    return frozenset(
        kind for kind, ops in OPS_OF_KIND.items() if kind in asked or asked.intersection(ops)
    )

"""Policies of rematerialisation: what of a layer is kept between the two passes.

`jspeed.config.remat` has the policies as data and the list of the tensors that models tag; here
they become what `jax.checkpoint` takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import nnx
from jax.ad_checkpoint import checkpoint_name, checkpoint_policies

from jspeed.config.remat import Checkpoint, RematPolicy, TensorName
from jspeed.core._compat import CUDNN_ATTENTION, name_p
from jspeed.core.shapes import Array

_Policy = Callable[..., Any]


def tagged(x: Array, name: TensorName) -> Array:
    """`x`, which policies know by `name`.

    Code that follows must use the result and not `x`: what is used untagged is kept or computed
    again by rules of its own.
    """
    return checkpoint_name(x, name)


def checkpointed(body: Callable[..., Any], policy: RematPolicy) -> Callable[..., Any]:
    """`body`, for a loop over layers, keeping for the backward pass what `policy` says.

    Args:
      body: of the loop; its arguments may be modules.
      policy: "attention" is up to the model, which tells its attention to keep only its inputs.
    """
    if policy in ("none", "attention"):
        return body
    # The two passes are two loops, between which the compiler finds nothing in common to undo.
    return nnx.remat(body, policy=_policy_of(policy), prevent_cse=False)


def _policy_of(policy: RematPolicy) -> _Policy | None:
    if policy == "dots":
        return checkpoint_policies.dots_with_no_batch_dims_saveable
    if not isinstance(policy, Checkpoint) or not (policy.save or policy.offload):
        return None
    by_name = checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=list(policy.save),
        names_which_can_be_offloaded=list(policy.offload),
        offload_src="device",
        offload_dst="pinned_host",
    )
    if "attention_out" not in (*policy.save, *policy.offload):
        return by_name

    def policy_of_attention(primitive: Any, *avals: Any, **params: Any) -> Any:
        # Its results are the output and the softmax's statistics; a tag from outside would keep
        # the output twice.
        if primitive.name == CUDNN_ATTENTION:
            return by_name(name_p, *avals, name="attention_out")
        return by_name(primitive, *avals, **params)

    return policy_of_attention

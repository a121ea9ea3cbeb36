"""Newton-Schulz orthogonalisation: all singular values pushed towards one by matrix products."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jspeed.core.shapes import Array, Float

# The quintic a x + b x^3 + c x^5 whose slope at 0 is as steep as it may be; singular values end
# within about 0.7 to 1.2 rather than at 1 exactly, which Muon does not mind.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
# The Gram form rebuilds its Gram matrix from the matrix after two steps, while the product of the
# polynomials is still well conditioned.
_LEGS = (2, 3)


def orthogonalize(
    matrix: Float[Array, "*stack rows columns"], *, method: str = "gram"
) -> Float[Array, "*stack rows columns"]:
    """Returns nearly `U V^T` of `matrix = U S V^T`, for each matrix of a stack.

    Five steps of the quintic Newton-Schulz iteration on the matrix divided by its Frobenius norm
    (Jordan et al. 2024). For an `n x m` matrix with `n <= m` a standard step costs
    `4 n^2 m + 2 n^3` FLOPs; the Gram form works on the `n x n` Gram matrix, and touches the matrix
    only twice. Half precision is not used: the iteration runs in fp32, whose products are TF32 on
    NVIDIA GPUs.

    Args:
        matrix: float32 `[..., rows, columns]`; a zero matrix stays zero.
        method: `gram` or `standard`, equal up to rounding.
    """
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)
    square = x.shape[-2] == x.shape[-1]
    x = _standard(x) if method == "standard" or square else _gram(x)
    return x.mT if tall else x


def _standard(x: jax.Array) -> jax.Array:
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def _gram(x: jax.Array) -> jax.Array:
    """The iteration on the Gram matrix.

    Each step multiplies `x` from the left by a polynomial of its Gram matrix; polynomials of one
    matrix commute, so their product is collected and applied once per leg.
    """
    a, b, c = COEFFICIENTS
    identity = jnp.eye(x.shape[-2], dtype=x.dtype)
    for steps in _LEGS:
        gram = x @ x.mT
        product = identity
        for step in range(steps):
            polynomial = a * identity + b * gram + c * gram @ gram
            product = polynomial @ product if step else polynomial
            if step < steps - 1:
                gram = polynomial @ gram @ polynomial
        x = product @ x
    return x

"""Root-mean-square normalisation with the residual sum before it, forward and backward."""

from pallas_kernels.rms_norm.api import add_rms_norm, rms_norm

__all__ = ["add_rms_norm", "rms_norm"]

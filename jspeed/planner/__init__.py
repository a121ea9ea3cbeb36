"""The real compiler's answer for GPUs that are not there."""

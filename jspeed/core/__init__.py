"""Shared vocabulary of all rooms: errors, pytree paths and the differences between JAX versions."""

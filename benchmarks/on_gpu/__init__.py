"""The sections of `benchmarks.gpu`, each run in a process of its own."""

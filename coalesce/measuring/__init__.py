"""Measuring on a device: kernels by the profiler, operations inside programs, and `tune`, which fills a database."""

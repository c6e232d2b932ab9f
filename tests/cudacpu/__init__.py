"""Runs CUDA kernels and the host code around them on a CPU, for tests."""

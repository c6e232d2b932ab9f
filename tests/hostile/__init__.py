"""Hostile inputs by a seed: damaged images, model files, run folders, command lines, arrays. `python -m tests.hostile --help`."""

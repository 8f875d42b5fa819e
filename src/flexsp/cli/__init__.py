"""The commands. Each module wires one of them to the library, nothing else."""

"""Runs a model on the hardware at hand and fits a profile."""

from flexsp.profiler.measure import measure_profile
from flexsp.profiler.probe import timed_step
from flexsp.profiler.store import load_or_measure, profile_path

__all__ = ["load_or_measure", "measure_profile", "profile_path", "timed_step"]

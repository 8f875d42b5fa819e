"""From a profile and plans to times, tables and pictures; no torch."""

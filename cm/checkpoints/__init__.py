"""Checkpoints: those of a run, and the formats of other tools."""

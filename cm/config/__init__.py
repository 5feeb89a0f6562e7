"""Flags: what there are, how they are parsed, and what a command answers before its heavy imports."""

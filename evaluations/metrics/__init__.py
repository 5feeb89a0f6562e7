"""The numbers, from features that are already there; one file for each metric."""

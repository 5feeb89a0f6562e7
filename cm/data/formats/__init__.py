"""Formats of data sets: one file each, and one line each in the table of `cm.data.sources`."""

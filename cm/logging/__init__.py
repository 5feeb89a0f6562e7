"""Rows of numbers and lines of text, and the formats that they are written in."""

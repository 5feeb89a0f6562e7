"""Train, distil, sample, edit and evaluate diffusion and consistency models."""

__version__ = "0.1.0"

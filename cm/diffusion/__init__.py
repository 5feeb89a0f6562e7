"""The mathematics of a denoiser: noise levels, their distributions, scalings and loss weights."""

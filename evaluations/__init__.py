"""Frechet distance, Inception Score, precision and recall of image samples."""

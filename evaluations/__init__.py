"""Evaluation of image samples. metrics/: metrics; features/: feature extractors; engine/: from files to numbers."""

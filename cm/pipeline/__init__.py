"""Use a trained model from Python in a few lines: load, sample, edit, save."""

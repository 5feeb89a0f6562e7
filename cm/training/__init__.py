"""The training loop and what it keeps: optimizer, averages, precision, callbacks, estimates."""

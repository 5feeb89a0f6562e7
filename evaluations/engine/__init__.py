"""From files of images to metrics, in one process or on many ranks."""

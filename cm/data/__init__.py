"""Images: their sources and classes, decoding, augmentation and batches."""

"""Images: where they come from, their classes, how they are decoded, augmented and batched."""

"""From a folder of images to a few-step generator: inspect the images, plan for the given time, run the commands."""

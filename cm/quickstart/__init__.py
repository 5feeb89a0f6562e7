"""From a folder of images to a few-step generator: look at the images, plan for the time given, run the commands."""

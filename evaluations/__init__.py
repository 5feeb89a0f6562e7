"""Quality of image samples: metrics/ holds the numbers, features/ the networks that look, engine/ files to numbers."""

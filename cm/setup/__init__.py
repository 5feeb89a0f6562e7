"""From resolved settings to the objects of a run."""

"""Images from a trained model: sampling over ranks, editing, the search for schedules, and their files."""

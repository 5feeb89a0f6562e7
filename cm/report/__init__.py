"""A self-contained web page about training runs."""

"""Ranks: how they meet, talk, share work, fail and stop."""

"""Files: local and remote, from strangers, downloaded. Knows nothing of networks."""

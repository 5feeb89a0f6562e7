"""Networks and their layers: built from flags, compiled, differentiated forward."""

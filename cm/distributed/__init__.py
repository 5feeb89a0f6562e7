"""Ranks of a job: rendezvous, collectives, sharding, failures and stop signals."""

"""Policies and scorers: loading, making from scratch, saving, and the log-probabilities of responses."""

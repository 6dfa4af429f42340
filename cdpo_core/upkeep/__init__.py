"""The store's upkeep over years: what it holds and who uses it, whether it is whole, and what can go."""

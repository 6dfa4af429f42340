"""Rivals that are no C-DPO, small and faithful, apart from the method: for comparisons only."""

"""The acceptance table: every promise of the project as a row that is run, measured and judged."""

"""Preference data: sources, formats, validation with quarantine, splits by prompt."""

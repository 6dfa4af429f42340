"""The shipped presets: YAML files that `cdpo run NAME` finds by name, wherever it is started."""

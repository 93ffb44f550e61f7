"""The properties, one file per concept."""

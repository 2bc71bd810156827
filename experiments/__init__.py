"""The guide's own entry points."""

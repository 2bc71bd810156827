"""Arms times seeds from one recipe, and what the difference between them is worth."""

"""Text: where it comes from, and how a student reads it."""

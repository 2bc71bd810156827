"""What a student is worth on text it has not seen."""

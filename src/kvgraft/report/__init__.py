"""What a run leaves for people: its log, its table and its picture."""

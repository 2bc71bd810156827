"""The adapters between a teacher's KV and the student's: built, fitted, sized, migrated."""

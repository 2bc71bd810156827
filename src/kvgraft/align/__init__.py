"""Matching a teacher to a student: tokens by the bytes they stand for, layers by a map."""

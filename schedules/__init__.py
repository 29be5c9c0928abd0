"""Schedules: one kernel family per file, computation to loops. No knowledge of graphs or of weights' values."""

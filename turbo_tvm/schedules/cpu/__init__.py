"""CPU schedules: one kernel family per file."""

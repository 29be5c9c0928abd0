"""Compiled models timed beside their rivals; `scripts/bench --help`."""

"""Means, intervals and tests: numbers in, numbers out. No records."""

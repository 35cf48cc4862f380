"""Measures of what is gone and what is still there: pure functions."""

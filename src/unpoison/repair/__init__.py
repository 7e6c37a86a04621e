"""Findings to clean data, or to a clean encoder."""

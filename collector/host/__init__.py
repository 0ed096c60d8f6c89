"""Counting on the CPU."""

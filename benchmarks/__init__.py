"""Measurements: ratios, both sides in one run on one machine."""

"""Sampling, scores, exports and imports of trained weights."""

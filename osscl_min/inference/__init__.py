"""Scores, thresholds and explanations for recordings of one's own."""

"""Figures and pages of a run, and the documents made from results/."""

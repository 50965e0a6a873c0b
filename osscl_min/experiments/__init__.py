"""Variants of the training, and analyses of trained detectors."""

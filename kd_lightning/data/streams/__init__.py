"""Datasets that are read in order, without random access."""

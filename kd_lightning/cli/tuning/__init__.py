"""Tune a method and its baseline alike, on validation samples: the search of ``experiment --tune``."""

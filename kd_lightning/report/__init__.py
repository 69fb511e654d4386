"""The report: one HTML page about runs. The comparison of figures behind it is in ``runs/figures``."""

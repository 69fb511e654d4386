"""Several methods in one experiment."""

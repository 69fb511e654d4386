"""Parts that only the modules use."""

"""Parts that only the modules share."""

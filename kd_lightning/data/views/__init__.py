"""Views: replayable augmentations of samples, their order, and the loader that serves them."""

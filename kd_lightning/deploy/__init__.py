"""Deployment: export a student to a file, and check the file against PyTorch."""

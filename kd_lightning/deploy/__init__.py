"""Deployment: export a student, and check the file."""

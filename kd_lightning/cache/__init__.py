"""Stored outputs of teachers: files that survive a crash, codecs, and hashes of what they depend on."""

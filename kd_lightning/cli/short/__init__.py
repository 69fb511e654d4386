"""The short way in: what a folder of pictures needs to be trained on, as YAML, and the steps that follow."""

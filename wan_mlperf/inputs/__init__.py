"""Readers of user input (paths, text files, YAML, values on the command line), records as JSON files, and folder locks."""

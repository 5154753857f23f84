"""Readers for what people bring, one each for paths, texts, YAML and values on the command line."""

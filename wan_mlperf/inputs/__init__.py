"""What people bring, read in one place each: paths, texts, YAML, and values on the command line."""

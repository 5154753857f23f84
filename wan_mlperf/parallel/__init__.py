"""The only place that knows ranks."""

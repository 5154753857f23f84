"""A model's folder before a weight is read: what it may hold (parts.py), is it whole (verify.py), which is it (content.py)."""

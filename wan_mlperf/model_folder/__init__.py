"""Checks a model's folder before any weight is read: its parts (parts.py), is it whole (verify.py), its identity (content.py)."""

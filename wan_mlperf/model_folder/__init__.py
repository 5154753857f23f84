"""A model's folder: its parts (parts.py), is it whole (verify.py), its identity (content.py), all before any weight is read.

And how an expert's weights are read (expert_weights.py).
"""

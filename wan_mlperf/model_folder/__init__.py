"""A model's folder: its parts (parts.py), what other folders are (kinds.py), whether it is complete (verify.py), its identity
(content.py), and how an expert's weights are read (expert_weights.py).
"""

"""Kernels by name: which device this is, what each name means on it, and the PyTorch references."""

"""How long a video takes on hardware that is not here, and what would fit: rehearsal, prices, calibration.

Others call `from_recipe.prices_of(recipe, "mi355x", gpus=8)`, then `.forward(...)`, `.decode()`, `.plan(...)` (prices.py).
"""

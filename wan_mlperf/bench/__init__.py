"""Side-by-side measurements: speed against diffusers and plain xDiT, fidelity of a recipe, score of the embedded model."""

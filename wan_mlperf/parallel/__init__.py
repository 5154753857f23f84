"""How several ranks make one video: the mesh, and the sharding that is attached to the experts and the VAE from outside."""

"""The JAX SparseCore API by its own module paths, as far as it is offered today: the specifications."""

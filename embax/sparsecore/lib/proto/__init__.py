"""Messages of SparseCore specifications."""

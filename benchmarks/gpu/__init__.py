"""Steps of large tables on a GPU: see ``benchmarks.gpu.__main__``."""

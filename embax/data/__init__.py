"""Data in files, from Parquet or CSV to batches: ``pip install 'embax[train]'``."""

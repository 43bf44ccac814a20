"""The CPU benchmark: embax beside its peers and beside the machine's own limits. See ``__main__``."""

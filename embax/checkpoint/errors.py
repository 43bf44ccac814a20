"""What is wrong with a checkpoint, or with what it is loaded into."""


class CheckpointError(ValueError):
    """A checkpoint that is damaged, foreign, newer, or does not fit; the message names the file and the remedy."""

"""``python -m embax.cli``: the ``embax`` command, where it is not on the path."""

from embax.cli import main

if __name__ == "__main__":
    main()

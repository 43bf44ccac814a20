"""Runs the benchmarks there are: today, one training step against the size of the vocabulary."""

from benchmarks import one_step

if __name__ == "__main__":
    one_step.main()

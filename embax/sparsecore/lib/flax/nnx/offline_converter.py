"""Converts a checkpoint for other devices: ``python -m embax.sparsecore.lib.flax.nnx.offline_converter --help``."""

import argparse
import os
from collections.abc import Sequence

from embax.sparsecore.lib.flax.nnx import checkpoint_utils
from embax.sparsecore.utils import utils


def main(argv: Sequence[str] | None = None) -> None:
    """Converts as the command line says."""
    parser = argparse.ArgumentParser(
        prog="offline_converter",
        description="Writes a SparseCore checkpoint as one of other devices.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--input_checkpoint", required=True, help="folder of the checkpoint, or a .tgz of it")
    parser.add_argument("--output_checkpoint", required=True, help="folder for the new one")
    parser.add_argument("--target_num_devices", type=int, default=4, help="devices of all processes")
    parser.add_argument("--target_device_kind", default="TPU v5", help='such as "TPU v5" or TPU_v5')
    parser.add_argument("--target_num_sc_per_device", type=int, help="SparseCores of each, if not those of the kind")
    parser.add_argument("--target_global_batch_size", type=int, help="if not that of the checkpoint")
    options = parser.parse_args(argv)
    kind = options.target_device_kind.replace("_", " ")
    cores = options.target_num_sc_per_device or utils.NUM_SC_PER_DEVICE_MAP.get(kind)
    if cores is None:
        known = ", ".join(utils.NUM_SC_PER_DEVICE_MAP)
        parser.error(f'a "{kind}" has no known number of SparseCores ({known}); give --target_num_sc_per_device')
    source = expand_directory_path(options.input_checkpoint)
    if source.endswith(".tgz"):
        source = checkpoint_utils.decompress_checkpoint(source)
    target = expand_directory_path(options.output_checkpoint)
    checkpoint_utils.convert_cross_topology_checkpoint(
        input_checkpoint_path=source,
        output_checkpoint_path=target,
        target_topology=checkpoint_utils.TargetTopology(options.target_num_devices, cores, kind),
        target_batch_size=options.target_global_batch_size,
    )
    print(f"{target}: converted for {options.target_num_devices} devices of {cores} SparseCores each")


def expand_directory_path(input_dir: str) -> str:
    """Returns an absolute path; one that begins with TEST_UNDECLARED_OUTPUTS_DIR is below the folder it names.

    Raises:
      ValueError: the environment variable is not set.
    """
    first, _, rest = input_dir.partition("/")
    if first == checkpoint_utils.ARCHIVES:
        root = os.environ.get(first)
        if not root:
            raise ValueError(f"{input_dir}: {first} is not set; set it, or give another path")
        return os.path.join(root, rest) if rest else root
    return input_dir if "://" in input_dir else os.path.abspath(input_dir)


if __name__ == "__main__":
    main()

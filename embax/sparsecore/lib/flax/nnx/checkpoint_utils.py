"""Checkpoints of NNX models with a SparseCoreEmbed: items model, optimizer and embedding_spec of Orbax.

A checkpoint is of the devices and stacks that it was saved on, and embedding_spec tells where its rows stand.
``restore_cross_topology_checkpoint`` reads it on others, ``convert_cross_topology_checkpoint`` makes it one of others.
Both are exact: rows and slots are copied as they are.
"""

import os
import shutil
import tarfile
import tempfile
from typing import Any, NamedTuple

from flax import nnx

from embax.sparsecore import topology_convert, topology_restore
from embax.sparsecore.lib.nn import embedding_proto_utils
from embax.sparsecore.topology_files import Keys, Step, manager_of, orbax, reader_of
from embax.sparsecore.utils import utils

ARCHIVES = "TEST_UNDECLARED_OUTPUTS_DIR"


class TargetTopology(NamedTuple):
    """The devices that a checkpoint is converted for.

    Attributes:
      num_global_devices: of all processes.
      num_sc_per_device: SparseCores of each.
      device_kind: for people to read.
    """

    num_global_devices: int
    num_sc_per_device: int
    device_kind: str | None = None


def create_checkpoint_manager(
    *,
    cp_path: Any,
    cp_options: Any,
    model_key: str = "model",
    optimizer_key: str = "optimizer",
    embedding_spec_key: str = "embedding_spec",
) -> Any:
    """Returns an Orbax CheckpointManager for these items.

    Args:
      cp_path: the folder.
      cp_options: ``orbax.checkpoint.CheckpointManagerOptions``.
      model_key: name of the item with the model.
      optimizer_key: with its optimizer.
      embedding_spec_key: with the proto of the features.

    Raises:
      ImportError: orbax-checkpoint is not installed.
    """
    return manager_of(cp_path, cp_options, Keys(model_key, optimizer_key, embedding_spec_key))


def save_checkpoint(
    *,
    cp_manager: Any,
    step: int,
    model: Any,
    optimizer: Any,
    feature_specs: Any,
    num_global_devices: int,
    num_sc_per_device: int,
    model_key: str = "model",
    optimizer_key: str = "optimizer",
    embedding_spec_key: str = "embedding_spec",
) -> None:
    """Saves a model, its optimizer and the proto of its features, as the manager's options have it.

    Args:
      cp_manager: from ``create_checkpoint_manager``.
      step: of training.
      model: an NNX module with a SparseCoreEmbed.
      optimizer: its nnx.Optimizer.
      feature_specs: of the model; of all its SparseCoreEmbed layers, if there are several.
      num_global_devices: devices of all processes.
      num_sc_per_device: SparseCores of each.
      model_key: name of the item with the model.
      optimizer_key: with its optimizer.
      embedding_spec_key: with the proto.

    Raises:
      ValueError: features, devices or SparseCores that are not those of the model.
    """
    ocp = orbax()
    num_sc = num_global_devices * utils.checked(num_sc_per_device)
    topology_restore.places_of(topology_restore.layers_of(model), feature_specs, num_sc)
    proto = embedding_proto_utils.create_proto_from_feature_specs(feature_specs, num_global_devices, num_sc_per_device)
    items = {
        model_key: ocp.args.StandardSave(nnx.state(model)),
        optimizer_key: ocp.args.StandardSave(nnx.state(optimizer, nnx.OptState)),
        embedding_spec_key: ocp.args.ProtoSave(proto),
    }
    cp_manager.save(step, args=ocp.args.Composite(**items))


def restore_checkpoint(
    *,
    cp_manager: Any = None,
    input_checkpoint_path: Any = None,
    step: int | None = None,
    model: Any,
    optimizer: Any,
    model_key: str = "model",
    optimizer_key: str = "optimizer",
    embedding_spec_key: str = "embedding_spec",
) -> None:
    """Puts a step of the same devices and stacks into a model and its optimizer, in place, or nothing of it.

    Args:
      cp_manager: from ``create_checkpoint_manager``; None for one of ``input_checkpoint_path``. Without both nothing is
        done.
      input_checkpoint_path: the folder.
      step: None for the newest.
      model: built as the saved one.
      optimizer: its nnx.Optimizer.
      model_key: name of the item with the model.
      optimizer_key: with its optimizer.
      embedding_spec_key: with the proto.

    Raises:
      ValueError: no such step, an item that is not there, or one that does not fit; tables that stand elsewhere.
    """
    keys = Keys(model_key, optimizer_key, embedding_spec_key)
    if cp_manager is not None:
        cp_manager.wait_until_finished()
        places = topology_restore.layer_places(topology_restore.layers_of(model))
        topology_restore.restore(Step(cp_manager, step, keys), model, optimizer, places, moves=False)
    elif input_checkpoint_path is not None:
        with reader_of(input_checkpoint_path, keys) as manager:
            named = {"model_key": model_key, "optimizer_key": optimizer_key, "embedding_spec_key": embedding_spec_key}
            restore_checkpoint(cp_manager=manager, step=step, model=model, optimizer=optimizer, **named)


def restore_cross_topology_checkpoint(
    *,
    cross_topology_checkpoint_restore_path: Any,
    model: Any,
    optimizer: Any,
    target_feature_specs: Any,
    num_global_devices: int,
    num_sc_per_device: int,
    model_key: str = "model",
    optimizer_key: str = "optimizer",
    embedding_spec_key: str = "embedding_spec",
    embedding_layer_name: str | None = None,
    restore_step: int | None = None,
) -> None:
    """Puts a step of any devices, SparseCores and stacks into a model and its optimizer, in place, or nothing of it.

    A part of a stack at a time is on the host while its rows are moved; stacks that stand as they did are read to where
    they belong.

    Args:
      cross_topology_checkpoint_restore_path: the folder; None to do nothing.
      model: on the new devices, with the same tables.
      optimizer: its nnx.Optimizer.
      target_feature_specs: of the model.
      num_global_devices: of all processes, now.
      num_sc_per_device: SparseCores of each, now.
      model_key: name of the item with the model.
      optimizer_key: with its optimizer.
      embedding_spec_key: with the proto.
      embedding_layer_name: attribute of the model with the SparseCoreEmbed; None to have it found.
      restore_step: None for the newest.

    Raises:
      ValueError: no such step, an item that is not there, or one that does not fit: tables, vocabularies, optimizers.
    """
    if cross_topology_checkpoint_restore_path is None:
        return
    keys = Keys(model_key, optimizer_key, embedding_spec_key)
    layers = topology_restore.layers_of(model, embedding_layer_name)
    num_sc = num_global_devices * utils.checked(num_sc_per_device)
    places = topology_restore.places_of(layers, target_feature_specs, num_sc)
    with reader_of(cross_topology_checkpoint_restore_path, keys) as manager:
        topology_restore.restore(Step(manager, restore_step, keys), model, optimizer, places, moves=True)


def convert_cross_topology_checkpoint(
    *,
    input_checkpoint_path: Any,
    output_checkpoint_path: Any,
    target_topology: TargetTopology | None = None,
    target_batch_size: int | None = None,
    model_key: str = "model",
    optimizer_key: str = "optimizer",
    embedding_spec_key: str = "embedding_spec",
    restore_step: int | None = None,
    save_step: int | None = None,
    target_feature_specs: Any = None,
) -> None:
    """Writes a checkpoint as one of other devices, without a model; the new tables are on the host meanwhile.

    Tables are stacked anew, as ``auto_stack_tables`` does it; in the stacks that they were in where the checkpoint does
    not tell all optimizers and combiners.

    Args:
      input_checkpoint_path: the folder; None to do nothing.
      output_checkpoint_path: another one, for the new checkpoint; None to do nothing.
      target_topology: the devices; None for none: every table is written as ``[vocabulary_size, embedding_dim]``.
      target_batch_size: of the global batch; None for that of the checkpoint.
      model_key: name of the item with the model.
      optimizer_key: with its optimizer.
      embedding_spec_key: with the proto.
      restore_step: None for the newest.
      save_step: None for ``restore_step``.
      target_feature_specs: stacked FeatureSpecs of ``target_topology``, for these stacks.

    Raises:
      ValueError: no such step, an item that is not there, or feature specs that do not fit.
    """
    if input_checkpoint_path is None or output_checkpoint_path is None:
        return
    keys = Keys(model_key, optimizer_key, embedding_spec_key)
    if target_topology is not None:
        devices, cores = target_topology.num_global_devices, utils.checked(target_topology.num_sc_per_device)
    elif target_feature_specs is not None or target_batch_size is not None:
        raise ValueError("target_feature_specs and target_batch_size are of a target_topology; give it, too")
    with reader_of(input_checkpoint_path, keys) as reader:
        step = Step(reader, restore_step, keys)
        if target_topology is None:
            wanted = topology_convert.unstacked(step)
        elif target_feature_specs is not None:
            wanted = topology_convert.given(target_feature_specs, devices, cores)
        else:
            wanted = topology_convert.regrouped(step, devices, cores, target_batch_size)
        # What is saved in the background is copied before.
        options = orbax().CheckpointManagerOptions(create=True, enable_async_checkpointing=False)
        with manager_of(output_checkpoint_path, options, keys) as manager:
            topology_convert.convert(step, manager, save_step, wanted)


def _unpack(archive: str, folder: str) -> None:
    """Unpacks what lies in an archive below ``folder``, and nothing that leads out of it."""
    with tarfile.open(archive, "r:gz") as file:
        if hasattr(tarfile, "data_filter"):
            return file.extractall(folder, filter="data")
        for member in file.getmembers():  # Python before 3.11.4 does not look
            inside = not os.path.isabs(member.name) and ".." not in member.name.split("/")
            if not (inside and (member.isfile() or member.isdir())):
                raise ValueError(f'{archive}: "{member.name}" is no file or folder of a checkpoint; pack it anew')
        file.extractall(folder)


def decompress_checkpoint(checkpoint_path: str) -> str:
    """Unpacks an archive (.tgz) below the folder that TEST_UNDECLARED_OUTPUTS_DIR names, and returns where.

    Args:
      checkpoint_path: of the archive; the folder is called as it is, without ".tgz".

    Raises:
      ValueError: the environment variable is not set.
    """
    root = os.environ.get(ARCHIVES)
    if not root:
        raise ValueError(
            f"decompress_checkpoint: {ARCHIVES} is not set; set it to the folder to unpack {checkpoint_path} into"
        )
    folder = os.path.join(root, "decompressed_checkpoints")
    output = os.path.join(folder, os.path.basename(checkpoint_path).removesuffix(".tgz"))
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as unpacked:
        whole = os.path.join(unpacked, "checkpoint")
        _unpack(checkpoint_path, whole)
        # Of an archive half read nothing is left where a checkpoint would be.
        shutil.rmtree(output, ignore_errors=True)
        os.replace(whole, output)
    return output

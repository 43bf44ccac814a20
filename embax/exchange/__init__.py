"""Between devices: ids to the owners of their rows, activations home, gradients to the owners.

``over_mesh`` is the door: it runs one of the exchanges below for every stack, inside a shard_map. An exchange is a
module with ``lookup``, ``update``, ``row_gradients`` and ``apply``, each from one device's point of view. Nothing has
a capacity to tune, and no id is lost.
"""

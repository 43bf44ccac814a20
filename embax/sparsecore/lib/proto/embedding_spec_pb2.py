"""The messages of SparseCore specifications, by name: ``embedding_spec_pb2.EmbeddingSpecProto()``.

They come with protobuf, which ``pip install 'embax[checkpoint]'`` installs.
"""

from typing import Any

from embax.sparsecore.proto_messages import MESSAGES, message_class


def __getattr__(name: str) -> Any:
    if name in MESSAGES:
        return message_class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *MESSAGES])

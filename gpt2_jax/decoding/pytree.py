"""Dataclasses as JAX trees that are never taken for one another."""

import dataclasses
from typing import TypeVar

import jax

Class = TypeVar('Class', bound=type)


def register(cls: Class) -> Class:
  """Registers a dataclass with JAX. Static fields are marked as for `register_dataclass`.

  To that one (jax 0.10 to 0.12) two classes are the same tree if their static fields are equal. Their
  hashes differ, but jit's cache looks at 7 bits of these: of two processors it would, rarely, run
  one for the other.
  """
  fields = dataclasses.fields(cls)
  static = [field.name for field in fields if 'static' in field.metadata]
  traced = [field.name for field in fields if field.name not in static]
  values = lambda x, names: tuple(getattr(x, name) for name in names)
  jax.tree_util.register_pytree_node(
    cls,
    lambda x: (values(x, traced), values(x, static)),
    lambda fixed, leaves: cls(**dict(zip(static, fixed)), **dict(zip(traced, leaves))),
  )
  return cls

"""Dataclasses as JAX trees that are never taken for one another."""

import dataclasses
from typing import TypeVar, dataclass_transform

import jax

Class = TypeVar('Class', bound=type)


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def register(cls: Class) -> Class:
  """Makes a frozen dataclass of a class, and a JAX tree of its instances.

  The metadata of a field may say `static=True` (a part of what is compiled for, as it does for
  `jax.tree_util.register_dataclass`) or `host=True` (no part of the tree, so None when compiled).

  With JAX's own function (jax 0.10 to 0.12) two classes are the same tree if their static fields are
  equal. Their hashes differ, but jit's cache looks at 7 bits of these: of two processors it would,
  rarely, run one for the other.
  """
  cls = cls if '__dataclass_params__' in vars(cls) else dataclasses.dataclass(frozen=True)(cls)
  fields = dataclasses.fields(cls)
  static = [field.name for field in fields if 'static' in field.metadata]
  traced = [field.name for field in fields if not field.metadata.keys() & {'static', 'host'}]

  def flatten(x):
    return tuple(getattr(x, name) for name in traced), tuple(getattr(x, name) for name in static)

  def unflatten(fixed, leaves):
    return cls(**dict(zip(static, fixed)), **dict(zip(traced, leaves)))

  jax.tree_util.register_pytree_node(cls, flatten, unflatten)
  return cls

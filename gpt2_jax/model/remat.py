"""What a block keeps for its backward pass, by the names of `model.remat`."""

import jax

# Elementwise functions and sums along an axis: they cost less to compute again than to keep.
CHEAP = frozenset(
  """
  add bitcast_convert_type broadcast_in_dim convert_element_type div erf exp integer_pow logistic
  max min mul neg pow reduce_max reduce_sum rsqrt select_n square sub tanh
  """.split()
)


def keep_products(primitive, *operands, **params) -> bool:
  """Whether a value is dear: a product, or what was moved about. Not a product in a wider dtype than
  its operands: it is kept as it is named, rounded as a rule (`cpu_matmul.kept`).
  """
  if primitive.name == 'dot_general':
    return operands[0].dtype == (params['preferred_element_type'] or operands[0].dtype)
  return primitive.name not in CHEAP | {'reshard', 'layout_constraint', 'custom_jvp_call'}


# What a block keeps for its backward pass; the rest is computed again. None keeps what was gathered
# from other devices: neither weights that `fsdp` splits, nor keys and values that `seq` splits.
REMAT_POLICIES = {
  'none': keep_products,
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # outputs of the projections
  'full': jax.checkpoint_policies.nothing_saveable,  # the block's input alone
}

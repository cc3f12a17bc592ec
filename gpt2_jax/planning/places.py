"""Where in the model an instruction of a compiled program comes from.

XLA keeps the path of scopes that an operation was traced in ('jit(step)/jvp()/while/body/attn/…'), of
several that it has fused that of the last one.
"""

import re

from gpt2_jax.planning.hlo_text import Instruction, Module

COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')

# Place -> what the path of its instructions, behind it the operation, contains; the first that does.
PLACES = {
  'collectives': rf' ({"|".join(COLLECTIVES)})|all-reduce-scatter',
  'loss': r'/jvp\(loss\)/|/loss/',
  'optimizer': r'/optimizer/',
  'metrics': r'/metrics/',
  'attention kernels': r'splash_mha\w*( |$)|__cudnn|dot_product_attention_(fwd|bwd)',
  'stacks of the layers': r'dynamic_(update_)?index_in_dim|while/body/(dynamic_|squeeze)',
  'layer norms': r'/ln(_\w+)?/',
  'activation': r'/activation/',
  'attention products': r'/attn/(.*/)?[A-Z]+,[A-Z]+->[A-Z]+/',
  'MLP products': r'/mlp/(.*/)?[A-Z]+,[A-Z]+->[A-Z]+/',
  'bias gradients': r'/[A-Z]+->[A-Z]+/',
  'residual adds': r'/(attn|mlp)/(add|add_any) ',
  'attention layouts': r'/attn/|splash',
  'MLP, the rest': r'/mlp/',
  'embeddings': r'/embed/|scatter|gather',
  'weight casts': r'convert_element_type | convert$',
  'copies': r' (copy|copy-start|slice-start|broadcast|fusion)$',
}
OTHER = 'other'


def path_of(i: Instruction, module: Module) -> str:
  """The path of an instruction; of a fusion that has none that of its root."""
  if found := re.search(r'op_name="([^"]*)"', i.attributes):
    return found[1]
  if i.op == 'fusion' and (callees := i.callees()):
    if found := re.search(r'op_name="([^"]*)"', module.root(callees[0]).attributes):
      return found[1]
  target = re.search(r'custom_call_target="([^"]*)"', i.attributes)
  return f'{i.name} {target[1]}' if target else i.name if i.op == 'custom-call' else ''


def place_of(i: Instruction, module: Module) -> str:
  """A name of PLACES, or OTHER."""
  what = f'{path_of(i, module)} {i.op}'
  return next((place for place, pattern in PLACES.items() if re.search(pattern, what)), OTHER)

"""Makes tests/golden/foreign_*: files by torch and flax themselves, and the tensors that they hold.

    pip install -e '.[parity]' && python tests/golden/make_foreign.py

nanoGPT's and llm.c's files are laid out here as their `train.py` and `train_gpt2.py` lay them out.
All hold the same random GPT-2: foreign_expected.npz, under Hugging Face's names.
"""

from pathlib import Path

import numpy as np
import torch
from flax import serialization

HERE = Path(__file__).parent
V, T, D, L, N = 13, 8, 12, 2, 3
LINEAR = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')


def weights() -> dict[str, np.ndarray]:
  """A random GPT-2, in the order of its modules."""
  rng = np.random.default_rng(0)
  block = {
    'ln_1.weight': (D,),
    'ln_1.bias': (D,),
    'attn.c_attn.weight': (D, 3 * D),
    'attn.c_attn.bias': (3 * D,),
    'attn.c_proj.weight': (D, D),
    'attn.c_proj.bias': (D,),
    'ln_2.weight': (D,),
    'ln_2.bias': (D,),
    'mlp.c_fc.weight': (D, 4 * D),
    'mlp.c_fc.bias': (4 * D,),
    'mlp.c_proj.weight': (4 * D, D),
    'mlp.c_proj.bias': (D,),
  }
  shapes = {'wte.weight': (V, D), 'wpe.weight': (T, D)}
  shapes |= {f'h.{i}.{name}': shape for i in range(L) for name, shape in block.items()}
  shapes |= {'ln_f.weight': (D,), 'ln_f.bias': (D,)}
  return {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def make_torch(state: dict[str, torch.Tensor]) -> None:
  """Plain state dicts, in both formats of torch.save, with the buffers of old transformers."""
  module = torch.nn.Linear(2, 2)  # whose state dict has `_metadata`
  full = module.state_dict()
  full.clear()
  for name, tensor in state.items():
    full[f'transformer.{name}'] = torch.nn.Parameter(tensor) if name == 'ln_f.bias' else tensor
  for i in range(L):
    full[f'transformer.h.{i}.attn.bias'] = torch.ones(1, 1, T, T, dtype=torch.uint8).tril()
    full[f'transformer.h.{i}.attn.masked_bias'] = torch.tensor(-1e4)
  full['lm_head.weight'] = full['transformer.wte.weight']
  torch.save(full, HERE / 'foreign_state.pt')
  torch.save(full, HERE / 'foreign_state_legacy.pt', _use_new_zipfile_serialization=False)


def make_views() -> None:
  """Tensors that share storages, of all dtypes, and what they hold."""
  base = torch.arange(60, dtype=torch.float32).reshape(3, 4, 5) / 7
  kinds = {
    'double': base[0].double(),
    'half': base[1].half(),
    'bfloat': base[2].bfloat16(),
    'long': torch.tensor([-(2**40), 3]),
    'int': torch.tensor([-5, 6], dtype=torch.int32),
    'byte': torch.tensor([0, 255], dtype=torch.uint8),
    'bool': torch.tensor([True, False]),
  }
  views = {
    'base': base,
    'transposed': base.transpose(0, 2),
    'row': base[1, 2],
    'column': base[:, 1, 3],
    'stepped': base[::2, 1:, ::3],
    'scalar': base[2, 3, 4],
    'empty': base[:, :0],
    **kinds,
  }
  value = {'views': views, 'list': [1, -(2**40), 1e-300, None, True, 'é'], 'tuple': (0.9, 0.95)}
  torch.save(value, HERE / 'foreign_views.pt')
  torch.save(value, HERE / 'foreign_views_legacy.pt', _use_new_zipfile_serialization=False)
  np.savez_compressed(
    HERE / 'foreign_views.npz',
    **{
      name: view.float().numpy() if name == 'bfloat' else view.numpy() for name, view in views.items()
    },
  )


def make_nanogpt(state: dict[str, torch.Tensor]) -> None:
  """As nanoGPT's train.py saves: with AdamW's state, then compiled, without biases, in bfloat16."""

  def checkpoint(bias: bool, dtype: torch.dtype, prefix: str, masks: bool) -> dict:
    linear = {k: v.t().contiguous() if k.endswith(LINEAR) else v for k, v in state.items()}
    parameters = {
      k: torch.nn.Parameter(v.clone().to(dtype))
      for k, v in linear.items()
      if bias or not k.endswith('bias')
    }
    decayed, rest = (
      [p for p in parameters.values() if (p.dim() > 1) == flag] for flag in (True, False)
    )
    optimizer = torch.optim.AdamW(
      [{'params': decayed, 'weight_decay': 0.1}, {'params': rest, 'weight_decay': 0.0}],
      lr=0.0,
      betas=(0.9, 0.95),
    )
    for parameter in parameters.values():
      parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # at a learning rate of 0: makes the state, leaves the weights
    model = {f'{prefix}transformer.{name}': p.detach() for name, p in parameters.items()}
    if masks:
      model |= {
        f'{prefix}transformer.h.{i}.attn.bias': torch.ones(1, 1, T, T).tril() for i in range(L)
      }
    model[f'{prefix}lm_head.weight'] = model[f'{prefix}transformer.wte.weight']
    args = dict(n_layer=L, n_head=N, n_embd=D, block_size=T, bias=bias, vocab_size=V, dropout=0.2)
    return {
      'model': model,
      'optimizer': optimizer.state_dict(),
      'model_args': args,
      'iter_num': 2000,
      'best_val_loss': torch.tensor(1.4697),
      'config': {'dataset': 'shakespeare_char', 'learning_rate': 1e-3, 'compile': True},
    }

  torch.save(checkpoint(True, torch.float32, '', True), HERE / 'foreign_nanogpt.pt')
  torch.save(
    checkpoint(False, torch.bfloat16, '_orig_mod.', False), HERE / 'foreign_nanogpt_nobias.pt'
  )


def make_llmc(state: dict[str, torch.Tensor]) -> None:
  """As llm.c's train_gpt2.py writes: version 3 in float32, version 5 in bfloat16."""
  header = torch.zeros(256, dtype=torch.int32)
  order = [
    'ln_1.weight',
    'ln_1.bias',
    'attn.c_attn.weight',
    'attn.c_attn.bias',
    'attn.c_proj.weight',
    'attn.c_proj.bias',
    'ln_2.weight',
    'ln_2.bias',
    'mlp.c_fc.weight',
    'mlp.c_fc.bias',
    'mlp.c_proj.weight',
    'mlp.c_proj.bias',
  ]
  tensors = [torch.nn.functional.pad(state['wte.weight'], (0, 0, 0, 128 - V)), state['wpe.weight']]
  for name in order:
    for i in range(L):
      tensor = state[f'h.{i}.{name}']
      tensors.append(tensor.t() if name.endswith(LINEAR) else tensor)
  tensors += [state['ln_f.weight'], state['ln_f.bias']]
  flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
  for version, dtype in ((3, torch.float32), (5, torch.bfloat16)):
    header[:8] = torch.tensor([20240326, version, T, V, L, N, D, 128])
    body = flat.to(dtype).view(torch.uint8).numpy().tobytes()
    (HERE / f'foreign_llmc_v{version}.bin').write_bytes(header.numpy().tobytes() + body)


def flax_tree(tensors: dict[str, np.ndarray]) -> dict:
  """The parameters of transformers' FlaxGPT2LMHeadModel."""
  tree: dict = {'transformer': {}}
  for name, tensor in tensors.items():
    *places, last = name.split('.')
    node = tree['transformer']
    for place in places:
      node = node.setdefault(place, {})
    if name.endswith(LINEAR):
      node['kernel'] = np.ascontiguousarray(tensor.T)
    elif last == 'bias':
      node['bias'] = tensor
    else:
      node['embedding' if places[0] in ('wte', 'wpe') else 'scale'] = tensor
  return tree


if __name__ == '__main__':
  arrays = weights()
  np.savez(HERE / 'foreign_expected.npz', **arrays)
  state = {name: torch.from_numpy(array) for name, array in arrays.items()}
  make_torch(state)
  make_views()
  make_nanogpt(state)
  make_llmc(state)
  (HERE / 'foreign_flax_model.msgpack').write_bytes(serialization.to_bytes(flax_tree(arrays)))

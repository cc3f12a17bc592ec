"""Makes tests/golden/transformer_lens*.npz: what TransformerLens finds at hooks of a random GPT-2.

    pip install transformer-lens==4.3.0 && python tests/golden/make_transformer_lens.py

`params/…` are the weights in our layout, `tokens` the ids, `logits` theirs, the rest arrays by
TransformerLens' names. Weights as they are: no folding of layer norms, no centring, no BOS. In
`transformer_lens_processed.npz` the same, without the weights, after folding of layer norms,
centring of writing weights and of the unembedding, without folding of the values' biases.
"""

import re
import tempfile
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from transformer_lens.model_bridge import TransformerBridge

L, D, N, V = 2, 15, 3, 31
# those that its GPT-2 has had from the first; other names of the same arrays are left out
HOOKS = re.compile(
  r'hook_(embed|pos_embed|resid_\w+|q|k|v|attn_scores|pattern|z|result|attn_out|pre|post|mlp_out|scale'
  r'|normalized)$'
)


def random_model() -> transformers.GPT2LMHeadModel:
  """A model as Hugging Face has it, in which every parameter matters."""
  sizes = dict(vocab_size=V, n_positions=8, n_embd=D, n_layer=L, n_head=N, n_inner=29)
  config = transformers.GPT2Config(
    **sizes, initializer_range=0.3, bos_token_id=0, eos_token_id=0, attn_implementation='eager'
  )
  model = transformers.GPT2LMHeadModel(config).eval()
  for name, parameter in model.named_parameters():
    if name.endswith('bias') or 'ln_' in name:
      parameter.add_(0.1 * torch.randn_like(parameter))
  return model


def in_our_layout(model: transformers.GPT2LMHeadModel) -> dict[str, np.ndarray]:
  """Name -> array, the blocks' stacked."""
  w = {n.removeprefix('transformer.'): x.numpy().copy() for n, x in model.named_parameters()}
  shapes = {'attn.c_attn.weight': (D, 3, N, -1), 'attn.c_attn.bias': (3, N, -1)}
  shapes['attn.c_proj.weight'] = (N, -1, D)
  out = {name: x for name, x in w.items() if not name.startswith('h.')}
  for name in (n.removeprefix('h.0.') for n in w if n.startswith('h.0.')):
    parts = [w[f'h.{i}.{name}'] for i in range(L)]
    out[f'h.{name}'] = np.stack([x.reshape(shapes.get(name, x.shape)) for x in parts])
  return out


def main() -> None:
  torch.manual_seed(0)
  torch.set_grad_enabled(False)
  model = random_model()
  params = {f'params/{name}': x for name, x in in_our_layout(model).items()}
  words = tokenizers.models.WordLevel({f'<{i}>': i for i in range(V)}, unk_token='<0>')
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizers.Tokenizer(words), bos_token='<0>', eos_token='<0>', pad_token='<0>'
  )
  with tempfile.TemporaryDirectory() as folder:  # it wants one, and from a folder
    tokenizer.save_pretrained(folder)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    lens = TransformerBridge.boot_transformers('gpt2', hf_model=model, tokenizer=tokenizer)
  lens.set_use_attn_result(True)
  tokens = np.random.default_rng(0).integers(0, V, (2, 7))
  logits, cache = lens.run_with_cache(torch.tensor(tokens))
  found = {name: x.numpy() for name, x in cache.items() if HOOKS.search(name)}
  path = Path(__file__).parent / 'transformer_lens.npz'
  np.savez_compressed(path, tokens=tokens, logits=logits.numpy(), **params, **found)
  lens.enable_compatibility_mode(disable_warnings=True, fold_value_biases=False)
  lens.set_use_attn_result(True)
  logits, cache = lens.run_with_cache(torch.tensor(tokens))
  found = {name: x.numpy() for name, x in cache.items() if HOOKS.search(name)}
  path = path.with_stem('transformer_lens_processed')
  np.savez_compressed(path, logits=logits.numpy(), **found)


if __name__ == '__main__':
  main()

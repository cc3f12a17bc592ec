"""Makes tests/golden/searches/: what transformers' searches find with a random model.

    pip install torch 'transformers==5.23.*'
    python tests/golden/make_searches.py beams
    pip install 'transformers==4.49.*'
    python tests/golden/make_searches.py groups contrastive

Version 5 has neither groups of beams nor contrastive search. Computed in float32, prompt by prompt.
A file has a list of (options, a list for each prompt of (new ids up to the end, score)).
"""

import itertools
import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent / 'searches'
SIZES = dict(vocab_size=97, n_positions=32, n_embd=32, n_layer=2, n_head=4)
PROMPTS = [[1, 2, 3], [5, 6, 7, 8, 9, 10, 11], [3] * 20, [96]]
PAD = 96  # stands in for groups that are done, and there counts as chosen: so it never is
COMMON = dict(
  do_sample=False,
  max_new_tokens=8,
  min_new_tokens=1,
  repetition_penalty=1.02,
  suppress_tokens=[PAD],
  eos_token_id=[22, 58],
)  # the same processors: one compilation
MODES = [
  dict(early_stopping=early, length_penalty=penalty)
  for early, penalty in itertools.product((False, True, 'never'), (-1.0, 0.5, 2.0))
]
BEAMS = dict(num_beams=3, num_return_sequences=3)
GROUPS = dict(num_beams=6, num_beam_groups=3, diversity_penalty=0.7, num_return_sequences=3)
CASES = {
  'beams': [
    BEAMS | mode
    for mode in (*MODES, dict(repetition_penalty=1.5), dict(min_new_tokens=4, early_stopping=True))
  ],
  'groups': [
    GROUPS | mode
    for mode in (
      *MODES,
      dict(repetition_penalty=1.5, early_stopping='never'),
      dict(diversity_penalty=5.0),
      dict(min_new_tokens=4, early_stopping=True),
    )
  ],
  'contrastive': [
    dict(top_k=4, min_new_tokens=6) | others
    for others in (
      *(dict(penalty_alpha=alpha) for alpha in (0.1, 0.4, 0.6, 0.9)),
      dict(penalty_alpha=0.6, repetition_penalty=1.5),
    )
  ],
}


def weights(seed: int = 1) -> dict[str, np.ndarray]:
  """The model's, under the names of its state dict without the prefix; float32."""
  D, V, P = (SIZES[name] for name in ('n_embd', 'vocab_size', 'n_positions'))
  shapes = {'wte.weight': (V, D), 'wpe.weight': (P, D), 'ln_f.weight': (D,), 'ln_f.bias': (D,)}
  for i in range(SIZES['n_layer']):
    for name, shape in {
      'ln_1': (D,),
      'attn.c_attn': (D, 3 * D),
      'attn.c_proj': (D, D),
      'ln_2': (D,),
      'mlp.c_fc': (D, 4 * D),
      'mlp.c_proj': (4 * D, D),
    }.items():
      shapes |= {f'h.{i}.{name}.weight': shape, f'h.{i}.{name}.bias': shape[-1:]}
  rng = np.random.default_rng(seed)
  return {
    name: (rng.normal(0, 0.3, shape) + ('ln_' in name and 'weight' in name)).astype(np.float32)
    for name, shape in shapes.items()
  }


def main(names: list[str]) -> None:
  import torch
  import transformers

  config = transformers.GPT2Config(**SIZES, bos_token_id=0, eos_token_id=0)
  model = transformers.GPT2LMHeadModel(config).eval()
  state = {f'transformer.{name}': torch.tensor(x) for name, x in weights().items()}
  model.load_state_dict(state | {'lm_head.weight': state['transformer.wte.weight']})

  def search(prompt, options):
    out = model.generate(
      torch.tensor([prompt]),
      attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
      pad_token_id=PAD,
      return_dict_in_generate=True,
      output_scores=True,
      **COMMON | options,
    )
    scores = getattr(out, 'sequences_scores', None)
    found = []
    for i, row in enumerate(out.sequences[:, len(prompt) :].tolist()):
      ends = [n for n, token in enumerate(row) if token in (*COMMON['eos_token_id'], PAD)]
      found.append(
        (row[: ends[0]] if ends else row, None if scores is None else round(float(scores[i]), 6))
      )
    return found

  HERE.mkdir(exist_ok=True)
  for name in names:
    cases = [(options, [search(prompt, options) for prompt in PROMPTS]) for options in CASES[name]]
    lines = ',\n'.join(json.dumps(case, separators=(',', ':')) for case in cases)
    (HERE / f'{name}.json').write_text(f'[\n{lines}\n]\n')


if __name__ == '__main__':
  main(sys.argv[1:])

"""Makes tests/golden/huggingface/: random GPT-2s of odd shapes as transformers and PEFT save them,
and what they compute with them.

    pip install -e '.[parity]' && python tests/golden/make_huggingface.py

A folder a model; `expected.npz` holds `tokens` and `logits`, and of some `grad/NAME` of the mean
next-token loss, `step/NAME` after one AdamW step and `hidden_states`, `attentions`. Computed in
float64, except with reorder_and_upcast_attn, which computes in float32.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import peft
import torch
import transformers

HERE = Path(__file__).parent / 'huggingface'
SIZES = dict(
  vocab_size=97,
  n_positions=16,
  n_embd=15,
  n_layer=2,
  n_head=3,
  n_inner=29,
  initializer_range=0.2,
  bos_token_id=0,
  eos_token_id=0,
)
MODELS = {
  'plain': {},
  'mistral': dict(reorder_and_upcast_attn=True, scale_attn_by_inverse_layer_idx=True, n_head=5),
  'untied': dict(tie_word_embeddings=False, scale_attn_weights=False, n_head=1),
}
LR, EPS, DECAY = 1e-2, 1e-3, 0.1  # eps: see test_one_adamw_step in tests/test_parity.py


def random_model(kind, seed, **fields):
  config = transformers.GPT2Config(**SIZES | fields, attn_implementation='eager')
  torch.manual_seed(seed)
  model = kind(config).eval()
  with torch.no_grad():
    for name, parameter in model.named_parameters():  # biases and layer norms matter too
      if name.endswith('bias') or 'ln_' in name:
        parameter.add_(0.1 * torch.randn_like(parameter))
  return model


def tokens(seed=0):
  return torch.tensor(np.random.default_rng(seed).integers(0, 97, (2, 11)))


def save(name, **arrays):
  np.savez_compressed(
    HERE / name / 'expected.npz',
    **{
      key: np.asarray(
        value.detach() if torch.is_tensor(value) else value,
        {True: np.float32, False: np.int32}[torch.is_tensor(value) and value.is_floating_point()],
      )
      for key, value in arrays.items()
    },
  )


def language_models():
  for seed, (name, fields) in enumerate(MODELS.items()):
    model, x = random_model(transformers.GPT2LMHeadModel, seed, **fields), tokens()
    model.save_pretrained(HERE / name)
    if not model.config.reorder_and_upcast_attn:
      model = model.double()
    out = model(x, labels=x, output_hidden_states=True, output_attentions=True)
    out.loss.backward()
    named = dict(model.named_parameters())
    gradients = {f'grad/{n}': p.grad.clone() for n, p in named.items()}
    decayed = [p for n, p in named.items() if n.endswith('weight') and 'ln_' not in n]
    others = [p for n, p in named.items() if not (n.endswith('weight') and 'ln_' not in n)]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.optim.AdamW(
      [{'params': decayed, 'weight_decay': DECAY}, {'params': others, 'weight_decay': 0.0}],
      lr=LR,
      betas=(0.9, 0.95),
      eps=EPS,
    ).step()
    save(
      name,
      tokens=x,
      logits=out.logits,
      hidden_states=torch.stack(out.hidden_states),
      attentions=torch.stack(out.attentions),
      **gradients,
      **{f'step/{n}': p for n, p in named.items()},
    )


def as_old_bin():
  """`plain` as in 2019: no prefix, causal masks, the tied head, torch's format before 1.6."""
  model = transformers.GPT2LMHeadModel.from_pretrained(HERE / 'plain')
  state = {n.removeprefix('transformer.'): t for n, t in model.state_dict().items()}
  for i in range(SIZES['n_layer']):
    state[f'h.{i}.attn.bias'] = torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16)
    state[f'h.{i}.attn.masked_bias'] = torch.tensor(-1e4)
  folder = HERE / 'old_bin'
  folder.mkdir()
  torch.save(state, folder / 'pytorch_model.bin', _use_new_zipfile_serialization=False)
  keys = model.config.to_dict()
  old = {
    k: keys[k]
    for k in (
      'vocab_size',
      'n_positions',
      'n_embd',
      'n_layer',
      'n_head',
      'n_inner',
      'layer_norm_epsilon',
      'initializer_range',
    )
  }
  (folder / 'config.json').write_text(
    json.dumps(
      old
      | {
        'n_ctx': 16,
        'architectures': ['GPT2LMHeadModel'],
        'activation_function': 'gelu_new',
        'task_specific_params': {'text-generation': {'do_sample': True, 'max_length': 50}},
      }
    )
  )


def classifiers():
  labels = dict(
    id2label={0: 'no', 1: 'perhaps', 2: 'yes'}, label2id={'no': 0, 'perhaps': 1, 'yes': 2}
  )
  x = tokens(1)
  x[0, 7:] = 96
  model = random_model(transformers.GPT2ForSequenceClassification, 7, pad_token_id=96, **labels)
  model.save_pretrained(HERE / 'sequence')
  save('sequence', tokens=x, lengths=np.array([7, 11]), logits=model.double()(x).logits)
  model = random_model(transformers.GPT2ForTokenClassification, 8, **labels)
  model.save_pretrained(HERE / 'token')
  save('token', tokens=x, logits=model.double()(x).logits)


def adapters():
  for name, base, task, targets in (
    ('lora', transformers.GPT2LMHeadModel, 'CAUSAL_LM', ['c_attn', 'mlp.c_proj']),
    ('lora_sequence', transformers.GPT2ForSequenceClassification, 'SEQ_CLS', ['c_proj', 'c_fc']),
  ):
    torch.manual_seed(9)
    model = base.from_pretrained(HERE / 'plain', pad_token_id=96)
    lora = peft.LoraConfig(
      r=3, lora_alpha=7, target_modules=targets, task_type=task, fan_in_fan_out=True
    )
    model = peft.get_peft_model(model, lora).eval()
    with torch.no_grad():
      for n, parameter in model.named_parameters():
        if 'lora_B' in n:
          parameter.normal_(std=0.3)
    model.save_pretrained(HERE / name)
    path = HERE / name / 'adapter_config.json'
    keys = json.loads(path.read_text())
    keys['base_model_name_or_path'] = 'tests/golden/huggingface/plain'
    path.write_text(json.dumps(keys, indent=2))
    (HERE / name / 'README.md').unlink(missing_ok=True)
    x = tokens(2)
    save(name, tokens=x, logits=model.double()(x).logits)


if __name__ == '__main__':
  shutil.rmtree(HERE, ignore_errors=True)
  HERE.mkdir()
  language_models()
  as_old_bin()
  classifiers()
  adapters()

"""Every knob there is, with its unit and why it has this value. The other configs change a few.

`placeholder(T)` is a knob that is derived where it isn't set.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
  config = ConfigDict()

  # Where the parameters begin: a workdir, a folder or file of another format, a name on the hub.
  # Default: drawn at random. What can be read: docs/conversion.md. For use: configs/finetune.py.
  config.init_from = placeholder(str)  # of a run one kept step: DIR@1200, DIR@best
  config.init_base = placeholder(str)  # the model that adapters belong to; default: the one they name
  config.init_ignore_extra = False  # take the language model alone from a file with other heads too
  config.init_positions = 'interpolate'  # where model.n_positions is larger than there; or extend

  # The same command gives the same bits each time, in metrics.jsonl too: what is measured by the
  # clock then stands in timing.jsonl. Costs speed on GPUs; CPU and TPU need nothing.
  config.deterministic = False

  # The model. Names and values are Hugging Face's; these are GPT-2 124M's.
  config.model = ConfigDict(
    dict(
      vocab_size=placeholder(int),  # default: the tokenizer's
      n_positions=1024,  # context; of a new model no more than data.sequence_length
      n_embd=768,
      n_layer=12,
      n_head=12,
      n_inner=placeholder(int),  # MLP width; default 4·n_embd
      activation_function='gelu_new',  # tanh GELU, as released
      embd_pdrop=0.0,  # pretraining passes over the data about once: no dropout, as nanoGPT, llm.c
      attn_pdrop=0.0,
      resid_pdrop=0.0,
      layer_norm_epsilon=1e-5,
      initializer_range=0.02,
      scale_attn_weights=True,
      scale_attn_by_inverse_layer_idx=False,
      reorder_and_upcast_attn=False,
      tie_word_embeddings=True,
      init_scheme='hf',  # or openai_release
      parametrization='standard',  # or mup: the best learning rate is that of a narrower model
      mup_base_width=placeholder(int),  # mup: n_embd of the model whose peak_lr this is
      mup_base_head_width=placeholder(int),  # mup: width of its heads; default: as wide as here
      vocab_multiple=128,  # the vocabulary is padded inside: 50257 = 29·1733 would not split
      dtype='auto',  # of activations: bfloat16 on accelerators, float32 on CPU
      remat='auto',  # what is computed again: none (of the products), dots (attention), full (all);
      # auto: what is fastest of what fits the memory
      scan_layers=placeholder(bool),  # layers as a loop; default: but on GPUs, which are then faster
      attention='auto',  # cudnn on GPUs, splash on TPUs, blocks on CPUs, where they can; else xla
      reduce_dtype='float32',  # of gradients while they are summed over devices, or bfloat16
      head='lm',  # or sequence_classification
    )
  )

  # The text.
  config.data = ConfigDict(
    dict(
      corpus='stdlib',  # stdlib, text:PATTERN, tfds:NAME, bin:FOLDER
      tokenizer=placeholder(str),  # gpt2, bpe:N, byte, or a folder; default: init_from's, or gpt2
      special=False,  # the text of a special token, <|endoftext|> perhaps, is the token
      text_field='text',  # of .jsonl, .json, .csv, .tsv, .parquet, TFDS
      label_field='label',  # of the same, for a classifier
      store=placeholder(str),  # folder of the tokens; default: by name in `directory`
      directory='data',
      val_fraction=0.005,  # held out, of the documents
      split='document',  # or tail: the end of each document
      split_seed=0,
      sequence_length=placeholder(int),  # tokens a row; default n_positions
      document_mask=False,  # a token sees its own document alone, not those before it in the row
    )
  )

  # Adapters that are trained in place of the weights (LoRA, arXiv:2106.09685). Names are PEFT's.
  config.lora = ConfigDict(
    dict(
      r=0,  # rank; 0: none, all parameters are trained
      alpha=16.0,  # the adapters' product is scaled by alpha / r
      target_modules=('c_attn',),  # of c_attn, c_proj, c_fc, or one of them: mlp.c_proj
      dropout=0.0,  # of the adapters' input
    )
  )

  # AdamW as in GPT-3's paper (arXiv:2005.14165, appendix B), nanoGPT and llm.c.
  config.optim = ConfigDict(
    dict(
      name='adamw',  # adafactor, lion, muon, schedule_free, soap: docs/training.md
      peak_lr=6e-4,
      schedule='cosine',  # cosine, linear, wsd, constant
      warmup_steps=700,
      warmup_tokens=placeholder(int),  # in its place: a schedule of tokens seen, whatever the batch
      decay_steps=placeholder(int),  # where the decay ends; default train.steps
      decay_tokens=placeholder(int),  # in its place, as warmup_tokens
      end_lr_fraction=0.1,  # of peak_lr, for cosine and linear; wsd ends there too
      wsd_decay_fraction=0.2,  # of the steps
      b1=0.9,
      b2=0.95,
      eps=1e-8,
      weight_decay=0.1,  # of matrices and embeddings, not of biases and layer norms
      decay_schedule='constant',  # or learning_rate: the decay falls with the rate, as a factor of it
      cautious_decay=False,  # only of what the step moves towards 0
      muon_momentum=0.95,
      muon_nesterov=True,
      muon_iteration='polar_express',  # or newton_schulz, with the coefficients of 2024
      muon_steps=5,  # of the iteration
      muon_dtype='auto',  # of the iteration: bfloat16 on accelerators, as it is on CPU
      muon_scale='match_rms_adamw',  # steps as large as AdamW's, for its rate; or original
      muon_lr_factor=1.0,  # of the learning rate, for Muon's matrices
      muon_apart='qkv',  # q, k and v are matrices of their own; or heads: by head too; or none
      muon_normalize_rows=False,  # NorMuon: rows of a step as large as each other
      soap_every=10,  # steps from one refreshment of its bases to the next
      soap_wide=False,  # turn the longer side of matrices, too: docs/training.md says what it costs
      clip_norm=1.0,  # global norm of the gradient; 0: no clipping
      skip_zscore=0.0,  # steps whose log gradient norm is so many standard deviations above its usual
      # value, or not finite, are not taken; 6 is rare without a cause; 0: off
      skip_warmup=100,  # steps to know the usual norm by, before any is judged
      z_loss=0.0,  # times mean log² Z, Z the sum of exp(logits), is added to the loss, in nats: keeps
      # logits from drifting; PaLM has 1e-4 (arXiv:2204.02311, section 5); 0: off
      ema_decay=0.0,  # moving average of the parameters, for evaluation and samples; 0: off
    )
  )

  config.train = ConfigDict(
    dict(
      steps=600_000,
      tokens=placeholder(int),  # in its place: as many steps as see them, whatever the batch
      epochs=placeholder(float),  # in its place: passes over the data
      seed=0,  # of the initial weights, the order of the data, dropout and the sample
      global_batch_tokens=2**19,  # tokens an update: part of the recipe, whatever the hardware
      micro_batch_rows=placeholder(int),  # rows a device at a time; default: what fits its memory
      compiler_options='',  # XLA's, for the step: 'xla_gpu_enable_triton_gemm=false …'; docs/gpu.md
      verify_every=0,  # steps: each of its multiples is made twice, to compare; 0: none is
      verify_replicas_every=0,  # steps: after its multiples the state's replicas are compared
    )
  )

  config.checkpoint = ConfigDict(
    dict(
      every=1000,  # steps
      keep=2,  # the newest ones, and the one that is offered (evaluate.patience)
      keep_every=0,  # steps: those of its multiples are kept too; 0: none
      keep_best=0,  # of the evaluated ones, so many with the lowest held-out loss are kept too
    )
  )

  # Sizes of the mesh's axes; one of them may be -1: what the others leave. data: batch split; fsdp:
  # batch and parameters split; seq: positions split; tensor: heads, MLP and vocabulary split.
  config.mesh = ConfigDict(
    dict(
      data=placeholder(int),  # default: what fsdp leaves
      fsdp=-1,  # with data's default: as few as hold the state in a quarter of a device's memory
      seq=1,  # for rows too long for one device
      tensor=1,
      slices_over='data',  # the axis that crosses the network between TPU slices, or fsdp
    )
  )

  config.evaluate = ConfigDict(
    dict(
      every=1000,  # steps; always the whole held-out split
      batch_rows=placeholder(int),  # default: as a micro-batch
      patience=0,  # stop after so many evaluations without a lower loss, offer the best; 0: go on
    )
  )

  # A trace of the host and the devices for TensorBoard or XProf, in workdir/profile.
  config.profile = ConfigDict(
    dict(
      steps=(0, 0)  # from this step, as metrics.jsonl counts, up to that one, which is not traced
    )
  )

  config.log = ConfigDict(
    dict(
      to='tensorboard',  # trackers: tensorboard, wandb, mlflow, with commas between; '' for none
      straggler_every=100,  # steps from one comparison of several hosts to the next; 0: never
      layers_every=0,  # steps from one look at each layer, as long as a step, to the next; 0: none
      sample_prompt='\n',  # of the sample at the end
      sample_tokens=128,
      sample_temperature=0.8,
      sample_top_k=200,
    )
  )
  return config

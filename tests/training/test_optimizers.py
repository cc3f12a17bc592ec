"""Each optimizer equals an independent implementation, on every mesh."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.arrays import assert_close, mesh_of
from support.configs import optim
from support.models import tiny_gpt2

from gpt2_jax.core.errors import UserError
from gpt2_jax.model.config import LoRA
from gpt2_jax.model.gpt2 import make_params
from gpt2_jax.model.parameters import map_rows
from gpt2_jax.parallel.sharding import in_mesh, on_devices, spec_of
from gpt2_jax.training import optimizer
from gpt2_jax.training.optimizer import make_optimizer
from gpt2_jax.training.optimizers.muon import APART
from gpt2_jax.training.optimizers.orthogonal import (
  ITERATIONS,
  POLAR_EXPRESS,
  Stack,
  each_matrix,
  orthogonalized,
)

torch = pytest.importorskip('torch')

RATE, STEPS = 0.02, 5
SIZES = dict(n_layer=3, n_embd=16, n_head=4, n_inner=40, n_positions=8, vocab_size=24)


def matrices(stack: Stack, x) -> np.ndarray:
  """All matrices of a parameter, [K, out, in] as torch has them, by NumPy alone."""
  x = np.asarray(x, np.float64)
  letters = 'L' + stack.row.letters
  apart = [i for i, letter in enumerate(letters) if letter in 'L' + stack.apart]
  ins = [i for i, c in enumerate(letters) if c in stack.row.contracted and i not in apart]
  outs = [i for i in range(x.ndim) if i not in (*apart, *ins)]
  size = lambda axes: int(np.prod([x.shape[i] for i in axes]))
  return x.transpose(*apart, *outs, *ins).reshape(size(apart), size(outs), size(ins))


def gradients(params, seed: int = 0) -> list:
  rng = np.random.default_rng(seed)
  draw = lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype)
  return [jax.tree.map(draw, params) for _ in range(STEPS)]


def steps_of(tx, params, grads):
  """The parameters after each step."""
  update = jax.jit(tx.update)
  state, out = tx.init(params), []
  for grad in grads:
    updates, state = update(grad, state, params)
    params = optax.apply_updates(params, updates)
    out.append(params)
  return out


def tensors(row, x) -> np.ndarray:
  """A parameter as matrices and vectors, a layer at a time, as files have them."""
  x = np.asarray(x, np.float64)
  layers = x if row.stacked else x[None]
  sizes = dict(zip(row.letters, layers.shape[1:]))
  return layers.reshape(len(layers), *row.theirs(sizes)[:: -1 if row.transposed else 1])


def torchs(make):
  """`make(parameter, config, decay)`, an optimizer of torch, as a coroutine: it is sent gradient and
  a rate, and gives the parameter.
  """

  def run(p, o, decay):
    p = torch.nn.Parameter(torch.tensor(p))
    made = make(p, o, decay)
    while True:
      g, made.param_groups[0]['lr'] = yield
      p.grad = torch.tensor(g)
      made.step()
      yield p.detach().numpy()

  return started(run)


def started(run):
  def begin(*args):
    coroutine = run(*args)
    next(coroutine)
    return Sent(coroutine)

  return begin


class Sent:
  """A coroutine whose answer to `send` is got by `next`."""

  def __init__(self, coroutine):
    self.coroutine = coroutine

  def send(self, value):
    self.answer = self.coroutine.send(value)
    next(self.coroutine)

  def __next__(self):
    return self.answer


def lion_by_hand(p, o, decay):
  """Algorithm 2 of arXiv:2302.06675."""
  m = np.zeros_like(p)
  while True:
    g, rate = yield
    p = p - rate * (np.sign(o.b1 * m + (1 - o.b1) * g) + decay * p)
    m = o.b2 * m + (1 - o.b2) * g
    yield p


def schedule_free_by_hand(y, o, decay):
  """AdamWScheduleFree of github.com/facebookresearch/schedule_free: it keeps x here, too."""
  x, z, v, weights, most, t = y, y, np.zeros_like(y), 0.0, 0.0, 0
  while True:
    g, rate = yield
    t, most = t + 1, max(most, rate)
    v = o.b2 * v + (1 - o.b2) * g * g
    z = z - rate * (g / (np.sqrt(v / (1 - o.b2**t)) + o.eps) + decay * y)
    weights += most**2
    x = x + most**2 / weights * (z - x)
    y = o.b1 * x + (1 - o.b1) * z
    yield y


THEIRS = {
  'adamw': torchs(
    lambda p, o, decay: torch.optim.AdamW([p], betas=(o.b1, o.b2), eps=o.eps, weight_decay=decay)
  ),
  'adafactor': torchs(
    lambda p, o, decay: torch.optim.Adafactor([p], eps=(o.eps, 1e-3), weight_decay=decay)
  ),
  'lion': started(lion_by_hand),
  'schedule_free': started(schedule_free_by_hand),
}


def lies(config):
  """Shapes and layouts of the parameters on the mesh that is set; nothing is compiled."""
  return on_devices(jax.eval_shape(lambda: make_params(config, 0)))


def drawn(config, dtype=jnp.float32):
  """Parameters by NumPy: nothing is compiled, as it is for those of a model."""
  rng = np.random.default_rng(1)
  shapes = jax.eval_shape(lambda: make_params(config, 0))
  return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), dtype), shapes)


@pytest.fixture
def sixty_four():
  with jax.enable_x64(True):
    config = tiny_gpt2(**SIZES)
    yield config, drawn(config, jnp.float64)


def flat(tree) -> dict:
  return {
    jax.tree_util.keystr(path, simple=True, separator='.'): x
    for path, x in jax.tree.leaves_with_path(tree)
  }


# --- against torch ------------------------------------------------------------------------------


@pytest.mark.parametrize('nesterov', [True, False])
@pytest.mark.parametrize('scale', ['original', 'match_rms_adamw'])
@pytest.mark.parametrize('apart', APART)
def test_muon_is_torchs(sixty_four, monkeypatch, apart, scale, nesterov):
  """torch.optim.Muon of each matrix alone, AdamW of all else; in float64, where it has bfloat16."""
  monkeypatch.setattr(torch.Tensor, 'bfloat16', lambda self: self.clone())
  _, params = sixty_four
  knobs = dict(muon_apart=apart, muon_scale=scale, muon_nesterov=nesterov)
  o = optim(name='muon', muon_iteration='newton_schulz', clip_norm=0.0, weight_decay=0.3, **knobs)
  grads = gradients(params)
  ours = steps_of(make_optimizer(o, optax.constant_schedule(RATE)), params, grads)
  rows = flat(map_rows(lambda row, _: row, params))
  muons, rest = {}, {}
  for name, x in flat(params).items():
    row = rows[name]
    if row.hidden:
      stack = Stack(row, APART[apart])
      muons[name] = [torch.nn.Parameter(torch.tensor(m)) for m in matrices(stack, x)]
    else:
      rest[name] = torch.nn.Parameter(torch.tensor(np.asarray(x)))
  muon = torch.optim.Muon(
    [p for group in muons.values() for p in group],
    lr=RATE,
    weight_decay=0.3,
    momentum=o.muon_momentum,
    nesterov=nesterov,
    adjust_lr_fn=scale,
  )
  groups = [
    {'params': [p for name, p in rest.items() if rows[name].decays == on], 'weight_decay': decay}
    for on, decay in ((True, 0.3), (False, 0.0))
  ]
  adamw = torch.optim.AdamW(groups, lr=RATE, betas=(o.b1, o.b2), eps=o.eps)
  for grad, have in zip(grads, ours):
    for name, g in flat(grad).items():
      if name in rest:
        rest[name].grad = torch.tensor(np.asarray(g))
      else:
        for p, m in zip(muons[name], matrices(Stack(rows[name], APART[apart]), g)):
          p.grad = torch.tensor(m)
    muon.step()
    adamw.step()
    for name, x in flat(have).items():
      if name in rest:
        assert_close(x, rest[name].detach().numpy(), 1e-9)
      else:
        want = np.stack([p.detach().numpy() for p in muons[name]])
        assert_close(matrices(Stack(rows[name], APART[apart]), x), want, 1e-9)


@pytest.mark.parametrize('name', ['adamw', 'lion', 'adafactor', 'schedule_free'])
def test_all_parameters_are_updated_alike(sixty_four, name):
  """Against torch's AdamW and Adafactor, layer by layer, and formulas of the others' authors."""
  _, params = sixty_four
  o = optim(name=name, clip_norm=0.0, weight_decay=0.3)
  o.schedule = 'constant' if name == 'schedule_free' else o.schedule
  rate = lambda step: RATE * jnp.minimum(1.0, 0.25 * (step + 1))
  grads = gradients(params)
  ours = steps_of(make_optimizer(o, rate), params, grads)
  rows = flat(map_rows(lambda row, _: row, params))
  for path, x in flat(params).items():
    row, decay = rows[path], 0.3 * rows[path].decays
    take = lambda tree, path=path, row=row: tensors(row, flat(tree)[path])
    for layer, p in enumerate(tensors(row, x)):
      theirs = THEIRS[name](p, o, decay)
      for t, (grad, have) in enumerate(zip(grads, ours)):
        theirs.send((take(grad)[layer], float(rate(t))))
        assert_close(take(have)[layer], next(theirs), 1e-9)


# --- against their authors' formulas --------------------------------------------------------------


def polar_express(g: np.ndarray, steps: int) -> np.ndarray:
  """Algorithm 1 of arXiv:2505.16932, of one matrix."""
  x = g.T if g.shape[0] > g.shape[1] else g
  x = x / (np.linalg.norm(x) * 1.01 + 1e-7)
  safe = [(a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in POLAR_EXPRESS[:-1]]
  for a, b, c in [*safe, *[POLAR_EXPRESS[-1]] * steps][:steps]:
    A = x @ x.T
    x = a * x + (b * A + c * A @ A) @ x
  return x.T if g.shape[0] > g.shape[1] else x


def test_normuon_is_its_authors_formula(sixty_four):
  """Algorithm 1 of arXiv:2510.05491, with Polar Express in place of five steps of Newton-Schulz, and
  with the decay of arXiv:2510.12402; each matrix on its own, in float64.
  """
  _, params = sixty_four
  o = optim(name='muon', clip_norm=0.0, muon_normalize_rows=True, cautious_decay=True)
  o.weight_decay = 0.3
  grads = gradients(params)
  ours = steps_of(make_optimizer(o, optax.constant_schedule(RATE)), params, grads)
  rows = flat(map_rows(lambda row, _: row, params))
  for name, x in flat(params).items():
    if not rows[name].hidden:
      continue
    stack = Stack(rows[name], 'C')
    W = matrices(stack, x)
    M, v = np.zeros_like(W), np.zeros((*W.shape[:2], 1))
    for grad, have in zip(grads, ours):
      G = matrices(stack, flat(grad)[name])
      M = 0.95 * M + 0.05 * G
      step = np.stack([polar_express(m, 5) for m in 0.95 * M + 0.05 * G])
      v = o.b2 * v + (1 - o.b2) * np.mean(step * step, 2, keepdims=True)
      step = step / (np.sqrt(v) + o.eps)
      m, n = W.shape[1:]
      step *= 0.2 * np.sqrt(m * n) / np.linalg.norm(step, axis=(1, 2), keepdims=True)
      W = W - RATE * (step + 0.3 * W * (step * W >= 0))
      assert_close(matrices(stack, flat(have)[name]), W, 1e-6)


def soap_by_hand(W, o, decay, wide):
  """Algorithms 3 and 4 of arXiv:2409.11321 of one matrix, as its authors' code has them: the moment
  in the bases, turned when they turn, no step from the first gradient. Adam's bias corrections.
  """
  sides = [i for i in (0, 1) if wide or W.shape[i] == min(W.shape)]
  grams = {i: np.zeros((W.shape[i], W.shape[i])) for i in sides}
  turn = lambda x, Q: Q.get(0, np.eye(len(W))).T @ x @ Q.get(1, np.eye(W.shape[1]))
  back = lambda Q: {i: q.T for i, q in Q.items()}
  m, v, Q, t = np.zeros_like(W), np.zeros_like(W), None, 0
  while True:
    g, rate = yield
    step = 0.0
    if Q is not None:
      t += 1
      m = o.b1 * m + (1 - o.b1) * turn(g, Q)
      v = o.b2 * v + (1 - o.b2) * turn(g, Q) ** 2
      step = turn(m / (1 - o.b1**t) / (np.sqrt(v / (1 - o.b2**t)) + o.eps), back(Q))
      m = turn(m, back(Q))
    W = W - rate * (step + decay * W)
    for i in sides:
      grams[i] = o.b2 * grams[i] + (1 - o.b2) * (g @ g.T if i == 0 else g.T @ g)
    if Q is None:
      Q = {i: np.linalg.eigh(gram)[1][:, ::-1] for i, gram in grams.items()}
    elif t % o.soap_every == 0:
      for i in sides:
        order = np.argsort(-np.diag(Q[i].T @ grams[i] @ Q[i]))
        v = np.take(v, order, i)
        Q[i] = np.linalg.qr(grams[i] @ Q[i][:, order])[0]
    m = turn(m, Q)
    yield W


@pytest.mark.parametrize('wide,inner', [(False, 40), (True, 16)])
def test_soap_is_its_authors_formula(sixty_four, wide, inner):
  """Each matrix on its own, in float64. Where both sides turn, they are of one length: else the first
  gradient leaves a part of the longer one's basis to rounding.
  """
  params = drawn(tiny_gpt2(**SIZES | dict(n_inner=inner)), jnp.float64)
  o = optim(name='soap', soap_every=2, soap_wide=wide, clip_norm=0.0, weight_decay=0.3)
  grads = gradients(params)
  ours = steps_of(make_optimizer(o, optax.constant_schedule(RATE)), params, grads)
  rows = flat(map_rows(lambda row, _: row, params))
  for name in flat(params):
    if not rows[name].hidden:
      continue
    take = lambda tree, name=name: matrices(Stack(rows[name], 'C'), flat(tree)[name])
    for k, W in enumerate(take(params)):
      theirs = started(soap_by_hand)(W, o, 0.3, wide)
      for grad, have in zip(grads, ours):
        theirs.send((take(grad)[k], RATE))
        assert_close(take(have)[k], next(theirs), 1e-6)


@pytest.mark.parametrize('name', ITERATIONS)
def test_singular_values_come_near_one(name):
  """And singular vectors stay: the iteration is an odd polynomial of the matrix."""
  rng = np.random.default_rng(0)
  left, right = (np.linalg.qr(rng.normal(size=(n, 16)))[0] for n in (24, 16))
  values = np.geomspace(1e-2, 1, 16)
  x = jnp.asarray((left * values) @ right.T, jnp.float32)[None]
  for y in (x, x.mT):
    made = np.asarray(orthogonalized(y, ITERATIONS[name], 5)[0], np.float64)
    inside = left.T @ (made if y is x else made.T) @ right
    assert np.abs(inside - np.diag(np.diag(inside))).max() < 1e-4
    assert 0.65 < np.diag(inside).min() and np.diag(inside).max() < 1.25


def test_the_polar_express_converges():
  """To U·Vᵀ, to rounding, as Newton-Schulz with one set of coefficients never does."""
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 20)), jnp.float32)
  u, _, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
  assert_close(orthogonalized(x, ITERATIONS['polar_express'], 10), u @ vt, 2e-6)
  far = np.abs(orthogonalized(x, ITERATIONS['newton_schulz'], 10) - u @ vt).max()
  assert far > 1e-2


# --- over a mesh ----------------------------------------------------------------------------------

WIDE = dict(SIZES, n_embd=32, n_head=8, n_inner=64, n_layer=3)
KNOBS = {
  'adamw': {},
  'adafactor': {},
  'lion': {},
  'schedule_free': {'schedule': 'constant'},
  'muon': {},
  'muon heads': {'muon_apart': 'heads', 'muon_scale': 'original'},
  'muon none': {'muon_apart': 'none', 'muon_nesterov': False},
  'normuon': {'muon_normalize_rows': True, 'cautious_decay': True, 'muon_lr_factor': 2.0},
  'soap': {'soap_every': 2},
}
NAMES = {'muon heads': 'muon', 'muon none': 'muon', 'normuon': 'muon'}


def made(kind: str, **fields):
  o = optim(name=NAMES.get(kind, kind), **KNOBS[kind], **fields)
  return make_optimizer(o, optax.constant_schedule(RATE))


def some_steps(kind: str, sizes=None) -> dict:
  """Parameters after some steps with random gradients, on a mesh or without one; in float64, in which
  nothing but a wrong step is as large as 1e-9.
  """

  def run():
    params, grads = whole, gradients(whole)
    if in_mesh():
      like, there = lambda x, p: jax.device_put(x, p.sharding), lies(config)
      params, *grads = [jax.tree.map(like, tree, there) for tree in (params, *grads)]
    last = steps_of(made(kind), params, grads)[-1]
    for a, b in zip(jax.tree.leaves(last), jax.tree.leaves(params), strict=True):
      assert not in_mesh() or spec_of(a) == spec_of(b)  # it lies as it lay
    return jax.device_get(flat(last))

  config = tiny_gpt2(**WIDE)
  with jax.enable_x64(True):
    whole = drawn(config, jnp.float64)
    with contextlib.nullcontext() if sizes is None else mesh_of(*sizes):
      return run()


QUICK = [('normuon', (2, 2, 2)), ('soap', (2, 2, 2))]  # data, fsdp, tensor, seq
MESHES = [(1, 8, 1), (8, 1, 1), (1, 2, 4), (2, 2, 1, 2), (1, 1, 8), (1, 4, 2), (2, 2, 2)]


@pytest.mark.parametrize(
  'kind,sizes',
  [
    pytest.param(kind, sizes, marks=[] if (kind, sizes) in QUICK else pytest.mark.slow)
    for kind in KNOBS
    for sizes in MESHES
  ],
  ids=str,
)
def test_on_every_mesh_a_step_is_the_same(kind, sizes):
  want, have = some_steps(kind), some_steps(kind, sizes)
  for name in want:
    assert_close(have[name], want[name], 1e-9)


@settings(max_examples=4, deadline=None)
@given(
  st.integers(1, 5),
  st.sampled_from([4, 8, 12]),
  st.sampled_from([(1, 4, 2), (2, 2, 2), (4, 1, 2), (2, 4, 1)]),
  st.sampled_from(list(APART)),
)
def test_every_matrix_is_seen_whole_and_once(layers, width, sizes, apart):
  """Whatever the shapes and the mesh: each is divided by its own norm, which needs all of it."""
  config = tiny_gpt2(**SIZES | dict(n_layer=layers, n_embd=4 * width, n_inner=8 * width))
  with mesh_of(*sizes):
    params = jax.tree.map(lambda x, p: jax.device_put(x, p.sharding), drawn(config), lies(config))
    rows = flat(map_rows(lambda row, _: row, params))
    names = [name for name in rows if rows[name].hidden]
    stacks = [Stack(rows[name], APART[apart]) for name in names]
    by_norm = lambda x: x / jnp.maximum(jnp.linalg.norm(x, axis=(1, 2), keepdims=True), 1e-9)
    leaves = [flat(params)[name] for name in names]
    have = jax.jit(lambda leaves: each_matrix(by_norm, leaves, stacks))(leaves)
  for stack, x, y in zip(stacks, leaves, have, strict=True):
    want = matrices(stack, x)
    want /= np.linalg.norm(want, axis=(1, 2), keepdims=True)
    assert_close(matrices(stack, y), want, 1e-6)


def collectives(kind: str, sizes) -> dict[str, int]:
  """The collectives of an update as it is compiled, without clipping."""
  with mesh_of(*sizes):
    params, tx = lies(tiny_gpt2(**WIDE)), made(kind, clip_norm=0.0)
    state = on_devices(jax.eval_shape(tx.init, params))
    text = jax.jit(tx.update).lower(params, state, params).compile().as_text()
  names = ('all-to-all', 'all-gather', 'all-reduce', 'reduce-scatter', 'collective-permute')
  counts = {name: text.count(f' {name}(') + text.count(f' {name}-start(') for name in names}
  return {name: count for name, count in counts.items() if count}


@pytest.mark.parametrize(
  'sizes,want',
  [
    ((1, 8, 1), {'all-to-all': 4}),  # there and back, for each of two shapes
    ((8, 1, 1), {'all-gather': 2}),  # every device has all: back alone
    ((2, 4, 1), {'all-to-all': 4, 'all-gather': 2}),
    ((1, 2, 4), {'all-to-all': 8}),  # there and back along each of two axes
  ],
  ids=str,
)
def test_matrices_travel_twice_and_iterations_are_silent(sizes, want):
  assert collectives('muon', sizes) == want


# --- which parameter gets which rule --------------------------------------------------------------

MATRICES = {
  'h.attn.c_attn.weight',
  'h.attn.c_proj.weight',
  'h.mlp.c_fc.weight',
  'h.mlp.c_proj.weight',
}


@pytest.mark.parametrize('tie', [True, False])
def test_muon_is_for_matrices_within_blocks(tie):
  """No bias, layer norm, embedding or head: by the table, by what is said, and by what is kept."""
  config = tiny_gpt2(**SIZES, tie_word_embeddings=tie)
  params = flat(drawn(config))
  assert {
    row.name for row in config.parameters() if optimizer.rule('muon', row) == 'muon'
  } == MATRICES
  said = optimizer.describe(optim(name='muon'), config)
  assert (
    said[0].split(': ')[0] == 'muon, decay 0.1' and set(said[0].split(': ')[1].split()) == MATRICES
  )
  assert sorted(' '.join(line.split(': ')[1] for line in said).split()) == sorted(params)
  state = jax.eval_shape(made('muon').init, drawn(config))
  sizes = lambda tree: sum(x.size for x in jax.tree.leaves(tree) if x.ndim)
  want = sum((1 if name in MATRICES else 2) * x.size for name, x in params.items())
  assert sizes(state) == want
  share = optimizer.moments(optim(name='muon'), config)
  assert share == want / sum(x.size for x in params.values())


def test_what_has_no_rule_is_refused():
  adapted = tiny_gpt2(**SIZES, lora=LoRA(r=2, alpha=4.0))
  with pytest.raises(UserError, match='optim.name = muon has no rule for lora.r'):
    optimizer.check(optim(name='muon'), adapted)
  optimizer.check(optim(name='adamw'), adapted)
  with pytest.raises(UserError, match='optim.name = soap has no rule for lora.r'):
    optimizer.check(optim(name='soap'), adapted)
  scaled = tiny_gpt2(**SIZES, parametrization='mup', mup_base_width=8)
  with pytest.raises(UserError, match='optim.name = soap has no rule for .* = mup'):
    optimizer.check(optim(name='soap'), scaled)
  with mesh_of(1, 8, 1), pytest.raises(UserError, match='soap_wide = True: a side of 36 is no mult'):
    odd = lies(tiny_gpt2(**SIZES | dict(n_inner=36)))
    jax.eval_shape(made('soap', soap_wide=True).init, odd)
  with pytest.raises(UserError, match='muon_apart = heads has no rule for .* = mup'):
    make_optimizer(optim(name='muon', muon_apart='heads'), optax.constant_schedule(1.0), 2.0)


@pytest.mark.parametrize('scale', ['original', 'match_rms_adamw'])
def test_under_mup_steps_have_one_spectral_norm_at_every_width(scale):
  """The condition of Yang et al. 2023 (arXiv:2310.17813) for features that move as much."""
  norms = []
  for ratio in (1, 4):
    width = 16 * ratio
    config = tiny_gpt2(**SIZES | dict(n_embd=width, n_head=4 * ratio, n_inner=4 * width))
    params = drawn(config)
    o = optim(name='muon', muon_scale=scale, muon_steps=12, clip_norm=0.0, weight_decay=0.0)
    tx = make_optimizer(o, optax.constant_schedule(1.0), ratio)
    updates, _ = jax.jit(tx.update)(gradients(params)[0], tx.init(params), params)
    rows = flat(map_rows(lambda row, _: row, params))
    norms.append(
      {
        name: np.linalg.norm(matrices(Stack(rows[name], 'C'), x)[0], 2)
        for name, x in flat(updates).items()
        if rows[name].hidden
      }
    )
  for name, norm in norms[0].items():
    assert norms[1][name] == pytest.approx(norm, rel=1e-3)

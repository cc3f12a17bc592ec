"""Planning: what is counted in a program is what is known by hand, and real topologies compile."""

import dataclasses
import importlib.util
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, reshard
from jax.sharding import PartitionSpec as P
from support.processes import ROOT, run

from configs import base
from gpt2_jax.cli import main
from gpt2_jax.cli import plan as command
from gpt2_jax.core import chips
from gpt2_jax.core.chips import GIB, Chip
from gpt2_jax.core.errors import UserError
from gpt2_jax.parallel import sharding
from gpt2_jax.planning import hlo_text, op_flops, places, program_cost, report, search, topology
from gpt2_jax.planning.compile_ahead import plan_train, versions
from gpt2_jax.planning.plan_decode import AskedTexts, lengths, plan_decode
from gpt2_jax.planning.program_cost import Traffic
from gpt2_jax.planning.report import Report
from gpt2_jax.training.run_plan import make_plan

tpu = pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='libtpu is not installed')
gpu = pytest.mark.skipif(
  importlib.util.find_spec('jax_cuda12_plugin') is None, reason='jax-cuda12-plugin is not installed'
)
CHIP = Chip(flops=1e12, hbm=GIB, hbm_bandwidth=1e11, ici=1e10, dcn=1e9)


def fake(hbm: int = GIB, slices: int = 1) -> topology.Topology:
  """The simulated CPU devices, as some chips."""
  devices = jax.devices()
  return topology.Topology(
    'cpu:8',
    dataclasses.replace(CHIP, hbm=hbm),
    devices,
    [i * slices // len(devices) for i in range(len(devices))],
  )


def small_config(**mesh):
  config = base.get_config()
  config.model.update(vocab_size=256, n_positions=64, n_embd=64, n_layer=3, n_head=4)
  config.train.update(global_batch_tokens=32 * 64, steps=10, micro_batch_rows=2)
  config.mesh.update(**mesh)
  return config


# --- Programs -------------------------------------------------------------------------------------


def compiled(mesh, f, *arguments):
  """The text of a program; arguments are pairs of a shape and a spec."""
  with jax.set_mesh(mesh):
    abstract = [
      jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))
      for shape, spec in arguments
    ]
    return jax.jit(f).lower(*abstract).compile().as_text()


def gathered_layers(x_BD, w_LDD):
  """A product a layer, each with a weight that is gathered first."""

  def layer(x_BD, w_DD):
    return jnp.einsum('BD,DE->BE', x_BD, reshard(w_DD, P(None, None)), out_sharding=P('fsdp')), None

  return jax.lax.scan(layer, x_BD, w_LDD)[0]


def test_a_loop_counts_as_often_as_it_runs():
  L, B, D = 5, 16, 64
  mesh = sharding.make_mesh(1, 8, 1)
  text = compiled(mesh, gathered_layers, ((B, D), ('fsdp', None)), ((L, D, D), (None, 'fsdp', None)))
  found = program_cost.count(text, [0] * 8)
  weights = L * D * D * 4
  assert found.flops == L * 2 * (B // 8) * D * D
  assert found.collectives == {
    'all-gather': Traffic(L, weights, *(weights * 7 / 8, 0), weights * 7 / 8)
  }
  assert found.endless == 0
  # of the weights, each turn reads its own, not all: the stacked parts, gathered, and read whole
  assert weights < found.hbm_bytes < 4 * weights
  over_two = program_cost.count(text, [0] * 4 + [1] * 4).collectives['all-gather']
  assert (over_two.ici, over_two.dcn) == (weights * 6 / 8, weights / 8)


def test_a_sum_over_slices_goes_over_dcn():
  mesh = sharding.make_mesh(2, 4, 1)
  add = lambda x: jax.shard_map(
    lambda x: jax.lax.psum(x, 'data'), in_specs=P('data', 'fsdp'), out_specs=P(None, 'fsdp')
  )(x)
  text = compiled(mesh, add, ((2, 4096), ('data', 'fsdp')))
  apart, together = (
    program_cost.count(text, slices).collectives['all-reduce']
    for slices in ([0] * 4 + [1] * 4, [0, 1, 2, 3] * 2)
  )
  assert (apart.ici, apart.dcn) == (0, 1024 * 4)
  assert (together.ici, together.dcn) == (1024 * 4, 0)


@pytest.mark.parametrize(
  'kind,total',
  [('all-gather', 7), ('reduce-scatter', 7 / 8), ('all-reduce', 14 / 8), ('all-to-all', 7 / 8)],
)
@pytest.mark.parametrize(
  'slices', [[0] * 8, [0] * 4 + [1] * 4, [0, 0, 1, 1, 2, 2, 3, 3], [*range(8)]]
)
def test_what_a_ring_sends_is_the_same_however_it_is_cut(kind, total, slices):
  ici, dcn = program_cost.sent(kind, 1.0, (tuple(range(8)),), slices)
  assert math.isclose(ici + dcn, total)
  assert (dcn == 0) == (len(set(slices)) == 1)
  assert (ici == 0) == (len(set(slices)) == 8)


@pytest.mark.parametrize(
  'text,groups',
  [
    ('replica_groups={{0,1},{2,3}}', [[0, 1], [2, 3]]),
    ('replica_groups={}', [[0, 1, 2, 3]]),
    ('replica_groups=[2,2]<=[4]', [[0, 1], [2, 3]]),
    ('replica_groups=[2,2]<=[2,2]T(1,0)', [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
    ("replica_groups=mesh['a'=4,'b'=1] {'a':(1)2}", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2], device_ids=(3,2,1,0) {'b'}", [[3, 2], [1, 0]]),
    ('source_target_pairs={{0,1},{1,2}}', [[0, 1], [1, 2]]),
  ],
)
def test_groups(text, groups):
  i = hlo_text.Instruction(
    'x', 'all-reduce', (), (), f', channel_id=1, {text}, dimensions={{1}}', False
  )
  assert [list(group) for group in hlo_text.groups_of(i, 4)] == groups


PROGRAM = (ROOT / 'tests' / 'golden' / 'made_up.hlo').read_text()


def test_what_a_tpu_hides_in_fusions():
  found = program_cost.count(PROGRAM, [0] * 4)
  assert found.collectives == {
    'reduce-scatter': Traffic(7, 7 * 512, 7 * 384, 0, 7 * 384),  # an all-reduce by name
    'all-gather': Traffic(7, 7 * 512, 7 * 384, 0),
  }  # in two steps
  assert found.cycles == 700
  # main memory: each turn reads a row of the stack, its number, and x; the rest is on the chip
  assert found.hbm_bytes == 7 * (64 * 4 + 4 + 8 * 16 * 4)


def test_between_slices_a_tpu_sends_to_its_host():
  send = (
    '  %after = token[] after-all()\n'
    '  %sent = (f32[8,16]{1,0}, u32[], token[]) send(%x.1, %after), channel_id=4, '
    'is_host_transfer=true, frontend_attributes={'
    '_xla_host_transfer_handler_name="xla_megascale_runtime",'
    '_xla_megascale_transfer_type="ALL_REDUCE"}\n'
  )
  text = PROGRAM.replace('  %start = s32[] constant(0)\n', send + '  %start = s32[] constant(0)\n')
  assert program_cost.count(text, [0] * 4 + [1] * 4).collectives['all-reduce'] == Traffic(
    1, 512, 0, 512
  )
  assert (
    program_cost.count(text, [0, 0, 1, 1, 2, 2, 3, 3]).collectives['all-reduce'].dcn
    == 2 * 512 * 3 / 4
  )


@pytest.mark.parametrize(
  'condition,loop,count',
  [
    ('compare(%count, %most), direction=LT', '', 7),
    ('compare(%count, %most), direction=LT', ', backend_config={"known_trip_count":{"n":"3"}}', 3),
    ('and(%count, %most)', '', None),
  ],
)
def test_trip_counts(condition, loop, count):
  text = PROGRAM.replace('compare(%count, %most), direction=LT', condition)
  text = text.replace('body=%body', f'body=%body{loop}')
  module = hlo_text.parse(text)
  assert hlo_text.trip_count(module, module.root('main')) == count
  whole, turn = program_cost.count(text, [0] * 4), program_cost.count(text, [0] * 4, one_turn=True)
  assert whole.endless == (count is None)
  assert whole.cycles == 100 * (count or 1) and (turn.cycles == 100 or count)


@pytest.mark.parametrize(
  'out,left,right,rest,flops',
  [
    # what the TPU compiler writes for products with batch dimensions: each batch entry meets its own
    (
      'f32[8,4,256,128]',
      'bf16[8,4,256,64]',
      'bf16[8,4,128,64]',
      'window={size=8x4 stride=7x3 lhs_dilate=8x4}, dim_labels=01bf_01oi->01bf',
      2 * 8 * 4 * 256 * 128 * 64,
    ),
    (
      'f32[8,256,1024]',
      'bf16[8,256,64]',
      'bf16[1024,64,1]',
      'window={size=1}, dim_labels=0bf_oi0->0bf',
      2 * 8 * 256 * 1024 * 64,
    ),
    (
      'f32[1,8,8,2]',
      'f32[1,10,10,3]',
      'f32[3,3,3,2]',
      'window={size=3x3}, dim_labels=b01f_01io->b01f',
      2 * 8 * 8 * 2 * 3 * 9,
    ),
  ],
)
def test_products_written_as_convolutions(out, left, right, rest, flops):
  i = hlo_text.Instruction('c', 'convolution', hlo_text.arrays_of(out), ('l', 'r'), f', {rest}', True)
  assert op_flops.of_product(i, [hlo_text.arrays_of(left), hlo_text.arrays_of(right)]) == flops


@pytest.mark.parametrize(
  'name,target,dims,products',
  [
    ('splash_mha_fwd_residuals.3', 'tpu_custom_call', (4, 12, 128, 64), 2),
    ('splash_mha_dkv.1', 'tpu_custom_call', (4, 12, 128, 64), 5),
    ('custom-call.1', '__cudnn$fmhaSoftmax', (4, 128, 12, 64), 2),
    ('custom-call.2', '__cudnn$fmhaSoftmaxBackward', (4, 128, 12, 64), 5),
    ('custom-call.3', 'Sharding', (4, 128, 12, 64), 0),
  ],
)
def test_products_of_attention_kernels(name, target, dims, products):
  array = hlo_text.Array('bf16', dims, 0)
  i = hlo_text.Instruction(name, 'custom-call', (array,), ('q', 'k'), '', True)
  flops = op_flops.of_library(i, target, [(array,)] * 2)
  assert flops == products * 2 * 4 * 12 * 128 * 128 * 64


# --- Topologies -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
  'text,bytes_,padded',
  [
    ('bf16[8,12,1024,64]{3,2,1,0:T(8,128)(2,1)}', 2 * 8 * 12 * 1024 * 64, 2 * 8 * 12 * 1024 * 128),
    ('bf16[8,12,1024,64]{2,3,1,0:T(8,128)(2,1)}', 2 * 8 * 12 * 1024 * 64, 2 * 8 * 12 * 1024 * 64),
    ('f32[3,130]{1,0:T(8,128)S(1)}', 4 * 3 * 130, 4 * 8 * 256),
    ('f32[1000]{0:T(1024)}', 4000, 4096),
    ('f32[3,130]{1,0}', 4 * 3 * 130, 4 * 3 * 130),
  ],
)
def test_tiles_of_a_tpu_are_filled_up(text, bytes_, padded):
  (array,) = hlo_text.arrays_of(text)
  assert (array.bytes, array.padded) == (bytes_, padded)


ASYNC = """
ENTRY %main (x: f32[8,8]) -> f32[8,8] {{
  %x = f32[8,8]{{1,0}} parameter(0)
  %start = f32[8,8]{{1,0}} all-reduce-start(%x), replica_groups={{{{0,1}}}}, to_apply=%add
  {between}
  %done = f32[8,8]{{1,0}} all-reduce-done(%start)
  ROOT %last = f32[8,8]{{1,0}} add(%done, %beside)
}}
"""


@pytest.mark.parametrize(
  'between,exposed',
  [
    ('%beside = f32[8,8]{1,0} add(%x, %x)', 256),
    ('%beside = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}', 0),
  ],
)
def test_a_collective_is_hidden_by_a_product_beside_it(between, exposed):
  found = program_cost.count(ASYNC.format(between=between), [0, 0]).collectives['all-reduce']
  assert (found.ici, found.exposed) == (256, exposed)


@pytest.mark.parametrize(
  'path,op,place',
  [
    ('jit(step)/jvp(loss)/shard_map/while/body/closed_call/CD,VD->CV/dot_general', 'fusion', 'loss'),
    (
      'jit(step)/jvp()/while/body/closed_call/attn/BTD,DCNH->CBTNH/dot_general',
      'fusion',
      'attention products',
    ),
    (
      'jit(step)/transpose(jvp())/while/body/closed_call/checkpoint/mlp/shard_map/BTF->F/reduce_sum',
      'fusion',
      'bias gradients',
    ),
    ('jit(step)/jvp()/while/body/closed_call/attn/ln/rsqrt', 'fusion', 'layer norms'),
    ('jit(step)/jvp()/while/body/closed_call/attn/split', 'fusion', 'attention layouts'),
    (
      'jit(step)/jvp()/while/body/jit(dynamic_update_index_in_dim)/dynamic_update_slice',
      'fusion',
      'stacks of the layers',
    ),
    ('jit(step)/jvp()/mlp/activation/tanh', 'fusion', 'activation'),
    ('jit(step)/optimizer/mul', 'fusion', 'optimizer'),
    ('', 'all-reduce-start', 'collectives'),
    ('', 'sort', places.OTHER),
  ],
)
def test_places_of_instructions(path, op, place):
  i = hlo_text.Instruction('x', op, (), (), f', metadata={{op_name="{path}"}}' if path else '', False)
  assert places.place_of(i, hlo_text.Module({}, '')) == place


def test_names_of_topologies():
  assert topology.split('4*v5e:8x8') == (4, 'v5e', (8, 8))
  assert topology.split('H100:2x8') == (1, 'h100', (2, 8))
  assert topology.split('tpu7x:2x2x1') == (1, 'v7x', (2, 2, 1))
  for name in ('v5e', 'v9:2x2', 'v5e:axb', 'v5e:0x4', 'v5litepod-16', ''):
    with pytest.raises(UserError, match='is none that is known'):
      topology.split(name)
  with pytest.raises(UserError, match='Do you mean h100'):
    topology.split('h1000:8')
  assert chips.chip_of('TPU v5 lite').flops == 197e12
  assert chips.chip_of('NVIDIA H100 80GB HBM3').hbm > 79 * GIB
  for _, kind, _, _ in topology.TPUS.values():
    assert kind in chips.CHIPS


@tpu
def test_every_name_that_is_offered_is_taken():
  for kind in topology.TPUS:
    for name in topology.legal(kind):
      found = topology.get(name)
      assert found.chips == math.prod(topology.split(name)[2]), name
      assert chips.chip_of(found.devices[0].device_kind) == found.chip, name
  several = topology.get('v5e:4x4', slices=2)
  assert several.name == '2*v5e:4x4' and several.slices == [0] * 16 + [1] * 16
  for name, says in (
    ('v5e:3x5', 'libtpu refuses it .*v5e:4x4 is near it; others: v5e:2x2, '),
    ('v5p:4x4', 'has 3 axes'),
    ('v5e:64x64', 'at most 256 chips'),
  ):
    with pytest.raises(UserError, match=says):
      topology.get(name)
  with pytest.raises(UserError, match='contradict'):
    topology.get('2*v5e:4x4', slices=4)


# --- Plans ----------------------------------------------------------------------------------------


def test_a_plan_of_a_training_step(tmp_path):
  made = plan_train(small_config(data=2, fsdp=4), fake(), 'small', tokens=10**9, dump=tmp_path / 'x')
  assert made.fits and made.refused is None and not made.calibrated
  assert made.mesh == {**made.mesh, 'data': 2, 'fsdp': 4, 'tensor': 1}
  # the formula has the whole vocabulary and no recomputation, as the program
  assert 0.95 < made.flops_compiled / made.flops < 1.05
  assert made.collectives['all-gather']['ici'] > 0 and made.collectives['all-gather']['dcn'] == 0
  assert 'HloModule' in (tmp_path / 'x').read_text()
  results = made.results
  assert math.isclose(results['tokens_per_second'], 32 * 64 / made.times.total)
  assert math.isclose(results['days'] * results['tokens_per_second'] * 86400, 1e9)
  assert math.isclose(results['chip_hours'], results['days'] * 24 * 8)
  assert results['mfu'] < report.COMPUTE + 1e-6
  bill = lambda field: sum(used[field] for used in made.places.values())
  assert bill('hbm_bytes') == made.hbm_bytes and bill('flops') == made.flops_compiled
  named = {'loss', 'optimizer', 'layer norms', 'activation', 'MLP products', 'attention products'}
  assert named < made.places.keys() and made.ideal.keys() < {*places.PLACES}
  assert 0 < sum(made.ideal.values()) < made.hbm_bytes and '  in all' in made.bill()
  made.save(tmp_path / 'plan.json')
  text = (tmp_path / 'plan.json').read_text()
  assert Report.from_json(text) == made
  assert 'uncalibrated' in made.text() and 'uncalibrated' in text


def test_over_two_slices_gradients_go_over_dcn():
  made = plan_train(small_config(data=2, fsdp=4), fake(slices=2), 'small')
  assert made.collectives['all-gather']['dcn'] == 0
  assert made.collectives['all-reduce']['dcn'] > 0 and made.times.dcn > 0


@pytest.mark.slow
def test_accumulation_repeats_the_gathers_of_the_layers():
  once, twice = small_config(fsdp=8), small_config(fsdp=8)
  once.train.micro_batch_rows = 4
  once, twice = (plan_train(c, fake(), 'small') for c in (once, twice))
  layers, tables = 3 * 12 * 64**2 * 4, (256 + 64) * 64 * 4
  assert once.collectives['all-gather']['bytes'] == tables + 2 * layers  # forward and backward
  assert twice.collectives['all-gather']['bytes'] == tables + 4 * layers
  assert math.isclose(once.flops_compiled, twice.flops_compiled)


@pytest.mark.slow
def test_what_does_not_fit_says_so():
  made = plan_train(small_config(), fake(hbm=2**20), 'small')
  assert not made.fits and made.memory.total > 2**20
  assert 'fits       NO' in made.text() and '--config.model.remat' in made.text()


def test_a_refusal_of_the_compiler_is_a_plan_too(monkeypatch):
  from gpt2_jax.training.run_plan import Plan, out_of_memory_advice

  def refuse(self):
    with out_of_memory_advice(self):
      raise jax.errors.JaxRuntimeError(
        'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO '
        'temporaries (21.41G) exceeds available HBM (15.75G).\nmore'
      )

  monkeypatch.setattr(Plan, 'compile_train_step', refuse)
  made = plan_train(small_config(), fake(), 'small')
  assert not made.fits and made.times is None and '21.41G' in made.text()
  assert made.memory.temporaries == int(21.41 * GIB)
  assert made.memory.arguments > 3 * 4 * made.numbers['parameters'] / 8
  assert Report.from_json(made.to_json()) == made


def test_of_a_program_that_cannot_be_read_the_memory_is_known(monkeypatch):
  """A compiler's text of another form costs the times, and nothing else."""
  monkeypatch.setattr(hlo_text, 'COMPUTATION', re.compile('no line is so'))
  made = plan_train(small_config(), fake(), 'small')
  assert made.memory.total > 0 and made.fits and made.times is None
  [note] = made.notes
  assert "this compiler's program can't be read" in note and '--dump' in note
  assert note in made.text() and made == Report.from_json(made.to_json())


def test_of_a_program_that_cannot_be_printed_the_memory_is_known(monkeypatch):
  """As libtpu 0.0.52's of a v6e."""

  def refuse(self):
    raise jax.errors.JaxRuntimeError('INTERNAL: RET_CHECK failure: async-update')

  monkeypatch.setattr(jax.stages.Compiled, 'as_text', refuse)
  made = plan_train(small_config(), fake(), 'small')
  assert made.fits and made.times is None and made.memory.total > 0
  assert "can't print its program (INTERNAL: RET_CHECK failure" in made.text()


def test_lengths_follow_the_context():
  for S, given, want in (
    (1024, (None, None), (128, 128)),
    (64, (None, None), (32, 32)),
    (2, (None, None), (2, 2)),
    (8, (None, 6), (8, 8)),
    (1024, (16, 32), (16, 32)),
  ):
    assert lengths(S, *given) == want, S
  for S, given in (
    (1, (None, None)),
    (64, (128, None)),
    (64, (None, 64)),
    (8, (0, 4)),
    (8, (1, 10**400)),
  ):
    with pytest.raises(UserError, match='n_positions') as error:
      lengths(S, *given)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize('mode', ['decode', 'prefill'])
def test_generation_is_planned(mode):
  config = small_config(data=4, fsdp=1, tensor=2)
  made = plan_decode(config, fake(), 'small', mode, AskedTexts(8, 16, 32), largest=False)
  cache = 2 * 3 * 64 * 48 * 8 * 4  # keys and values, layers, width, slots, rows, float32
  assert made.results['kv_cache_bytes'] == cache
  assert made.results['kv_cache_bytes_per_device'] == cache / 8
  assert 0.7 < made.flops_compiled / made.flops < 1.3
  assert made.fits and made.times.total > 0
  if mode == 'decode':
    assert made.hbm_bytes > made.results['weight_bytes_per_device']


@pytest.mark.slow
def test_the_largest_batch_is_one_that_fits():
  config = small_config(data=8, fsdp=1)
  plan = lambda rows, largest: plan_decode(
    config, fake(hbm=6 * 2**20), 'small', 'decode', AskedTexts(rows, 16, 32), largest=largest
  )
  rows = int(plan(8, True).results['largest_batch'])
  assert rows > 8 and rows % 8 == 0
  assert plan(rows, False).fits and not plan(2 * rows, False).fits


# --- Search ---------------------------------------------------------------------------------------


def test_candidates_divide_the_model_and_the_batch():
  found = search.candidates(small_config(), fake(slices=2))
  assert len(set(found)) == len(found) > 20
  for c in found:
    assert c.data * c.fsdp * c.tensor == 8 and c.tensor <= 4 and 64 % c.fsdp == 4 % c.tensor == 0
    assert 32 % (c.data * c.fsdp * c.rows) == 0
  assert {c.remat for c in found} == {'none', 'dots', 'full'}
  few = search.candidates(small_config(), fake(hbm=2**20))
  assert len(few) < len(found)


def test_plans_are_kept(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  config, topo = small_config(), fake()
  made = search.plan_cached(config, topo, 'small')
  monkeypatch.setattr(search, 'plan_train', lambda *_, **__: pytest.fail('compiled again'))
  assert search.plan_cached(config, topo, 'small') == made
  config.optim.b2 = 0.5
  assert search.cache_key(config, 'x', None) != search.cache_key(small_config(), 'x', None)


def test_the_ranking_puts_what_does_not_fit_last():
  made = plan_train(small_config(), fake(), 'small')
  candidate = search.Candidate(1, 8, 1, 2, 'none')
  slow = dataclasses.replace(made, results=made.results | {'tokens_per_second': 1.0})
  big = dataclasses.replace(made, fits=False, times=None, results={})
  ranked = search.ranked([(candidate, big), (candidate, slow), (candidate, made)])
  assert [r for _, r in ranked] == [made, slow, big]
  assert len(search.table(ranked).splitlines()) == 4


# --- The command line -----------------------------------------------------------------------------


@pytest.mark.parametrize(
  'words,says',
  [
    (['--topology=v9:2x2'], 'is none that is known'),
    (['--topology=v5e:4x4', '--config.mesh.foo=3'], "no knob 'foo'"),
    (['--topology=v5e:4x4', '--search', '--mode=decode'], '--search is for --mode train'),
    (['--config=configs/none.py', '--topology=v5e:4x4'], 'there is no file'),
    (['--config=configs/tiny.py:none', '--topology=v5e:4x4'], "recipe 'none' is none of"),
    (['--topology=v5e:4x4', '--config.mesh.tensor', '3', '--config.mesh.fsdp=1'], 'does not cover'),
  ],
)
def test_errors_are_one_message(words, says, monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  if importlib.util.find_spec('libtpu') is None and '--topology=v5e:4x4' in words:
    pytest.skip('libtpu is not installed')
  if not any(word.startswith('--config=') for word in words):
    words = ['--config=configs/tiny.py', *words]
  with pytest.raises(SystemExit) as e:
    main.main(['plan', *words])
  assert says in str(e.value) and str(e.value).startswith('error: ')
  assert str(e.value).count('\n') == 0


# --- Compilers of hardware that is not here -------------------------------------------------------

TINY = (
  '--config.model.n_layer=2',
  '--config.model.n_embd=64',
  '--config.model.vocab_size=256',
  '--config.model.n_positions=64',
  '--config.train.global_batch_tokens=1024',
)


@tpu
def test_a_tpu_plan(tmp_path):
  done = run(
    '-m',
    'gpt2_jax',
    'plan',
    '--config=configs/tiny.py',
    '--topology=v5e:2x2',
    f'--json={tmp_path / "plan.json"}',
    *TINY,
  )
  assert done.returncode == 0, done.stderr
  made = Report.from_json((tmp_path / 'plan.json').read_text())
  assert made.device_kind == 'TPU v5 lite' and made.devices == 4 and made.fits
  assert 'bfloat16' in made.model and made.memory.hbm == int(15.75 * GIB)
  assert 0.9 < made.flops_compiled / made.flops < 1.2
  assert made.cycles > 0 and made.collectives and 'fits       yes' in done.stdout


@tpu
def test_a_plan_of_two_slices(tmp_path):
  done = run(
    '-m',
    'gpt2_jax',
    'plan',
    '--config=configs/tiny.py',
    '--topology=2*v5e:2x2',
    f'--json={tmp_path / "plan.json"}',
    *TINY,
    '--config.mesh.data=2',
    '--config.model.n_embd=256',
  )  # heads of 128: narrower ones are padded before they go
  assert done.returncode == 0, done.stderr
  made = Report.from_json((tmp_path / 'plan.json').read_text())
  moved = made.collectives
  assert moved['all-gather']['dcn'] == 0  # of weights, inside a slice
  # of gradients each device sends its quarter, reduced inside the slice: 2 or 4 bytes a parameter
  gradients = made.numbers['parameters'] / 4
  assert 2 * gradients < moved['all-reduce']['dcn'] < 1.3 * 4 * gradients
  assert made.times.dcn > made.times.compute


@gpu
def test_a_gpu_plan(tmp_path):
  done = run(
    '-m',
    'gpt2_jax',
    'plan',
    '--config=configs/tiny.py',
    '--topology=h100:2x4',
    f'--json={tmp_path / "plan.json"}',
    *TINY,
    '--config.mesh.data=2',
  )
  assert done.returncode == 0, done.stderr
  made = Report.from_json((tmp_path / 'plan.json').read_text())
  assert made.device_kind.startswith('NVIDIA H100') and made.devices == 8 and made.fits
  assert 0.9 < made.flops_compiled / made.flops < 1.2
  assert sum(t['dcn'] for t in made.collectives.values()) > 0


@pytest.mark.slow
def test_a_search(tmp_path):
  done = run(
    '-m',
    'gpt2_jax',
    'plan',
    '--config=configs/tiny.py',
    '--topology=v5e:2x2',
    '--search',
    '--search-limit=2',
    f'--json={tmp_path / "plans.json"}',
    *TINY,
    timeout=900,
    XDG_CACHE_HOME=str(tmp_path),
  )
  assert done.returncode == 0, done.stderr
  plans = json.loads((tmp_path / 'plans.json').read_text())
  speeds = [plan['results']['tokens_per_second'] for plan in plans]
  assert len(plans) == 2 and speeds == sorted(speeds, reverse=True)
  assert len(list((tmp_path / 'gpt2_jax' / 'plans').glob('*.json'))) == 2


# What the configs get by themselves.
SHIPPED = [
  (size, name, fsdp)
  for name in ('v5e:4x4', 'v5e:16x16')
  for size, fsdp in (('small', 1), ('medium', 2), ('large', 4), ('xl', 8))
]


@tpu
@pytest.mark.slow
@pytest.mark.parametrize('size,name,fsdp', SHIPPED)
def test_how_far_the_shipped_configs_are_split(size, name, fsdp):
  config, _ = command.load_config(f'configs/{size}.py')
  assert make_plan(config, topology.get(name).devices).mesh.shape['fsdp'] == fsdp


# The layers are one scan's body, so two of them compile the same program. Each size once as it is
# split; the largest over more replicas too, and the smallest over all chips: there an einsum used to
# be cut in pieces.
COMPILED = [*SHIPPED[:4], SHIPPED[-1], ('small', 'v5e:4x4', 16)]


@tpu
@pytest.mark.slow
@pytest.mark.parametrize('size,name,fsdp', COMPILED)
def test_weights_are_gathered_and_nothing_is_copied_whole(size, name, fsdp, tmp_path, capfd):
  listed = (size, name, fsdp) == SHIPPED[0]  # is the first row of the docs' table, with all layers
  overrides = [f'--config.mesh.fsdp={fsdp}', *([] if listed else ['--config.model.n_layer=2'])]
  config, called = command.load_config(f'configs/{size}.py', tuple(overrides))
  made = plan_train(config, topology.get(name), called, dump=tmp_path / 'train.hlo.txt')
  assert 'Involuntary full rematerialization' not in capfd.readouterr().err
  text = (tmp_path / 'train.hlo.txt').read_text()
  assert 'windowed_dot_general' not in text
  assert ('all-gather' in made.collectives) == (fsdp > 1)
  # a few, of edges: a shard of 200 columns isn't a multiple of a register's 128 lanes
  moved = {kind: one['bytes'] for kind, one in made.collectives.items()}
  assert moved.get('collective-permute', 0) < 0.02 * sum(moved.values())
  if listed:
    compare_with_the_table(made)


def compare_with_the_table(made: Report) -> None:
  """Whether a plan is that of the table, if the same versions made that."""
  kept = json.loads((ROOT / 'benchmarks' / 'results' / 'plans-tpu.json').read_text())
  entry = kept['small v5e:4x4']
  if not entry['versions'].items() <= versions().items():
    pytest.skip(f'the table is of other versions: {entry["versions"]}')
  listed = entry['report']
  for have, want in (
    (made.memory.total, listed['memory']['total']),
    (made.times.total, listed['times']['total']),
    (made.hbm_bytes, listed['hbm_bytes']),
  ):
    assert 0.97 < have / want < 1.03, 'stale: python -m benchmarks.plans'


def test_memory_limit_of_a_device_that_is_only_described():
  from gpt2_jax.training.memory_estimate import memory_limit

  class Described:
    platform, device_kind = 'tpu', 'TPU v5 lite'

    def memory_stats(self):
      raise jax.errors.JaxRuntimeError('only supported for addressable devices')

  assert memory_limit(Described()) == int(0.9 * int(15.75 * GIB))
  Described.device_kind = 'TPU v99'
  with pytest.raises(UserError, match='how much memory'):
    memory_limit(Described())
  assert np.isfinite(memory_limit(jax.devices()[0]))

"""Inputs lie over the context axis; what comes after them does not know it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from steps import config_on, sent

from perceiver_ar.errors import UserError
from perceiver_ar.ops import attention
from perceiver_ar.ops.masks import Mask
from perceiver_ar.ops.rotation import Turns


def _sent(mesh, **changes):
  return sent(config_on(mesh, **{'model.scan_unroll': 1} | changes))


@pytest.mark.parametrize(
  'mesh',
  [
    {'data': 2, 'context': 4},
    pytest.param({'context': 4, 'model': 2}, marks=pytest.mark.slow),
    pytest.param({'slice': 2, 'data': 2, 'context': 2}, marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_the_latent_phase_sends_nothing_over_context_but_gradients(mesh):
  sent = []
  for num_rows in (8, 16):
    rows = _sent(mesh, **{'train.batch_size': num_rows})
    over_context = [row for row in rows if 'context' in row.axis]
    phases = {row.phase for row in over_context}
    assert {'input', 'gradient'} <= phases
    assert phases <= {'input', 'gradient'}
    sent.append(sum(r.bytes for r in over_context if r.phase == 'gradient'))
  # Sums of activations would be of more rows.
  assert sent[0] == sent[1]


@pytest.mark.slow
def test_too_few_rows_split_the_latents_and_gather_their_keys():
  rows = _sent({'context': 8}, **{'train.num_microbatches': 2})
  latent = [r for r in rows if r.phase == 'latent' and r.axis == 'context']
  assert {r.kind for r in latent} == {'all-gather', 'reduce-scatter'}


@pytest.mark.slow
@pytest.mark.parametrize(
  'mesh', [{'context': 8}, {'data': 2, 'context': 2, 'model': 2}], ids=str
)
def test_what_latents_and_the_context_axis_send_does_not_grow_with_the_inputs(
  mesh,
):
  over_context, of_latents = [], []
  for M in (24, 96):
    sizes = {'model.context_length': M, 'model.num_latents': 8}
    # Whether a table is less work depends on M.
    rows = _sent(mesh, **sizes, **{'model.token_table': 'never'})
    over_context.append(sum(r.bytes for r in rows if 'context' in r.axis))
    of_latents.append([r for r in rows if r.phase == 'latent'])
  # But for the ids of inputs, four bytes each.
  assert over_context[1] - over_context[0] < 4 * 8 * (96 - 24)
  assert of_latents[0] == of_latents[1]
  assert bool(of_latents[0]) == (mesh != {'context': 8})


@pytest.mark.parametrize(
  ('name', 'platform', 'dtype', 'found'),
  [
    ('auto', 'tpu', 'float32', 'flash'),
    ('auto', 'gpu', 'bfloat16', 'cudnn'),
    ('auto', 'gpu', 'float32', 'chunked'),
    ('auto', 'cpu', 'float32', 'chunked'),
    ('chunked', 'tpu', 'bfloat16', 'chunked'),
    ('reference', 'gpu', 'bfloat16', 'reference'),
  ],
)
def test_auto_takes_what_the_platform_has(name, platform, dtype, found):
  where = {'platform': platform, 'dtype': dtype}
  assert attention.choose(name, 5, **where, head_size=64).name == found


@pytest.mark.parametrize(('N', 'M'), [(4, 6), (5, 6), (4, 7), (5, 7)])
def test_cudnn_gets_even_lengths_and_gives_what_reference_does(
  N, M, monkeypatch
):
  """There is no GPU here: XLA computes what cuDNN is asked for."""
  compute = jax.nn.dot_product_attention

  def stand_in(*qkv, implementation, **how):
    assert implementation == 'cudnn'
    assert not any(size % 2 for x in qkv for size in x.shape[1:2])
    return compute(*qkv, implementation='xla', **how)

  monkeypatch.setattr(jax.nn, 'dot_product_attention', stand_in)
  rng = np.random.default_rng(0)
  qkv = [
    jnp.asarray(rng.normal(size=(3, size, 16)), jnp.float32)
    for size in (N, M, M)
  ]
  # The second row begins among its queries, the third has no key.
  mask = Mask(offset=M - N, start_B=jnp.asarray([0, M - 2, M]))

  def run(name):
    kernel = attention.Kernel(name, 5, 8, interpret=False)
    attend = lambda q, k, v: attention.attend(q, k, v, mask, Turns(), kernel)
    out, vjp = jax.vjp(attend, *qkv)
    return out, *vjp(jnp.ones_like(out))

  for a, b in zip(run('cudnn'), run('reference'), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('head_size', [1024, 12])
def test_auto_does_not_take_what_cudnn_refuses(head_size):
  where = {'platform': 'gpu', 'dtype': 'bfloat16', 'head_size': head_size}
  assert attention.choose('auto', 5, **where).name == 'chunked'
  with pytest.raises(UserError, match=str(head_size)):
    attention.choose('cudnn', 5, **where)


@pytest.mark.parametrize(
  ('name', 'platform', 'dtype'),
  [
    ('cudnn', 'cpu', 'bfloat16'),
    ('cudnn', 'tpu', 'bfloat16'),
    ('cudnn', 'gpu', 'float32'),
    ('flash', 'gpu', 'bfloat16'),
  ],
)
def test_an_implementation_is_never_replaced_in_silence(name, platform, dtype):
  with pytest.raises(UserError) as error:
    attention.choose(name, 5, platform=platform, dtype=dtype, head_size=64)
  for word in ('model.attention', name, platform, 'auto'):
    assert word in str(error.value)

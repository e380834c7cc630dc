"""The published model once more, for files to import: another way to write it.

Left-aligned, with dense masks, heads merged and neighbouring channels rotated,
under the published names; in NumPy float64, or in JAX where gradients are
wanted. Shares no code with the package.
"""

import json

import numpy as np

_ROOT = 'perceiver_ar/~'


def config(**changes):
  """The keys that a file has, of a small rotary model."""
  return {
    'vocab': 23,
    'm': 12,
    'n': 4,
    'layers': 2,
    'width': 16,
    'embed': 16,
    'cross_heads': 2,
    'heads': 4,
    'pos': 'rotary',
    'pe': 'sinusoidal',
    'learn': False,
    'frac': 0.5,
    'frac_heads': 1.0,
    'data_pos': True,
    'idx': [14],
    'wavelength': 12,
    'neg': False,
  } | changes


def sinusoids(size, width):
  half = width // 2
  angles = np.outer(
    np.arange(size),
    np.exp(-np.arange(half) * np.log(10000.0) / (half - 1)),
  )
  return np.concatenate([np.sin(angles), np.cos(angles)], 1).astype(np.float32)


def random_weights(c, rng, cross_hidden=40, hidden=24):
  """Everything is drawn, biases and norms too, so that nothing hides."""
  V, E, D = c['vocab'], c['embed'], c['width']
  weights = {}

  def linear(name, num_in, num_out):
    weights[f'{name}/w'] = rng.normal(size=(num_in, num_out)) / num_in**0.5
    weights[f'{name}/b'] = rng.normal(size=num_out) / 5

  def norm(name, width):
    weights[f'{name}/scale'] = 1 + rng.normal(size=width) / 5
    weights[f'{name}/offset'] = rng.normal(size=width) / 5

  def block(name, key_width, norms, hidden):
    linear(f'{name}/attention/linear', D, key_width)
    linear(f'{name}/attention/linear_1', key_width, key_width)
    linear(f'{name}/attention/linear_2', key_width, key_width)
    linear(f'{name}/attention/linear_3', key_width, D)
    linear(f'{name}/dense/linear', D, hidden)
    linear(f'{name}/dense/linear_1', hidden, D)
    for number, width in enumerate(norms):
      norm(f'{name}/layer_norm{_suffix(number)}', width)

  weights[f'{_ROOT}/embed/embeddings'] = rng.normal(size=(V, E))
  if c['pos'] == 'absolute':
    for axis, size in enumerate(c['idx']):
      table = rng.normal(size=(size, E))
      if c['pe'] == 'sinusoidal' and not c['learn']:
        table = sinusoids(size, E)
      weights[f'{_ROOT}/embed_{axis + 1}/embeddings'] = table
  linear(f'{_ROOT}/linear', E, D)
  block(f'{_ROOT}/cross_attention', E, (D, E, D), cross_hidden)
  for layer in range(c['layers']):
    block(f'{_ROOT}/self_attention{_suffix(layer)}', D, (D, D), hidden)
  norm('perceiver_ar/layer_norm', D)
  linear(f'{_ROOT}/logits', D, V)
  return {name: x.astype(np.float32) for name, x in weights.items()}


def random_file(c, rng, lengths, **sizes):
  """Arrays of a file with outputs, without gradients."""
  lengths = np.array(lengths)
  is_token = np.arange(c['m'] + 1) <= lengths[:, None]
  tokens = rng.integers(3, c['vocab'], size=is_token.shape) * is_token
  tokens[lengths == 0] = 0
  inputs, targets = tokens[:, :-1].copy(), tokens[:, 1:]
  inputs[np.arange(c['m']) >= lengths[:, None]] = 0
  index = np.arange(c['m'])
  axes = [index + 1]
  if len(c['idx']) > 1:
    axes = [index % 3 + 1, index // 3 + 1, index % 2 + 1][: len(c['idx'])]
  idxs = np.stack(axes, -1) * (inputs > 0)[..., None]
  weights = random_weights(c, rng, **sizes)
  last = np.maximum(lengths[:, None] - c['n'] + np.arange(c['n']), -1)
  labels = np.take_along_axis(targets, last, 1) * (last >= 0)
  logits = forward(np, weights, c, inputs, idxs, lengths, last)
  mask = labels > 0
  loss = loss_of(np, logits, labels) * mask
  return {
    'config': np.array(json.dumps(c)),
    'inputs': inputs.astype(np.int32),
    'targets': targets.astype(np.int32),
    'input_idxs': idxs.astype(np.int32),
    'lengths': lengths,
    'latent_last_steps': last.astype(np.int32),
    'logits': logits.astype(np.float32),
    'labels': labels.astype(np.int32),
    'loss': loss.astype(np.float32),
    'loss_mask': mask,
    'total_loss': loss.sum().astype(np.float32),
    **{f'p/{name}': x for name, x in weights.items()},
  }


def add_gradients(file, c):
  """The same file with gradients of the summed loss."""
  import jax
  import jax.numpy as jnp

  def total(weights):
    logits = forward(
      jnp,
      weights,
      c,
      file['inputs'],
      file['input_idxs'],
      file['lengths'],
      file['latent_last_steps'],
    )
    return (loss_of(jnp, logits, file['labels']) * file['loss_mask']).sum()

  weights = {k[2:]: x for k, x in file.items() if k.startswith('p/')}
  with jax.numpy_rank_promotion('allow'):
    grads = jax.jit(jax.grad(total))(weights)
  return file | {f'g/{name}': np.asarray(g) for name, g in grads.items()}


def loss_of(xp, logits, labels):
  log_z = xp.log(xp.exp(logits).sum(-1))
  picked = xp.take_along_axis(logits, labels[..., None], -1)[..., 0]
  return log_z - picked + 1e-4 * log_z**2


def forward(xp, weights, c, inputs, idxs, lengths, last):
  """Logits [B, N, V]; `last` is the input that each latent ends with."""
  p = weights if xp is not np else _float64(weights)
  from_end = np.maximum(lengths[:, None] - 1 - np.arange(c['m']), 0)
  turns = idxs[..., 0] if c['data_pos'] else from_end * (-1) ** c['neg']
  x = p[f'{_ROOT}/embed/embeddings'][inputs]
  if c['pos'] == 'absolute':
    for axis in range(len(c['idx'])):
      ids = idxs[..., axis] if c['data_pos'] else from_end
      x = x + p[f'{_ROOT}/embed_{axis + 1}/embeddings'][ids]
  rows = last % c['m']  # where there is none, the last row serves
  z = xp.take_along_axis(x, rows[..., None], 1)
  z = _linear(p, f'{_ROOT}/linear', z)
  turns_z = np.take_along_axis(turns, rows, 1)
  sees = (np.arange(c['m']) <= last[..., None]) & (inputs > 0)[:, None]
  name = f'{_ROOT}/cross_attention'
  z = _block(xp, p, c, name, z, x, (turns_z, turns), sees, c['cross_heads'])
  sees = (last[:, None] <= last[..., None]) & (last >= 0)[:, None]
  sees |= np.eye(c['n'], dtype=bool)
  for layer in range(c['layers']):
    name = f'{_ROOT}/self_attention{_suffix(layer)}'
    z = _block(xp, p, c, name, z, None, (turns_z,) * 2, sees, c['heads'])
  z = _norm(p, 'perceiver_ar/layer_norm', z)
  return _linear(p, f'{_ROOT}/logits', z)


def _block(xp, p, c, name, z, x, turns, sees, num_heads):
  q = kv = _norm(p, f'{name}/layer_norm', z)
  if x is not None:
    kv = _norm(p, f'{name}/layer_norm_1', x)
  q, k, v = (
    _heads(_linear(p, f'{name}/attention/linear{_suffix(i)}', y), num_heads)
    for i, y in enumerate((q, kv, kv))
  )
  if c['pos'] == 'rotary':
    q, k = _rotate(xp, q, turns[0], c), _rotate(xp, k, turns[1], c)
  scores = xp.einsum('bnhk,bmhk->bhnm', q, k) / q.shape[-1] ** 0.5
  scores = xp.where(sees[:, None], scores, -1e30)
  scores = xp.exp(scores - scores.max(-1, keepdims=True))
  scores = scores / scores.sum(-1, keepdims=True)
  out = xp.einsum('bhnm,bmhk->bnhk', scores, v)
  z = z + _linear(
    p, f'{name}/attention/linear_3', out.reshape(*out.shape[:2], -1)
  )
  last_norm = f'{name}/layer_norm_{1 if x is None else 2}'
  hidden = _linear(p, f'{name}/dense/linear', _norm(p, last_norm, z))
  return z + _linear(p, f'{name}/dense/linear_1', xp.maximum(hidden, 0) ** 2)


def _rotate(xp, x, turns, c):
  """Channels (0, 1), (2, 3), ... of the first heads."""
  num_heads = int(c['frac_heads'] * x.shape[2])
  half = int(x.shape[3] * c['frac'] / 2)
  if not half or not num_heads:
    return x
  exponents = np.arange(half) / max(half - 1, 1)
  angles = turns[..., None] * float(c['wavelength']) ** -exponents
  sin, cos = (f(angles)[:, :, None].astype(x.dtype) for f in (np.sin, np.cos))
  turned, rest = x[:, :, :num_heads], x[:, :, num_heads:]
  a, b = turned[..., 0 : 2 * half : 2], turned[..., 1 : 2 * half : 2]
  pairs = xp.stack([a * cos - b * sin, b * cos + a * sin], -1)
  pairs = pairs.reshape(*pairs.shape[:3], 2 * half)
  turned = xp.concatenate([pairs, turned[..., 2 * half :]], -1)
  return xp.concatenate([turned, rest], 2)


def _suffix(number):
  return f'_{number}' if number else ''


def _float64(weights):
  return {name: x.astype(np.float64) for name, x in weights.items()}


def _linear(p, name, x):
  return x @ p[f'{name}/w'] + p[f'{name}/b']


def _norm(p, name, x):
  mean = x.mean(-1, keepdims=True)
  spread = ((x - mean) ** 2).mean(-1, keepdims=True) + 1e-5
  scale, offset = p[f'{name}/scale'], p[f'{name}/offset']
  return (x - mean) / spread**0.5 * scale + offset


def _heads(x, num_heads):
  return x.reshape(*x.shape[:2], num_heads, -1)

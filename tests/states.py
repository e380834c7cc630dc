"""A small training state with every dtype, and where to put it."""

import pathlib
import runpy

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from perceiver_ar import config as config_lib

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = config_lib.resolve(
  runpy.run_path(str(ROOT / 'configs' / 'default.py'))['get_config']()
)


@flax.struct.dataclass
class State:
  step: jax.Array
  params: dict
  opt_state: optax.OptState
  flags: tuple


def make_mesh(data, model):
  return jax.make_mesh(
    (data, model),
    ('data', 'model'),
    axis_types=(jax.sharding.AxisType.Auto,) * 2,
    devices=jax.devices()[: data * model],
  )


def sharded(mesh, tree):
  """Abstract, with every array spread as far as its shape allows."""

  def leaf(x):
    axes = [
      name if size % mesh.shape[name] == 0 else None
      for name, size in zip(mesh.axis_names, x.shape, strict=False)
    ]
    spec = jax.sharding.PartitionSpec(*axes)
    sharding = jax.sharding.NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  return jax.tree.map(leaf, tree)


def make_state(seed=0, mesh=None):
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape).astype(np.float32))

  params = {
    'embed': {'table': normal(64, 48)},
    'layers': {
      'kernel': normal(8, 8, 3),
      'scale': normal(8).astype(jnp.bfloat16),
    },
  }
  optimizer = optax.chain(optax.clip(1.0), optax.adam(1e-3))
  state = State(
    step=jnp.int32(seed),
    params=params,
    opt_state=optimizer.init(params),
    flags=(jnp.array([True, False] * 4), jnp.arange(8, dtype=jnp.uint32)),
  )
  abstract = sharded(mesh or make_mesh(4, 2), state)
  return jax.tree.map(
    lambda x, a: jax.device_put(x, a.sharding), state, abstract
  )


def bits(x):
  return np.asarray(x).tobytes()


def same(a, b):
  return jax.tree.structure(a) == jax.tree.structure(b) and all(
    x.dtype == y.dtype and x.shape == y.shape and bits(x) == bits(y)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )

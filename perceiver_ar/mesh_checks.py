"""Refuses what a mesh does not divide, before anything is compiled."""

from jax.sharding import Mesh

from perceiver_ar import logical, partitioning
from perceiver_ar.config import Config, ModelConfig
from perceiver_ar.errors import UserError
from perceiver_ar.ops import attention


def check_batch(key: str, size: int, mesh: Mesh, *, axes: str) -> None:
  """Refuses a number of rows that axes, such as 'slice*data', do not divide."""
  ways = partitioning.num_parts(mesh, axes.split('*'))
  if size % ways:
    raise UserError(
      f'{key} {size} is not divisible by mesh axes {axes} of size {ways}; '
      f'use a multiple of {ways}, or a smaller mesh axis'
    )


def check_context(model: ModelConfig, key: str, size: int, mesh: Mesh) -> None:
  """Refuses inputs that the context axis does not divide, or cannot split."""
  context = mesh.shape['context']
  for name, inputs in (
    (key, size),
    ('model.num_kept_inputs', model.num_kept_inputs),
  ):
    if inputs % context:
      raise UserError(
        f'{name} {inputs} is not divisible by mesh.context {context}; use a '
        f'multiple of {context}, or a smaller context axis'
      )
  kernel = attention.choose(
    model.attention,
    model.attention_block,
    platform=mesh.devices.flat[0].platform,
    dtype=model.dtype,
    head_size=model.embed_width // model.num_cross_heads,
  )
  if context > 1 and not kernel.can_split_keys:
    raise UserError(
      f'{kernel.name} attention cannot split its inputs over mesh.context '
      f'{context}; set model.attention to chunked, or to flash on TPU'
    )


def check_train(config: Config, mesh: Mesh) -> None:
  """Refuses a training run that the mesh does not divide."""
  model, train = config.model, config.train
  num_rows = train.batch_size // train.num_microbatches
  check_batch(
    'train.batch_size / train.num_microbatches',
    num_rows,
    mesh,
    axes='slice*data',
  )
  check_context(model, 'model.context_length', model.context_length, mesh)
  logical.latent_axes(mesh, num_rows, model.num_latents)
  if config.evaluate.every:
    check_evaluate(config, mesh)


def check_evaluate(config: Config, mesh: Mesh) -> None:
  """The same for evaluation, which has sizes of its own."""
  how = config.evaluate
  check_batch('evaluate.batch_size', how.batch_size, mesh, axes='slice*data')
  check_context(
    config.model, 'evaluate.context_length', how.context_length, mesh
  )
  logical.latent_axes(mesh, how.batch_size, how.num_latents)


def check_sample(config: Config, mesh: Mesh) -> None:
  num = config.sample.num_samples
  check_batch('sample.num_samples', num, mesh, axes='slice*data*context')

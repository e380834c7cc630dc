"""Refuses what a mesh does not divide, before anything is compiled."""

from jax.sharding import Mesh

from perceiver_ar import logical, partitioning
from perceiver_ar.config import Config, MeshConfig, ModelConfig
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
  _check_inputs(key, size, context)
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


def _check_inputs(key: str, size: int, context: int) -> None:
  if size % context:
    raise UserError(
      f'{key} {size} is not divisible by mesh.context {context}; use a '
      f'multiple of {context}, or a smaller context axis'
    )


def _check_rules(config: MeshConfig, mesh: Mesh) -> None:
  """Refuses a model axis along which every device would do the same."""
  ways = mesh.shape['model']
  if ways > 1 and not partitioning.splits_parameters(config.rules, 'model'):
    raise UserError(
      f'mesh.rules {config.rules} splits nothing over mesh.model {ways}; use '
      'mesh.rules=fsdp_tensor, or mesh.model=1'
    )


def check_train(config: Config, mesh: Mesh) -> None:
  """Refuses a training run that the mesh does not divide."""
  model, train = config.model, config.train
  _check_rules(config.mesh, mesh)
  num_rows = train.batch_size // train.num_microbatches
  check_batch(
    'train.batch_size / train.num_microbatches',
    num_rows,
    mesh,
    axes='slice*data',
  )
  check_context(model, 'model.context_length', model.context_length, mesh)
  # Inputs are dropped in training only.
  _check_inputs(
    'model.num_kept_inputs', model.num_kept_inputs, mesh.shape['context']
  )
  logical.latent_axes(mesh, num_rows, model.num_latents)
  if config.evaluate.every:
    check_evaluate(config, mesh)


def check_evaluate(config: Config, mesh: Mesh) -> None:
  """The same for evaluation, which has sizes of its own."""
  how = config.evaluate
  _check_rules(config.mesh, mesh)
  check_batch('evaluate.batch_size', how.batch_size, mesh, axes='slice*data')
  check_context(
    config.model, 'evaluate.context_length', how.context_length, mesh
  )
  logical.latent_axes(mesh, how.batch_size, how.num_latents)


def check_sample(config: Config, mesh: Mesh) -> None:
  num = config.sample.num_samples
  _check_rules(config.mesh, mesh)
  check_batch('sample.num_samples', num, mesh, axes='slice*data*context')

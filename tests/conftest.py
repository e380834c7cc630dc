"""Eight fake CPU devices, and no silent broadcasting, in every test."""

import os

os.environ['JAX_PLATFORMS'] = 'cpu'
# Nobody holds a TPU here, so processes may share its compiler.
os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'
# Compiling is most of the work of small tests: little is optimised, and the
# older emitters of fused loops make half the code.
os.environ['XLA_FLAGS'] = (
  '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true '
  '--xla_cpu_use_fusion_emitters=false'
)

import jax

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_default_matmul_precision', 'highest')

"""Eight fake CPU devices, and no silent broadcasting, in every test."""

import gc
import os
import tempfile

os.environ['JAX_PLATFORMS'] = 'cpu'
# Nobody holds a TPU here, so processes may share its compiler.
os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'
# Compiling is most of the work of small tests: little is optimised, and the
# older emitters of fused loops make half the code, compiled in one part.
os.environ['XLA_FLAGS'] = (
  '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true '
  '--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1'
)
# Nobody reads from which lines of Python a program was made.
os.environ['JAX_TRACEBACK_IN_LOCATIONS_LIMIT'] = '0'

import jax

# Traces are all that is made here, and looking for cycles in them takes time.
gc.set_threshold(100_000, 50, 50)
# What one process that a test starts has compiled, for all others, and not for
# those that run tests: they find the folder named, and it goes with the first.
_CACHE = 'JAX_COMPILATION_CACHE_DIR'
if _CACHE not in os.environ:
  _compiled = tempfile.TemporaryDirectory(prefix='perceiver-ar-compiled-')
  os.environ[_CACHE] = _compiled.name
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
jax.config.update('jax_compilation_cache_dir', None)
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_default_matmul_precision', 'highest')

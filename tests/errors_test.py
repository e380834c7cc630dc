"""What JAX raises, whichever way, becomes a sentence and a status."""

import re

import jax
import pytest

from perceiver_ar import errors


@pytest.mark.parametrize('kind', [jax.errors.JaxRuntimeError, ValueError])
@pytest.mark.parametrize(
  ('said', 'match', 'status'),
  [
    (
      'UNKNOWN: Gloo AllGather failed: Connection reset by peer\nat x.cc',
      'another process .* reset by peer.*; run again$',
      errors.RESTART,
    ),
    (
      'RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.',
      'the memory .* allocate 9 bytes.*`perceiver-ar plan` finds',
      1,
    ),
  ],
)
def test_what_devices_and_their_links_say_is_one_sentence(
  kind, said, match, status
):
  sentence, ended = errors.explain(kind(said))
  assert ended == status
  assert '\n' not in sentence
  assert re.search(match, sentence)


@pytest.mark.parametrize('kind', [RuntimeError, ValueError, KeyError])
def test_what_nobody_expects_takes_a_traceback(kind):
  assert errors.explain(kind('INTERNAL: a mistake of ours')) == ('', 1)

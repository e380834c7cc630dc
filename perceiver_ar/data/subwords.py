"""Trains a subword vocabulary that loses no character of any text."""

import io
import re
from collections.abc import Iterable, Iterator

from perceiver_ar.data import text as text_lib
from perceiver_ar.data.tokens import EOS, PAD, SOS
from perceiver_ar.errors import UserError

# Fixed, because the pieces depend on it in the last bit.
_THREADS = 4
_LINE_CHARACTERS = 1_000  # sentencepiece leaves out lines beyond 4192 bytes


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> bytes:
  """A unigram model: what `text.SentencePieceCodec` opens as a file."""
  spm = text_lib.import_sentencepiece()
  model = io.BytesIO()
  try:
    spm.SentencePieceTrainer.train(
      sentence_iterator=_lines(texts),
      model_writer=model,
      vocab_size=vocab_size,
      model_type='unigram',
      normalization_rule_name='identity',
      remove_extra_whitespaces=False,
      add_dummy_prefix=False,
      allow_whitespace_only_pieces=True,
      byte_fallback=True,
      character_coverage=0.9999,
      user_defined_symbols=['\n'],
      split_digits=True,
      pad_id=PAD,
      eos_id=EOS,
      bos_id=SOS,
      unk_id=text_lib.UNKNOWN,
      num_threads=_THREADS,
      minloglevel=2,
    )
  except RuntimeError as error:
    raise UserError(_why_not(vocab_size, str(error))) from error
  return model.getvalue()


def _why_not(vocab_size: int, error: str) -> str:
  # Its own words name its own options, and the place in its source.
  if too_high := re.search(r'<= ([0-9]+)', error):
    return (
      f'--vocab_size={vocab_size} is too large for this text; use at most '
      f'--vocab_size={too_high[1]}, or --vocabulary=bytes'
    )
  if too_low := re.search(r'[0-9]+ vs ([0-9]+)', error):
    return (
      f'--vocab_size={vocab_size} is too small for the characters of this '
      f'text; use at least --vocab_size={too_low[1]}, or --vocabulary=bytes'
    )
  return (
    f'sentencepiece cannot train --vocab_size={vocab_size} on this text '
    f'({error.strip().splitlines()[-1]}); try another size, or '
    '--vocabulary=bytes'
  )


def _lines(texts: Iterable[str]) -> Iterator[str]:
  for text in texts:
    for line in text.split('\n'):
      for start in range(0, len(line), _LINE_CHARACTERS):
        yield line[start : start + _LINE_CHARACTERS]

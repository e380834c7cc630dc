"""Reads the documents of visits, and others in the place of damaged ones."""

import logging
import threading
from typing import Protocol, TypeVar

import numpy as np

from perceiver_ar.data import records
from perceiver_ar.errors import UserError

_MAX_IN_A_ROW = 20  # damaged records, one drawn in the place of the other
# What more than this share of all visits meets is not the data set that the
# model should be trained on; a few of them say nothing about a share.
_MAX_SHARE = 0.05
_FEW = 20
_log = logging.getLogger(__name__)
_T = TypeVar('_T', covariant=True)


class Indexed(Protocol[_T]):
  def __len__(self) -> int: ...
  def __getitem__(self, index: int, /) -> _T: ...


class Reader:
  """Reads what is visited; safe to use in threads.

  With `skip`, another visit is drawn where a record is damaged, so that what
  is read is a function of the visit, of the generator and of the data alone.
  """

  def __init__(
    self,
    documents: Indexed[np.ndarray],
    visits: Indexed[int],
    *,
    skip: bool,
  ):
    """Visit i reads document visits[i]."""
    self._documents = documents
    self._visits = visits
    self._skip = skip
    self._lock = threading.Lock()
    self._named: set[int] = set()
    self._num_visits = self._num_damaged = 0

  def read(
    self, visit: int, rng: np.random.Generator
  ) -> tuple[np.ndarray, int]:
    """A document, and how many damaged records were met before it.

    Raises:
      UserError: a record cannot be read; or, with `skip`, too many cannot.
    """
    with self._lock:
      self._num_visits += 1
    for num_damaged in range(_MAX_IN_A_ROW):
      index = self._visits[visit]
      try:
        return self._documents[index], num_damaged
      except records.DamagedRecord as error:
        if not self._skip:
          raise UserError(
            f'{error}, or train without such records '
            '(--config.data.damaged=skip)'
          ) from error
        self._count(index, error)
        visit = int(rng.integers(len(self._visits)))
    raise UserError(
      f'{_MAX_IN_A_ROW} records in a row are damaged, the last of them '
      f'{index} of the split; restore the data set or prepare it again'
    )

  def _count(self, index: int, error: records.DamagedRecord) -> None:
    with self._lock:
      self._num_damaged += 1
      num, total = self._num_damaged, self._num_visits
      is_new = index not in self._named
      self._named.add(index)
    if is_new:
      _log.warning('%s; another is read instead', error)
    if num > max(_FEW, _MAX_SHARE * total):
      raise UserError(
        f'{num} of {total} visits met a damaged record, which is more than '
        f'{_MAX_SHARE:.0%}; the last of them: {error}'
      )

"""What is installed here, as it is compared between processes."""

from perceiver_ar import software


def test_software_knows_our_own_code(monkeypatch, tmp_path):
  before = software.facts()
  # Our own, what we need, and what that needs; not what tests need.
  assert {'perceiver-ar', 'jax', 'jaxlib', 'scipy', 'ml-dtypes'} <= {*before}
  assert 'pytest' not in before
  assert len(before['code']) == 16
  (tmp_path / 'x.py').write_text('')
  monkeypatch.setattr(software, '__file__', str(tmp_path / 'y.py'))
  empty = software.facts()['code']
  (tmp_path / 'x.py').write_text('pass')
  assert len({before['code'], empty, software.facts()['code']}) == 3

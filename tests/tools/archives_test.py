"""Archives of strangers: names that lead elsewhere, links, bombs, lies."""

import io
import os
import pathlib
import stat
import sys
import tarfile
import zipfile
from typing import Any

import numpy as np
import pytest

from perceiver_ar.errors import UserError

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / 'tools'))

import archives
import image_files
import imagenet64
import music_sources
import official_files
import source_files
import text_published


def write_zip(path, members, how=zipfile.ZIP_DEFLATED):
  with zipfile.ZipFile(path, 'w', how) as file:
    for name, content in members.items():
      file.writestr(name, content)
  return path


def check(path):
  with zipfile.ZipFile(path) as file:
    archives.check_zip(path, file, path.stat().st_size)


def special(name, kind):
  member = zipfile.ZipInfo(name)
  member.create_system = 3
  member.external_attr = (kind | 0o777) << 16
  return member


@pytest.mark.parametrize(
  'name', ['../x', 'a/../../x', '/etc/x', 'C:/x', '\\\\host\\x', 'a\\..\\..\\x']
)
def test_a_member_outside_is_refused_by_name(tmp_path, name):
  path = write_zip(tmp_path / 'a.zip', {'good': b'x', name: b'x'})
  with pytest.raises(UserError, match='leaves its folder') as caught:
    check(path)
  assert str(path) in str(caught.value)
  assert name.split('/')[-1].split('\\')[-1] in str(caught.value)


@pytest.mark.parametrize(
  'kind', [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK]
)
def test_a_link_or_a_device_is_refused_by_name(tmp_path, kind):
  path = tmp_path / 'a.zip'
  with zipfile.ZipFile(path, 'w') as file:
    file.writestr(special('train/a.mid', kind), '/etc/passwd')
  with pytest.raises(UserError, match=r"a\.zip holds 'train/a\.mid', which is"):
    check(path)


def test_plain_files_and_folders_are_not(tmp_path):
  path = tmp_path / 'a.zip'
  with zipfile.ZipFile(path, 'w') as file:
    file.writestr(special('a/', stat.S_IFDIR), '')
    file.writestr(special('a/b', stat.S_IFREG), 'x')
    file.writestr('c', 'x')
  check(path)


def bomb(path, name='a.mid'):
  return write_zip(path, {'b.mid': b'x', name: bytes(100 * 2**20)})


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path):
  path = bomb(tmp_path / 'a.zip')
  assert path.stat().st_size < 2**18
  with pytest.raises(UserError, match=r'such as 104,857,600 of .a\.mid'):
    check(path)


def test_many_members_that_share_their_bytes_are_a_bomb(tmp_path):
  """The directory may name one place many times."""
  path = write_zip(tmp_path / 'a.zip', {'0': bytes(2**20)})
  with zipfile.ZipFile(path, 'a') as file:
    first = file.infolist()[0]
    for number in range(1, 200):
      member = zipfile.ZipInfo(str(number))
      for key in ('header_offset', 'file_size', 'compress_size', 'CRC'):
        setattr(member, key, getattr(first, key))
      member.compress_type = first.compress_type
      file.filelist.append(member)
    setattr(file, '_didModify', True)  # noqa: B010
  with pytest.raises(UserError, match='would unpack to more than 100 times'):
    check(path)


def test_a_member_is_no_larger_than_it_says(tmp_path):
  path = write_zip(tmp_path / 'a.zip', {'train/a.mid': bytes(2**20)})
  data = path.read_bytes()
  size = (2**20).to_bytes(4, 'little')
  assert data.count(size) == 2
  path.write_bytes(data.replace(size, (9).to_bytes(4, 'little')))
  check(path)
  with pytest.raises(UserError, match='CRC'):
    music_sources.read([str(path), 'train/a.mid', 'zip'], 2**22)


def midi(path):
  return write_zip(path, {'a.mid': bytes(2**22)})


def wikitext(path):
  return write_zip(path, {'wiki.train.raw': bytes(2**22)})


def batch(path):
  out = io.BytesIO()
  np.savez_compressed(out, data=np.zeros((300, 3 * 64 * 64), np.uint8))
  path.write_bytes(out.getvalue())
  return path


def weights(path):
  arrays: Any = {'p/x/w': np.zeros(2**20, np.float32)}
  np.savez_compressed(path, **arrays)
  return path


@pytest.mark.parametrize(
  ('write', 'read', 'name'),
  [
    (midi, lambda p: music_sources.find(p, None), 'in.zip'),
    (wikitext, text_published.wikitext, 'in.zip'),
    (midi, lambda p: imagenet64.find(p.parent), 'Imagenet64_val.zip'),
    (batch, lambda p: imagenet64.find(p.parent), 'val_data.npz'),
    (weights, official_files.read_npz, 'in.npz'),
  ],
)
def test_every_reader_refuses_bombs(tmp_path, monkeypatch, write, read, name):
  monkeypatch.setattr(archives, '_FREE', 2**20)
  with pytest.raises(UserError, match='would unpack to more') as caught:
    read(write(tmp_path / name))
  assert str(tmp_path / name) in str(caught.value)


def write_tar(path, change, name='train_64x64/1.png'):
  """A member whose header is changed and has the right sum again."""
  member = tarfile.TarInfo(name)
  member.size = 5
  header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
  change(header)
  total = sum(header[:148]) + 8 * 32 + sum(header[156:])
  header[148:156] = b'%06o\0 ' % total
  first = tarfile.TarInfo('train_64x64/0.png').tobuf(tarfile.GNU_FORMAT)
  path.write_bytes(first + header + b'x'.ljust(512, b'\0') + bytes(1024))
  return path


def test_a_tar_that_goes_in_circles_ends(tmp_path):
  def back(header):
    header[124:136] = b'\xff' * 10 + b'\xfe\0'  # -512: the header again

  path = write_tar(tmp_path / 'train_64x64.tar', back)
  with pytest.raises(UserError, match=r'train_64x64\.tar is no readable tar'):
    imagenet64._oord_items('train', path)


def test_a_member_larger_than_any_picture_is_not_read(tmp_path):
  path = tmp_path / 'large.png'
  with path.open('wb') as file:
    file.truncate(2**40)  # of nothing: it takes no room
  for size in (-1, 2**39):
    with pytest.raises(UserError, match='which is no picture'):
      image_files.read_bytes(str(path), 0, size)


def test_a_pipe_among_the_files_is_refused_and_not_opened(tmp_path):
  (tmp_path / 'a.txt').touch()
  os.mkfifo(tmp_path / 'b.txt')
  with pytest.raises(UserError, match=r'b\.txt is a pipe'):
    source_files.files_below(tmp_path)


def test_links_are_followed_to_files_and_not_to_folders(tmp_path):
  """Files may be on another disk; folders may contain themselves."""
  (tmp_path / 'in').mkdir()
  (tmp_path / 'elsewhere').mkdir()
  (tmp_path / 'elsewhere' / 'a.txt').touch()
  (tmp_path / 'in' / 'a.txt').symlink_to(tmp_path / 'elsewhere' / 'a.txt')
  (tmp_path / 'in' / 'loop').symlink_to(tmp_path / 'in')
  (tmp_path / 'in' / 'folder').symlink_to(tmp_path / 'elsewhere')
  (tmp_path / 'in' / 'nowhere.txt').symlink_to(tmp_path / 'gone')
  assert source_files.files_below(tmp_path / 'in') == ['a.txt', 'nowhere.txt']

"""Images in every published form, and folders of pictures, become data sets."""

import io
import json
import pathlib
import pickle
import sys
import tarfile
import zipfile

import numpy as np
import PIL.Image
import pytest

from perceiver_ar.data import image, records
from perceiver_ar.errors import UserError

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / 'tools'))

import imagenet64
import pictures
import preparation
import prepare_image


@pytest.fixture(autouse=True)
def _forget():
  """Files of one name differ from test to test."""
  imagenet64._load_batch.cache_clear()
  pictures._reduced.cache_clear()


def make_images(number, seed=0):
  rng = np.random.default_rng(seed)
  coarse = rng.integers(0, 256, (number, 4, 4, 3), np.uint8)
  return coarse.repeat(16, axis=1).repeat(16, axis=2)


def named_pngs(number, seed=0):
  images = make_images(number, seed)
  return {f'{i:07d}.png': image.png(pixels) for i, pixels in enumerate(images)}


def write_tar(path, files):
  with tarfile.open(path, 'w') as tar:
    folder = tarfile.TarInfo(path.stem)
    folder.type = tarfile.DIRTYPE
    tar.addfile(folder)
    for name, data in files.items():
      member = tarfile.TarInfo(f'{path.stem}/{name}')
      member.size = len(data)
      tar.addfile(member, io.BytesIO(data))


def write_folder(path, files):
  for name, data in files.items():
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    (path / name).write_bytes(data)


def batch_of(number, seed=0):
  data = make_images(number, seed).transpose(0, 3, 1, 2)
  return {
    'data': data.reshape(number, -1),
    'labels': list(range(1, number + 1)),
    'mean': np.zeros(12_288),
  }


def as_pickle(batch):
  return pickle.dumps(batch, protocol=2)


def as_old_pickle(batch):
  """As Python 2 wrote it: one string of bytes, which is no text."""
  data = batch['data']
  shape = b''.join(b'M' + size.to_bytes(2, 'little') for size in data.shape)
  return (
    b'\x80\x02}(U\x04data'
    b'cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\0\x85U\x01btR'
    b'(K\x01(' + shape + b't'
    b'cnumpy\ndtype\n(U\x02u1K\0K\x01tR'
    b'(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb\x89'
    b'T' + data.nbytes.to_bytes(4, 'little') + data.tobytes() + b'tb'
    b'U\x06labels](K\x01K\x02eu.'
  )


def as_npz(batch):
  out = io.BytesIO()
  np.savez(out, data=batch['data'], labels=batch['labels'])
  return out.getvalue()


@pytest.fixture
def source(tmp_path):
  folder = tmp_path / 'source'
  folder.mkdir()
  return folder


def prepare(source, output, *more, workers=1):
  options = [f'--input={source}', f'--output={output}', f'--workers={workers}']
  return prepare_image.main([*options, *more])


def contents(folder):
  return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def read_images(output, split):
  documents = records.Documents(str(output), split)
  codec = documents.codec
  assert isinstance(codec, image.ImageCodec)
  found = {}
  for index in range(len(documents)):
    tokens_T, info = documents[index], documents.info(index)
    assert tokens_T[0] == 2 and tokens_T.min() >= 2 and 1 not in tokens_T
    assert info.counts == {'dims': len(tokens_T) - 1}
    found[info.name], num_missing = codec.decode(tokens_T)
    assert num_missing == 0
  return found


def manifest_of(output):
  return records.Manifest.load(output)


def rejected(output):
  lines = (output / 'rejected.jsonl').read_text().splitlines()
  return {line['name']: line['reason'] for line in map(json.loads, lines)}


def refused(capsys):
  said = capsys.readouterr().err
  assert said.startswith('prepare_image: ') and said.count('\n') == 1, said
  return said


# Both editions of ImageNet64.


@pytest.mark.parametrize('order', ['rgb', 'planes', 'permuted'])
def test_pngs_in_tars_are_the_edition_of_van_den_oord(
  source, tmp_path, capsys, order
):
  write_tar(source / 'train_64x64.tar', named_pngs(12))
  write_tar(source / 'valid_64x64.tar', named_pngs(3, seed=1))
  assert prepare(source, tmp_path / 'set', f'--order={order}') == 0
  said = capsys.readouterr().out
  assert '12 of 1,281,149 in train, 3 of 49,999 in validation' in said
  manifest = manifest_of(tmp_path / 'set')
  assert (manifest.kind, manifest.variant) == (
    'images',
    'imagenet64-oord-partial',
  )
  assert manifest.splits['validation'].counts == {'dims': 3 * 12_288}
  assert manifest.positions['order'] == order
  found = read_images(tmp_path / 'set', 'train')
  assert list(found) == [f'train/{i:07d}.png' for i in range(12)]
  assert (np.stack(list(found.values())) == make_images(12)).all()


def test_a_tar_and_what_it_unpacks_to_are_the_same(source, tmp_path):
  train, held = named_pngs(12), named_pngs(3, seed=1)
  backwards = dict(reversed(train.items()))
  write_tar(source / 'train_64x64.tar', backwards)
  write_tar(source / 'valid_64x64.tar', held)
  assert prepare(source, tmp_path / 'tars') == 0
  unpacked = tmp_path / 'unpacked'
  write_folder(unpacked / 'train_64x64' / 'train_64x64', train)
  write_folder(unpacked / 'valid_64x64', held)
  assert prepare(unpacked, tmp_path / 'folders') == 0
  assert contents(tmp_path / 'tars') == contents(tmp_path / 'folders')


@pytest.mark.parametrize(
  ('suffix', 'dump'), [('', as_pickle), ('', as_old_pickle), ('.npz', as_npz)]
)
@pytest.mark.parametrize('zipped', [False, True])
def test_batches_are_the_edition_of_chrabaszcz(
  source, tmp_path, suffix, dump, zipped
):
  numbers = {'train_data_batch_2': 4, 'train_data_batch_10': 5, 'val_data': 2}
  files = {
    f'{name}{suffix}': dump(batch_of(number, seed=number))
    for name, number in numbers.items()
  }
  if zipped:
    tail = '_npz' if suffix else ''
    for part, names in (('train_part1', files), ('val', ['val_data' + suffix])):
      with zipfile.ZipFile(source / f'Imagenet64_{part}{tail}.zip', 'w') as out:
        for name in names:
          if (part == 'val') == name.startswith('val'):
            out.writestr(name, files[name])
  else:
    write_folder(source / 'Imagenet64_train_part1', files)
  assert prepare(source, tmp_path / 'set') == 0
  manifest = manifest_of(tmp_path / 'set')
  assert manifest.variant == 'imagenet64-chrabaszcz-partial'
  found = read_images(tmp_path / 'set', 'train')
  assert list(found) == [
    *(f'train_data_batch_2/{i:06d}' for i in range(4)),
    *(f'train_data_batch_10/{i:06d}' for i in range(5)),
  ]
  expected = np.concatenate([make_images(4, seed=4), make_images(5, seed=5)])
  assert (np.stack(list(found.values())) == expected).all()
  held = read_images(tmp_path / 'set', 'validation')
  assert (np.stack(list(held.values())) == make_images(2, seed=2)).all()


def test_an_edition_is_complete_when_its_numbers_are(
  source, tmp_path, monkeypatch, capsys
):
  few = {
    imagenet64.OORD: {'train': 5, 'validation': 2},
    imagenet64.CHRABASZCZ: {'train': 6, 'validation': 3},
  }
  monkeypatch.setattr(imagenet64, '_NUM_PUBLISHED', few)
  write_tar(source / 'train_64x64.tar', named_pngs(5))
  write_folder(source / 'valid_64x64', named_pngs(2))
  assert prepare(source, tmp_path / 'set') == 0
  assert manifest_of(tmp_path / 'set').variant == 'imagenet64-oord'
  # One split is missing, and the other complete.
  (source / 'valid_64x64').rename(tmp_path / 'valid_64x64')
  assert prepare(source, tmp_path / 'set') == 0
  assert manifest_of(tmp_path / 'set').variant == 'imagenet64-oord'
  # The other edition, packed under the names of this one.
  write_tar(source / 'train_64x64.tar', named_pngs(6))
  assert prepare(source, tmp_path / 'set') == 2
  assert 'as many images, 6, as that of imagenet64-chr' in refused(capsys)


def test_editions_are_never_mixed(source, tmp_path, capsys):
  write_tar(source / 'train_64x64.tar', named_pngs(2))
  write_folder(source, {'val_data': as_pickle(batch_of(2))})
  assert prepare(source, tmp_path / 'set') == 2
  assert 'mixes two editions' in refused(capsys)
  assert not (tmp_path / 'set').exists()


def test_nothing_is_taken_twice(source, tmp_path, capsys):
  write_folder(source, {'train_data_batch_1': as_pickle(batch_of(2))})
  npz = {'npz/train_data_batch_1.npz': as_npz(batch_of(2))}
  write_folder(source, npz)
  assert prepare(source, tmp_path / 'set') == 2
  assert 'train_data_batch_1 is there twice' in refused(capsys)
  other = tmp_path / 'other'
  write_folder(other / 'train_64x64', named_pngs(2))
  write_tar(other / 'train_64x64.tar', named_pngs(2))
  assert prepare(other, tmp_path / 'set') == 2
  assert 'are both there' in refused(capsys)


@pytest.mark.parametrize(
  ('name', 'kind'),
  [
    ('../../0000009.png', tarfile.REGTYPE),
    ('/0000009.png', tarfile.REGTYPE),
    ('train_64x64/0000009.png', tarfile.SYMTYPE),
    ('train_64x64/0000009.png', tarfile.LNKTYPE),
    ('train_64x64/0000009.png', tarfile.FIFOTYPE),
  ],
)
def test_a_tar_that_leads_elsewhere_is_refused(
  source, tmp_path, capsys, name, kind
):
  write_tar(source / 'train_64x64.tar', named_pngs(2))
  with tarfile.open(source / 'train_64x64.tar', 'a') as tar:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, '/etc/passwd'
    tar.addfile(member)
  assert prepare(source, tmp_path / 'set') == 2
  message = refused(capsys)
  assert 'get it again where it is published' in message and name in message


@pytest.mark.parametrize('cut', [1000, 5000])
def test_a_tar_that_ends_early_is_refused(source, tmp_path, capsys, cut):
  path = source / 'train_64x64.tar'
  write_tar(path, {'a.png': b'\0' * 8000})
  path.write_bytes(path.read_bytes()[:cut])
  assert prepare(source, tmp_path / 'set') == 2
  assert 'train_64x64.tar is no readable tar' in refused(capsys)


class _Evil:
  def __reduce__(self):
    return pathlib.Path.touch, (pathlib.Path('evil'),)


def of_shape(*shape, dtype='uint8'):
  return as_pickle({'data': np.zeros(shape, dtype), 'labels': [1]})


@pytest.mark.parametrize(
  ('name', 'data', 'said'),
  [
    (
      'val_data',
      as_pickle({'data': _Evil()}),
      'names the global.*; download it again',
    ),
    ('val_data', as_pickle({'images': 1}), "readable batch.*KeyError: 'data'"),
    ('val_data', as_pickle(batch_of(2))[:-500], 'readable batch'),
    ('val_data', b'', 'readable batch'),
    ('val_data', as_pickle([1]), 'readable batch'),
    ('val_data', of_shape(2, 3072), r'shape \(2, 3072\).*64x64 edition'),
    ('val_data', of_shape(12_288), r'shape \(12288,\)'),
    ('val_data', of_shape(2, 12_288, dtype='float64'), 'type float64'),
    ('val_data.npz', b'PK nothing', 'readable batch'),
    ('val_data.npz', as_pickle(batch_of(2)), 'readable batch'),
    ('Imagenet64_val.zip', b'PK nothing', 'no readable zip'),
  ],
)
def test_a_batch_that_is_none_is_refused(
  source, tmp_path, capsys, monkeypatch, name, data, said
):
  monkeypatch.chdir(tmp_path)
  write_folder(source, {'train_data_batch_1': as_pickle(batch_of(2))})
  write_folder(source, {name: data})
  assert prepare(source, tmp_path / 'set') == 2
  message = refused(capsys)
  assert name in message
  with pytest.raises(UserError, match=said):
    imagenet64.find(source)
  assert not (tmp_path / 'evil').exists()
  assert 'the parameters' not in message  # which is the remedy for weights


def test_no_batch_stays_in_memory_while_workers_need_it(source):
  write_folder(source, {'train_data_batch_1': as_pickle(batch_of(2))})
  found = imagenet64.find(source)
  assert found is not None and len(found.items) == 2
  assert imagenet64._load_batch.cache_info().currsize == 0


def test_an_npz_of_objects_is_not_unpickled(source, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  out = io.BytesIO()
  np.savez(out, data=np.array([_Evil()], object))
  write_folder(source, {'train_data_batch_1.npz': out.getvalue()})
  assert prepare(source, tmp_path / 'set') == 2
  assert not (tmp_path / 'evil').exists()


def test_a_zip_that_leads_elsewhere_is_refused(source, tmp_path, capsys):
  with zipfile.ZipFile(source / 'Imagenet64_val.zip', 'w') as out:
    out.writestr('../val_data', as_pickle(batch_of(2)))
  assert prepare(source, tmp_path / 'set') == 2
  assert "leaves its folder, '../val_data'" in refused(capsys)


def test_options_of_pictures_are_refused_with_imagenet(
  source, tmp_path, capsys
):
  write_folder(source / 'train_64x64', named_pngs(2))
  for option in ('--size=32', '--tiles=8', '--held_out=0.5'):
    assert prepare(source, tmp_path / 'set', option) == 2
    assert f'{option} is for pictures' in refused(capsys)


# What is bad, and how many work.


def bad_pngs():
  good = image.png(make_images(1)[0])
  small = image.png(np.zeros((64, 63, 3), np.uint8))
  grey = io.BytesIO()
  PIL.Image.new('L', (64, 64)).save(grey, 'PNG')
  return {
    '9000001.png': (good[: len(good) // 2], 'no readable image'),
    '9000002.png': (small, 'PNG of 63x64 in mode RGB'),
    '9000003.png': (b'', 'no readable image'),
    '9000004.png': (grey.getvalue(), 'PNG of 64x64 in mode L'),
  }


def test_bad_images_are_named_and_left_out(source, tmp_path, capsys):
  bad = bad_pngs()
  good = image.png(make_images(1)[0])
  files = {f'{i:07d}.png': good for i in range(400)}
  files |= {name: data for name, (data, _) in bad.items()}
  write_tar(source / 'train_64x64.tar', files)
  outputs = tmp_path / 'one', tmp_path / 'two'
  for output in outputs:
    assert prepare(source, output) == 0
  assert contents(outputs[0]) == contents(outputs[1])
  reasons = rejected(outputs[0])
  assert set(reasons) == {f'train/{name}' for name in bad}
  for name, (_, said) in bad.items():
    assert said in reasons[f'train/{name}']
  assert manifest_of(outputs[0]).splits['train'].num_documents == 400
  capsys.readouterr()
  assert prepare(source, tmp_path / 'strict', '--strict') == 2
  assert 'train/9000001.png: this is no readable image' in refused(capsys)
  assert not (tmp_path / 'strict').exists()


def test_the_bytes_are_those_of_any_number_of_workers(
  source, tmp_path, monkeypatch
):
  write_folder(source, {'train_data_batch_1': as_pickle(batch_of(20))})
  write_folder(source, {'val_data': as_pickle(batch_of(9, seed=1))})
  options = ['--order=permuted', '--order_seed=5']
  assert prepare(source, tmp_path / 'one', *options, workers=1) == 0
  monkeypatch.setattr(prepare_image, '_PER_PART', 7)
  assert prepare(source, tmp_path / 'four', *options, workers=4) == 0
  assert contents(tmp_path / 'one') == contents(tmp_path / 'four')


# Pictures of any size.


def saved(picture, form='PNG', **options):
  out = io.BytesIO()
  picture.save(out, form, **options)
  return out.getvalue()


def photograph(seed, size=(200, 150)):
  width, height = size
  rng = np.random.default_rng(seed)
  pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
  return saved(PIL.Image.fromarray(pixels))


def all_images(output):
  return read_images(output, 'train') | read_images(output, 'validation')


def test_the_centre_is_reduced_by_a_box_filter(source, tmp_path):
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (32, 48, 3), np.uint8)
  write_folder(source / 'deep', {'a.png': saved(PIL.Image.fromarray(pixels))})
  write_folder(source, {'b.PNG': saved(PIL.Image.new('RGB', (16, 16), 'red'))})
  assert prepare(source, tmp_path / 'set', '--size=8') == 0
  found = all_images(tmp_path / 'set')
  assert set(found) == {'deep/a.png', 'b.PNG'}
  square = pixels[:, 8:40].astype(float)
  expected = square.reshape(8, 4, 8, 4, 3).mean(axis=(1, 3))
  assert np.abs(found['deep/a.png'] - expected).max() <= 1
  assert manifest_of(tmp_path / 'set').positions['height'] == 8
  assert manifest_of(tmp_path / 'set').variant == ''


def test_pictures_of_every_mode_become_rgb(source, tmp_path):
  grey = PIL.Image.new('L', (8, 8), 77)
  clear = PIL.Image.new('RGBA', (8, 8), (0, 0, 0, 0))
  palette = PIL.Image.new('RGB', (8, 8), (9, 8, 7)).quantize(2)
  turned = PIL.Image.new('RGB', (16, 8))
  turned.paste('white', (0, 0, 8, 8))
  exif = PIL.Image.Exif()
  exif[0x0112] = 6  # to be held a quarter turn clockwise
  write_folder(
    source,
    {
      'grey.png': saved(grey),
      'clear.png': saved(clear),
      'palette.png': saved(palette),
      'photo.jpg': saved(turned, 'JPEG', exif=exif, quality=95),
    },
  )
  assert prepare(source, tmp_path / 'set', '--size=4', '--held_out=0.5') == 0
  found = all_images(tmp_path / 'set')
  assert (found['grey.png'] == 77).all()
  assert (found['clear.png'] == 255).all()
  assert (found['palette.png'] == (9, 8, 7)).all()
  assert found['photo.jpg'][0].mean() > 200 > 50 > found['photo.jpg'][3].mean()


def test_pictures_are_held_out_by_name_or_by_folder(source, tmp_path, capsys):
  files = {f'{i}.png': photograph(i, (8, 8)) for i in range(10)}
  write_folder(source, files | {'notes.txt': b'', '.hidden.png': b''})
  options = ['--size=8', '--held_out=0.3']
  assert prepare(source, tmp_path / 'set', *options) == 0
  assert f'1 files in {source} are no pictures' in capsys.readouterr().out
  held = read_images(tmp_path / 'set', 'validation')
  assert set(held) == preparation.held_out(sorted(files), 0.3)
  for split in ('train', 'validation', 'test', 'other'):
    write_folder(source / split, {f'{split}.png': photograph(0, (8, 8))})
  assert prepare(source, tmp_path / 'set', '--size=8') == 0
  splits = manifest_of(tmp_path / 'set').splits
  assert {name: s.num_documents for name, s in splits.items()} == {
    'train': 1,
    'validation': 1,
    'test': 1,
  }
  assert f'11 files in {source} are not in the folders' in (
    capsys.readouterr().out
  )
  assert prepare(source, tmp_path / 'set', *options) == 2
  assert '--held_out=0.3 is for inputs without' in refused(capsys)


def test_validation_is_never_held_out_of_pictures_for_testing(source, tmp_path):
  for split in ('train', 'test'):
    files = {f'{i}.png': photograph(i, (8, 8)) for i in range(10)}
    write_folder(source / split, files)
  options = ['--size=8', '--held_out=0.3']
  assert prepare(source, tmp_path / 'set', *options) == 0
  found = {
    split: set(read_images(tmp_path / 'set', split))
    for split in ('train', 'validation', 'test')
  }
  assert found['test'] == {f'test/{i}.png' for i in range(10)}
  assert len(found['validation']) == 3 and len(found['train']) == 7
  names = found['train'] | found['validation']
  assert names == {f'train/{i}.png' for i in range(10)}


def test_the_next_command_fits_what_was_found(source, tmp_path, capsys):
  output = tmp_path / 'my set'
  for edition in ('imagenet64', 'small'):
    if edition == 'imagenet64':
      write_folder(source / 'train_64x64', named_pngs(2))
    else:
      (source / 'train_64x64').rename(source / 'train')
    assert prepare(source, output) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
      f'Next: perceiver-ar train --config=configs/images.py:{edition} '
      f"'--config.data.path={output}' --workdir=runs/images"
    )


def test_tiles_are_cut_at_three_scales_and_never_cross_splits(source, tmp_path):
  pixels = np.arange(40 * 50 * 3, dtype=np.uint32).astype(np.uint8)
  pixels = pixels.reshape(40, 50, 3)
  write_folder(source, {'a.png': saved(PIL.Image.fromarray(pixels))})
  write_folder(source, {'b.png': photograph(0, (50, 40))})
  options = ['--size=8', '--tiles=6']
  assert prepare(source, tmp_path / 'set', *options) == 0
  found = read_images(tmp_path / 'set', 'train')
  held = read_images(tmp_path / 'set', 'validation')
  assert len(found) == len(held) == 8 * 6 + 3 * 3 + 1 * 1
  assert len({name.split()[0] for name in found}) == 1
  tiles = found if 'a.png 1/1 0,0' in found else held
  assert (tiles['a.png 1/1 6,12'] == pixels[12:20, 6:14]).all()
  half = pixels.reshape(20, 2, 25, 2, 3).mean(axis=(1, 3))
  tile = tiles['a.png 1/2 12,6']
  assert np.abs(tile - half[6:14, 12:20]).max() <= 1


@pytest.mark.parametrize('options', [[], ['--tiles=64']])
def test_bad_pictures_are_named(source, tmp_path, options):
  wide = PIL.Image.new('I;16', (64, 64))
  bad = {
    'small.png': (photograph(0, (63, 90)), 'has 63x90 pixels, fewer than 64'),
    'broken.jpg': (b'\xff\xd8\xff', 'no readable image'),
    'cut.jpg': (saved(PIL.Image.new('RGB', (99, 99)), 'JPEG')[:-99], 'no read'),
    'wide.png': (saved(wide), 'mode I;16'),
    # One of many that Pillow knows; it hands some to other programs.
    'alien.png': (saved(PIL.Image.new('RGB', (99, 99)), 'GIF'), 'no read'),
  }
  good = photograph(0, (64, 64))
  files = {f'good {i}.png': good for i in range(600)}
  (source / 'gone.png').symlink_to('nowhere')
  write_folder(source, files | {name: data for name, (data, _) in bad.items()})
  assert prepare(source, tmp_path / 'set', *options) == 0
  reasons = {
    n.split(' 1/')[0]: r for n, r in rejected(tmp_path / 'set').items()
  }
  assert set(reasons) == {*bad, 'gone.png'}
  assert 'this cannot be read (No such file' in reasons['gone.png']
  for name, (_, said) in bad.items():
    assert said in reasons[name], name


@pytest.mark.parametrize(
  ('options', 'said'),
  [
    ([], 'holds one document to train on, a.png'),
    (['--size=0'], '--size=0 must be at least 1'),
    (['--tiles=-1'], '--tiles=-1 must be at least 1'),
    (['--held_out=1'], '--held_out=1.0 must lie between'),
    (['--order_seed=3'], '--order_seed=3 is of --order=permuted only'),
    (['--order=permuted', '--order_seed=-1'], 'raster'),
    (['--size=100000'], 'raster'),
  ],
)
def test_a_mistake_ends_in_one_sentence(
  source, tmp_path, capsys, options, said
):
  write_folder(source, {'a.png': photograph(0)})
  assert prepare(source, tmp_path / 'set', *options) == 2
  assert said in refused(capsys)
  assert prepare(source, source / 'set') == 2
  assert 'lies in --input' in refused(capsys)
  assert prepare(tmp_path / 'nowhere', tmp_path / 'set') == 2
  assert 'nowhere is no folder' in refused(capsys)

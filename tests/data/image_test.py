"""Images become tokens and images again, whatever the tokens are."""

import io
import struct
import sys
import zlib

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perceiver_ar.data import image, layouts
from perceiver_ar.errors import UserError

_H, _W = 6, 9


def make_codec(order='rgb', seed=0, height=_H, width=_W):
  return image.ImageCodec(
    {
      'kind': 'raster',
      'height': height,
      'width': width,
      'channels': 3,
      'order': order,
      'seed': seed,
    }
  )


def make_pixels(seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (_H, _W, 3), np.uint8)


def to_pixels(data):
  with PIL.Image.open(io.BytesIO(data)) as picture:
    assert (picture.format, picture.mode) == ('PNG', 'RGB')
    return np.array(picture)


@pytest.mark.parametrize('order', layouts.ORDERS)
def test_images_come_back_in_every_order(order):
  codec, pixels = make_codec(order), make_pixels()
  ids = codec.encode(pixels)
  assert ids.dtype == np.int32 and len(ids) == pixels.size
  assert sorted(ids) == sorted(pixels.reshape(-1).astype(int) + 3)
  back, num_missing = codec.decode(ids)
  assert (back == pixels).all() and num_missing == 0
  data, num_repairs = codec.write(ids)
  assert (to_pixels(data) == pixels).all() and num_repairs == 0
  assert (codec.read(data) == ids).all()


def test_orders_are_what_they_are_called():
  pixels = make_pixels()
  ids = {order: make_codec(order).encode(pixels) for order in layouts.ORDERS}
  assert (ids['rgb'] - 3 == pixels.reshape(-1)).all()
  planes = pixels.transpose(2, 0, 1).reshape(-1)
  assert (ids['planes'] - 3 == planes).all()
  assert (ids['permuted'] != ids['rgb']).any()
  again = make_codec('permuted').encode(pixels)
  assert (again == ids['permuted']).all()
  other = make_codec('permuted', seed=1).encode(pixels)
  assert (other != ids['permuted']).any()


@pytest.mark.parametrize('order', layouts.ORDERS)
def test_a_position_names_the_subpixel_that_its_token_is(order):
  codec, pixels = make_codec(order), make_pixels()
  ids_T = codec.encode(pixels)
  ids_TP = layouts.positions(codec.layout, np.arange(1, 1 + len(ids_T)))
  x, y, channel = (ids_TP - 2).T
  assert (pixels[y, x, channel] + 3 == ids_T).all()


def test_codecs_differ_where_their_layouts_do():
  codecs = [
    make_codec(),
    make_codec('planes'),
    make_codec('permuted'),
    make_codec('permuted', seed=1),
    make_codec(width=8),
  ]
  assert len({codec.sha256 for codec in codecs}) == len(codecs)
  assert make_codec().sha256 == make_codec().sha256


def test_other_layouts_are_refused():
  grey = make_codec().layout | {'channels': 1}
  for layout in (grey, layouts.INDEX):
    with pytest.raises(UserError, match='none of colour images'):
      image.ImageCodec(layout)


@given(st.lists(st.integers(-2, 300), max_size=200), st.sampled_from(range(3)))
@settings(max_examples=60, deadline=None)
def test_any_ids_are_a_picture_with_counted_repairs(ids, order):
  codec = make_codec(layouts.ORDERS[order])
  data, num_repairs = codec.write(ids)
  assert to_pixels(data).shape == (_H, _W, 3)
  symbols = [i - 3 for i in ids if 3 <= i < 259]
  num_foreign = sum(not 0 <= i < 259 for i in ids)
  num_dims = _H * _W * 3
  assert num_repairs == abs(num_dims - len(symbols)) + num_foreign
  kept = codec.read(data)[: len(symbols)] - 3
  assert kept.tolist() == symbols[:num_dims]


@pytest.mark.parametrize('order', ['rgb', 'planes'])
def test_what_is_not_drawn_yet_is_a_checkerboard(order):
  codec = make_codec(order, height=32, width=32)
  black = np.full(32 * 32 * 3, 3)
  picture, num_missing = codec.decode(black[: 32 * 32])
  assert num_missing == 32 * 32 * 2
  values, counts = np.unique(picture[16:, :, 1:], return_counts=True)
  assert len(values) == 2 and counts[0] == counts[1]
  assert (picture[16:18, :2, 2] == picture[16, 0, 2]).all()
  assert (picture[16:18, 2:4, 2] == picture[18, 0, 2]).all()
  assert picture[16, 0, 2] != picture[18, 0, 2]


def make_png(mode, size=(_W, _H)):
  out = io.BytesIO()
  PIL.Image.new(mode, size).save(out, 'PNG')
  return out.getvalue()


def claiming_png(width, height):
  """A few bytes that claim to be so wide and high."""

  def chunk(kind, payload):
    crc = struct.pack('>I', zlib.crc32(kind + payload))
    return struct.pack('>I', len(payload)) + kind + payload + crc

  header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
  return (
    b'\x89PNG\r\n\x1a\n'
    + chunk(b'IHDR', header)
    + chunk(b'IDAT', zlib.compress(b'\0' * 100))
    + chunk(b'IEND', b'')
  )


def flipped(data):
  at = data.index(b'IDAT') + 12
  return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def in_format(name):
  out = io.BytesIO()
  PIL.Image.fromarray(make_pixels()).save(out, name)
  return out.getvalue()


@pytest.mark.parametrize(
  ('data', 'said'),
  [
    (b'', 'no readable image'),
    (b'no picture', 'no readable image'),
    (image.png(make_pixels())[:-40], 'no readable image'),
    (flipped(image.png(make_pixels())), 'no readable image'),
    (in_format('JPEG'), 'no readable image'),
    (claiming_png(60_000, 60_000), 'no readable image.*exceeds limit'),
    (claiming_png(9_000, 9_000), 'bytes claim to be 9000x9000 pixels'),
    (make_png('RGB', (9, 7)), 'PNG of 9x7 in mode RGB; it must be 9x6'),
    (make_png('L'), 'PNG of 9x6 in mode L'),
    (make_png('RGBA'), 'PNG of 9x6 in mode RGBA'),
    (make_png('I;16'), 'PNG of 9x6 in mode I;16'),
  ],
)
def test_files_that_are_no_such_image_are_refused(data, said):
  with pytest.raises(UserError, match=said) as caught:
    make_codec().read(data)
  assert '\n' not in str(caught.value)


def test_every_truncation_is_noticed():
  data = image.png(make_pixels())
  for size in range(len(data) - 12):  # the end chunk says nothing
    with pytest.raises(UserError):
      make_codec().read(data[:size])


def test_a_sheet_shows_every_image_in_its_place():
  images = [make_pixels(seed) for seed in range(5)]
  sheet = to_pixels(image.grid_png(images, 3))
  scale = 160 // _W
  gap = (sheet.shape[1] - 3 * scale * _W) // 4
  assert gap > 0
  for at, pixels in enumerate(images):
    y = gap + at // 3 * (scale * _H + gap)
    x = gap + at % 3 * (scale * _W + gap)
    part = sheet[y : y + scale * _H : scale, x : x + scale * _W : scale]
    assert (part == pixels).all()
  assert (sheet[-gap - 1, -gap - 1] == 255).all()  # there is no sixth


def test_a_missing_pillow_names_the_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, 'PIL.Image', None)
  monkeypatch.setitem(sys.modules, 'PIL', None)
  with pytest.raises(UserError, match=r'perceiver-ar\[prepare\]'):
    image.png(make_pixels())

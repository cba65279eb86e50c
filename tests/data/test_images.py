"""Every kind of image becomes the right RGB pixels, or one line that says why not."""

import io
import pickle
import struct
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from helpers import huge_png
from PIL import Image, ImageDraw, ImageOps

from nxtp.data import images
from nxtp.data.images import SUFFIXES, ImageError, _quiet_pillow, find_images, load_image
from nxtp.data.transforms import to_pixels

RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def picture(size=(48, 32)) -> Image.Image:
    """Smooth, and different in all four quarters, so that turns and flips show."""
    x, y = np.meshgrid(np.linspace(0, 200, size[0]), np.linspace(0, 200, size[1]))
    return Image.fromarray(np.stack([x, y, 120 + 0 * x], axis=-1).astype(np.uint8))


def encoded(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def difference(a: Image.Image, b: Image.Image) -> float:
    """Mean over pixels, in levels of 255."""
    assert a.size == b.size
    return float(np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).mean())


def one_line(error: pytest.ExceptionInfo, name: str) -> str:
    message = str(error.value)
    assert message.startswith(f"{name}: ")
    assert "\n" not in message
    assert "0x" not in message
    return message


@pytest.fixture(autouse=True)
def no_warning_leaks():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize(
    ("suffix", "options", "tolerance"),
    [
        (".png", {}, 0),
        (".bmp", {}, 0),
        (".tif", {"compression": "tiff_lzw"}, 0),
        (".ppm", {}, 0),
        (".webp", {"lossless": True}, 0),
        (".jpg", {"quality": 95}, 2),
        (".jpg", {"quality": 95, "progressive": True}, 2),
        (".jp2", {}, 2),
        (".gif", {}, 12),
        (".ico", {"sizes": [(48, 32)]}, 0),
    ],
)
def test_formats_from_path_bytes_and_image(tmp_path, suffix, options, tolerance):
    path = tmp_path / f"a{suffix}"
    picture().save(path, **options)
    assert suffix in SUFFIXES
    data = path.read_bytes()
    with Image.open(path) as opened:
        for source in (path, str(path), data, memoryview(data), opened):
            image = load_image(source)
            assert (image.mode, image.size) == ("RGB", (48, 32))
            assert difference(image, picture()) <= tolerance


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "YCbCr"])
def test_one_pixel_of_every_mode(mode):
    image = load_image(Image.new(mode, (1, 1)))
    assert (image.mode, image.size) == ("RGB", (1, 1))


def test_an_image_given_is_not_changed_and_not_shared():
    given = picture()
    result = load_image(given)
    result.paste((0, 0, 0), (0, 0, 48, 32))
    assert difference(given, picture()) == 0


def test_grey():
    grey = picture().convert("L")
    image = load_image(encoded(grey, "PNG"))
    assert image.mode == "RGB"
    assert difference(image, grey.convert("RGB")) == 0
    assert load_image(encoded(Image.new("1", (3, 2), 1), "PNG")).getpixel((0, 0)) == WHITE


def transparent(mode: str) -> bytes:
    """A PNG of 2×1: a transparent pixel, an opaque red one (grey 100 in the grey modes)."""
    if mode == "LA":
        image = Image.new("LA", (2, 1), (100, 255))
        image.putpixel((0, 0), (0, 0))
        return encoded(image, "PNG")
    if mode == "RGBA":
        image = Image.new("RGBA", (2, 1), (*RED, 255))
        image.putpixel((0, 0), (0, 0, 255, 0))
        return encoded(image, "PNG")
    if mode.startswith("P"):
        image = Image.new("P", (2, 1), 1)
        image.putpalette([0, 0, 255, *RED])
        image.putpixel((0, 0), 0)
        return encoded(image, "PNG", transparency=0 if mode == "P" else bytes([0, 255]))
    image = Image.new(mode, (2, 1), RED if mode == "RGB" else 100)
    image.putpixel((0, 0), (0, 0, 255) if mode == "RGB" else 7)
    return encoded(image, "PNG", transparency=(0, 0, 255) if mode == "RGB" else 7)


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P", "P with alpha table", "RGB", "L"])
def test_transparency_is_laid_on_white(mode):
    image = load_image(transparent(mode))
    assert image.getpixel((0, 0)) == WHITE
    assert image.getpixel((1, 0)) == ((100, 100, 100) if mode.startswith("L") else RED)


def test_half_transparency_is_mixed_with_white():
    assert load_image(encoded(Image.new("RGBA", (1, 1), (0, 0, 0, 128)), "PNG")).getpixel((0, 0)) == (127, 127, 127)
    for mode in ("RGBa", "La", "PA"):
        image = Image.new("RGBA" if mode == "RGBa" else "LA", (1, 1)).convert(mode) if mode != "PA" else None
        image = image or Image.new("PA", (1, 1))
        assert load_image(image).getpixel((0, 0)) in (WHITE, (0, 0, 0))


def test_cmyk_plain_and_inverted_as_adobe_writes_it(tmp_path):
    cmyk = picture((64, 64)).convert("CMYK")
    for format in ("JPEG", "TIFF"):  # Pillow writes CMYK JPEG as Adobe does: inverted, with the APP14 marker
        image = load_image(encoded(cmyk, format, **({"quality": 95} if format == "JPEG" else {})))
        assert image.mode == "RGB"
        assert difference(image, picture((64, 64))) < 3


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
    values = np.array([[0, 257, 32896, 65535], [128, 129, 1000, 60000]], np.uint16)
    expected = np.rint(values / 257).astype(np.uint8)
    path = tmp_path / "grey.tif"
    Image.fromarray(values.astype(">u2")).save(path)
    for source in (encoded(Image.fromarray(values), "PNG"), encoded(Image.fromarray(values), "TIFF"), path):
        image = load_image(source)
        assert image.mode == "RGB"
        assert (np.asarray(image) == expected[..., None]).all()


def test_16_bit_pgm():
    data = b"P5 2 1 65535\n" + struct.pack(">HH", 65535, 32896)
    assert [load_image(data).getpixel((x, 0))[0] for x in (0, 1)] == [255, 128]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0.0, 0.5, 1.0]]), [0, 128, 255]),
        (np.array([[0.0, 100.0, 254.6]]), [0, 100, 255]),
        (np.array([[0.0, 257.0, 65535.0]]), [0, 1, 255]),
        (np.array([[-1.0, 0.0, 1.0]]), [0, 128, 255]),
        (np.array([[np.nan, 0.0, np.inf, 1.0]]), [0, 0, 255, 255]),
        (np.array([[1e6, 1e6]]), [0, 0]),
        (np.array([[0, 1, 200]], np.int32), [0, 1, 200]),
        (np.array([[0, 65535]], np.int32), [0, 255]),
        (np.array([[-100, 0, 100]], np.int32), [0, 128, 255]),
        (np.array([[-(2**31), 2**31 - 1]], np.int32), [0, 255]),
    ],
)
def test_values_without_a_range(values, expected):
    values = values.astype(np.float32) if values.dtype == np.float64 else values
    image = load_image(encoded(Image.fromarray(values), "TIFF"))
    assert np.asarray(image)[0, :, 0].tolist() == expected


def test_no_finite_value():
    with pytest.raises(ImageError, match="no pixel has a finite value"):
        load_image(encoded(Image.fromarray(np.full((2, 2), np.nan, np.float32)), "TIFF"))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_animation_gives_its_first_frame(format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN)]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=50, **options)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert load_image(data).getpixel((4, 4)) == RED


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation(orientation, format):
    """The stored picture is turned so that undoing its orientation gives the upright one."""
    store = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    upright = picture((96, 64))
    stored = upright.transpose(store[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(format, {})
    data = encoded(stored, format, exif=exif, **options)
    assert difference(load_image(data), upright) < 2
    if format == "JPEG":
        assert load_image(data, near=14).size == (48, 32)
    opened = Image.open(io.BytesIO(data))
    assert difference(load_image(opened), upright) < 2


@pytest.mark.parametrize("exif", [b"II*\0\xff\xff\xff\xff", b"II*\0\x08\0\0\0\x05\0", b"garbage!"])
def test_damaged_metadata_does_not_hide_the_pixels(exif):
    data = encoded(picture(), "JPEG", quality=95, exif=b"Exif\0\0" + exif)
    assert difference(load_image(data), picture()) < 2


def test_an_image_is_turned_although_another_tag_is_damaged():
    """Pillow's exif_transpose writes the other tags anew and fails on this one: a number where a text belongs."""
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHII", 0x013C, 5, 1, 38)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4) + struct.pack("<II", 1, 2)
    upright = picture((96, 64))
    data = encoded(upright.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=95, exif=exif)
    with pytest.raises(AttributeError):
        ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert difference(load_image(data), upright) < 2


def test_unreadable_metadata_does_not_hide_the_pixels(monkeypatch):
    def fails(self):
        raise SyntaxError("not a TIFF file")

    monkeypatch.setattr(Image.Image, "getexif", fails)
    assert difference(load_image(picture()), picture()) == 0


def test_large_jpeg_is_decoded_near_the_wanted_size():
    image = Image.effect_noise((1000, 800), 40).convert("RGB").resize((1600, 1200), Image.Resampling.BICUBIC)
    ImageDraw.Draw(image).ellipse((200, 200, 1000, 900), fill=(200, 30, 90))
    data = encoded(image, "JPEG", quality=90)
    assert load_image(data).size == (1600, 1200)
    for near, size in [(700, (1600, 1200)), (266, (800, 600)), (224, (800, 600)), (100, (400, 300)), (8, (200, 150))]:
        assert load_image(data, near=near).size == size
    full, fast = (to_pixels(load_image(data, near=near), 224).float() for near in (None, 224))
    assert (full - fast).abs().mean() < 1
    assert load_image(encoded(image, "PNG"), near=224).size == (1600, 1200)
    assert load_image(encoded(picture((33, 17)), "JPEG"), near=1).size == (33, 17), "no half pixels"
    assert load_image(encoded(picture((32, 24)), "JPEG"), near=1).size == (4, 3)
    opened = Image.open(io.BytesIO(data))
    assert load_image(opened, near=100).size == (1600, 1200)


@pytest.mark.parametrize("size", [(13_300, 13_300), (60_000, 50_000)])  # below and above Pillow's own check
def test_too_many_pixels_are_refused_before_decoding(tmp_path, size):
    path = tmp_path / "bomb.png"
    path.write_bytes(huge_png(*size))
    with pytest.raises(ImageError) as error:
        load_image(path)
    assert "pixels" in one_line(error, str(path))


def test_size_limit_and_reduction():
    png, jpeg = encoded(picture((100, 80)), "PNG"), encoded(picture((100, 80)), "JPEG")
    progressive = encoded(picture((100, 80)), "JPEG", progressive=True)
    assert load_image(png, max_pixels=8000).size == (100, 80)
    assert load_image(jpeg, max_pixels=8000).size == (100, 80)
    assert load_image(jpeg, max_pixels=7999).size == (50, 40)
    assert load_image(jpeg, max_pixels=1000).size == (25, 20)
    for data in (png, progressive):
        with pytest.raises(ImageError, match="100×80 pixels are too many"):
            load_image(data, max_pixels=7999, near=10)
    with pytest.raises(ImageError, match="pixels are too many"):
        load_image(jpeg, max_pixels=10)
    four_channels = encoded(picture((100, 80)).convert("RGBA"), "PNG"), encoded(Image.new("F", (100, 80)), "TIFF")
    for data in four_channels:
        assert load_image(data, max_pixels=10_667).size == (100, 80)
        with pytest.raises(ImageError, match="at most 7,999"):
            load_image(data, max_pixels=10_666)
    with pytest.raises(ImageError, match="pixels are too many"):
        load_image(picture(), max_pixels=100)


def test_200_megapixel_jpeg(tmp_path):
    path = tmp_path / "large.jpg"
    Image.new("L", (20_000, 10_000), 90).save(path, quality=50)
    image = load_image(path, near=224)
    assert image.size == (2500, 1250)
    assert image.getpixel((1000, 1000)) == (90, 90, 90)


def test_size_between_pillows_warning_and_its_refusal_does_not_warn(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    data = encoded(picture((40, 40)), "PNG")
    with pytest.warns(Image.DecompressionBombWarning):
        Image.open(io.BytesIO(data))
    with warnings.catch_warnings(record=True) as leaked:
        assert load_image(data).size == (40, 40)
    assert leaked == []
    with pytest.raises(ImageError, match="too many pixels"):
        load_image(encoded(picture((60, 60)), "PNG"))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_truncated(tmp_path, format, kept):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    data = encoded(noise, format)
    path = tmp_path / f"cut.{format.lower()}"
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(ImageError) as error:
        load_image(path)
    one_line(error, str(path))
    if format == "JPEG" and kept >= 0.5:
        with Image.open(path) as opened, pytest.raises(ImageError) as error:
            load_image(opened)
        one_line(error, str(path))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"hello, this is a text\n", "not an image in a known format"),
        (b"", "the file is empty"),
        (b"\xff\xd8\xff", "cannot be decoded"),
        (b"\x89PNG\r\n\x1a\n", "cannot be decoded|not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image in a known format"),
    ],
)
def test_not_an_image(tmp_path, content, reason):
    path = tmp_path / "note.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=reason) as error:
        load_image(path)
    one_line(error, str(path))
    with pytest.raises(ImageError, match=reason) as error:
        load_image(content, name="key 17")
    one_line(error, "key 17")


def test_missing_and_directory(tmp_path):
    for path, reason in [(tmp_path / "none.png", "no such file"), (tmp_path, "is a directory")]:
        with pytest.raises(ImageError) as error:
            load_image(path)
        assert reason in one_line(error, str(path))


def test_random_damage_gives_pixels_or_an_image_error():
    rng = np.random.default_rng(1)
    for format in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "ICO"):
        good = np.frombuffer(encoded(picture(), format), np.uint8)
        for _ in range(40):
            bad = good.copy()
            bad[rng.integers(4, len(bad), 6)] = rng.integers(0, 256, 6)
            with suppress(ImageError):
                assert load_image(bad.tobytes(), max_pixels=1_000_000).mode == "RGB"


def test_warning_filters_survive_threads():
    """Two decodings that overlap, the first to start being the first to end; then many."""

    def pillow_warns():
        warnings.warn_explicit("large", Image.DecompressionBombWarning, "Image.py", 1, module="PIL.Image")

    before = list(warnings.filters)
    first, second = threading.Event(), threading.Event()

    def overlap():
        with _quiet_pillow:
            first.set()
            second.wait(10)

    thread = threading.Thread(target=overlap)
    thread.start()
    first.wait(10)
    with _quiet_pillow:
        second.set()
        thread.join()
        pillow_warns()
    assert list(warnings.filters) == before
    with pytest.raises(Image.DecompressionBombWarning):
        pillow_warns()

    data = encoded(picture(), "PNG")
    threads = [threading.Thread(target=lambda: [load_image(data) for _ in range(20)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(warnings.filters) == before


def test_find_images(tmp_path):
    files = ["b.PNG", "a.jpg", "sub/deep/c.webp", "sub/notes.txt", ".hidden/d.png", "._a.jpg", "sub/a.jpeg"]
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    text = tmp_path / "sub/notes.txt"
    images, problems = find_images([text, tmp_path, tmp_path / "a.jpg", tmp_path / "gone.png", tmp_path / "empty"])
    names = [str(path.relative_to(tmp_path)) for path in images]
    assert names == ["sub/notes.txt", "a.jpg", "b.PNG", "sub/a.jpeg", "sub/deep/c.webp"]
    assert [str(p) for p in problems] == [
        f"{tmp_path / 'gone.png'}: no such file",
        f"{tmp_path / 'empty'}: the directory '{tmp_path / 'empty'}' contains no file with an image's name "
        "(.jpg, .png, .webp, .avif, .gif, .tif, .bmp, .jp2 and others)",
    ]
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "here").symlink_to(tmp_path / "sub")
    (tmp_path / "linked" / "around").symlink_to(tmp_path / "linked")
    images, problems = find_images([tmp_path / "linked"])
    assert [str(path.relative_to(tmp_path)) for path in images] == ["linked/here/a.jpeg", "linked/here/deep/c.webp"]
    assert not problems
    assert find_images([]) == ([], [])
    assert find_images([str(tmp_path / "a.jpg")]) == ([Path(tmp_path / "a.jpg")], [])


def test_an_error_is_one_line_whatever_the_name_holds_and_survives_a_process_border():
    error = ImageError("a\nb\x1b[31m\udcff.jpg", "the file is empty")
    assert str(error) == r"a\nb\x1b[31m\udcff.jpg: the file is empty"
    again = pickle.loads(pickle.dumps(error))
    assert (again.name, again.reason, str(again)) == (error.name, error.reason, str(error))


def test_large_images_are_decoded_one_after_another(monkeypatch):
    inside, most = 0, 0
    lock = threading.Lock()

    def counting(image):
        nonlocal inside, most
        with lock:
            inside, most = inside + 1, max(most, inside + 1)
        time.sleep(0.02)
        with lock:
            inside -= 1
        return image.convert("RGB")

    monkeypatch.setattr(images, "_to_rgb", counting)
    monkeypatch.setattr(images, "_LARGE", 99)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(load_image, [Image.new("L", (10, 10))] * 8))
    assert most == 1

"""The page: hostile uploads leave it serving, no file of the machine can be read, and a browser can use it."""

import io
import json
import os
import shutil
import signal
import socket
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import cache
from html import unescape
from importlib.util import find_spec
from pathlib import Path

import httpx
import numpy as np
import pytest
from helpers import call_nxtp, free_port, huge_png, jpeg, recognizer, reports_a_taken_port_and_a_missing_model, serving
from PIL import Image

from nxtp.deploy import guard
from nxtp.inference.recognizer import Recognizer

if find_spec("gradio") is None:  # imported by the process that runs this file, not by each that collects it
    pytest.skip("the page needs gradio", allow_module_level=True)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.costly
MAX_BYTES, KEPT = 1 << 20, 30
# One for all requests: httpx.get reads the certificates of this machine each time.
web = httpx.Client(verify=False, timeout=60, limits=httpx.Limits(max_connections=None, max_keepalive_connections=0))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("app")
    (root / "examples").mkdir()
    for i in range(3):
        (root / "examples" / f"{i}.jpg").write_bytes(jpeg((60 * i, 200 - 40 * i, 90), seed=i, size=96))
    (root / "secret.jpg").write_bytes(jpeg((1, 2, 3)))
    (root / "uploads").mkdir()
    return root


@pytest.fixture(scope="module")
def model():
    return recognizer()


@pytest.fixture(scope="module")
def address(model, place):
    """Of the page, served by a thread of this process."""
    from nxtp.deploy.app.page import launch, make_page

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(place / "uploads"))
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        page = make_page(model, place / "examples")
        yield launch(page, place / "uploads", "127.0.0.1", free_port(), MAX_BYTES, KEPT)
        page.close(verbose=False)


def upload(address: str, content: bytes, name: str = "x.jpg") -> str:
    found = web.post(f"{address}/gradio_api/upload", files={"files": (name, content)})
    assert found.status_code == 200, found.text
    return found.json()[0]


@cache
def asking(address: str) -> int:
    """The number of the page's function that gives labels: the one of four inputs."""
    config = web.get(f"{address}/config").json()
    return next(i for i, each in enumerate(config["dependencies"]) if len(each["inputs"]) == 4)


def ask(address: str, path: str | None, count: int = 5, mode: str = "Any label", typed: str = "") -> str:
    """What the page shows for an uploaded file, or 'FAILED: …'."""
    session = os.urandom(5).hex()
    image = path and {"path": path, "meta": {"_type": "gradio.FileData"}}
    asked = {"data": [image, count, mode, typed], "fn_index": asking(address), "session_hash": session}
    joined = web.post(f"{address}/gradio_api/queue/join", json=asked)
    if joined.status_code != 200:
        return f"FAILED: {joined.text}"
    url = f"{address}/gradio_api/queue/data"
    with web.stream("GET", url, params={"session_hash": session}) as events:
        for line in events.iter_lines():
            event = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
            if event.get("msg") == "process_completed":
                return event["output"]["data"][0] if event["success"] else f"FAILED: {event['output'].get('error')}"
    return "FAILED: no result"


def labels_in(shown: str) -> list[str]:
    return [unescape(part.split('"')[0]) for part in shown.split('data-label="')[1:]]


def hostile() -> dict[str, bytes]:
    def saved(image: Image.Image, kind: str, **options) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a.txt", "a" * 1000)
    frames = [Image.new("RGB", (30, 30), colour) for colour in ("red", "green", "blue")]
    deep = Image.fromarray(np.arange(900, dtype=np.uint16).reshape(30, 30) * 70)
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><script>alert(1)</script></svg>'
    return {
        "no image": b"hello",
        "torn": jpeg((1, 2, 3), size=64)[:300],
        "empty": b"",
        "30,000 × 30,000": huge_png(30_000, 30_000),
        "zip": packed.getvalue(),
        "svg": svg,
        "animated gif": saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "cmyk": saved(Image.new("CMYK", (30, 30), (9, 200, 30, 0)), "JPEG"),
        "16 bit": saved(deep, "PNG"),
        "1 × 1": saved(Image.new("RGB", (1, 1)), "PNG"),
    }


USABLE = {"animated gif", "cmyk", "16 bit", "1 × 1"}


@pytest.mark.parametrize("kind", sorted(hostile()))
def test_hostile_uploads_get_a_line_or_labels(address, place, kind):
    name = "x.svg" if kind == "svg" else "x.jpg"
    shown = ask(address, upload(address, hostile()[kind], name))
    assert ("role=" in shown) == (kind not in USABLE), shown
    assert ('class="row"' in shown) == (kind in USABLE), shown
    assert "FAILED" not in shown
    assert str(place) not in shown
    assert "x.jpg" not in shown


def test_labels_are_the_models(address, model):
    shown = ask(address, upload(address, jpeg((200, 40, 60))), 4)
    expected = model.predict(jpeg((200, 40, 60)), top_k=4)
    assert [unescape(part.split('"')[0]) for part in shown.split('data-label="')[1:]] == [
        label for label, _ in expected
    ]
    assert [unescape(part.split('"')[0]) for part in shown.split('data-written="')[1:]] == [
        label.written for label, _ in expected
    ]
    assert " ms." in shown


def test_a_typed_vocabulary_is_classified_and_escaped(address, model):
    path = upload(address, jpeg((200, 40, 60)))
    evil = "<img src=x onerror=alert(1)>"
    shown = ask(address, path, 9, "Only these", f"rose, flower\nlemon\n\n{evil}\n${{alert(1)}}{{{{value}}}}")
    assert set(labels_in(shown)) == {"rose", "lemon", evil, "${alert(1)}{{value}}"}
    assert "<img" not in shown
    assert "Type the labels" in ask(address, path, 9, "Only these", " \n")
    assert "too many" in ask(address, path, 9, "Only these", "\n".join(map(str, range(3000))))
    assert "are one label" in ask(address, path, 9, "Only these", "rose\nRose")
    alike = "\n".join("q" * 150 + f"{i:04d}" * 12 for i in range(240))
    assert "begin alike" in ask(address, path, 9, "Only these", alike)
    assert "A label is too long" in ask(address, path, 9, "Only these", "a" * 201)
    assert 'class="row"' not in ask(address, path, 9, "Only these", "a\n" * 30_000)


def test_no_file_of_the_machine_can_be_read(address, place):
    secret = str(place / "secret.jpg")
    inside = upload(address, jpeg((5, 5, 5)))
    assert web.get(f"{address}/gradio_api/file={inside}").status_code == 200
    climbing = f"{Path(inside).parent}/../../secret.jpg"
    for path in (secret, "/etc/passwd", climbing, climbing.replace("/", "%2f"), "pyproject.toml", "~/.bashrc"):
        found = web.get(f"{address}/gradio_api/file={path}", follow_redirects=True)
        assert found.status_code in (403, 404), path
    with serving(place) as (site, handler):
        for path in (secret, "/etc/passwd", climbing, f"{site}/secret.jpg"):
            assert ask(address, path).startswith("FAILED"), path
        assert handler.asked == [], "no address inside the network is fetched"
    for name in ("../../evil.jpg", "/tmp/evil.jpg", "..\\evil.jpg", "a\x00b.jpg"):
        found = web.post(f"{address}/gradio_api/upload", files={"files": (name, b"x")})
        assert all(Path(path).is_relative_to(place / "uploads") for path in (found.json() if found.is_success else []))
    for elsewhere in ("file=https://example.org/x.png", "file=HTTP:%2F%2F127.0.0.1:1/x", "proxy=https://example.org"):
        assert web.get(f"{address}/gradio_api/{elsewhere}").status_code == 403, elsewhere
    assert web.get(f"{address}/docs").status_code == 404
    config = web.get(f"{address}/config").text
    assert str(place / "examples") not in config


def test_uploads_are_limited_in_size_and_number(address, place):
    def pieces():
        for _ in range(100):
            yield bytes(1 << 16)

    url = f"{address}/gradio_api/upload"
    announced = {"content-length": str(1 << 30), "content-type": "multipart/form-data; boundary=x"}
    with socket.create_connection(("127.0.0.1", int(address.rsplit(":")[-1]))) as raw:
        head = "".join(f"{name}: {value}\r\n" for name, value in announced.items())
        raw.sendall(f"POST /gradio_api/upload HTTP/1.1\r\nhost: localhost\r\n{head}\r\n".encode())
        assert b" 413 " in raw.recv(1000), "a gigabyte is refused before it is sent"
    kind = {"content-type": "multipart/form-data; boundary=x"}
    begin = b'--x\r\ncontent-disposition: form-data; name="files"; filename="x.jpg"\r\n\r\n'
    with suppress(httpx.TransportError):  # the connection may be closed while we are still sending
        assert web.post(url, content=iter([begin, *pieces()]), headers=kind).status_code == 413
    too_large = web.post(url, files={"files": ("x.jpg", bytes(MAX_BYTES + 5))})
    assert too_large.status_code == 413
    for number in range(KEPT + 5):
        upload(address, f"{number}".encode())
    examples = 3
    assert len(list((place / "uploads").iterdir())) <= KEPT + examples


def test_stalled_uploads_keep_nobody_out(address, monkeypatch):
    monkeypatch.setattr(guard, "MAX_INCOMPLETE", 20)
    head = b"POST /gradio_api/upload HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100000\r\n"
    form = b'--x\r\ncontent-disposition: form-data; name="files"; filename="x.jpg"\r\n\r\n'
    half = head + b"content-type: multipart/form-data; boundary=x\r\n\r\n" + form
    with ExitStack() as stack:
        for _ in range(40):
            raw = stack.enter_context(socket.create_connection(("127.0.0.1", int(address.rsplit(":")[-1]))))
            raw.sendall(half)
        assert Path(upload(address, jpeg((9, 9, 9)))).is_file()
        monkeypatch.setattr(guard, "RECEIVE_SECONDS", 0.1)
        raw = stack.enter_context(socket.create_connection(("127.0.0.1", int(address.rsplit(":")[-1])), timeout=20))
        raw.sendall(half)
        assert raw.recv(1000) == b"", "the page's server has the deadline"


def test_other_bodies_are_limited_too(address):
    asked = {"data": [None, 1, "Any label", "a" * (2 << 20)], "fn_index": asking(address), "session_hash": "x"}
    assert web.post(f"{address}/gradio_api/queue/join", json=asked).status_code == 413


def test_names_of_other_sites_are_refused_and_nothing_is_loaded_from_them(address):
    assert web.get(address, headers={"host": "evil.example"}).status_code == 400
    assert web.get(address, headers={"host": "localhost:80"}).status_code == 200
    policy = web.get(address).headers["content-security-policy"]
    assert policy.startswith("default-src 'self'; ")
    assert "http" not in policy


def test_sigterm_deletes_uploads(model, tmp_path, monkeypatch):
    found = []

    def end(page) -> None:
        found.extend(tmp_path.glob("nxtp-app-*"))
        signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(Recognizer, "from_pretrained", lambda *_, **__: model)
    monkeypatch.setattr("gradio.Blocks.block_thread", end)
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "")
    try:
        done = call_nxtp("app", "model", "--port", str(free_port()), cwd=tmp_path)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert done.returncode != 0
    assert len(found) == 1
    assert not found[0].exists()
    assert "Traceback" not in done.stderr


def test_fifty_requests_at_a_time_leave_it_serving(address, model, monkeypatch):
    path = upload(address, jpeg((1, 90, 90)))
    with monkeypatch.context() as patch, ThreadPoolExecutor(50) as pool:
        patch.setattr(model, "predict_pixels", lambda pixels, *_, **__: [[("rose", 0.5)]] * len(pixels))
        shown = list(pool.map(lambda _: ask(address, path, 1), range(50)))
    served = [text for text in shown if 'class="row"' in text]
    assert len(served) >= 32
    assert all("FAILED" in text for text in shown if text not in served), "the others get an error"
    assert 'class="row"' in ask(address, path)


def test_a_taken_port_and_a_missing_model_are_reported_in_a_line(place):
    reports_a_taken_port_and_a_missing_model("app", place)


# In a browser

ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, headless=True, args=ARGUMENTS)
        yield opened
        opened.close()


def test_a_browser_shows_labels_and_where_they_look(address, browser, place):
    page = browser.new_page(viewport={"width": 1280, "height": 850})
    asked, problems = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda said: problems.append(said.text) if "Content Security Policy" in said.text else None)
    page.goto(address)
    page.set_input_files("#image input[type=file]", place / "examples" / "0.jpg")
    rows = page.locator("#labels .row")
    rows.first.wait_for()
    assert rows.count() == 8

    page.locator("#count input[type=range]").focus()  # by keyboard
    page.keyboard.press("ArrowRight")
    page.locator("#count input[type=range]").dispatch_event("pointerup")
    page.wait_for_function("document.querySelectorAll('#labels .row').length != 8")
    rows.nth(1).focus()
    page.keyboard.press("Enter")
    page.locator("#look img").wait_for()
    nothing_sticks_out(page)
    assert rows.nth(1).get_attribute("aria-pressed") == "true"
    assert page.evaluate("document.querySelector('#look img').naturalWidth") > 100
    label = rows.nth(1).get_attribute("data-label")
    assert f"Where “{label}” looks" in page.locator("#look").inner_text()

    page.get_by_label("Only these").check()
    typed = page.locator("#typed textarea")
    typed.fill("rose\nlemon, citrus\n<img src=x onerror='window.broken = 1'>")
    typed.blur()
    page.wait_for_function("document.querySelectorAll('#labels .row').length == 3")
    assert not page.evaluate("window.broken")
    nothing_sticks_out(page)

    page.get_by_label("Any label").check()
    page.set_input_files("#image input[type=file]", {"name": "x.jpg", "mimeType": "image/jpeg", "buffer": b"no"})
    page.locator("#labels [role=alert]").wait_for()
    assert "not an image" in page.locator("#labels").inner_text()

    assert page.locator("button.gallery-item").count() == 3
    page.locator("button.gallery-item").first.focus()
    page.keyboard.press("Enter")
    rows.first.wait_for()

    nothing_sticks_out(page)
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))], "nothing from elsewhere"
    assert problems == []
    page.close()


def nothing_sticks_out(page):
    """On a telephone either."""
    for width in (390, 1280):
        page.set_viewport_size({"width": width, "height": 850})
        assert page.evaluate("document.documentElement.scrollWidth") <= width

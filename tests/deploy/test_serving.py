"""The server: the model's labels, requests in batches; a bad request does not fail the others of its batch."""

import base64
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from helpers import COLOURS, jpeg, recognizer, reports_a_taken_port_and_a_missing_model

pytest.importorskip("litserve")

from nxtp.deploy.ports import free_port
from nxtp.deploy.server import LabelAPI, PredictRequest, Refused, Server
from nxtp.inference.recognizer import Recognizer

pytestmark = pytest.mark.costly
IMAGES = [jpeg(colour, seed=i) for i, colour in enumerate([*COLOURS.values()] * 3)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("serving")
    recognizer().save_pretrained(root / "model")
    return root


@pytest.fixture(scope="module")
def model(place):
    return Recognizer.from_pretrained(place / "model", device="cpu")


def body(image: bytes, **options) -> bytes:
    return json.dumps({"image": base64.b64encode(image).decode(), **options}).encode()


def post(port: int, body: bytes) -> tuple[int, dict]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/predict", body, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.fixture(scope="module")
def port(place):
    number = free_port()
    options = ("--port", str(number), "--batch-size", "4", "--wait-ms", "300", "--max-mb", "1", "--device", "cpu")
    quiet = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(place / "log", "w") as log:
        command = [sys.executable, "-m", "nxtp", "serve", "model", *options]
        process = subprocess.Popen(command, cwd=place, stdout=log, stderr=log, env=quiet, start_new_session=True)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{number}/health", timeout=5).close()
            break
        except OSError:
            time.sleep(0.2)
    yield number
    process.send_signal(signal.SIGTERM)
    assert process.wait(90) is not None
    with suppress(ProcessLookupError):
        for _ in range(100):
            os.killpg(process.pid, 0)
            time.sleep(0.1)
        raise AssertionError("processes of the server are left")
    assert sorted(path.name for path in place.iterdir()) == ["log", "model"]
    assert "Traceback" not in (place / "log").read_text()


def test_labels_are_the_models_and_bad_requests_do_not_spoil_a_batch(port, model):
    bodies = [body(image, top_k=3) for image in IMAGES]
    bodies[2] = body(b"no picture")
    bodies[5] = body(IMAGES[5], top_k=0)
    bodies[7] = b'{"image": 3'
    with ThreadPoolExecutor(len(bodies)) as pool:
        found = list(pool.map(lambda body: post(port, body), bodies))
    assert [code for code, _ in found] == [422 if i in (2, 5, 7) else 200 for i in range(len(bodies))]
    assert found[2][1] == {"error": "not an image in a known format"}
    for image, (code, labels) in zip(IMAGES, found, strict=True):
        if code == 200:
            expected = model.predict(image, top_k=3)
            assert [each["label"] for each in labels["labels"]] == [label for label, _ in expected]
            probabilities = [each["probability"] for each in labels["labels"]]
            assert probabilities == pytest.approx([probability for _, probability in expected], rel=1e-4)
    assert post(port, body(bytes(2 << 20)))[0] == 413


def test_requests_that_come_together_are_one_batch(place, model):
    """What LitServe calls, in the order in which it calls it."""
    api = LabelAPI(str(place / "model"), max_batch_size=8)
    api.pre_setup()
    api.setup("cpu")
    sizes = []
    usual = api.recognizer.predict_pixels
    api.recognizer.predict_pixels = lambda pixels, *rest: sizes.append(len(pixels)) or usual(pixels, *rest)
    counts = (3, 2, 3, 3)
    pairs = zip([*IMAGES[:3], b"no"], counts, strict=True)
    asked = [PredictRequest(image=base64.b64encode(image), top_k=count) for image, count in pairs]
    found = api.unbatch(api.predict(api.batch([api.decode_request(each) for each in asked])))
    assert sizes == [2, 1], "of two labels the first is not always that of three"
    for i, labels in enumerate(found[:3]):
        assert [label for label, _ in labels] == [label for label, _ in model.predict(IMAGES[i], top_k=counts[i])]
    assert isinstance(found[3], Refused)
    assert api.predict(api.decode_request(asked[0])) == found[0], "without batches LitServe gives one request"
    assert isinstance(api.predict(api.decode_request(asked[3])), Refused)


def test_a_closed_vocabulary(place, model):
    (place / "model" / "labels.txt").write_text("rose, flower\nlemon\n")
    api = LabelAPI(str(place / "model"), str(place / "model" / "labels.txt"), max_batch_size=2)
    api.setup("cpu")
    found = api.predict(api.decode_request(PredictRequest(image=base64.b64encode(IMAGES[0]))))
    assert found == [(label, pytest.approx(p)) for label, p in model.classify(IMAGES[0], [["rose", "flower"], "lemon"])]
    (place / "model" / "labels.txt").unlink()


def test_the_monitor_ends_before_its_manager(monkeypatch):
    """LitServe's monitor asks a manager process that is gone: a traceback, on a busy machine."""
    asked = []
    ends = lambda self, *_: asked.append((type(self._shutdown_event), self._shutdown_event.is_set()))  # noqa: E731
    monkeypatch.setattr(Server.__base__, "_perform_graceful_shutdown", ends)
    server = Server(LabelAPI("nowhere", max_batch_size=2), accelerator="cpu")
    server._perform_graceful_shutdown(None, {}, "keyboard_interrupt")
    assert asked == [(threading.Event, True)]


def test_a_taken_port_and_a_missing_model_are_reported_in_a_line(place):
    reports_a_taken_port_and_a_missing_model("serve", place)

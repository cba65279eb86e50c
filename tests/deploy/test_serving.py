"""The server: the model's labels, requests in batches; a bad request does not fail the others of its batch."""

import atexit
import base64
import json
import multiprocessing
import os
import shutil
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

import psutil
import pytest
from helpers import COLOURS, Command, free_port, jpeg, recognizer, reports_a_taken_port_and_a_missing_model, start_nxtp

pytest.importorskip("litserve")

from nxtp.deploy.server import LabelAPI, PredictRequest, Refused, Server, _end_worker
from nxtp.inference.recognizer import Recognizer

pytestmark = pytest.mark.costly
IMAGES = [jpeg(colour, seed=i) for i, colour in enumerate([*COLOURS.values()] * 3)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("serving")
    recognizer().save_pretrained(root / "model")
    (root / "quick.py").write_text(QUICK)
    return root


@pytest.fixture(scope="module")
def model(place):
    return Recognizer.from_pretrained(place / "model", device="cpu")


def body(image: bytes, **options) -> bytes:
    return json.dumps({"image": base64.b64encode(image).decode(), **options}).encode()


def post(port: int, body: bytes, content_type: str = "application/json") -> tuple[int, dict]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/predict", body, {"content-type": content_type})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


# Imported by the servers of these tests: LitServe starts a worker as a new interpreter, which takes half a minute to
# import what the fork server has imported. Its processes are a group, so that none is missed.
QUICK = """
import atexit, multiprocessing, os, time
from nxtp.deploy import guard, server
from nxtp.inference.recognizer import Recognizer

os.setsid()
usual = multiprocessing.get_context
multiprocessing.get_context = lambda method=None: usual("fork")
os.register_at_fork(after_in_child=atexit._clear)  # what those before it would delete at their end
guard.MAX_INCOMPLETE = 30
server.Server.monitor_internal = property(lambda _: 0.05, lambda *_: None)  # LitServe looks for its worker every 2 s
if "SLOW" in os.environ:
    Recognizer.from_pretrained = lambda *_, **__: print("loading", flush=True) or time.sleep(100)
"""


def start_server(place, model="model", **environment) -> tuple[Command, int]:
    port = free_port()
    options = ("--port", str(port), "--batch-size", "4", "--wait-ms", "300", "--max-mb", "1", "--device", "cpu")
    return start_nxtp("serve", model, *options, cwd=place, NXTP_IMPORT="quick", **environment), port


def wait_until(ready, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, "too late"
        time.sleep(0.02)


def is_up(port: int) -> bool:
    with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
        return response.status == 200
    return False


def has_ended(command: Command) -> bool:
    """Whether none of its processes is left; one that has ended may wait for init."""
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(process.pid) == command.ranks[0].pid and process.status() != psutil.STATUS_ZOMBIE:
                return False
    return True


@pytest.fixture(scope="module")
def served(place):
    command, port = start_server(place)
    wait_until(lambda: is_up(port))
    yield command, port
    command.kill(signal.SIGTERM)
    assert command.wait(90) == 0
    wait_until(lambda: has_ended(command), 30)
    assert {path.name for path in place.iterdir()} <= {"model", "quick.py", "__pycache__", command.log.name}
    lines = ["Loading model …", f"Serving at http://127.0.0.1:{port}/predict (Ctrl-C stops it).", "Stopped."]
    assert command.output.splitlines() == lines


@pytest.fixture(scope="module")
def port(served):
    return served[1]


def test_labels_are_the_models_and_bad_requests_do_not_spoil_a_batch(port, model):
    bodies = [body(image, top_k=3) for image in IMAGES]
    bodies[2] = body(b"no picture")
    bodies[5] = body(IMAGES[5], top_k=0)
    bodies[7] = b'{"image": 3'
    with ThreadPoolExecutor(len(bodies)) as pool:
        found = list(pool.map(lambda body: post(port, body), bodies))
    assert [code for code, _ in found] == [422 if i in (2, 5, 7) else 200 for i in range(len(bodies))]
    assert found[2][1] == {"error": "not an image in a known format"}
    assert found[7][1] == {"error": "JSON decode error"}
    assert found[5][1] == {"error": "top_k: Input should be greater than or equal to 1"}
    for image, (code, labels) in zip(IMAGES, found, strict=True):
        if code == 200:
            expected = model.predict(image, top_k=3)
            assert [each["label"] for each in labels["labels"]] == [label for label, _ in expected]
            probabilities = [each["probability"] for each in labels["labels"]]
            assert probabilities == pytest.approx([probability for _, probability in expected], rel=1e-4)
    assert post(port, body(bytes(2 << 20))) == (413, {"error": "Payload too large"})


HOSTILE = {
    "raw bytes": b"\xff\xd8\xff\xe0raw secret",
    "NaN": b'{"image": NaN, "secret": NaN}',
    "1e400": b'{"image": "", "top_k": 1e400, "secret": 1}',
    "a lone surrogate": b'{"image": "\\ud800", "secret": "\\ud800"}',
    "not base64": b'{"image": "secret*"}',
    "deep": b"[" * 100_000,
    "a long number": b'{"image": "", "top_k": ' + b"9" * 10_000 + b"}",
    "nothing": b"",
    "null": b"null",
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("content_type", ["application/json", "application/octet-stream"])
def test_a_request_that_is_none_gets_a_line_and_not_itself(port, kind, content_type):
    code, found = post(port, HOSTILE[kind], content_type)
    assert code in (400, 422)
    assert list(found) == ["error"]
    assert isinstance(found["error"], str)
    assert "secret" not in found["error"]


def test_other_paths_names_and_half_requests(port):
    request = urllib.request.Request(f"http://127.0.0.1:{port}/elsewhere")
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request)
    assert json.load(error.value) == {"error": "Not Found"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/health", headers={"host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request)
    with ExitStack() as stack:
        halves = [stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20)) for _ in range(31)]
        for half in halves[1:]:
            half.sendall(b"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n{")
        assert halves[0].recv(100) == b"", "the oldest is closed"
        assert post(port, body(IMAGES[0]))[0] == 200


def test_a_signal_while_the_model_loads(place):
    """To the first process, or to all."""
    for command, send in [(start_server(place, SLOW="1")[0], send) for send in (os.kill, os.killpg)]:
        wait_until(lambda command=command: "loading" in command.output)
        send(command.ranks[0].pid, signal.SIGTERM)
        assert command.wait(60) != 0
        wait_until(lambda command=command: has_ended(command), 30)
        assert "Traceback" not in command.output
        command.log.unlink()


def test_a_model_that_cannot_be_loaded_is_one_line(place, model):
    shutil.copytree(place / "model", place / "torn")
    (place / "torn" / "model.safetensors").write_bytes(b"no weights")
    command, _ = start_server(place, "torn")
    assert command.wait(60) == 1
    wait_until(lambda: has_ended(command), 30)
    assert command.output.startswith("Loading torn …\nerror: ")
    assert command.output.count("\n") == 2
    command.log.unlink()
    shutil.rmtree(place / "torn")


def test_a_worker_that_dies_ends_the_server(place):
    command, port = start_server(place)
    wait_until(lambda: is_up(port))
    worker = max(psutil.Process(command.ranks[0].pid).children(), key=lambda each: each.memory_info().rss)
    worker.kill()
    assert command.wait(60) == 1
    wait_until(lambda: has_ended(command), 30)
    assert "died" in command.output
    assert "Traceback" not in command.output
    command.log.unlink()


def test_a_worker_ends_at_once_without_its_temporary_files(place):
    ended = multiprocessing.get_context("fork").Process(target=ends_with_files, args=(place / "files",))
    ended.start()
    ended.join(20)
    assert ended.exitcode == 0
    assert not (place / "files").exists()


def ends_with_files(path):
    atexit._clear()  # what the process that was forked would delete at its end
    path.touch()
    atexit.register(path.unlink)
    try:
        _end_worker()
    finally:
        os._exit(1)  # nothing is unwound


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


def test_it_shuts_down_once_and_its_monitor_asks_no_manager(monkeypatch):
    """LitServe's monitor asks a manager process that may be gone: a traceback, on a busy machine."""
    asked = []
    ends = lambda self, *_: asked.append(self._shutdown_event.is_set())  # noqa: E731
    monkeypatch.setattr(Server.__base__, "_perform_graceful_shutdown", ends)
    monkeypatch.setattr(Server.__base__, "_init_manager", lambda *_: None)
    server = Server(LabelAPI("nowhere", max_batch_size=2), accelerator="cpu")
    server._init_manager(1)
    assert isinstance(server._shutdown_event, threading.Event)
    server._perform_graceful_shutdown(None, {}, "keyboard_interrupt")
    server._perform_graceful_shutdown(None, {}, "Worker inference-worker died")
    assert asked == [True]
    assert not server.died


def test_a_taken_port_and_a_missing_model_are_reported_in_a_line(place):
    reports_a_taken_port_and_a_missing_model("serve", place)

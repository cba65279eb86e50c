"""`nxtp serve`: a model behind LitServe, which batches the requests that arrive together (docs/serving.md)."""

# No postponed annotations here: LitServe derives the HTTP endpoint from those of decode_request and encode_response.

import atexit
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import click
import litserve
from fastapi.exceptions import RequestValidationError
from litserve.utils import WorkerSetupStatus
from pydantic import Base64Bytes, BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from nxtp.deploy.guard import TimedProtocol, trusted_hosts
from nxtp.deploy.ports import check_free
from nxtp.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from nxtp.sampling.ranking import Labels

    Input: TypeAlias = tuple[Tensor, int] | "Refused"  # pixels uint8 [3, S, S] and top_k

MAX_TOP_K = 100


class Refused(str):
    """Why a request has no labels; the others of its batch have."""


class PredictRequest(BaseModel):
    """The body of a request."""

    image: Base64Bytes
    top_k: Annotated[int, Field(ge=1, le=MAX_TOP_K)] = 10


class LabelAPI(litserve.LitAPI):
    """POST {"image": its bytes in base64, "top_k": 10} → {"labels": [{"label": …, "probability": …}, …]}.

    Args:
        model: a directory or hub name.
        classes: a closed vocabulary, as of `nxtp classify`; None: any label.
        max_batch_size, batch_timeout: requests per batch, and the seconds that the first waits for others.
    """

    def __init__(self, model: str, classes: str | None = None, **batching: Any):
        super().__init__(**batching)
        self.source, self.classes = model, classes

    def setup(self, device: str) -> None:
        """Load the model in the process that runs it; a mistake is one line, and ends the process."""
        from nxtp.inference.recognizer import Recognizer
        from nxtp.sampling.closed_vocabulary import read_classes

        if multiprocessing.parent_process() is not None:
            signal.signal(signal.SIGTERM, _end_worker)
        try:
            self.recognizer = Recognizer.from_pretrained(self.source, device=device)
            classes = None if self.classes is None else read_classes(self.classes)
            self.prepared = self.recognizer.prepare_classes(classes) if classes else None
        except UserError as error:
            click.secho(f"error: {error}", fg="red", err=True)
            sys.exit(1)

    def decode_request(self, request: PredictRequest):
        """Pixels and top_k; Refused instead of an exception, which would fail the whole batch."""
        from nxtp.data.images import ImageError

        try:
            return self.recognizer.transform(request.image), request.top_k
        except ImageError as error:
            return Refused(error.reason)

    def predict(self, inputs: Any) -> Any:
        """Labels of one request, or of a list of them."""
        if isinstance(inputs, list):
            return self._labels(inputs)
        return self._labels([inputs])[0]

    def encode_response(self, output):
        if isinstance(output, Refused):
            return JSONResponse({"error": output}, status_code=422)
        # Plain strings: the process that answers would import torch to unpickle a PredictedLabel.
        return {"labels": [{"label": str(label), "probability": probability} for label, probability in output]}

    def _labels(self, inputs: Sequence["Input"]) -> "list[Labels | Refused]":
        """One forward pass per top_k: the labels of a smaller one are not always the first of a larger one."""
        import torch

        outputs: Any = list(inputs)
        readable = {place: each for place, each in enumerate(inputs) if not isinstance(each, Refused)}
        for top_k in dict.fromkeys(count for _, count in readable.values()):
            same = [place for place, (_, count) in readable.items() if count == top_k]
            pixels = torch.stack([readable[place][0] for place in same])
            for place, labels in zip(same, self.recognizer.label_pixels(pixels, top_k, self.prepared), strict=True):
                outputs[place] = labels
        return outputs


class Server(litserve.LitServer):
    """LitServe's, with limits, and without tracebacks when it ends: by a signal at any moment, or with its worker.

    Args:
        host: where it will serve.
    """

    def __init__(self, *arguments: Any, host: str = "127.0.0.1", **options: Any):
        super().__init__(*arguments, **options)
        self._host = host
        self.app.user_middleware.insert(0, trusted_hosts(host))
        self.app.add_exception_handler(RequestValidationError, _invalid)
        self.app.add_exception_handler(HTTPException, _refused)

    def _init_manager(self, *arguments: Any) -> Any:
        manager = super()._init_manager(*arguments)
        # LitServe's belongs to the manager, a process, which its monitor would ask when it is gone.
        self._shutdown_event, self._ending = threading.Event(), threading.Lock()
        return manager

    def launch_inference_worker(self, *arguments: Any) -> Any:
        """Ctrl-C is for the main process: a worker ignores it from its first instruction on."""
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return super().launch_inference_worker(*arguments)
        finally:
            signal.signal(signal.SIGINT, before)

    def verify_worker_status(self) -> None:
        """Wait for the model. LitServe would wait forever for a process that was killed."""
        while WorkerSetupStatus.READY not in self.workers_setup_status.values():
            ended = next((each.exitcode for each in self.inference_workers if not each.is_alive()), None)
            if ended is not None:  # after a line of its own, unless it was killed
                if ended >= 0:
                    raise SystemExit(1)
                name = signal.Signals(-ended).name
                raise UserError(f"The process that loads the model was killed ({name}): is there enough memory?")
            time.sleep(0.05)

    def _start_server(self, port: int, *arguments: Any, **options: Any) -> Any:
        """Report the address once a request can be sent."""
        workers = super()._start_server(port, *arguments, **options)
        local = "::1" if self._host == "::" else "127.0.0.1"
        while all(each.is_alive() for each in workers.values()):
            with suppress(OSError), socket.create_connection((local, port), timeout=5):
                host = "[::]" if self._host == "::" else self._host
                click.echo(f"Serving at http://{host}:{port}/predict (Ctrl-C stops it).", err=True)
                break
            time.sleep(0.05)
        return workers

    def _perform_graceful_shutdown(self, manager: Any, uvicorn_workers: Any, shutdown_reason: str = "normal") -> None:
        """Once, by the monitor when a worker died, or by the main thread when a signal came; the other waits."""
        with self._ending:
            if not self._shutdown_event.is_set():
                self.died = "died" in shutdown_reason
                self._shutdown_event.set()
                super()._perform_graceful_shutdown(manager, uvicorn_workers, shutdown_reason)


async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    """The first mistake, without the input, which FastAPI sends back and fails where it is no JSON."""
    first = error.errors()[0]
    where = ".".join(part for part in first["loc"][1:2] if isinstance(part, str))  # a position in what is no JSON
    return JSONResponse({"error": f"{where}: {first['msg']}" if where else first["msg"]}, status_code=422)


async def _refused(request: Request, error: HTTPException) -> JSONResponse:
    return JSONResponse({"error": error.detail}, status_code=error.status_code)


def _end_worker(*_: Any) -> None:
    """Libraries delete their temporary files. To free every object takes longer than the 5 s that LitServe waits."""
    atexit._run_exitfuncs()
    os._exit(0)


@click.command()
@click.argument("model")
@click.option(
    "--host", type=click.Choice(["127.0.0.1", "0.0.0.0", "::"]), default="127.0.0.1", show_default=True,
    help="Address to serve at; 0.0.0.0 or :: to the network.",
)  # fmt: skip
@click.option("--port", type=click.IntRange(1024, 65535), default=8000, show_default=True)
@click.option("--classes", help="A closed vocabulary: a file with one class per line, or imagenet1k.")
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Maximum requests per batch.")
@click.option(
    "--wait-ms", type=click.FloatRange(1), default=10.0, show_default=True,
    help="How long the first request of a batch waits for others.",
)  # fmt: skip
@click.option("--max-mb", type=click.IntRange(1), default=20, show_default=True, help="Size of a request.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
def serve(model, host, port, classes, batch_size, wait_ms, max_mb, device) -> None:
    """Serve MODEL's labels over HTTP. Requests that arrive together are one batch.

    \b
    nxtp serve runs/demo/model
    printf '{"image": "%s", "top_k": 5}' "$(base64 -w0 photo.jpg)" |
        curl localhost:8000/predict -H 'content-type: application/json' -d @-
    """
    check_free(host, port)
    from nxtp.inference import model_directory as model_dir

    model_dir.read_config(model_dir.locate(model))  # mistakes are reported here, not by a process of the server
    if classes is not None:
        from nxtp.sampling.closed_vocabulary import read_classes

        read_classes(classes)
    api = LabelAPI(model, classes, max_batch_size=batch_size, batch_timeout=wait_ms / 1000)
    server = Server(api, accelerator=device, devices=1, host=host, max_payload_size=max_mb << 20)
    _exit_on_sigterm()
    click.echo(f"Loading {model} …", err=True)
    try:
        server.run(
            host=host, port=port, num_api_servers=1, generate_client_file=False, log_level="warning", http=TimedProtocol
        )
    finally:  # if it ended before LitServe was ready to end them
        for process in multiprocessing.active_children():
            process.kill()
    if server.died:
        sys.exit(1)
    click.echo("Stopped.", err=True)


def _exit_on_sigterm() -> None:
    """Treat SIGTERM as Ctrl-C: only then does LitServe end its processes. They inherit the handler, and just exit."""
    main = os.getpid()

    def end(*_: Any) -> None:
        raise KeyboardInterrupt if os.getpid() == main else SystemExit(0)

    signal.signal(signal.SIGTERM, end)

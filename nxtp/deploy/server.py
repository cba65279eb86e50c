"""`nxtp serve`: a model behind LitServe, which gathers requests that come together into one batch (docs/serving.md)."""

# No postponed annotations here: LitServe reads those of decode_request and encode_response as an HTTP endpoint's.

import multiprocessing
import os
import signal
from collections.abc import Sequence
from typing import Annotated, Any

import click
import litserve
import torch
from pydantic import Base64Bytes, BaseModel, Field
from starlette.responses import JSONResponse
from torch import Tensor

from nxtp.data.images import ImageError
from nxtp.deploy.ports import check_free
from nxtp.inference.recognizer import Recognizer
from nxtp.sampling.closed_vocabulary import read_classes
from nxtp.sampling.ranking import Labels

MOST_LABELS = 100


class Refused(str):
    """Why a request cannot be answered; the others of its batch are."""


class PredictRequest(BaseModel):
    """What a client sends."""

    image: Base64Bytes
    top_k: Annotated[int, Field(ge=1, le=MOST_LABELS)] = 10


class LabelAPI(litserve.LitAPI):
    """POST {"image": its bytes in base64, "top_k": 10} → {"labels": [{"label": …, "probability": …}, …]}.

    Args:
        model: a directory or hub name.
        labels: a closed vocabulary, as of `nxtp classify`; None: any label.
        max_batch_size, batch_timeout: requests labelled together, and the seconds that the first waits for others.
    """

    def __init__(self, model: str, labels: str | None = None, **batching: Any):
        super().__init__(**batching)
        self.source, self.labels = model, labels

    def setup(self, device: str) -> None:
        """Load the model, in the process that runs it; Ctrl-C is the first process's, which ends this one."""
        if multiprocessing.parent_process() is not None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.recognizer = Recognizer.from_pretrained(self.source, device=device)
        self.known = self.recognizer.vocabulary(read_classes(self.labels)) if self.labels else None

    def decode_request(self, request: PredictRequest):
        """Pixels uint8 [3, S, S] and the number of labels; or Refused: an exception would fail the whole batch."""
        try:
            return self.recognizer.transform(request.image), request.top_k
        except ImageError as error:
            return Refused(error.reason)

    def batch(self, inputs: Sequence[tuple[Tensor, int] | Refused]) -> Sequence[tuple[Tensor, int] | Refused]:
        return inputs

    def predict(self, inputs: Any) -> Any:
        """Labels of each; one request, or with batches a sequence of them."""
        if not isinstance(inputs, list | tuple) or isinstance(inputs[0], Tensor):
            return self._labels([inputs])[0]
        return self._labels(inputs)

    def unbatch(self, output: list[Labels | Refused]) -> list[Labels | Refused]:
        return output

    def encode_response(self, output):
        if isinstance(output, Refused):
            return JSONResponse({"error": output}, status_code=422)
        return {"labels": [{"label": label, "probability": probability} for label, probability in output]}

    def _labels(self, inputs: Sequence[tuple[Tensor, int] | Refused]) -> list[Labels | Refused]:
        """Those that ask for the same number of labels together: of more labels the first are others."""
        found: list[Labels | Refused] = list(inputs)
        of_count: dict[int, list[int]] = {}
        for place, each in enumerate(inputs):
            if not isinstance(each, Refused):
                of_count.setdefault(each[1], []).append(place)
        for count, places in of_count.items():
            pixels = torch.stack([inputs[place][0] for place in places])
            for place, labels in zip(places, self._predict(pixels, count), strict=True):
                found[place] = labels
        return found

    def _predict(self, pixels: Tensor, count: int) -> list[Labels]:
        if self.known:
            return self.recognizer.classify_pixels(pixels, self.known, count)
        return self.recognizer.predict_pixels(pixels, count)


@click.command()
@click.argument("model")
@click.option(
    "--host", type=click.Choice(["127.0.0.1", "0.0.0.0", "::"]), default="127.0.0.1", show_default=True,
    help="Address to serve at; 0.0.0.0 or :: to the network.",
)  # fmt: skip
@click.option("--port", type=click.IntRange(1024, 65535), default=8000, show_default=True)
@click.option("--labels", help="A closed vocabulary: a file, a class a line, or imagenet1k.")
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True, help="Requests labelled together.")
@click.option("--wait-ms", type=click.FloatRange(1), default=10.0, show_default=True, help="A request for others.")
@click.option("--max-mb", type=click.IntRange(1), default=20, show_default=True, help="Of a request.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
def serve(model, host, port, labels, batch, wait_ms, max_mb, device) -> None:
    """Answer HTTP requests with MODEL's labels, several requests in one batch.

    \b
    nxtp serve runs/demo/model
    curl localhost:8000/predict -H 'content-type: application/json' \\
         -d "{\\"image\\": \\"$(base64 -w0 photo.jpg)\\", \\"top_k\\": 5}"
    """
    from nxtp.inference import model_directory as model_dir

    check_free(host, port)
    model_dir.read_config(model_dir.locate(model))  # told here, not by a process of the server
    if labels:
        read_classes(labels)
    api = LabelAPI(model, labels, max_batch_size=batch, batch_timeout=wait_ms / 1000)
    server = litserve.LitServer(api, accelerator=device, devices=1, max_payload_size=max_mb << 20)
    _end_as_on_ctrl_c()
    server.run(host=host, port=port, num_api_servers=1, generate_client_file=False, log_level="warning")


def _end_as_on_ctrl_c() -> None:
    """On SIGTERM, too: only then does LitServe end its other processes. These, which inherit the handler, just end."""
    ours = os.getpid()

    def end(*_: Any) -> None:
        raise KeyboardInterrupt if os.getpid() == ours else SystemExit(0)

    signal.signal(signal.SIGTERM, end)

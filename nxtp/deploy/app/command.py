"""`nxtp app`: serve the page from this machine."""

from __future__ import annotations

import os
import signal
import tempfile
from importlib.util import find_spec
from pathlib import Path

import click

from nxtp.deploy.ports import LOOPBACK, check_free
from nxtp.errors import UserError

EXAMPLES = Path("data/shards/demo/examples")  # written by make demo


@click.command()
@click.argument("model")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to serve at; 0.0.0.0: the network too.")
@click.option("--port", type=click.IntRange(1, 65535), default=7860, show_default=True)
@click.option("--examples", type=click.Path(path_type=Path, file_okay=False, exists=True), help="Example images.")
@click.option("--max-mb", type=click.IntRange(1, 1000), default=20, show_default=True, help="Size of an upload.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, …")
def app(model: str, host: str, port: int, examples: Path | None, max_mb: int, device: str) -> None:
    """Try MODEL (a directory or hub name) in a browser: drop an image, see its labels, click one to see its attention.

    \b
    nxtp app runs/demo/model
    nxtp app runs/demo/model --examples pictures --port 8000

    Example images: those of --examples; by default the scenes of make demo, in data/shards/demo/examples.
    """
    if find_spec("gradio") is None:
        raise UserError("The page needs gradio: pip install 'nxtp[app]'.")
    check_free(host, port)
    if host not in LOOPBACK:
        click.secho(f"Anyone who reaches {host}:{port} over the network can use this page.", fg="yellow", err=True)
    from nxtp.inference.recognizer import Recognizer

    recognizer = Recognizer.from_pretrained(model, device=device)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: uploads are deleted
    with tempfile.TemporaryDirectory(prefix="nxtp-app-") as uploads:
        # Before gradio is imported, which reads its settings once: where uploads are, no telemetry.
        os.environ |= {"GRADIO_TEMP_DIR": uploads, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
        from nxtp.deploy.app.page import launch, make_page

        page = make_page(recognizer, examples or (EXAMPLES if EXAMPLES.is_dir() else None))
        address = launch(page, Path(uploads), host, port, max_mb << 20)
        click.echo(f"{address}   (stop with Ctrl-C)")
        try:
            page.block_thread()
        finally:
            page.close(verbose=False)

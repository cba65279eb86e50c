"""The page: an image, its labels as bars, and the attention of a label."""

from __future__ import annotations

import time
from dataclasses import replace
from html import escape
from pathlib import Path
from threading import Lock

import gradio as gr
from PIL import Image
from starlette.middleware import Middleware
from uvicorn.config import HTTP_PROTOCOLS

from nxtp.data.images import find_images
from nxtp.deploy.app.guard import PageGuard
from nxtp.deploy.guard import trusted_hosts
from nxtp.errors import UserError, counted
from nxtp.inference.figures import overlay
from nxtp.inference.recognizer import Recognizer
from nxtp.model.attention_maps import average
from nxtp.sampling.closed_vocabulary import classes_of_lines
from nxtp.sampling.ranking import Labels, spelling

MAX_LABELS, MAX_CLASSES, MAX_CHARACTERS, MAX_EXAMPLES = 30, 2000, 50_000, 12
MAX_LABEL = 200  # characters
MAX_ALIKE = 4096  # tokens of labels that begin alike: attention grows with the square
MAX_WAITING = 64  # requests in the queue; the next is refused
SHOWN_PIXELS = 448  # per side of the attention picture
TITLE = "# What is in this image?\nLabels, written token by token and ranked by probability."
OPEN, CLOSED = "Any label", "Only these"

HERE = Path(__file__).parent


class Predictor:
    """What the page needs of the model. One request runs at a time."""

    def __init__(self, recognizer: Recognizer):
        self.recognizer = recognizer
        self._lock = Lock()

    def labels(self, path: str | None, count: float, mode: str, typed: str) -> str:
        """Labels as HTML, or why there are none."""
        if path is None:
            return _message("Drop an image, or choose one of the examples.")
        count = int(min(max(count, 1), MAX_LABELS))
        try:
            classes = _classes(typed or "") if mode == CLOSED else None
            with self._lock:
                begin = time.perf_counter()
                pixels = self.recognizer.transform(path)[None]
                prepared = self.recognizer.prepare_classes(classes) if classes else None
                if prepared and max(last - first for first, last in prepared.tree.rows(MAX_ALIKE)) > MAX_ALIKE:
                    raise UserError("Too many labels begin alike: they are computed together.")
                (labels,) = self.recognizer.label_pixels(pixels, count, prepared)
                seconds = time.perf_counter() - begin
        except UserError as error:
            return _message(_reason(error), "error")
        return _rows(labels, seconds)

    def look(self, path: str | None, label: str) -> Image.Image:
        """The image under the relevance of a label, spelled as the model writes it: where it is seen.

        Raises:
            gr.Error: there is no image, or it cannot be read: shown by the page.
        """
        try:
            if path is None or len(label) > MAX_LABEL:
                raise UserError("There is no such label here.")
            with self._lock:
                pixels = replace(self.recognizer.pixels, size=SHOWN_PIXELS)(path)
                weights = average(self.recognizer.relevance(path, label))
        except UserError as error:
            raise gr.Error(_reason(error), print_exception=False) from None
        return overlay(Image.fromarray(pixels.permute(1, 2, 0).numpy()), weights.numpy())


def _classes(typed: str) -> list[list[str]]:
    """
    Raises:
        UserError: nothing is typed, too much, or a label twice.
    """
    if len(typed) > MAX_CHARACTERS:
        raise UserError(f"The list is too long: at most {MAX_CHARACTERS:,} characters.")
    classes = classes_of_lines(typed.splitlines(), "The list")
    if not classes:
        raise UserError("Type the labels: one per line, other names of the same thing behind it, after commas.")
    if len(classes) > MAX_CLASSES:
        raise UserError(f"{len(classes):,} labels are too many: at most {MAX_CLASSES:,}.")
    if any(len(name) > MAX_LABEL for names in classes for name in names):
        raise UserError(f"A label is too long: at most {MAX_LABEL} characters.")
    return classes


def _reason(error: UserError) -> str:
    """One line, without the path of a file on this machine."""
    return getattr(error, "reason", None) or str(error)


def _message(text: str, kind: str = "") -> str:
    role = ' role="alert"' if kind == "error" else ""
    return f'<p class="message {kind}"{role}>{escape(text)}</p>'


def _rows(labels: Labels, seconds: float) -> str:
    """Labels as buttons with bars. All text of a model or a user is escaped."""
    rows = []
    for label, probability in labels:
        text = escape(label)
        value = f"{100 * probability:.1f} %" if probability >= 0.0005 or probability == 0 else f"{probability:.0e}"
        rows.append(
            f'<button type="button" class="row" data-label="{text}" data-written="{escape(spelling(label))}" '
            f'aria-pressed="false">'
            f'<span class="name">{text}</span>'
            f'<span class="track"><span class="bar" style="width:{100 * probability:.2f}%"></span></span>'
            f'<span class="value">{value}</span></button>'
        )
    found = f"{counted(len(labels), 'label')} in {1e3 * seconds:,.0f} ms. Choose one to see where it looks."
    return f'<div>{"".join(rows)}</div><p class="message" id="latency">{found}</p>'


def make_page(recognizer: Recognizer, examples: Path | None = None) -> gr.Blocks:
    """The page; :func:`launch` serves it.

    Args:
        examples: a directory; its first images are the examples.
    """
    predictor = Predictor(recognizer)
    pictures = find_images([examples])[0][:MAX_EXAMPLES] if examples else []
    with gr.Blocks(title="nxtp", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(TITLE, elem_id="title")
        with gr.Row(elem_id="body"):
            with gr.Column(min_width=0):
                image = gr.Image(
                    label="Image", type="filepath", sources=["upload", "clipboard"], elem_id="image", height=340,
                    buttons=[],
                )  # fmt: skip
                # The file as it was uploaded, not as gradio decodes it: load_image judges it. (A subclass would have
                # gradio write a stub file beside this module.)
                image.preprocess = lambda payload: payload and payload.path
                if pictures:
                    gr.Examples(
                        [[str(path)] for path in pictures], [image], label="Examples", examples_per_page=MAX_EXAMPLES
                    )
            with gr.Column(min_width=0, elem_id="result"):
                click = (HERE / "click.js").read_text()
                labels = gr.HTML(predictor.labels(None, 1, OPEN, ""), elem_id="labels", js_on_load=click)
                look = gr.Image(interactive=False, visible=False, elem_id="look", height=340, format="png", buttons=[])
            with gr.Column(min_width=0):
                count = gr.Slider(1, MAX_LABELS, value=8, step=1, label="Number of labels", elem_id="count")
                mode = gr.Radio([OPEN, CLOSED], value=OPEN, label="Vocabulary", elem_id="mode")
                typed = gr.Textbox(
                    label="Labels, one per line; other names of the same thing after commas", lines=5, max_lines=12,
                    max_length=MAX_CHARACTERS, placeholder="dog, puppy\ncat\nbicycle, bike", visible=False,
                    elem_id="typed",
                )  # fmt: skip
        options = {
            "concurrency_id": "model", "concurrency_limit": 1, "api_name": False, "trigger_mode": "always_last",
            "show_progress": "minimal",
        }  # fmt: skip
        asking = [image.change, count.release, mode.change, typed.blur, typed.submit]
        gr.on(asking, predictor.labels, [image, count, mode, typed], labels, **options)
        mode.change(lambda chosen: gr.update(visible=chosen == CLOSED), mode, typed, queue=False, api_name=False)
        image.change(lambda: gr.update(visible=False), None, look, queue=False, api_name=False)

        def show(path: str | None, event: gr.EventData):
            label = str(event.label)
            seen = predictor.look(path, str(event.written))
            return gr.update(value=seen, label=f"Where “{label}” looks", visible=True)

        labels.click(show, image, look, **options)
    page.queue(max_size=MAX_WAITING, default_concurrency_limit=1)
    return page


def launch(page: gr.Blocks, uploads: Path, host: str, port: int, max_bytes: int, kept: int = 200) -> str:
    """Serve the page in a thread, within limits; returns its URL.

    With gradio's own launch, not mounted in another application: only then gradio refuses paths that nobody uploaded.

    Args:
        uploads: gradio's directory of files, GRADIO_TEMP_DIR; the last ``kept`` stay there.
    """
    guards = [trusted_hosts(host), Middleware(PageGuard, directory=uploads, max_bytes=max_bytes, kept=kept)]
    closed = {"docs_url": None, "redoc_url": None, "openapi_url": None}
    HTTP_PROTOCOLS["auto"] = "nxtp.deploy.guard:TimedProtocol"  # gradio gives uvicorn no options of ours
    _, address, _ = page.launch(
        server_name=host, server_port=port, max_file_size=max_bytes, app_kwargs={"middleware": guards, **closed},
        quiet=True, prevent_thread_lock=True, share=False, inbrowser=False, ssr_mode=False, pwa=False, footer_links=[],
        run_history=False, enable_monitoring=False, mcp_server=False, css=(HERE / "page.css").read_text(),
        theme=gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"]),
    )  # fmt: skip
    return address.rstrip("/")

"""The page: an image, its labels as bars, and where a label looks."""

from __future__ import annotations

import time
from html import escape
from pathlib import Path
from threading import Lock

import gradio as gr
from PIL import Image
from starlette.middleware import Middleware

from nxtp.data.images import find_images, load_image
from nxtp.data.transforms import to_pixels
from nxtp.deploy.app.guard import UploadGuard
from nxtp.errors import UserError, counted
from nxtp.inference.figures import overlaid
from nxtp.inference.recognizer import Recognizer
from nxtp.model.attention import average
from nxtp.sampling.closed_vocabulary import classes_of_lines
from nxtp.sampling.ranking import Labels

MOST_LABELS, MOST_CLASSES, MOST_CHARACTERS, MOST_EXAMPLES = 30, 2000, 50_000, 12
LONGEST = 200  # characters of a label
MOST_ALIKE = 4096  # tokens of labels that begin alike: attention grows with their square
WAITING = 64  # requests in the queue; more are told that it is full
SHOWN_PIXELS = 448  # a side of the picture of where a label looks
TITLE = "# What is in this image?\nLabels, written token by token and ranked by probability."
OPEN, CLOSED = "Any label", "Only these"

STYLE = """
.gradio-container { max-width: 1040px !important; margin: 0 auto !important; }
#title h1 { font-size: 1.5rem; margin: 0; }
#title p { margin: .2rem 0 0; opacity: .75; }
#body { display: grid; grid-template-columns: minmax(0, 5fr) minmax(0, 6fr); gap: 1rem 1.5rem; align-items: start; }
#result { grid-column: 2; grid-row: 1 / span 2; }
#image img, #look img { width: 100%; height: 100%; object-fit: contain; }
#labels .row { display: grid; grid-template-columns: minmax(0, 10rem) minmax(3rem, 1fr) 4rem; gap: .75rem;
  align-items: center; width: 100%; padding: .35rem .6rem; border: 1px solid transparent; border-radius: 8px;
  background: none; font: inherit; color: inherit; text-align: left; cursor: pointer; }
#labels .row:hover { background: var(--background-fill-secondary); }
#labels .row:focus-visible { outline: 2px solid #0072b2; outline-offset: 1px; }
#labels .row.chosen { border-color: #d55e00; }
#labels .name { overflow-wrap: anywhere; }
#labels .track { height: .8rem; border-radius: 4px; background: var(--border-color-primary); overflow: hidden; }
#labels .bar { display: block; height: 100%; background: #0072b2; min-width: 1px; }
#labels .chosen .bar { background: #d55e00; }
#labels .value { text-align: right; font-variant-numeric: tabular-nums; }
#labels .told { opacity: .75; padding: .35rem .6rem; margin: 0; }
#labels .error { color: #b3261e; opacity: 1; }
.dark #labels .error { color: #ffb4ab; }
footer { display: none !important; }
@media (max-width: 700px) {
  #body { grid-template-columns: minmax(0, 1fr); }
  #result { grid-column: 1; grid-row: auto; }
  #labels .row { grid-template-columns: minmax(0, 7rem) minmax(3rem, 1fr) 4rem; padding: .5rem 0; }
}
"""
CLICKED = """
element.addEventListener('click', (event) => {
  const row = event.target.closest('.row');
  if (!row) return;
  element.querySelectorAll('.row').forEach((each) => {
    each.classList.toggle('chosen', each === row);
    each.setAttribute('aria-pressed', each === row);
  });
  trigger('click', {label: row.dataset.label});
});
"""


class Answers:
    """What the page asks the model; one request at a time."""

    def __init__(self, recognizer: Recognizer):
        self.recognizer = recognizer
        self._lock = Lock()

    def labels(self, path: str | None, count: float, mode: str, typed: str) -> str:
        """Labels as HTML, or why there are none."""
        if path is None:
            return _told("Drop an image, or choose one of the examples.")
        count = int(min(max(count, 1), MOST_LABELS))
        try:
            classes = _classes(typed or "") if mode == CLOSED else None
            with self._lock:
                begin = time.perf_counter()
                pixels = self.recognizer.transform(path)[None]
                if classes is None:
                    (labels,) = self.recognizer.predict_pixels(pixels, count)
                else:
                    known = self.recognizer.vocabulary(classes)
                    if max(last - first for first, last in known.tree.rows(MOST_ALIKE)) > MOST_ALIKE:
                        raise UserError("Too many labels begin alike: they are computed together.")
                    (labels,) = self.recognizer.classify_pixels(pixels, known, count)
                seconds = time.perf_counter() - begin
        except UserError as error:
            return _told(_reason(error), "error")
        return _rows(labels, seconds)

    def look(self, path: str | None, label: str) -> Image.Image:
        """The picture of where a label looks.

        Raises:
            gr.Error: there is no image, or it cannot be read: shown by the page.
        """
        try:
            if path is None or len(label) > LONGEST:
                raise UserError("There is no such label here.")
            with self._lock:
                pixels = to_pixels(load_image(path, near=SHOWN_PIXELS), SHOWN_PIXELS)
                weights = average(self.recognizer.attention(path, label))
        except UserError as error:
            raise gr.Error(_reason(error), print_exception=False) from None
        return overlaid(Image.fromarray(pixels.permute(1, 2, 0).numpy()), weights.numpy())


def _classes(typed: str) -> list[list[str]]:
    """
    Raises:
        UserError: nothing is typed, or too much.
    """
    if len(typed) > MOST_CHARACTERS:
        raise UserError(f"The list is too long: at most {MOST_CHARACTERS:,} characters.")
    classes = classes_of_lines(typed.splitlines())
    if not classes:
        raise UserError("Type the labels: one a line, other names of the same thing behind it, after commas.")
    if len(classes) > MOST_CLASSES:
        raise UserError(f"{len(classes):,} labels are too many: at most {MOST_CLASSES:,}.")
    if any(len(name) > LONGEST for names in classes for name in names):
        raise UserError(f"A label is too long: at most {LONGEST} characters.")
    return classes


def _reason(error: UserError) -> str:
    """One line without the path of a file on this machine."""
    return getattr(error, "reason", None) or str(error)


def _told(text: str, kind: str = "") -> str:
    role = ' role="alert"' if kind == "error" else ""
    return f'<p class="told {kind}"{role}>{escape(text)}</p>'


def _rows(labels: Labels, seconds: float) -> str:
    """Labels as buttons with bars. Everything that a model or a user wrote is escaped."""
    rows = []
    for label, probability in labels:
        text = escape(label)
        value = f"{100 * probability:.1f} %" if probability >= 0.0005 or probability == 0 else f"{probability:.0e}"
        rows.append(
            f'<button type="button" class="row" data-label="{text}" aria-pressed="false">'
            f'<span class="name">{text}</span>'
            f'<span class="track"><span class="bar" style="width:{100 * probability:.2f}%"></span></span>'
            f'<span class="value">{value}</span></button>'
        )
    found = f"{counted(len(labels), 'label')} in {1e3 * seconds:,.0f} ms. Choose one to see where it looks."
    return f'<div>{"".join(rows)}</div><p class="told" id="latency">{found}</p>'


def make_page(recognizer: Recognizer, examples: Path | None = None) -> gr.Blocks:
    """The page, not yet served.

    Args:
        examples: a folder whose first images are offered.
    """
    answers = Answers(recognizer)
    pictures = find_images([examples])[0][:MOST_EXAMPLES] if examples else []
    with gr.Blocks(title="nxtp", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(
            "# What is in this image?\nLabels, written token by token and ranked by probability.", elem_id="title"
        )
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
                        [[str(path)] for path in pictures], [image], label="Examples", examples_per_page=MOST_EXAMPLES
                    )
            with gr.Column(min_width=0, elem_id="result"):
                labels = gr.HTML(answers.labels(None, 1, OPEN, ""), elem_id="labels", js_on_load=CLICKED)
                look = gr.Image(interactive=False, visible=False, elem_id="look", height=340, format="png", buttons=[])
            with gr.Column(min_width=0):
                count = gr.Slider(1, MOST_LABELS, value=8, step=1, label="Number of labels", elem_id="count")
                mode = gr.Radio([OPEN, CLOSED], value=OPEN, label="Vocabulary", elem_id="mode")
                typed = gr.Textbox(
                    label="Labels, one a line; other names of the same thing after commas", lines=5, max_lines=12,
                    max_length=MOST_CHARACTERS, placeholder="dog, puppy\ncat\nbicycle, bike", visible=False,
                    elem_id="typed",
                )  # fmt: skip
        options = {
            "concurrency_id": "model", "concurrency_limit": 1, "api_name": False, "trigger_mode": "always_last",
            "show_progress": "minimal",
        }  # fmt: skip
        asking = [image.change, count.release, mode.change, typed.blur, typed.submit]
        gr.on(asking, answers.labels, [image, count, mode, typed], labels, **options)
        mode.change(lambda chosen: gr.update(visible=chosen == CLOSED), mode, typed, queue=False, api_name=False)
        image.change(lambda: gr.update(visible=False), None, look, queue=False, api_name=False)

        def show(path: str | None, event: gr.EventData):
            label = str(event.label)
            return gr.update(value=answers.look(path, label), label=f"Where “{label}” looks", visible=True)

        labels.click(show, image, look, **options)
    page.queue(max_size=WAITING, default_concurrency_limit=1)
    return page


def launch(page: gr.Blocks, uploads: Path, host: str, port: int, max_bytes: int, kept: int = 200) -> str:
    """Serve the page from a thread, within limits; its address.

    By gradio's own launch, not mounted in another application: only then does gradio refuse paths that no one uploaded.

    Args:
        uploads: gradio's directory of files (GRADIO_TEMP_DIR).
        max_bytes: of an uploaded image.
        kept: uploads that are kept.
    """
    guard = Middleware(UploadGuard, directory=uploads, max_bytes=max_bytes, kept=kept)
    closed = {"docs_url": None, "redoc_url": None, "openapi_url": None}
    _, address, _ = page.launch(
        server_name=host, server_port=port, max_file_size=max_bytes, app_kwargs={"middleware": [guard], **closed},
        quiet=True, prevent_thread_lock=True, share=False, inbrowser=False, ssr_mode=False, pwa=False, footer_links=[],
        run_history=False, enable_monitoring=False, mcp_server=False, css=STYLE,
        theme=gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"]),
    )  # fmt: skip
    return address.rstrip("/")

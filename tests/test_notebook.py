"""The notebooks, executed one after the other in one forked kernel, on a tiny study, run and model."""

import base64
import io
import json
import os
import re
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
from helpers import TINY_OVERRIDES, fork, jpeg, kernel_here, nxtp_runs, write_shards
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from jupyter_client.provisioning import local_provisioner
from nbclient import NotebookClient
from PIL import Image

from nxtp import Recognizer

pytestmark = pytest.mark.costly

ROOT = Path(__file__).resolve().parent.parent
TOUR, COLAB = ROOT / "experiments" / "tour.ipynb", ROOT / "docs" / "colab.ipynb"


class ThisInterpreter(AsyncKernelManager):
    """Its kernel is this interpreter, whatever kernels are installed."""

    @property
    def kernel_spec(self) -> KernelSpec:
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=command, display_name="tests", language="python")


def forked_kernel(command: list[str], cwd: str, env: dict[str, str], **_) -> SimpleNamespace:
    """In place of Jupyter's ``launch_kernel``: a process that has imported the libraries, as far as it needs one."""
    process = fork(kernel_here, command[3:], cwd, {k: v for k, v in env.items() if k.startswith("NXTP_")})
    while os.getpgid(process.pid) != process.pid:
        assert process.is_alive()
        time.sleep(0.01)
    streams = dict.fromkeys(("stdin", "stdout", "stderr"))
    signalled = partial(os.kill, process.pid)
    return SimpleNamespace(
        pid=process.pid, poll=lambda: process.exitcode, wait=process.join, send_signal=signalled, **streams
    )


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    root = tmp_path_factory.mktemp("tour")
    write_shards(root / "train", [16])
    write_shards(root / "val", [4], labels=True)
    sets = ["data.train=train", "+data.val.val=val", "data.num_workers=0", "data.batch_size=8"]
    sets += ["trainer.max_epochs=2", "trainer.log_every_n_steps=1"]
    nxtp_runs("train", "name=r", *TINY_OVERRIDES, *sets, cwd=root)
    study, pictures = root / "depth", root / "pictures"
    study.mkdir()
    columns = "columns: {blocks: model.decoder.depth}\nmetrics: {val/recall@10: recall}\n"
    (study / "report.yaml").write_text(f"{columns}plot: {{x: blocks, y: [val/recall@10]}}\n")
    lines = []
    for depth, values in {1: (0.25, 0.35), 4: (0.5, 0.7)}.items():
        for seed, value in enumerate(values):
            config = {"model": {"decoder": {"depth": depth}}}
            record = {"format": 3, "name": f"{depth},{seed}", "sweep": "depth/laptop", "config": config, "seed": seed}
            lines.append(json.dumps(record | {"status": "finished", "metrics": {"val/recall@10": value}}))
    (study / "records.jsonl").write_text("\n".join(lines))
    pictures.mkdir()
    for number, colour in enumerate([(200, 40, 60), (40, 160, 60), (30, 80, 200)]):
        (pictures / f"{number}.jpg").write_bytes(jpeg(colour, seed=number))
    notebook, colab = (nbformat.read(path, as_version=4) for path in (TOUR, COLAB))
    (root / "elsewhere").mkdir()
    fresh = f"%reset -f\nimport os\nos.chdir({str(root / 'elsewhere')!r})\ndel os"  # as in a kernel of its own
    count = len(notebook.cells)
    notebook.cells += [nbformat.v4.new_code_cell(fresh), *colab.cells]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NXTP_STUDY", str(study))
        patch.setenv("NXTP_RUN", str(root / "runs" / "r"))
        patch.setenv("NXTP_MODEL", str(root / "runs" / "r" / "model"))
        patch.setenv("NXTP_PICTURES", str(pictures))
        patch.setattr(local_provisioner, "launch_kernel", forked_kernel)
        client = NotebookClient(
            notebook,
            timeout=120,
            kernel_manager_class=ThisInterpreter,
            resources={"metadata": {"path": str(TOUR.parent)}},
        )
        client.execute()
    return root, outputs_of(notebook.cells[:count]), outputs_of(notebook.cells[count:])


def outputs_of(cells) -> list:
    return [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]


def shown(outputs, kind: str) -> list[str]:
    return [output["data"][kind] for output in outputs if kind in output.get("data", {})]


def printed(outputs) -> str:
    return "".join(output["text"] for output in outputs if output.get("name") == "stdout")


def test_the_tour_shows_a_studys_table_and_plot(executed):
    _, outputs, _ = executed
    (table,) = shown(outputs, "text/markdown")
    assert "| laptop | 1 | 0.300 ± 0.071 (2) |" in table
    assert "| laptop | 4 | 0.600 ± 0.141 (2) |" in table
    (plot,) = shown(outputs, "image/svg+xml")
    assert ">blocks<" in plot


def test_the_tour_shows_curves_and_labelled_pictures(executed):
    root, outputs, _ = executed
    curves, grid = (Image.open(io.BytesIO(base64.b64decode(data))) for data in shown(outputs, "image/png"))
    assert min(curves.size) > 100
    assert len(np.unique(curves.convert("L"))) > 10, "something is drawn"
    assert min(grid.size) > 100
    recognizer = Recognizer.from_pretrained(root / "runs" / "r" / "model")
    for number in range(3):
        labels = recognizer.predict(root / "pictures" / f"{number}.jpg", top_k=5)
        (line,) = re.findall(rf"^{number}\.jpg (.*)$", printed(outputs), re.M)
        assert line == ", ".join(f"{label} {probability:.3f}" for label, probability in labels)


def test_the_colab_notebook_predicts_classifies_and_shows_attention(executed):
    root, _, outputs = executed
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    lines = re.findall(r"^(\d)\.jpg (.*)$", printed(outputs), re.M)
    assert [number for number, _ in lines] == ["0", "1", "2"] * 2
    recognizer = Recognizer.from_pretrained(root / "runs" / "r" / "model")
    paths = [root / "pictures" / f"{number}.jpg" for number in range(3)]
    classes = ["bicycle", "bike"], "cat", "dog", "person", "pizza"
    predicted, classified = recognizer.predict(paths, top_k=20), recognizer.classify(paths, classes, top_k=3)
    expected = [", ".join(f"{label} {p:.3f}" for label, p in labels[:5]) for labels in predicted]
    expected += [", ".join(f"{label} {p:.2e}" for label, p in labels) for labels in classified]
    assert [line for _, line in lines] == expected
    grid, looks = (Image.open(io.BytesIO(base64.b64decode(data))) for data in shown(outputs, "image/png"))
    assert grid.width > 1000
    assert looks.height > 600, "a row for each picture"
    assert "Collecting" not in printed(outputs), "nothing is installed where nxtp is"


@pytest.mark.parametrize("path", [TOUR, COLAB], ids=lambda path: path.stem)
def test_it_is_committed_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) > 3
    assert all(not cell.outputs and cell.execution_count is None for cell in code)

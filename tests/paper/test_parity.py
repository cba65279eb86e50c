"""`nxtp parity`: the project's own recording, the published one where it is available, and unusable directories."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from nxtp.errors import UserError
from nxtp.model import decoder
from nxtp.paper import base_weights, parity
from nxtp.paper.parity_checks import Ours
from nxtp.paper.parity_fixture import Recording

DATA = Path(__file__).parent
TINY = DATA / "parity_tiny"
PUBLISHED = Path(__file__).parents[3] / "shared/reference/parity_small"
ROWS = [
    "image tokens",
    "first logits",
    "one-shot tokens",
    "one-shot probabilities",
    "training targets",
    "training logits",
    "training loss",
]


def verdicts(rows: list[parity.Row]) -> dict[str, str]:
    return {row.name: row.verdict for row in rows}


@pytest.fixture
def recording(tmp_path):
    return Path(shutil.copytree(TINY, tmp_path / "recording"))


@pytest.fixture(scope="module")
def computed():
    """What our model computes from the inputs of the project's recording: each result once for all tests."""
    return Ours(Recording.read(TINY))


@pytest.fixture
def same_inputs(monkeypatch, computed):
    """For tests that change recorded results only: our side is computed once."""

    def of(recording):
        computed.recording = recording
        return computed

    monkeypatch.setattr(parity, "Ours", of)


def change_expected(directory: Path, **changes) -> None:
    """Replace tensors of the recording; None removes one."""
    expected = load_file(directory / "expected.safetensors") | changes
    save_file({n: t for n, t in expected.items() if t is not None}, directory / "expected.safetensors")


@pytest.mark.parametrize("directory", [TINY, PUBLISHED], ids=["own", "published"])
def test_every_row_passes(directory):
    if not directory.exists():
        pytest.skip(f"no {directory}")
    rows = parity.run_parity(directory)
    names = [row.name for row in rows]
    assert names[: len(ROWS)] == ROWS
    if directory == TINY:
        assert {"attention of block 0", "attention of block 1"} <= set(names)
        assert {"greedy: tokens", "greedy, penalty: probabilities", "beam search: tokens"} <= set(names)
        assert {f"ranking {name}" for name in ("prob", "ppl", "sim_mean", "sim_max", "none")} <= set(names)
    assert sum(name.startswith("grad/") for name in names) >= 5
    assert {row.verdict for row in rows} == {"pass"}, rows
    # a perplexity, exp(mean loss), turns the loss's absolute rounding into a relative one; it differs by machine
    assert all(row.error < (5e-5 if row.name == "ranking ppl" else 1e-5) for row in rows), rows
    assert parity.report(rows) == 0


def test_the_recording_is_what_its_script_writes(tmp_path):
    spec = importlib.util.spec_from_file_location("make_parity_fixture", DATA / "make_parity_fixture.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main(tmp_path)
    committed, written = (load_file(d / "expected.safetensors") for d in (TINY, tmp_path))
    assert committed.keys() == written.keys()
    for name in committed:
        torch.testing.assert_close(written[name], committed[name], rtol=1e-4, atol=1e-5)
    assert json.loads((TINY / "meta.json").read_text()) == json.loads((tmp_path / "meta.json").read_text())
    tokens = committed["one_shot_tokens"]
    lengths = (tokens != script.IDS["delimiter"]).int().cumprod(dim=-1).sum(dim=-1)
    assert set(range(script.MAX_UPDATE_ITER)) == set(lengths.unique().tolist()), "ended at once … cut at the cap"


def test_rotary_pairs_left_interleaved_are_a_miss(monkeypatch):
    monkeypatch.setattr(base_weights, "halves_from_pairs", lambda weight, heads: weight)
    rows = parity.run_parity(TINY)
    seen = verdicts(rows)
    assert seen["image tokens"] == "pass"
    assert {seen[name] for name in ROWS[1:] if name != "training targets"} == {"fail"}
    assert parity.report(rows) == 1


def test_a_causal_mask_over_images_is_a_miss(monkeypatch):
    forward = decoder.Decoder.forward

    def causal(self, embeddings, positions, mask, cache=None):
        queries, keys = mask.shape[-2:]
        return forward(self, embeddings, positions, mask & torch.ones(queries, keys).tril(keys - queries).bool(), cache)

    monkeypatch.setattr(decoder.Decoder, "forward", causal)
    seen = verdicts(parity.run_parity(TINY))
    assert seen["image tokens"] == "pass"
    assert seen["first logits"] == seen["training loss"] == "fail"


@pytest.mark.usefixtures("same_inputs")
def test_one_wrong_number_fails_its_row_alone(recording):
    expected = load_file(recording / "expected.safetensors")
    loss, gradient = expected["train_loss"], expected["grad/vision_encoder.proj.weight"]
    gradient[0, 0] += 3e-4 * gradient.abs().max()
    change_expected(recording, train_loss=loss * 1.001, **{"grad/vision_encoder.proj.weight": gradient})
    rows = parity.run_parity(recording)
    failed = {row.name: row for row in rows if row.verdict == "fail"}
    assert set(failed) == {"training loss", "grad/vision_encoder.proj.weight"}
    assert failed["training loss"].error == pytest.approx(1e-3, rel=0.01)
    assert parity.report(rows) == 1


@pytest.mark.usefixtures("same_inputs")
def test_a_wrong_token_fails(recording):
    tokens = load_file(recording / "expected.safetensors")["one_shot_tokens"]
    tokens[0, 0, 0] += 1
    change_expected(recording, one_shot_tokens=tokens)
    assert verdicts(parity.run_parity(recording))["one-shot tokens"] == "fail"


@pytest.mark.usefixtures("same_inputs")
def test_not_a_number_fails(recording):
    logits = load_file(recording / "expected.safetensors")["first_logits"]
    change_expected(recording, first_logits=torch.full_like(logits, float("nan")))
    assert verdicts(parity.run_parity(recording))["first logits"] == "fail"


@pytest.mark.usefixtures("same_inputs")
def test_missing_tensors_are_named_and_skipped(recording):
    gradients = {name: None for name in load_file(recording / "expected.safetensors") if name.startswith("grad/")}
    change_expected(recording, train_tokens=None, image_tokens_with_cls=None, **gradients)
    rows = {row.name: row for row in parity.run_parity(recording)}
    skipped = {name for name, row in rows.items() if row.verdict == "skipped"}
    assert skipped == {"image tokens", "training targets", "training logits", "training loss", "grad/*"}
    assert rows["image tokens"].reason == "not recorded: image_tokens_with_cls"
    assert "train_tokens" in rows["training loss"].reason
    console = Console(record=True, width=80)
    assert parity.report(list(rows.values()), console) == 0
    assert "not recorded: image_tokens_with_cls" in console.export_text()


def test_training_sequences_that_cannot_be_compared_are_skipped(recording):
    tokens = load_file(recording / "expected.safetensors")["train_tokens"]
    unended = tokens.clone()
    unended[0, -1] = -1
    change_expected(recording, train_tokens=unended)
    row = next(row for row in parity.run_parity(recording) if row.name == "training loss")
    assert row.verdict == "skipped"
    assert "without a delimiter" in row.reason


def test_nothing_to_compare_is_no_success(recording):
    images = load_file(recording / "expected.safetensors")["images"]
    save_file({"images": images}, recording / "expected.safetensors")
    assert parity.report(parity.run_parity(recording)) == 1


@pytest.mark.usefixtures("same_inputs")
def test_what_no_row_compares_is_named(recording):
    change_expected(recording, novelty=torch.ones(2))
    row = parity.run_parity(recording)[-1]
    assert (row.name, row.verdict, row.reason) == ("novelty", "skipped", "no row for it")


@pytest.mark.usefixtures("same_inputs")
def test_files_that_are_absent_are_named_and_skipped(recording):
    (recording / "samplers.safetensors").unlink()
    (recording / "ranked_labels.json").unlink()
    rows = parity.run_parity(recording)
    skipped = {row.name: row.reason for row in rows if row.verdict == "skipped"}
    assert skipped["greedy: tokens"] == "not recorded: greedy_tokens"
    assert skipped["ranking *"] == "not recorded: ranked_labels.json"
    assert parity.report(rows) == 0


@pytest.mark.usefixtures("same_inputs")
def test_a_wrong_order_or_score_of_labels_is_a_miss(recording):
    content = json.loads((recording / "ranked_labels.json").read_text())
    content["ranked"]["ppl"][0]["labels"].reverse()
    content["ranked"]["prob"][1]["scores"][0] += 1e-3
    (recording / "ranked_labels.json").write_text(json.dumps(content))
    rows = {row.name: row for row in parity.run_parity(recording)}
    assert rows["ranking ppl"].verdict == rows["ranking prob"].verdict == "fail"
    assert "recorded" in rows["ranking ppl"].reason
    assert rows["ranking sim_mean"].verdict == "pass"


@pytest.mark.parametrize(
    "name",
    ["meta.json", "release_format.pth", "expected.safetensors"],
)
@pytest.mark.parametrize("content", [None, b"", b"something else"])
def test_an_unusable_directory_is_a_one_line_error(recording, name, content):
    if content is None:
        (recording / name).unlink()
    else:
        (recording / name).write_bytes(content)
    with pytest.raises(UserError, match=name) as caught:
        parity.run_parity(recording)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("part", "key", "value", "says"),
    [
        ("decoder", "dim", 48, "do not fit"),
        ("decoder", "n_layers", 3, "lacks decoder"),
        ("decoder", "n_layers", 1, "has more"),
        ("decoder", "n_heads", None, "meta.json"),
        ("encoder", "layers", None, "meta.json"),
        ("encoder", "activation", "relu", "relu"),
    ],
)
def test_dimensions_that_do_not_fit_are_a_one_line_error(recording, part, key, value, says):
    meta = json.loads((recording / "meta.json").read_text())
    if value is None:
        del meta[part][key]
    else:
        meta[part][key] = value
    (recording / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=says) as caught:
        parity.run_parity(recording)
    assert "\n" not in str(caught.value)


def test_no_directory_is_an_error(tmp_path):
    with pytest.raises(UserError, match="not a directory"):
        parity.run_parity(tmp_path / "nowhere")

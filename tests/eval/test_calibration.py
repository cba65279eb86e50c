"""Calibrated probabilities, precision-recall curves and thresholds."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
import torch
from helpers import call_nxtp, ending_recognizer, write_shards
from sklearn.metrics import average_precision_score, brier_score_loss
from torchmetrics.functional.classification import binary_calibration_error

from nxtp.deploy.onnx.export import runner_config
from nxtp.deploy.onnx.runner import OnnxRecognizer
from nxtp.errors import UserError
from nxtp.eval.calibrate import calibration_of
from nxtp.eval.curves import Curve, LabelHits, brier_score, calibration_error, fit, reliability, write_curves
from nxtp.eval.metrics import ExactMatch
from nxtp.inference.calibration import Calibration, logit, read_calibrations
from nxtp.inference.recognizer import Recognizer
from nxtp.sampling.ranking import RankingConfig, cut, threshold_of
from nxtp.sampling.samplers import sampler_config, settings_of


def drawn(temperature, offset, count=40_000):
    """Probabilities, and hits that are true of logit(p) / temperature + offset."""
    rng = np.random.default_rng(0)
    p = rng.uniform(0.01, 0.99, count)
    true = np.array([q for _, q in Calibration(temperature, offset)([("", each) for each in p])])
    return p, rng.uniform(size=count) < true


def test_the_error_of_a_constructed_set_is_the_known_one():
    p = np.array([0.25] * 8 + [0.75] * 4)
    right = np.array([1] * 4 + [0] * 4 + [1] * 1 + [0] * 3)
    found = reliability(p, right.astype(bool), bins=2)
    assert found == [[0.25, 0.5, 8], [0.75, 0.25, 4]]
    assert calibration_error(found) == pytest.approx((8 * 0.25 + 4 * 0.5) / 12)
    p, right = drawn(3.0, 1.0)
    expected = binary_calibration_error(torch.tensor(p), torch.tensor(right).long(), n_bins=15, norm="l1")
    assert calibration_error(reliability(p, right)) == pytest.approx(float(expected), abs=1e-6)


def test_the_brier_score_is_that_of_scikit_learn_and_a_constant_does_not_lower_it():
    p, right = drawn(1.0, 0.0)
    assert brier_score(p, right) == pytest.approx(brier_score_loss(right, p))
    constant = np.full(len(p), right.mean())
    assert calibration_error(reliability(constant, right)) == pytest.approx(0, abs=1e-9), "which the other error is"
    assert brier_score(constant, right) > brier_score(p, right) + 0.05


def test_what_was_drawn_is_fitted():
    temperature, offset = fit(*drawn(2.5, 0.7))
    assert temperature == pytest.approx(2.5, rel=0.05)
    assert offset == pytest.approx(0.7, abs=0.05)
    assert fit(*drawn(1.0, 0.0)) == (pytest.approx(1, rel=0.05), pytest.approx(0, abs=0.05))


def test_calibration_keeps_the_order_and_stays_within_0_and_1():
    labels = Calibration(0.01, 3.0)([("a", 1.0), ("b", 0.6), ("c", 0.0)])
    assert [q for _, q in labels] == sorted((q for _, q in labels), reverse=True)
    assert all(0 <= q <= 1 for _, q in labels)
    assert Calibration(1.0, 0.0)([("a", 0.3)])[0][1] == pytest.approx(0.3)
    assert logit(0.5) == 0
    for wrong in ((0.0, 0.0), (-1.0, 0.0), (1.0, float("nan")), ("1", 0.0), (10**400, 0.0)):
        with pytest.raises(ValueError, match="must be finite"):
            Calibration(*wrong)


def hits_of(p, right):
    """One label per image."""
    hits = LabelHits()
    hits.update([[("a", each)] for each in p], [["a" if hit else "b"] for hit in right])
    return hits


def test_every_second_image_is_fitted_and_the_others_are_measured():
    p, right = drawn(2.5, 0.7, 8000)
    found = calibration_of(hits_of(p, right), "val")
    assert found.measured["ece"]["after"] < 0.03 < found.measured["ece"]["before"]
    brier = found.measured["brier"]
    assert brier["before"] == pytest.approx(brier_score_loss(right[1::2], p[1::2]), abs=1e-6)
    assert brier["constant"] == pytest.approx(np.mean((right[1::2] - right[::2].mean()) ** 2), abs=1e-6)
    assert brier["after"] < min(brier["before"], brier["constant"])
    right[1::2] ^= np.arange(len(right) // 2) % 7 == 0
    again = calibration_of(hits_of(p, right), "val")
    assert (again.temperature, again.offset) == (found.temperature, found.offset), "fitted on the others"
    right[1::2] = False
    with pytest.raises(UserError, match=r"each half needs 10 labels that are right and 10 that are not, one has 0\."):
        calibration_of(hits_of(p, right), "val")


@pytest.mark.parametrize(
    ("hits", "line"),
    [
        (LabelHits(), "data.val.val: no image has labels"),
        (hits_of([0.5] * 50, [False] * 50), "none of 50 predicted labels is right"),
        (
            hits_of([0.5] * 50, [True] * 3 + [False] * 47),
            "Only 3 of 50 predicted labels are right: are the set's labels",
        ),
        (hits_of(np.linspace(0, 1, 400), np.linspace(1, 0, 400) > 0.5), "no temperature mends that"),
    ],
)
def test_a_set_that_cannot_calibrate_is_refused_in_one_line(hits, line):
    with pytest.raises(UserError, match=line) as error:
        calibration_of(hits, "val")
    assert "\n" not in str(error.value)


# ---- curves and thresholds -----------------------------------------------------------------------------------------


def test_average_precision_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    scores = rng.uniform(size=(200, 6)).round(2)  # with ties
    right = rng.uniform(size=(200, 6)) < scores**2
    hits = LabelHits()
    names = list("abcdef")
    hits.update(
        [sorted(zip(names, row, strict=True), key=lambda each: -each[1]) for row in scores.tolist()],
        [[name for name, hit in zip(names, row, strict=True) if hit] for row in right],
    )
    some = right.any(axis=1)  # an image without labels counts in no metric
    curve = Curve.of(hits)
    assert hits.truths == right.sum()
    assert curve.average_precision == pytest.approx(average_precision_score(right[some].ravel(), scores[some].ravel()))
    place = int((curve.threshold == 0.5).argmax())
    said = scores[some] >= 0.5
    assert curve.precision[place] == pytest.approx(right[some][said].mean())
    assert curve.recall[place] == pytest.approx(right[some][said].sum() / right.sum())
    assert curve.labels_per_image[place] == pytest.approx(said.sum() / some.sum())
    hits.truths *= 2  # as many labels that no prediction has
    assert Curve.of(hits).average_precision == pytest.approx(curve.average_precision / 2)
    assert Curve.of(LabelHits()).average_precision == 0


def test_a_curve_counts_the_labels_that_exact_match_counts():
    hits = LabelHits()
    said = [("Dog", 0.5), ("dog ", 0.3), (" ", 0.2), ("cat", 0.1)]
    hits.update([said], [["dog", "DOG", ""]])
    assert (hits.probabilities, hits.right, hits.truths) == ([0.5, 0.1], [True, False], 1)
    exact = ExactMatch()
    exact.update([[label for label, _ in said]], [["dog"]])
    curve = Curve.of(hits)
    assert (curve.precision[-1], curve.recall[-1]) == (exact.compute()["precision@10"], exact.compute()["recall@10"])
    assert curve.average_precision == 1


def test_the_whole_curve_is_written_and_the_best_f1_marked(tmp_path, monkeypatch):
    hits, shown = LabelHits(), []
    hits.update([[("a", 0.9), ("b", 0.8), ("c", 0.1)]], [["a", "b"]])
    monkeypatch.setattr("nxtp.eval.curves.save_figure", lambda figure, path: shown.append(figure))
    write_curves({"val": Curve.of(hits)}, tmp_path)
    rows = list(csv.DictReader((tmp_path / "curve.csv").open()))
    assert [(float(row["threshold"]), float(row["recall"])) for row in rows] == [(0.9, 0.5), (0.8, 1), (0.1, 1)]
    (line,) = shown[0].axes[0].lines
    assert line.get_markevery() == [1]
    assert line.get_label() == "val: average precision 1.000, F1 1.00 at 0.8"


def brute_force_f1(probabilities, said):
    """2 · E[right] / (said + E[labels])."""
    return 2 * sum(probabilities[:said]) / (said + sum(probabilities))


def test_a_sum_that_is_rounded_above_1_leaves_the_thresholds_as_they_are():
    curves = []
    for top in (1.0, 1 + 1e-7):
        hits = LabelHits()
        hits.update([[("a", top), ("b", 0.5)], [("a", 0.3), ("c", 0.1)]], [["a"], ["c"]])
        curves.append(Curve.of(hits))
    for one, other in zip(vars(curves[0]).values(), vars(curves[1]).values(), strict=True):
        assert one.tolist() == other.tolist()


def test_a_threshold_or_the_f1_of_expected_counts_says_how_many_labels():
    labels = [("a", 0.9), ("b", 0.8), ("c", 0.3), ("d", 0.02)]
    assert cut(labels, 0.3) == labels[:3]
    assert cut(labels, 0.95) == []
    assert cut(labels, None) == labels
    assert cut(labels, "f1") == labels[:2]
    assert cut([], "f1") == []
    rng = np.random.default_rng(0)
    for _ in range(50):
        p = sorted(rng.uniform(size=8) ** 3, reverse=True)
        best = max(range(1, 9), key=lambda said: brute_force_f1(p, said))
        assert len(cut([("x", each) for each in p], "f1")) == best
    assert threshold_of("0.25", RankingConfig()) == 0.25
    for value, ranking, line in ((2, "prob", "from 0 to 1"), ("much", "prob", "got 'much'"), (0.1, "ppl", "use prob")):
        with pytest.raises(UserError, match=line):
            threshold_of(value, RankingConfig(ranking))


# ---- the commands --------------------------------------------------------------------------------------------------

DATA = ["+data.val.val=val", "data.num_workers=0"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model of random weights, and a set whose labels it predicts about as often as chance has it."""
    root = tmp_path_factory.mktemp("calibration")
    model = ending_recognizer()
    model.save_pretrained(root / "model")
    write_shards(root / "val", [40], labels=True)
    return root


@pytest.fixture
def calibrated(place, tmp_path):
    """The model with a calibration, without running the command."""
    directory = tmp_path / "model"
    shutil.copytree(place / "model", directory)
    recognizer = Recognizer.from_pretrained(directory, device="cpu")
    recognizer.calibrations = {"one_shot": Calibration(2.0, 0.5, {"max_tokens": 19, "temperature": 1.0})}
    recognizer.save_pretrained(directory)
    return directory


def test_a_calibration_does_not_go_along_with_other_weights(calibrated, tmp_path, caplog):
    recognizer = Recognizer.from_pretrained(calibrated, device="cpu")
    recognizer.save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "calibration.json").is_file()
    recognizer.model.image_token += 1
    recognizer.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other" / "calibration.json").exists()
    assert "has no calibration: it was of other weights" in caplog.text


def test_classes_are_calibrated_each_vocabulary_for_itself(calibrated, caplog):
    recognizer = Recognizer.from_pretrained(calibrated, device="cpu")
    image = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    mine, other = (recognizer.prepare_classes(names) for names in (["rose", "lemon"], ["lemon", "rose"]))
    raw = [recognizer.classify_pixels(image, each) for each in (mine, other)]
    recognizer.calibrations["classify"] = Calibration(2.0, 0.5, {"classes": mine.fingerprint})
    assert recognizer.classify_pixels(image, mine) == [Calibration(2.0, 0.5)(raw[0][0])]
    assert recognizer.classify_pixels(image, other) == raw[1]
    assert recognizer.label_pixels(image, 2, other) == raw[1]
    assert recognizer.label_pixels(image, 3) == recognizer.predict_pixels(image, 3)
    assert caplog.text.count("The model's calibration is not for these classes") == 1, "once, and nothing of the first"


def test_predictions_are_calibrated_where_the_model_directory_says_so(place, calibrated):
    image = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    plain, found = (Recognizer.from_pretrained(d, device="cpu") for d in (place / "model", calibrated))
    raw = plain.predict_pixels(image)
    assert found.predict_pixels(image) == [Calibration(2.0, 0.5)(raw[0])]
    assert found.predict_pixels(image)[0][0][1] > 2 * raw[0][0][1]
    greedy = {"name": "greedy", "max_new_tokens": 2}
    for others in ({"sampler": {"name": "one_shot", "temperature": 2.0}}, {"ranking": "ppl"}, {"sampler": greedy}):
        assert found.predict_pixels(image, **others) == plain.predict_pixels(image, **others)
    limit = found.predict_pixels(image)[0][2][1]
    assert len(found.predict_pixels(image, threshold=limit)[0]) == 3


def test_an_exported_model_is_calibrated_as_its_model_directory(place, calibrated, monkeypatch):
    runner, plain = object.__new__(OnnxRecognizer), object.__new__(OnnxRecognizer)
    runner.config = runner_config(Recognizer.from_pretrained(calibrated, device="cpu"), "float32")
    plain.config = runner_config(Recognizer.from_pretrained(place / "model", device="cpu"), "float32")
    monkeypatch.setattr(OnnxRecognizer, "_text", lambda self, ids: str(ids))
    tokens = np.array([[5, runner.config.delimiter], [6, runner.config.delimiter]])
    labels = plain._ranked(tokens, np.array([[0.3, 0.5], [0.2, 0.5]]), 2)
    assert runner._ranked(tokens, np.array([[0.3, 0.5], [0.2, 0.5]]), 2) == Calibration(2.0, 0.5)(labels)


def test_a_calibration_of_other_weights_is_not_used_and_a_damaged_one_refused(calibrated, caplog):
    path = calibrated / "calibration.json"
    content = json.loads(path.read_text())
    weights = content["weights"]
    assert content["samplers"]["one_shot"]["measured"] == {}, "as before there was a Brier score"
    assert read_calibrations(calibrated, weights)
    assert read_calibrations(calibrated, "other") == {}
    assert "is of other weights" in caplog.text
    content["samplers"]["one_shot"]["temperature"] = -1
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"calibration\.json' is damaged"):
        Recognizer.from_pretrained(calibrated)
    path.write_text(json.dumps(content | {"format": 9}))
    with pytest.raises(UserError, match="has format 9, this nxtp reads 1"):
        Recognizer.from_pretrained(calibrated)


def test_calibrate_writes_into_the_model_directory_and_evaluate_draws_a_curve(place, monkeypatch):
    shutil.copytree(place / "model", place / "mine")
    rng = np.random.default_rng(0)
    scale = 1.0

    def pieces(self, images, *rest, **more):
        drawn = rng.uniform(size=(len(images), 2)).tolist()
        labels = [[("stone", scale * (0.5 + a / 2)), ("rose", scale * b), ("x", 0.001)] for a, b in drawn]
        return self._calibrated(labels, *settings_of(sampler_config("one_shot")))

    with monkeypatch.context() as patch:
        patch.setattr(Recognizer, "predict_pixels", pieces)
        done = call_nxtp("calibrate", "mine", *DATA, cwd=place)
        assert "The expected calibration error is not lower: nothing is stored." in done.stdout
        assert not (place / "mine" / "calibration.json").exists()
        scale, rng = 0.1, np.random.default_rng(1)
        done = call_nxtp("calibrate", "mine", *DATA, cwd=place)
        assert (done.returncode, done.stderr) == (0, "")
        rng = np.random.default_rng(1)
        assert call_nxtp("calibrate", "mine", *DATA, cwd=place).stdout == done.stdout, "the earlier one is not used"
        first, data, error, brier, last = filter(str.strip, done.stdout.splitlines())
        assert re.fullmatch(r"one_shot: temperature \d+\.\d{3}, offset [+-]\d+\.\d{3}", first)
        assert data == "fitted to 60 labels, the top 10 of 20 images; measured on 60 labels of 20 others:"
        assert re.fullmatch(r"expected calibration error 0\.\d{4} before, 0\.\d{4} after", error)
        assert re.fullmatch(r"Brier score 0\.\d{4} before, 0\.\d{4} after, 0\.\d{4} for a constant", brier)
        assert last == "calibration.json and calibration.png, the reliability diagram, in mine"
        content = json.loads((place / "mine" / "calibration.json").read_text())
        assert content["samplers"]["one_shot"]["measured"]["images"] == 40
        assert (place / "mine" / "calibration.png").stat().st_size > 5_000
        given = [*DATA, "semantic=null", "grid=0", "top_k=3", "prior=val", "out=curve", "curve=true"]
        done = call_nxtp("evaluate", "model=mine", *given, cwd=place)
        assert done.returncode == 0
    line = done.stdout.splitlines()[-1]
    assert re.fullmatch(r"metrics\.json, predictions\.jsonl, curve\.csv, curve\.png in \S*curve", line)
    metrics = json.loads((place / "curve" / "metrics.json").read_text())
    rows = list(csv.DictReader((place / "curve" / "curve.csv").open()))
    assert 0 < metrics["val/average_precision"] < 1
    assert [float(row["recall"]) for row in rows] == sorted(float(row["recall"]) for row in rows)
    assert (place / "curve" / "curve.png").stat().st_size > 5_000
    assert len(json.loads((place / "curve" / "run.json").read_text())["data"]["train"]["frequent_labels"]) == 3


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["calibrate", *DATA], "'.' is no local model directory, to write calibration.json to"),
        (["calibrate", "model"], "data.val has no set to calibrate on"),
        (["calibrate", "model", *DATA, "ranking=ppl"], "omit ranking and threshold"),
        (["calibrate", "model", *DATA, "top_k=1"], "none of 40 predicted labels is right. Is the model of another"),
        (["evaluate", "model=model", *DATA, "curve=true", "threshold=f1"], "omit threshold and ranking"),
        *(
            ([*command, *DATA, "classes=x.txt", setting], "omit sampler and ranking")
            for command in (["evaluate", "model=model"], ["calibrate", "model"])
            for setting in ("sampler=greedy", "sampler.temperature=2", "ranking.published=true")
        ),
        (["evaluate", "model=model", *DATA, "classes=x.txt", "ranking=ppl"], "omit sampler and ranking"),
        (["evaluate", "model=model", *DATA, "threshold=2"], "threshold must be from 0 to 1, or f1, got 2."),
        (["predict", "x.jpg", "--model", "model", "--threshold", "lots"], "threshold must be a probability or f1"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(place, arguments, line):
    done = call_nxtp(*arguments, cwd=place)
    assert done.returncode == 1
    assert line in done.stderr
    assert len(done.stderr.splitlines()) == 1

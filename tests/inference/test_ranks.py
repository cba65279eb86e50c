"""Prediction over ranks: they share out the source, resume, and write the file of one process."""

import json

import pytest
from helpers import COLOURS, call_nxtp, jpeg, nxtp_runs, recognizer, write_shards
from torch.distributed import HashStore

from nxtp.data import mixture
from nxtp.distributed.rendezvous import Ranks
from nxtp.errors import UserError
from nxtp.inference.streaming import ImageItem, ImageSource, Prediction, shared_out
from nxtp.inference.writer import PredictionWriter

GIVEN = ["predict", "pictures", "--model", "model", "--top-k", "3", "--batch-size", "2"]


def source(count: int) -> ImageSource:
    return ImageSource([ImageItem(str(i), lambda: None) for i in range(count)], count)


@pytest.mark.parametrize("count", [0, 1, 2, 7, 12, 13])
def test_every_image_is_of_one_rank_in_the_batches_of_one_process(count):
    shares = [shared_out(source(count), 2, (rank, 3)) for rank in range(3)]
    names = [[item.image for item in share.items] for share in shares]
    assert [len(each) for each in names] == [share.count for share in shares]
    assert sorted((name for each in names for name in each), key=int) == [str(i) for i in range(count)]
    assert all(int(name) // 2 % 3 == rank for rank, each in enumerate(names) for name in each)
    with pytest.raises(UserError, match="cannot share out a pipe"):
        shared_out(ImageSource(iter(())), 2, (0, 2))


@pytest.mark.parametrize("count", [7, 8, 9])
def test_one_file_in_the_sources_order_of_ranks_that_were_killed(tmp_path, count):
    """Rank 1 is killed within a batch, whose rows are written again."""
    out, computed = tmp_path / "o.jsonl", []
    for stop in (3, None):
        files = [PredictionWriter(out, {}, batch_size=2, share=(rank, 2)) for rank in range(2)]
        for rank, file in enumerate(files):
            left = list(file.remaining(shared_out(source(count), 2, (rank, 2)).items))
            for item in left[: stop if rank else None]:
                file.write(Prediction(item, [("rose", 0.5)]))
                computed.append(item.image)
        if stop:
            for file in files:
                file.close()
            (tmp_path / "o.jsonl.partial-1-of-2").open("a").write('{"image": "6", "la')
    files[0].finish()
    assert [json.loads(line)["image"] for line in out.read_text().splitlines()] == [str(i) for i in range(count)]
    assert len(computed) <= count + 3, "of each rank at most a batch, here of two, is computed again"
    assert [path.name for path in tmp_path.iterdir()] == ["o.jsonl"]


def test_another_number_of_ranks_is_refused(tmp_path):
    out = tmp_path / "o.jsonl"
    PredictionWriter(out, {}, share=(0, 2)).close()
    for ranks in (1, 3):
        with pytest.raises(UserError, match=f"another number of ranks than {ranks}: use that number, another name"):
            PredictionWriter(out, {}, share=(0, ranks))
    PredictionWriter(out, {}, overwrite=True).finish()
    assert [path.name for path in tmp_path.iterdir()] == ["o.jsonl"]


def test_shards_are_listed_and_counted_by_the_first_rank(tmp_path, monkeypatch):
    write_shards(tmp_path, [3, 4], labels=True)
    store = HashStore()
    first = ImageSource.from_paths([str(tmp_path)], ranks=Ranks(store, 0, 2, running=False))
    monkeypatch.setattr(mixture, "expand_shards", None)
    monkeypatch.setattr(mixture, "listed_counts", None)
    other = ImageSource.from_paths([str(tmp_path)], ranks=Ranks(store, 1, 2, running=False))
    assert list(other.items) == list(first.items)
    assert len(other.local) == 2
    assert (other.count, other.local) == (7, first.local)


def test_two_ranks_write_the_file_of_one(tmp_path, monkeypatch):
    recognizer().save_pretrained(tmp_path / "model")
    (tmp_path / "pictures").mkdir()
    for i in range(9):
        (tmp_path / "pictures" / f"{i}.jpg").write_bytes(jpeg(list(COLOURS.values())[i % 4], seed=i, size=40 + i))
    (tmp_path / "pictures" / "4.jpg").write_bytes(b"no picture")
    output = nxtp_runs(*GIVEN, "--out", "two.jsonl", cwd=tmp_path, ranks=2, code=1)
    assert "two.jsonl: 9 images, 1 of them could not be read" in output.splitlines()
    assert output.count("error: ") == 1, "the image is reported by the rank that has it"
    assert call_nxtp(*GIVEN, "--out", "one.jsonl", cwd=tmp_path).returncode == 1
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert not list(tmp_path.glob("*.partial*"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = call_nxtp(*GIVEN, "--device", "cpu", cwd=tmp_path)
    assert done.stderr == "error: Several ranks need --out: they write one file.\n"

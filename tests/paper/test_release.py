"""Released checkpoints: read with their base weights, written again, and every input that must be refused."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizerFast

from nxtp.errors import UserError
from nxtp.inference.recognizer import Recognizer
from nxtp.model.decoder import DecoderConfig
from nxtp.model.encoder import EncoderConfig
from nxtp.model.model import Model, ModelConfig
from nxtp.model.tokenizer import LabelTokenizer
from nxtp.model.weights import SafetensorsFiles, Spec, write_safetensors
from nxtp.paper.commands import convert
from nxtp.paper.release import export_release, import_release
from nxtp.paper.release_names import our_name, their_name
from nxtp.paper.rope_order import halves_from_pairs, pairs_from_halves
from nxtp.paper.weight_files import PickledFile, TorchScriptFile, open_weights

WIDTH, HEADS, HIDDEN, BLOCKS, DEPTH = 64, 4, 96, 4, 3
VISION = {"layers": 4, "width": 64, "head_width": 64, "patch_size": 8, "mlp_ratio": 4.0}
TRAINED_ENCODER_BLOCKS = (2, 3)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A released checkpoint with everything that it was trained from, in all the forms in which that is given out."""
    place = tmp_path_factory.mktemp("release")
    torch.manual_seed(0)
    write_tokenizer_model(place / "meta" / "tokenizer.model")
    tokenizer = LabelTokenizer.load(place / "meta" / "tokenizer.model")
    llama = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=WIDTH,
            intermediate_size=HIDDEN,
            num_hidden_layers=BLOCKS,
            num_attention_heads=HEADS,
            vocab_size=len(tokenizer),
            rms_norm_eps=1e-5,
        )
    )
    llama.save_pretrained(place / "llama", max_shard_size="100KB")
    tokenizer.save(place / "llama")
    write_meta(place / "meta", llama)

    trained = trained_model(tokenizer, llama)
    visual = {
        f"visual.{n.removeprefix('encoder.visual.')}": t.half()
        for n, t in trained.state_dict().items()
        if n.startswith("encoder.visual.")
    }
    clip = visual | {"visual.proj": torch.randn(64, 8).half(), "text_projection": torch.randn(8, 8).half()}
    trained.load_state_dict({n.replace("visual.", "encoder.visual.", 1): t.float() for n, t in visual.items()}, False)
    save_file(clip, place / "clip.safetensors")
    torch.save({"state_dict": {f"module.{n}": t for n, t in clip.items()}}, place / "clip.pt")
    write_torchscript(place / "clip.torchscript.pt", clip)

    with torch.no_grad():  # training moved the trained parts away from the base weights
        for name, parameter in trained.named_parameters():
            if is_trained(name):
                parameter += 0.1 * torch.randn_like(parameter)
    trained.decoder.lm.model.embed_tokens.weight.data[len(tokenizer)] = trained.image_token.data
    torch.save({"epoch": 3, "global_step": 21360, "model": released(trained)}, place / "release.pth")
    return place, trained, tokenizer


def write_tokenizer_model(path: Path) -> None:
    import sentencepiece

    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.parent / "text.txt"
    text.write_text("The objects in the image are cat, dog, coffee table, a red rocket,\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(path.with_suffix("")),
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )


def write_meta(directory: Path, llama: LlamaForCausalLM) -> None:
    """The same weights as Meta gives them out: its own names, q and k in interleaved pairs."""
    names = {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {f"self_attn.{x}_proj": f"attention.w{x}" for x in "qkvo"}
    names |= {"mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3"}
    state = {"rope.freqs": torch.ones(8)}
    for name, tensor in llama.state_dict().items():
        new = name.removeprefix("model.")
        for ours, theirs in names.items():
            new = new.replace(ours, theirs)
        new = {"embed_tokens.weight": "tok_embeddings.weight", "lm_head.weight": "output.weight"}.get(new, new)
        state[new] = interleaved(tensor) if new.endswith(("wq.weight", "wk.weight")) else tensor
    torch.save(state, directory / "consolidated.00.pth")
    params = {"dim": WIDTH, "n_heads": HEADS, "n_layers": BLOCKS, "norm_eps": 1e-5, "vocab_size": -1}
    (directory / "params.json").write_text(json.dumps(params))


def interleaved(weight: torch.Tensor) -> torch.Tensor:
    """Halves to pairs, row by row."""
    size = weight.shape[0] // HEADS
    order = [h * size + half * size // 2 + i for h in range(HEADS) for i in range(size // 2) for half in (0, 1)]
    return weight[order]


def trained_model(tokenizer: LabelTokenizer, llama: LlamaForCausalLM) -> Model:
    fields = {"model_type": "llama", **llama.config.to_diff_dict()}
    config = ModelConfig(
        encoder=EncoderConfig(vision=VISION, quick_gelu=True, image_size=32),
        decoder=DecoderConfig(config=fields | {"num_hidden_layers": DEPTH, "vocab_size": len(tokenizer) + 2}),
    )
    model = Model(config).eval()
    own = model.decoder.lm.state_dict()
    for name, tensor in llama.state_dict().items():
        if name in own:
            own[name][: tensor.shape[0]] = tensor
    return model


def is_trained(name: str) -> bool:
    if name.startswith("encoder."):
        return "ln_post" in name or any(f"resblocks.{n}." in name for n in TRAINED_ENCODER_BLOCKS)
    return name != "decoder.lm.model.embed_tokens.weight"


def released(model: Model) -> dict[str, torch.Tensor]:
    """The trained parameters in the published naming, and the embedding, which contains the row of <|image|>."""
    state = {}
    for name, tensor in model.state_dict().items():
        if name != "image_token" and (is_trained(name) or "embed_tokens" in name):
            turn = name.endswith(("q_proj.weight", "k_proj.weight"))
            state[f"module.{their_name(name)}"] = interleaved(tensor) if turn else tensor.clone()
    return state


def write_torchscript(path: Path, state: dict[str, torch.Tensor]) -> None:
    """An archive like OpenAI's: nested modules with parameters, and a program that must not be run."""

    class Part(torch.nn.Module):
        def forward(self, x: int) -> int:
            return x + 1

    root = Part()
    for name, tensor in state.items():
        *modules, leaf = name.split(".")
        module = root
        for part in modules:
            if not hasattr(module, part):
                module.add_module(part, Part())
            module = getattr(module, part)
        module.register_parameter(leaf, torch.nn.Parameter(tensor.clone()))
    root.register_buffer("input_resolution", torch.tensor(32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(root).save(str(path))


def import_it(place: Path, to: Path, **changes):
    options = {"llama": place / "llama", "clip": str(place / "clip.safetensors"), "tokenizer": place / "llama"}
    return import_release(changes.pop("checkpoint", place / "release.pth"), to=to, **(options | changes))


@pytest.fixture(scope="module")
def imported(place, tmp_path_factory):
    """The model directory of the release, and what its conversion returned."""
    directory = tmp_path_factory.mktemp("imported") / "model"
    return directory, import_it(place[0], directory)


def test_a_release_and_its_base_weights_become_the_model_that_was_trained(place, imported):
    _, trained, tokenizer = place
    directory, done = imported
    recognizer = Recognizer.from_pretrained(directory, device="cpu")
    ours = recognizer.model.state_dict()
    assert ours.keys() == trained.state_dict().keys()
    for name, tensor in trained.state_dict().items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=0, msg=name)
    images = torch.rand(2, 3, 32, 32)
    logits = [model.prefill(images, tokenizer.prompt_ids)[0] for model in (recognizer.model, trained)]
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    assert recognizer.predict_pixels(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), top_k=3)
    assert (done.from_llama, done.from_clip) == (0, 5 + 2 * 12)
    assert recognizer.provenance["trainable"]["encoder"] == len(TRAINED_ENCODER_BLOCKS)
    assert recognizer.provenance["objective"] == "published"


@pytest.mark.parametrize("clip", ["clip.pt", "clip.torchscript.pt"])
def test_every_form_of_the_base_weights_gives_the_same_file(place, imported, tmp_path, clip):
    place, _, _ = place
    meta = {"llama": place / "meta" / "consolidated.00.pth", "tokenizer": place / "meta" / "tokenizer.model"}
    import_it(place, tmp_path / "b", clip=str(place / clip), **meta)
    directories = [imported[0], tmp_path / "b"]
    weights = [(directory / "model.safetensors").read_bytes() for directory in directories]
    assert weights[0] == weights[1]
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    a, b = (Recognizer.from_pretrained(directory, device="cpu").predict_pixels(images) for directory in directories)
    assert a == b


def test_llama_completes_a_release_that_trained_only_some_blocks(place, tmp_path):
    place, trained, _ = place
    content = torch.load(place / "release.pth", weights_only=True)
    content["model"] = {n: t for n, t in content["model"].items() if ".layers.0." not in n}
    torch.save(content, tmp_path / "part.pth")
    done = import_it(place, tmp_path / "model", checkpoint=tmp_path / "part.pth")
    assert done.from_llama == 9
    state = SafetensorsFiles([tmp_path / "model" / "model.safetensors"])
    llama = LlamaForCausalLM.from_pretrained(place / "llama").state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(state.read(f"decoder.lm.{name}"), llama[name])
    assert torch.equal(state.read("projection.weight"), trained.projection.weight)


def test_there_and_back_to_the_bit(place, imported, tmp_path):
    place, _, _ = place
    shutil.copytree(imported[0], tmp_path / "model")
    export_release(tmp_path / "model", tmp_path / "again.pth")
    first, again = (torch.load(p, weights_only=True) for p in (place / "release.pth", tmp_path / "again.pth"))
    assert first["model"].keys() == again["model"].keys()
    assert all(torch.equal(first["model"][n], again["model"][n]) for n in first["model"])
    assert (again["epoch"], again["global_step"]) == (3, 21360)
    every = export_release(tmp_path / "model", tmp_path / "all.pth", everything=True)
    assert every > len(first["model"])
    import_it(place, tmp_path / "model2", checkpoint=tmp_path / "all.pth")
    files = [(tmp_path / x / "model.safetensors") for x in ("model", "model2")]
    names = [SafetensorsFiles([file]) for file in files]
    assert all(torch.equal(names[0].read(n).float(), names[1].read(n).float()) for n in names[0].specs)
    # Directories saved before 'trainable' had its name are written with the same parameters.
    config = tmp_path / "model" / "config.yaml"
    config.write_text(config.read_text().replace("  trainable:", "  trains:"))
    assert "trains:" in config.read_text()
    export_release(tmp_path / "model", tmp_path / "old.pth")
    assert torch.load(tmp_path / "old.pth", weights_only=True)["model"].keys() == first["model"].keys()


def test_a_model_of_another_kind_does_not_leave(place, tmp_path):
    _, trained, tokenizer = place
    small = replace(trained.config, decoder=replace(trained.config.decoder, config=dict(trained.config.decoder.config)))
    small.decoder.config["vocab_size"] = len(tokenizer)
    Recognizer(Model(small), tokenizer, small).save_pretrained(tmp_path / "small")
    with pytest.raises(UserError, match=rf"vocab_size={len(tokenizer) + 2}"):
        export_release(tmp_path / "small", tmp_path / "x.pth")
    pooled = replace(trained.config, pool=True)
    Recognizer(Model(pooled), tokenizer, pooled).save_pretrained(tmp_path / "pooled")
    with pytest.raises(UserError, match=r"cannot be loaded by the published code: it has model\.pool=true"):
        export_release(tmp_path / "pooled", tmp_path / "x.pth")
    timm = replace(trained.config, encoder=EncoderConfig(vision={"timm_model_name": "resnet10t"}, image_size=64))
    Recognizer(Model(timm), tokenizer, timm).save_pretrained(tmp_path / "timm")
    with pytest.raises(UserError, match="cannot be loaded by the published code"):
        export_release(tmp_path / "timm", tmp_path / "x.pth")
    assert not (tmp_path / "x.pth").exists()


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/nxtp-was-here",)


def change(place: Path, to: Path, function) -> Path:
    content = torch.load(place / "release.pth", weights_only=True)
    function(content["model"])
    torch.save(content, to)
    return to


def deeper(model):
    model.update({n.replace(".layers.2.", ".layers.4."): t for n, t in model.items() if ".layers.2." in n})


def wider(model):
    model["module.language_decoder.norm.weight"] = torch.ones(WIDTH + 1)


def larger(model):
    for name in ("tok_embeddings", "output"):
        weight = model[f"module.language_decoder.{name}.weight"]
        model[f"module.language_decoder.{name}.weight"] = torch.cat([weight, weight[:3]])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (deeper, r"has 5 decoder blocks, '.*' only 4"),
        (wider, r"1 of another shape \(decoder.lm.model.norm.weight: 65, expected 64\)"),
        (larger, r"vocabulary has \d+ rows"),
        (
            lambda model: [model.pop(f"module.language_decoder.layers.{n}.ffn_norm.weight") for n in (0, 2)],
            r"2 missing \(decoder.lm.model.layers.0.post_attention_layernorm.weight, decoder.lm.model.layers.2.post",
        ),
        (lambda model: model.pop("module.vision_encoder.proj.weight"), r"1 missing \(projection.weight\)"),
        (
            lambda model: model.update({"module.value_head.weight": torch.ones(2)}),
            r"1 surplus parameters: module.value",
        ),
        (
            lambda model: model.update({"module.vision_encoder.extra": torch.ones(2)}),
            r"1 surplus \(encoder.visual.extra\)",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(place, tmp_path, function, message):
    place, _, _ = place
    with pytest.raises(UserError, match=message) as error:
        import_it(place, tmp_path / "model", checkpoint=change(place, tmp_path / "odd.pth", function))
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["odd.pth"]


def test_damaged_and_hostile_files_are_refused(place, tmp_path):
    place, _, _ = place
    whole = (place / "release.pth").read_bytes()
    (tmp_path / "torn.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("hello")
    torch.save({"model": [1, 2]}, tmp_path / "list.pth")
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"model": Evil()}, protocol=2))
    torch.save({"model": {"x": Evil()}}, tmp_path / "evil2.pth")
    for name in sorted(os.listdir(tmp_path)):
        with pytest.raises(UserError, match=name) as error:
            import_it(place, tmp_path / "model", checkpoint=tmp_path / name)
        assert "\n" not in str(error.value)
    clip = (place / "clip.torchscript.pt").read_bytes()
    (tmp_path / "torn.pt").write_bytes(clip[: len(clip) // 2])
    with pytest.raises(UserError, match=r"torn\.pt"):
        import_it(place, tmp_path / "model", clip=str(tmp_path / "torn.pt"))
    with pytest.raises(UserError, match="Did you mean 'openai'"):
        import_it(place, tmp_path / "model", clip="opnai")
    with pytest.raises(UserError, match="not a CLIP vision transformer"):
        import_it(place, tmp_path / "model", clip=str(place / "release.pth"))
    assert not (tmp_path / "model").exists()
    assert not Path("/tmp/nxtp-was-here").exists()


def test_a_torchscript_archive_that_asks_for_more_than_tensors_is_refused(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "evil.pt", "w") as archive:
        archive.writestr("evil/constants.pkl", pickle.dumps(()))
        archive.writestr("evil/data.pkl", pickle.dumps(Evil()))
    with pytest.raises(UserError, match=r"asks for posix\.system"):
        open_weights(tmp_path / "evil.pt")
    assert not Path("/tmp/nxtp-was-here").exists()


def test_a_tokenizer_that_splits_the_delimiter_or_the_last_prompt_word_is_refused(place, tmp_path):
    place, _, _ = place
    content = json.loads((place / "llama" / "tokenizer.json").read_text())["model"]

    def without_are(model):
        model["vocab"]["odd"] = model["vocab"].pop("▁are")
        model["merges"] = [pair for pair in model["merges"] if "▁are" not in (*pair, "".join(pair))]

    def with_a_comma(model):
        model["merges"].append(["▁a", ","])
        odd = max(model["vocab"], key=model["vocab"].get)
        model["vocab"]["▁a,"] = model["vocab"].pop(odd)
        model["merges"] = [pair for pair in model["merges"] if odd not in (*pair, "".join(pair))]

    for function, message in (
        (without_are, "splits 'are', the prompt's last word"),
        (with_a_comma, "the delimiter ','"),
    ):
        directory = tmp_path / function.__name__
        LlamaTokenizerFast.from_pretrained(place / "llama").save_pretrained(directory)
        broken = json.loads((directory / "tokenizer.json").read_text())
        broken["model"] = json.loads(json.dumps(content))
        function(broken["model"])
        (directory / "tokenizer.json").write_text(json.dumps(broken))
        with pytest.raises(UserError, match=message):
            import_it(place, tmp_path / "model", tokenizer=directory)
    assert not (tmp_path / "model").exists()


def test_names_and_row_orders_are_inverse(place):
    _, trained, _ = place
    for name in trained.state_dict():
        assert name == "image_token" or our_name(their_name(name)) == name
    weight = torch.randn(WIDTH, 5)
    assert torch.equal(pairs_from_halves(weight, HEADS), interleaved(weight))
    assert torch.equal(halves_from_pairs(pairs_from_halves(weight, HEADS), HEADS), weight)


def test_the_same_tensors_from_every_kind_of_file(place, tmp_path):
    place, _, _ = place
    files = [open_weights(place / f"clip.{suffix}") for suffix in ("safetensors", "pt", "torchscript.pt")]
    assert [type(file) for file in files] == [SafetensorsFiles, PickledFile, TorchScriptFile]
    for name in files[0].specs:
        expected = files[0].read(name)
        assert torch.equal(files[1].read(f"module.{name}"), expected)
        assert torch.equal(files[2].read(name), expected)
        assert files[2].specs[name] == files[0].specs[name]


def test_written_tensor_by_tensor_as_the_library_writes_it(tmp_path):
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64, torch.bool)
    state = {f"t{i}": torch.arange(7 + i).to(dtype) for i, dtype in enumerate(dtypes)}
    state |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "turned": torch.randn(3, 4).T}
    write_safetensors(
        tmp_path / "x.safetensors", {n: Spec(tuple(t.shape), t.dtype) for n, t in state.items()}, state.__getitem__
    )
    save_file({n: t.contiguous() for n, t in state.items()}, tmp_path / "y.safetensors")
    ours, theirs = (SafetensorsFiles([tmp_path / f"{x}.safetensors"]) for x in "xy")
    assert ours.specs == theirs.specs
    assert all(torch.equal(ours.read(n), theirs.read(n)) for n in state)


def test_a_pickle_is_mapped_once_per_so_many_bytes(tmp_path, monkeypatch):
    tensors = {str(n): torch.full((8,), float(n)) for n in range(6)}
    torch.save({"model": tensors}, tmp_path / "x.pth")
    monkeypatch.setattr("nxtp.paper.weight_files.MAPPED_BYTES", 2 * 32)
    with mock.patch.object(torch, "load", wraps=torch.load) as load:
        weights = PickledFile(tmp_path / "x.pth")
        for name, tensor in tensors.items():
            assert torch.equal(weights.read(name), tensor)
    assert load.call_count == 2, "at first and after the third tensor"
    torch.save({"model": tensors}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with mock.patch.object(torch, "load", wraps=torch.load) as load:
        weights = PickledFile(tmp_path / "old.pth")
        assert all(torch.equal(weights.read(name), tensor) for name, tensor in tensors.items())
    assert load.call_count == 1, "reading it again would hold it twice"


def test_the_command(place, tmp_path):
    place, _, _ = place

    def run(*arguments):
        return CliRunner().invoke(convert, list(map(str, arguments)))

    arguments = [place / "release.pth", "--llama", place / "llama", "--clip", place / "clip.pt"]
    done = run(*arguments, "--out", tmp_path / "model")
    assert done.exit_code == 0, done.output
    assert "29 from CLIP" in " ".join(done.stderr.split())
    again = run(*arguments, "--out", tmp_path / "model")
    assert isinstance(again.exception, UserError)
    assert "--overwrite" in str(again.exception)
    assert run(*arguments).exit_code == run(place / "release.pth", "--out", tmp_path / "other").exit_code == 2
    done = run(tmp_path / "model", "--to-release", tmp_path / "out.pth")
    assert done.exit_code == 0, done.output
    assert torch.load(tmp_path / "out.pth", weights_only=True)["global_step"] == 21360


FULL_SIZE = """
import sys
from pathlib import Path
from nxtp.paper.release import import_release

def peak():  # of this process alone; getrusage's would begin with its parent's
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

before, place = peak(), Path(sys.argv[1])
done = import_release(place / "release.pth", llama=place / "llama", clip=str(place / "clip.safetensors"),
                      tokenizer=place / "llama", to=place / "model")
print(done.bytes, peak(), before)
"""


@pytest.mark.slow
def test_the_published_size_is_converted_in_little_memory(tmp_path):
    """1.78 B parameters in bfloat16: the whole process stays under 1.2 times the size of what it writes."""
    from nxtp.model.meta import meta_model

    write_tokenizer_model(tmp_path / "llama" / "tokenizer.model")
    tokenizer = LabelTokenizer.load(tmp_path / "llama" / "tokenizer.model")
    rows = 32002
    fields = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
    fields |= {"num_key_value_heads": 32, "num_hidden_layers": 6, "vocab_size": rows, "rms_norm_eps": 1e-5}
    encoder = EncoderConfig(name="ViT-L-14", quick_gelu=True, image_size=224)
    model = meta_model(ModelConfig(encoder=encoder, decoder=DecoderConfig(config=fields)), None)
    shapes = {name: Spec(tuple(t.shape), torch.bfloat16) for name, t in model.state_dict().items()}
    assert sum(Spec(s.shape, torch.uint8).bytes for s in shapes.values()) / 1e6 == pytest.approx(1783.84, abs=0.01)

    def zeros(spec):
        return torch.zeros(spec.shape, dtype=spec.dtype)

    visual = {n.removeprefix("encoder."): s for n, s in shapes.items() if n.startswith("encoder.visual.")}
    write_safetensors(tmp_path / "clip.safetensors", visual, lambda name: zeros(visual[name]))
    # The vocabulary's size is the real one; a tokenizer of 32,000 pieces cannot be made here, so it is filled up.
    grown = LlamaTokenizerFast.from_pretrained(tmp_path / "llama")
    grown.add_tokens([f"filler{i}" for i in range(rows - 2 - len(tokenizer))])
    grown.save_pretrained(tmp_path / "llama")
    (tmp_path / "llama" / "config.json").write_text(json.dumps(fields | {"num_hidden_layers": 32}))
    write_safetensors(
        tmp_path / "llama" / "model.safetensors",
        {"model.norm.weight": Spec((4096,), torch.bfloat16)},
        lambda name: torch.ones(4096, dtype=torch.bfloat16),
    )
    last = {f"resblocks.{n}." for n in range(18, 24)}
    names = [n for n in shapes if n != "image_token" and (not n.startswith("encoder.") or any(b in n for b in last))]
    torch.save({"model": {f"module.{their_name(n)}": zeros(shapes[n]) for n in names}}, tmp_path / "release.pth")
    done = subprocess.run([sys.executable, "-c", FULL_SIZE, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written, peak, before = map(int, done.stdout.split())
    print(f"written {written / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB, of which libraries {before / 1e9:.2f} GB")
    assert written == pytest.approx(2 * 1783.84e6, rel=1e-3)
    assert peak < 1.2 * written

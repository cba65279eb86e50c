"""Image encoder: any open_clip tower, ViT-like or convolutional, as a sequence of image tokens."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nxtp.errors import UserError, nearest, one_of
from nxtp.model.hub import reason
from nxtp.model.untrusted import read_yaml
from nxtp.model.weights import MODEL_FILE, ComputesBuffers, SafetensorsFiles

log = logging.getLogger("nxtp")
logging.getLogger("timm").setLevel(logging.WARNING)  # "Loaded  from checkpoint": of a plain file it knows no name

PREFIX = "encoder.visual."  # of the tower's tensors in a model directory
_probed: dict[str, tuple[list[str], list[str], int, int]] = {}  # of towers: a model directory's is built twice
MAX_SIZE = 4096  # pixels per side of an image
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# What applies where neither the configuration nor the weights say anything, as in open_clip.
DEFAULTS = {
    "quick_gelu": False,
    "mean": CLIP_MEAN,
    "std": CLIP_STD,
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
CHOICES = {"interpolation": ("bicubic", "bilinear"), "resize_mode": ("shortest", "longest", "squash")}


@dataclass
class EncoderConfig:
    """Which tower, and how an image becomes its input.

    ``name``        open_clip model name (``ViT-L-14``); null if ``vision`` describes the tower
    ``vision``      open_clip ``vision_cfg`` of another tower, e.g. ``{timm_model_name: resnet10t}``
    ``depth``       keep the tower's first blocks (a convolutional tower's stages) only; null keeps all
    ``pretrained``  open_clip's tag of weights (timm's for a ``timm_model_name`` in ``vision``) or a local weight file;
                    or a model directory with an encoder of the same tower; null starts from random weights
    ``image_size``  height and width of the input in pixels

    The rest is, where null, what the weights were trained with: as the model directory in ``pretrained`` stores it, as
    open_clip has it for the tag (without one: for the first tag of ``name``), or timm for a tower of its own.

    ``quick_gelu``     OpenAI's weights were trained with QuickGELU; it cannot be inferred from a file
    ``mean, std``      channel statistics of the normalised input, RGB in [0, 1]
    ``interpolation``  bicubic or bilinear, antialiased
    ``resize_mode``    how an image becomes square: shortest (the short side is resized, the centre is cut out),
                       longest (the long side; black beside the image), or squash (both sides)
    """

    name: str | None = None
    vision: dict[str, Any] | None = None
    depth: int | None = None
    pretrained: str | None = None
    quick_gelu: bool | None = None
    image_size: int = 224
    mean: list[float] | None = None
    std: list[float] | None = None
    interpolation: str | None = None
    resize_mode: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.image_size <= MAX_SIZE:
            raise UserError(f"model.encoder.image_size must be ≥ 1 and ≤ {MAX_SIZE}, got {self.image_size}.")
        mean, std = (CLIP_STD if values is None else values for values in (self.mean, self.std))
        if not len(mean) == len(std) == 3 or not all(map(math.isfinite, [*mean, *std])) or min(std) <= 0:
            raise UserError("model.encoder.mean and std must be three finite numbers each, those of std > 0.")
        for name, known in CHOICES.items():
            if (value := getattr(self, name)) is not None:
                one_of(f"model.encoder.{name}", value, known)

    def filled(self, found: Mapping[str, Any]) -> EncoderConfig:
        """With ``found``, else the defaults, for every setting of the input that is null."""
        chosen = {name: found.get(name, usual) for name, usual in DEFAULTS.items() if getattr(self, name) is None}
        lists: dict[str, Any] = {name: list(value) for name, value in chosen.items() if isinstance(value, tuple)}
        return replace(self, **chosen | lists)


class Encoder(ComputesBuffers):
    """The tower without its pooling and output heads: images → its last layer's patch tokens, normalised.

    ``width`` is D_encoder, ``num_tokens`` is N. Parameters that the tokens do not depend on (pooling, projection to
    the contrastive space) are removed, so that DDP can train every remaining parameter.

    Raises:
        UserError: an unknown tower or weight tag, or a tower without spatial features.
    """

    def __init__(self, config: EncoderConfig, load_pretrained: bool = True):
        super().__init__()
        tower, trained = _tower_config(config)
        self.config = config = config.filled(trained)
        key = repr((tower, config.depth))
        if key not in _probed:
            with torch.device("meta"):
                _probed[key] = _probe(_build_tower(tower, config.depth), config.image_size)
        unused, idle, self.num_tokens, self.width = _probed[key]
        self.visual = _build_tower(tower, config.depth)
        if config.pretrained is not None and load_pretrained:
            usual = EncoderConfig().filled(trained)
            for name in DEFAULTS:
                given, right = getattr(config, name), getattr(usual, name)
                if name in trained and given != right:
                    message = "model.encoder.%s is %s; '%s' was trained with %s."
                    log.warning(message, name, given, config.pretrained, right)
            if is_model_dir(config.pretrained):
                fill_from_model_dir(self.visual, Path(config.pretrained), without=unused)
            else:
                state = pretrained_tower(config) if config.name else _timm_weights(config, tower["vision_cfg"])
                if config.depth is not None:
                    kept = self.visual.state_dict()
                    state = {name: tensor for name, tensor in state.items() if name in kept}
                self.visual.load_state_dict(state)
        for name in unused:
            owner, _, leaf = name.rpartition(".")
            setattr(self.visual.get_submodule(owner), leaf, None)
        for name in idle:
            owner, _, leaf = name.rpartition(".")
            module = self.visual.get_submodule(owner)
            module.register_buffer(leaf, module._parameters.pop(leaf))
        for name in ("mean", "std"):
            self.register_buffer(name, torch.empty(3, 1, 1), persistent=False)
        self.compute_buffers()

    def compute_buffers(self) -> None:
        """Mean and standard deviation [3, 1, 1]: pixels are rounded to the tower's type when they are normalised."""
        for name in ("mean", "std"):
            values, device = getattr(self.config, name), getattr(self, name).device
            setattr(self, name, torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Patch tokens.

        Args:
            images: uint8 [B, 3, S, S] in 0..255, or floating point, already normalised; or stored features of a
                frozen tower, floating point [B, N, D_encoder], which are returned as they are.

        Returns:
            [B, N, D_encoder]. A frozen tower runs without autograd; in a partly frozen one autograd records nothing
            before the first trainable block.
        """
        dtype = next(self.visual.parameters()).dtype
        if images.ndim == 3:
            return images.to(dtype)
        if images.dtype == torch.uint8:
            images = ((images.float() / 255 - self.mean) / self.std).to(dtype)
        if images.device.type == "cpu" and self.is_convolutional:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.is_trained):
            return _spatial_tokens(self.visual, images)

    def forward_with_prefix(self, images: Tensor) -> Tensor:
        """As :meth:`forward`, with the tower's class token(s) in front: [B, 1 + N, D_encoder]."""
        return _spatial_tokens(self.visual, images, with_prefix=True)

    @property
    def is_trained(self) -> bool:
        return any(p.requires_grad for p in self.visual.parameters())

    @property
    def is_convolutional(self) -> bool:
        return sum(isinstance(m, nn.Conv2d) for m in self.visual.modules()) > 4

    def train(self, mode: bool = True) -> Encoder:
        """Frozen parts stay in evaluation mode: no dropout, no update of batch statistics."""
        super().train(mode)
        for module in self.visual.modules():
            parameters = list(module.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                module.eval()
        return self

    def blocks(self) -> list[nn.Module]:
        """The tower's blocks (stages, for a convolutional one), first to last."""
        owner, names = _blocks(self.visual)
        return [owner.get_submodule(name) for name in names[: self.config.depth]]  # behind them are identities


def _tower_config(config: EncoderConfig) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """embed_dim, vision_cfg and quick_gelu as open_clip spells them; the settings that its weights had in training."""
    import open_clip

    if config.name is not None and config.vision is None:
        known = open_clip.get_model_config(config.name) if config.name in open_clip.list_models() else None
        if known is None:  # open_clip would also read directories and the hub, hf-hub:owner/name
            raise UserError(
                f"open_clip has no model '{config.name}'.{nearest(config.name, open_clip.list_models())} "
                "All names: python -c 'import open_clip; print(open_clip.list_models())'"
            )
    elif config.vision is not None and config.name is None:
        known = {"vision_cfg": config.vision, "embed_dim": 8}
        if "timm_model_name" in config.vision:
            own = {"timm_pool": "", "timm_proj": "none", **config.vision, "timm_model_name": _timm_name(config)}
            known["vision_cfg"] = own
        elif config.pretrained is not None and not is_model_dir(config.pretrained):
            raise UserError(
                f"model.encoder.pretrained is '{config.pretrained}': with model.encoder.vision it can only be a model "
                "directory, or weights of its timm_model_name; open_clip's weights need model.encoder.name."
            )
    else:
        raise UserError("model.encoder needs either 'name' (an open_clip model) or 'vision' (a vision_cfg), not both.")
    vision = {**known["vision_cfg"], "image_size": config.image_size}
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    side, width = (vision.get(key) for key in ("patch_size", "width"))
    if vision.get("pos_embed_type") == "sin_cos_2d" and not (
        isinstance(side, int) and isinstance(width, int) and side > 0 and (config.image_size / side) ** 2 * width < 1e8
    ):  # open_clip computes them at once, even on the meta device
        raise UserError("model.encoder.vision: sin_cos_2d positions of this size are not computed.")
    trained = _trained_with(config, vision) | ({"quick_gelu": True} if known.get("quick_gelu") else {})
    quick_gelu = known.get("quick_gelu") or config.filled(trained).quick_gelu
    return {"embed_dim": known["embed_dim"], "vision_cfg": vision, "quick_gelu": quick_gelu}, trained


def _timm_name(config: EncoderConfig) -> str:
    """timm's name of the tower that ``vision`` describes, with the tag of its weights if it has one.

    Raises:
        UserError: timm has no such tower, or no such weights of it.
    """
    import timm

    name, _, tag = str((config.vision or {})["timm_model_name"]).partition(".")
    if not timm.is_model(name):  # timm would also read directories and the hub, hf-hub:owner/name
        raise UserError(
            f"model.encoder.vision.timm_model_name: timm has no model '{name}'.{nearest(name, timm.list_models())} "
            "All names: python -c 'import timm; print(timm.list_models())'"
        )
    source = config.pretrained
    if source is not None and not is_model_dir(source) and not Path(source).is_file():
        tag = source
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{name}.*")] if tag else []
    if tag and tag not in tags:
        known = f"{nearest(tag, tags)} Known: {', '.join(tags) or 'none'}."
        raise UserError(f"'{tag}' is neither a file nor a tag of weights of timm's {name}.{known}")
    return f"{name}.{tag}" if tag else name


def _trained_with(config: EncoderConfig, vision: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of :data:`DEFAULTS` that the weights, or those known for the tower, were trained with.

    Raises:
        UserError: the model directory of the weights has no usable configuration.
    """
    import open_clip

    if config.pretrained is not None and is_model_dir(config.pretrained):
        path = Path(config.pretrained, "config.yaml")
        try:
            stored = read_yaml(path)["model"]["encoder"]
            known = {name: stored[name] for name in DEFAULTS if stored.get(name) is not None}
            return asdict(EncoderConfig(**known).filled({}))
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"model.encoder.pretrained: '{path}' cannot be read: {reason(error)}.") from error
    if config.name is not None and (tags := open_clip.list_pretrained_tags_by_model(config.name)):
        if config.pretrained in tags:
            return {"quick_gelu": False, **open_clip.get_pretrained_cfg(config.name, config.pretrained)}
        known = open_clip.get_pretrained_cfg(config.name, tags[0])
        return {name: value for name, value in known.items() if name != "quick_gelu"}  # tags differ in it
    if "timm_model_name" in vision:
        import timm

        trained = timm.get_pretrained_cfg(vision["timm_model_name"])
        if trained is not None and trained.has_weights:
            data = timm.data.resolve_data_config(pretrained_cfg=trained.to_dict())
            modes = {"center": "shortest", "border": "longest", "squash": "squash"}
            return {**data, "resize_mode": modes.get(data["crop_mode"], "shortest")}
    return {}


def _build_tower(tower: dict[str, Any], depth: int | None) -> nn.Module:
    """open_clip builds towers in pairs: take the image tower beside the smallest text tower."""
    import open_clip

    text = {"context_length": 8, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}
    try:
        visual = open_clip.CLIP(**tower, text_cfg=text).visual
        _resize(visual, tower["vision_cfg"]["image_size"])
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"open_clip cannot build the tower {tower['vision_cfg']}: {reason(error)}.") from error
    if depth is not None:
        owner, names = _blocks(visual)
        if not 1 <= depth <= len(names):
            raise UserError(f"model.encoder.depth must be from 1 to {len(names)}, the tower's blocks, got {depth}.")
        for name in reversed(names[depth:]):
            if isinstance(owner, (nn.Sequential, nn.ModuleList)):
                del owner[int(name)]
            else:
                setattr(owner, name, nn.Identity())
    return visual


def _resize(visual: nn.Module, image_size: int) -> None:
    """timm's vision transformers are built for the size of their weights; most refuse another one."""
    trunk = getattr(visual, "trunk", visual)
    if getattr(getattr(trunk, "patch_embed", None), "strict_img_size", False) and hasattr(trunk, "set_input_size"):
        trunk.set_input_size(image_size)


def _blocks(visual: nn.Module) -> tuple[nn.Module, list[str]]:
    """The module that holds the tower's blocks, and their names in it, first to last."""
    trunk = getattr(visual, "trunk", visual)
    for path in ("transformer.resblocks", "blocks", "stages"):
        try:
            owner = trunk.get_submodule(path)
        except AttributeError:
            continue
        return owner, [name for name, _ in owner.named_children()]
    names = [name for name, _ in trunk.named_children() if name.startswith("layer")]
    if not names:
        raise UserError(f"The blocks of the tower {type(trunk).__name__} are not known; use all of it, trained or not.")
    return trunk, names


def is_model_dir(source: str) -> bool:
    return Path(source, MODEL_FILE).is_file()


def fill_from_model_dir(visual: nn.Module, directory: Path, without: list[str]) -> None:
    """Load the weights of a model directory's encoder, except those named in ``without``, which no encoder keeps.

    Raises:
        UserError: that encoder has another tower.
    """
    weights = SafetensorsFiles([directory / MODEL_FILE])
    found = {name.removeprefix(PREFIX): spec.shape for name, spec in weights.specs.items() if name.startswith(PREFIX)}
    wanted = {name: tensor for name, tensor in visual.state_dict().items() if name not in without}
    if found != {name: tuple(tensor.shape) for name, tensor in wanted.items()}:
        raise UserError(f"model.encoder.pretrained: the encoder in '{directory}' has another tower.")
    for name, tensor in wanted.items():
        tensor.copy_(weights.read(PREFIX + name))


def pretrained_tower(config: EncoderConfig) -> dict[str, Tensor]:
    """The image tower's weights of an open_clip model, from its tag or file.

    Raises:
        UserError: no such tag or file.
    """
    import open_clip

    name, source = str(config.name), str(config.pretrained)
    tags = open_clip.list_pretrained_tags_by_model(name)
    if not Path(source).is_file() and source not in tags:
        known = f"{nearest(source, tags)} Known: {', '.join(tags)}."
        raise UserError(f"'{source}' is neither a file nor an open_clip tag of {name}.{known}")
    model = open_clip.create_model(
        name,
        pretrained=source,
        force_quick_gelu=bool(config.quick_gelu),
        force_image_size=config.image_size,
        require_pretrained=True,
        weights_only=True,
    )
    return model.visual.state_dict()


def _probe(visual: nn.Module, image_size: int) -> tuple[list[str], list[str], int, int]:
    """On the meta device: parameters that the tokens do not depend on, the number of tokens, their width.

    First the parameters of modules that do not run, then of those that run for nothing.

    Raises:
        UserError: the tower has no patch tokens, or takes no images of this size.
    """
    visual.eval()
    ran: set[nn.Module] = set()
    with torch.enable_grad():
        hook = nn.modules.module.register_module_forward_hook(lambda module, *_: ran.add(module))
        try:
            tokens = _spatial_tokens(visual, torch.zeros(1, 3, image_size, image_size, device="meta"))
        except Exception as error:  # of any kind: a tower's own
            tower = type(getattr(visual, "trunk", visual)).__name__
            raise UserError(
                f"model.encoder: {tower} gives no patch tokens of an image of {image_size} pixels: {reason(error)}."
            ) from error
        finally:
            hook.remove()
    used, nodes, seen = set(), [tokens.grad_fn], set()
    while nodes:  # walked: computing the gradients took as long as building the tower
        if (node := nodes.pop()) is not None and node not in seen:
            seen.add(node)
            used.add(id(getattr(node, "variable", None)))
            nodes += [before for before, _ in node.next_functions]
    unused = [n for n, p in visual.named_parameters() if p.requires_grad and id(p) not in used]
    idle = [name for name in unused if visual.get_submodule(name.rpartition(".")[0]) in ran]
    return [name for name in unused if name not in idle], idle, tokens.shape[1], tokens.shape[2]


def _spatial_tokens(visual: nn.Module, images: Tensor, with_prefix: bool = False) -> Tensor:
    attentional_pool = getattr(visual, "attn_pool", None) is not None  # of open_clip's VisionTransformer only
    out = visual.forward_intermediates(
        images,
        indices=1,
        normalize_intermediates=not attentional_pool,  # CoCa's last norm is a part of its pooling
        intermediates_only=True,
        output_fmt="NCHW",  # the only format of every tower
        output_extra_tokens=with_prefix,
    )
    tokens = out["image_intermediates"][-1].flatten(2).transpose(1, 2)
    if with_prefix:
        tokens = torch.cat([out["image_intermediates_prefix"][-1], tokens], dim=1)
    return tokens


def _timm_weights(config: EncoderConfig, vision: Mapping[str, Any]) -> dict[str, Tensor]:
    """As :func:`pretrained_tower`, of a timm tower: read as safetensors, or without unpickling objects."""
    import timm
    from timm.models import load_state_dict

    source = str(config.pretrained)
    try:
        given = {"state_dict": load_state_dict(source, weights_only=True)} if Path(source).is_file() else {}
        trunk = timm.create_model(
            vision["timm_model_name"],
            pretrained=True,
            pretrained_cfg_overlay=given,
            num_classes=0,
            global_pool=vision["timm_pool"],
        )
    except Exception as error:  # timm and the hub raise many types
        advice = "" if Path(source).is_file() else " Without a hub, give a local file: model.encoder.pretrained=FILE."
        if advice and vision["timm_model_name"] == "tf_efficientnet_lite0.in1k":
            advice += " In a clone, python experiments/photographs/efficientnet_lite0.py --out FILE writes it."
        text = f"model.encoder.pretrained: no usable weights '{source}': {reason(error)}.{advice}"
        raise UserError(text) from error
    _resize(trunk, config.image_size)
    return {f"trunk.{name}": tensor for name, tensor in trunk.state_dict().items()}

"""The pocket architecture: configuration, fresh weights, training-time forward passes, and the portable folder.

The model is a stock ``LlavaForConditionalGeneration``: a CLIP vision tower (112x112 image, 8x8 patches, so CLS + 196
tokens) whose penultimate hidden states feed a two-layer projector, and a Llama decoder, all 128 wide. The last vision
layer thus serves the CLS token only, as in the large models of this family.

`write_folder` writes one ``from_pretrained`` folder that transformers 4.57 and 5.x read alike; the shipped checkpoint
was written by it. It writes the JSON files itself because each version's ``save_pretrained`` uses names the other does
not know.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vtc.pocket.errors import PocketError
from vtc.pocket.objects import COLOR_NAMES, IMAGE_SIZE, N_COMBINATIONS, PLURALS, SHAPES, WIDE_SIZES, WORDS

PATCH_SIZE = 8
GRID = IMAGE_SIZE // PATCH_SIZE
N_PATCHES = GRID * GRID
MAX_POSITIONS = 512
MAX_ANYRES_POSITIONS = 2048
ANYRES_SIZES: tuple[tuple[int, int], ...] = ((IMAGE_SIZE, IMAGE_SIZE), *WIDE_SIZES)
"""(height, width) that LLaVA-NeXT's processor scales images to before it cuts crops."""

PAD, UNK, BOS, EOS, IMAGE = SPECIAL_TOKENS = ("<pad>", "<unk>", "<s>", "</s>", "<image>")
_MARKUP = ("user", "assistant", ":", "?", ".", ",")
_QUESTION_WORDS = (
    "what which color is the big shape object there a how many shapes are digits digit next to does word say "
    "left right of above below more than yes no "  # scenes
    "contain image in not present"  # easy-VQA adds these
).split()

PATCH_TARGET_SIZES = (len(COLOR_NAMES) + 1, len(SHAPES) + 1, 11, len(WORDS) + 1, N_COMBINATIONS + 1, 2)
"""Classes of the per-patch targets colour, shape, digit, word, partner shape, object centre; class 0 is "none"."""

MENTION_TARGET_SIZES = (8, GRID, GRID, 10, len(COLOR_NAMES), len(SHAPES))
"""Classes of the targets of a noun phrase: how many objects fit it, and column, row, digit, colour, shape of a single one."""

RELATION_TARGETS = 5
"""Targets of the second noun phrase of a spatial question: the first one's object is to the right; is below; the question
is about above and below; it asks for right or below; the answer is yes."""

N_CONTENTS = N_COMBINATIONS + 10 + len(WORDS)
"""Length of the image's content vector: which (colour, shape) pairs, digits and words it shows."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}user : {% if m['content'] is string %}"
    "<image> {{ m['content'] }}{% else %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image> "
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}{% else %} assistant : "
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{{ m['content'][0]['text'] }}{% endif %}"
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %} assistant :{% endif %}"
)


def build_vocabulary() -> dict[str, int]:
    """Word-level vocabulary: special tokens and markup first, then every word of both data sources, sorted."""
    first = (*SPECIAL_TOKENS, *_MARKUP)
    words = {*_QUESTION_WORDS, *COLOR_NAMES, *SHAPES, *PLURALS, *WORDS, *map(str, range(10))}
    return {word: number for number, word in enumerate((*first, *sorted(words - set(first))))}


@dataclass(frozen=True)
class PocketConfig:
    """Size of a pocket model; the defaults are the shipped one's.

    Attributes
    ----------
    width
        Hidden size of tower and decoder, a multiple of 32 (heads are 32 wide).
    vision_layers
        Layers of the tower, at least 2.
    text_layers
        Layers of the decoder.
    """

    width: int = 128
    vision_layers: int = 5
    text_layers: int = 6

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be built."""
        if self.width < 32 or self.width % 32:
            raise PocketError(f"width must be a positive multiple of 32, got {self.width}")
        if self.vision_layers < 2 or self.text_layers < 1:
            raise PocketError("a pocket model needs at least 2 vision layers and 1 text layer")

    def to_json(self) -> dict[str, Any]:
        """Contents of ``config.json``, in terms that transformers 4.57 and 5.x both know."""
        vocabulary = build_vocabulary()
        tokens = {f"{n}_token_id": vocabulary[t] for n, t in (("bos", BOS), ("eos", EOS), ("pad", PAD))}
        heads = self.width // 32
        return {
            "architectures": ["LlavaForConditionalGeneration"],
            **tokens,
            # The weights are stored as float16 to be small; float32 is what the model is meant to run in on a CPU,
            # and what a plain from_pretrained then gives on both versions.
            "dtype": "float32",
            "image_seq_length": N_PATCHES,
            "image_token_index": vocabulary[IMAGE],
            "model_type": "llava",
            "multimodal_projector_bias": True,
            "projector_hidden_act": "gelu",
            "text_config": {
                **tokens,
                "attention_bias": False,
                "attention_dropout": 0.0,
                "head_dim": 32,
                "hidden_act": "silu",
                "hidden_size": self.width,
                "initializer_range": 0.02,
                "intermediate_size": self.width * 11 // 4,
                "max_position_embeddings": MAX_POSITIONS,
                "mlp_bias": False,
                "model_type": "llama",
                "num_attention_heads": heads,
                "num_hidden_layers": self.text_layers,
                "num_key_value_heads": heads,
                "rms_norm_eps": 1e-05,
                "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},  # read by 5.x
                "rope_theta": 10000.0,  # read by 4.x
                "tie_word_embeddings": False,
                "use_cache": True,
                "vocab_size": len(vocabulary),
            },
            "tie_word_embeddings": False,
            "vision_config": {
                "attention_dropout": 0.0,
                "hidden_act": "gelu_pytorch_tanh",
                "hidden_size": self.width,
                "image_size": IMAGE_SIZE,
                "initializer_factor": 1.0,
                "initializer_range": 0.02,
                "intermediate_size": 4 * self.width,
                "layer_norm_eps": 1e-05,
                "model_type": "clip_vision_model",
                "num_attention_heads": heads,
                "num_channels": 3,
                "num_hidden_layers": self.vision_layers,
                "patch_size": PATCH_SIZE,
                "projection_dim": self.width,
            },
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
        }


@dataclass(frozen=True)
class PocketNextConfig(PocketConfig):
    """Size of a pocket model with AnyRes inputs (LLaVA-NeXT): the same weights and one more, the newline."""

    def to_json(self) -> dict[str, Any]:
        """Contents of ``config.json``."""
        contents = super().to_json()
        contents["architectures"] = ["LlavaNextForConditionalGeneration"]
        contents["model_type"] = "llava_next"
        contents["image_grid_pinpoints"] = [list(size) for size in ANYRES_SIZES]
        contents["text_config"]["max_position_embeddings"] = MAX_ANYRES_POSITIONS
        return contents


# ---------------------------------------------------------------------------------------------- fresh weights


def vision_core(model: nn.Module) -> nn.Module:
    """Return the module holding the tower's embeddings and layers; transformers 4.x wraps it once more than 5.x."""
    tower = model.model.vision_tower
    return getattr(tower, "vision_model", tower)


def build_model(config: PocketConfig | None = None, seed: int = 0) -> nn.Module:
    """Build an untrained float32 ``LlavaForConditionalGeneration``.

    Parameters
    ----------
    config
        Its size; the shipped model's when None.
    seed
        Seed of the weights. The global random state of torch is left as it was.
    """
    import transformers

    config = config or PocketConfig()
    contents = config.to_json()
    contents.pop("architectures")
    contents.pop("dtype")
    with torch.random.fork_rng(devices=[]):
        if isinstance(config, PocketNextConfig):
            model = transformers.LlavaNextForConditionalGeneration(transformers.LlavaNextConfig.from_dict(contents)).float()
        else:
            model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig.from_dict(contents)).float()
        torch.manual_seed(seed)  # after the library's own draws, which differ between its versions
        _initialise(model, config)
    return model


@torch.no_grad()
def _initialise(model: nn.Module, config: PocketConfig) -> None:
    """Overwrite the library's start values, which train badly at this width."""
    for name, weight in sorted(model.named_parameters(), key=lambda item: portable_name(item[0])):
        if weight.dim() >= 2 and "patch_embedding" not in name:
            nn.init.normal_(weight, std=0.02 if "embed" in name else 0.6 * weight.shape[-1] ** -0.5)
        if name.endswith(("out_proj.weight", "o_proj.weight", "fc2.weight", "down_proj.weight")):
            weight.mul_(0.5)  # residual branches start small
    if isinstance(config, PocketNextConfig):
        nn.init.normal_(model.model.image_newline, std=config.width**-0.5)
    tower = vision_core(model)
    nn.init.normal_(tower.embeddings.class_embedding, std=config.width**-0.5)
    patches = tower.embeddings.patch_embedding.weight
    nn.init.normal_(patches, std=patches[0].numel() ** -0.5)
    # Two-dimensional sine table and equal query and key weights: attention starts out local and similarity-based.
    positions = tower.embeddings.position_embedding.weight
    positions[0] = 0
    positions[1:] = _sine_table(config.width)
    for layer in tower.encoder.layers:
        layer.self_attn.q_proj.weight.mul_(1.6)
        layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)


def _sine_table(width: int) -> Tensor:
    """Sine and cosine of the column and row of each patch at ``width / 4`` frequencies, [196, width]."""
    axis = torch.arange(GRID).float()
    rows, columns = torch.meshgrid(axis, axis, indexing="ij")
    frequencies = 30.0 ** -(torch.arange(width // 4) / (width // 4))
    return torch.cat([wave(c.reshape(-1, 1) * frequencies) for c in (columns, rows) for wave in (torch.sin, torch.cos)], dim=1)


_GROWN_FROM = (0, 1, None, 2, None, 3)
_NEW_WORDS = ("more", "than")


def grow(state: dict[str, Tensor], config: PocketConfig, seed: int = 0) -> dict[str, Tensor]:
    """Make start weights of a six-layer model from the first pocket checkpoint, which had four decoder layers.

    The two new layers start as identities (their output projections are zero) and the rows of new words are random, so
    the grown model answers old questions as the old one did.

    Parameters
    ----------
    state
        Weights of the first checkpoint, with portable names.
    config
        Size of the grown model; only its six decoder layers may differ from the first one's.
    seed
        Seed of what is new.

    Raises
    ------
    PocketError
        If the sizes do not match.
    """
    if config.text_layers != len(_GROWN_FROM):
        raise PocketError(f"the first checkpoint grows to {len(_GROWN_FROM)} decoder layers, not {config.text_layers}")
    grown = build_model(config, seed).state_dict()
    kept = torch.tensor([number for word, number in build_vocabulary().items() if word not in _NEW_WORDS])
    for name, weight in grown.items():
        source = portable_name(name)
        prefix = "language_model.model.layers."
        if source.startswith(prefix):
            number, _, rest = source.removeprefix(prefix).partition(".")
            if _GROWN_FROM[int(number)] is None:
                if rest in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
                    weight.zero_()
                continue
            source = f"{prefix}{_GROWN_FROM[int(number)]}.{rest}"
        if source not in state:
            raise PocketError(f"the checkpoint to grow has no weight {source!r}")
        target = weight[kept] if "embed_tokens" in source or "lm_head" in source else weight
        if target.shape != state[source].shape:
            raise PocketError(f"{source} has shape {list(state[source].shape)}, not {list(target.shape)}")
        if target is weight:
            weight.copy_(state[source])
        else:
            weight[kept] = state[source].to(weight.dtype)
    return grown


class AuxiliaryHeads(nn.Module):
    """Linear read-outs that exist during training only: per-patch targets, and image contents from the CLS token.

    The patch heads give the tower a dense signal long before answers do; the content head gives the CLS token a "what
    is in the picture" job like CLIP's, without which CLS attention would mean nothing to the reducers that use it.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.patch = nn.Linear(width, sum(PATCH_TARGET_SIZES))
        self.content = nn.Linear(width, N_CONTENTS)

    def forward(self, features: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Map patch features [b, 196, width] and the pooled CLS state [b, width] to float32 logits."""
        return self.patch(self.norm(features)).float(), self.content(pooled).float()


class MentionHeads(nn.Module):
    """Linear read-outs of the question's noun phrases half-way through the decoder, during training only.

    They ask the last word of every noun phrase what it refers to: how many objects fit it, where the only one is, and
    which digit, colour and shape belong to it. Answers alone teach the decoder to look things up only after tens of
    thousands of images; this dense signal does so within a few thousand.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.classify = nn.Linear(width, sum(MENTION_TARGET_SIZES))

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden states [..., width] to float32 logits."""
        return self.classify(self.norm(hidden)).float()


def half_way(states: Sequence[Tensor]) -> int:
    """Which of the decoder's states, from the embeddings on, noun phrases are read from: the one after half of the layers."""
    return (len(states) - 1) // 2


class RelationHead(nn.Module):
    """Linear read-outs at the second noun phrase of a spatial question, during training only.

    "Is A left of B?" is an exclusive-or of the relation word and the sign of a difference; answers alone stay at chance
    until both are known. One layer after `MentionHeads` asked where each object is, this head asks on which side of B
    lies A and what the question wants to know, and another layer later whether the two agree.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.sides = nn.Linear(width, RELATION_TARGETS - 1)
        self.agree = nn.Linear(width, 1)

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """Map the decoder's states [b, t, width], from the embeddings on, to float32 logits [b, t, 5]."""
        half = half_way(states)
        sides, agree = (states[min(half + further, len(states) - 1)] for further in (1, 2))
        return torch.cat([self.sides(self.norms[0](sides)), self.agree(self.norms[1](agree))], dim=-1).float()


class PositionHead(nn.Module):
    """Linear read-out of column and row from every visual token behind the projector, during training only.

    A projector trained on answers drops where a patch lies long before any answer asks for it (the first checkpoint's
    did: objects were misplaced by 4 of 14 cells, as by guessing), and the decoder cannot compare places it never sees.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.place = nn.Linear(width, 2 * GRID)

    def forward(self, visual: Tensor) -> tuple[Tensor, Tensor]:
        """Map visual tokens [b, 196, width] to float32 logits of column and row, [b, 196, 14] each."""
        columns, rows = self.place(self.norm(visual)).float().chunk(2, dim=-1)
        return columns, rows


# ---------------------------------------------------------------------------------------------- training forward


def encode_images(model: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Run the vision tower.

    Parameters
    ----------
    model
        The pocket model.
    pixels
        Images in -1..1, [b, 3, 112, 112].

    Returns
    -------
    features, pooled
        Penultimate hidden states of the patches [b, 196, width], which the projector reads, and the normalised last
        CLS state [b, width].
    """
    from vtc.engine import upstream

    output = model.model.vision_tower(pixels, output_hidden_states=True)
    return upstream.all_states(output)[-2][:, 1:], upstream.features_of(output)


def arrange_crops(model: nn.Module, visual: Tensor, rows: int, columns: int) -> Tensor:
    """Lay projected thumbnail and crops out as LLaVA-NeXT does: thumbnail, then lines across all crops, each ended.

    Parameters
    ----------
    model
        The pocket-next model, for its newline embedding.
    visual
        Projected features, [b, 1 + rows * columns, 196, width].
    rows, columns
        Grid of crops.

    Returns
    -------
    Tensor
        Visual tokens [b, 196 + 14 rows (14 columns + 1), width].
    """
    batch, _, _, width = visual.shape
    lines = visual[:, 1:].reshape(batch, rows, columns, GRID, GRID, width).transpose(2, 3)
    lines = lines.reshape(batch, rows * GRID, columns * GRID, width)
    ends = model.model.image_newline.expand(batch, rows * GRID, 1, width).to(lines.dtype)
    return torch.cat([visual[:, 0], torch.cat([lines, ends], dim=2).flatten(1, 2)], dim=1)


def project(model: nn.Module, features: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
    """Turn patch features into visual tokens.

    Parameters
    ----------
    model
        The pocket model.
    features
        Of `encode_images`, [b, 196, width], or [b (1 + rows * columns), 196, width] for thumbnails and crops.
    grid
        Rows and columns of crops, for a pocket-next model.

    Returns
    -------
    Tensor
        Visual tokens [b, n, width]; see `arrange_crops`.
    """
    visual = model.model.multi_modal_projector(features)
    if grid is None:
        return visual
    rows, columns = grid
    return arrange_crops(model, visual.unflatten(0, (-1, 1 + rows * columns)), rows, columns)


def decode_packed(
    model: nn.Module, visual: Tensor, prefix: Tensor, tokens: Tensor, segments: Tensor, positions: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run the decoder on several questions packed behind one image.

    Each question sees the prefix, the image and itself, at the positions it would have alone: the result equals that
    of single-turn prompts at a fraction of the cost.

    Parameters
    ----------
    model
        The pocket model.
    visual
        Visual tokens, as the projector (and `arrange_crops`) gives them, [b, v, width].
    prefix
        Token ids in front of the image, [p].
    tokens
        Token ids of the packed questions, [b, t].
    segments
        Which question a token belongs to, [b, t]; -1 is padding.
    positions
        Position ids of the packed tokens, [b, t].

    Returns
    -------
    last, states
        Hidden states of the packed tokens [b, t, width]: after the last layer and its norm, and a tuple of those in front
        of and after every layer, as the library gives them.
    """
    from vtc.engine import upstream

    decoder = model.model.language_model
    batch, context = tokens.shape[0], len(prefix) + visual.shape[1]
    embed = decoder.embed_tokens
    inputs = torch.cat([embed(prefix).expand(batch, -1, -1), visual, embed(tokens)], dim=1)
    position_ids = torch.cat([torch.arange(context).expand(batch, -1), positions], dim=1)
    shared = -2  # the segment of prefix and image, visible to all
    segment = torch.cat([segments.new_full((batch, context), shared), segments], dim=1)
    length = segment.shape[1]
    visible = (segment[:, None] == shared) | (segment[:, None] == segment[:, :, None])
    visible = visible & torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(batch, 1, length, length, dtype=inputs.dtype)
    mask = mask.masked_fill_(~visible[:, None], torch.finfo(inputs.dtype).min)
    output = decoder(
        **{upstream.EMBEDS: inputs, upstream.MASK: mask, upstream.POSITIONS: position_ids, upstream.USE_CACHE: False},
        output_hidden_states=True,
    )
    return upstream.states_of(output)[:, context:], tuple(state[:, context:] for state in upstream.all_states(output))


# ---------------------------------------------------------------------------------------------- portable folder


def portable_name(name: str) -> str:
    """Name of a weight in the file, from its name in a model of either transformers version.

    These are the names of the first LLaVA checkpoints, which every version of the library still maps to its own.
    """
    if name.endswith("lm_head.weight"):
        return "language_model.lm_head.weight"
    name = name.removeprefix("model.")
    for module, portable in (("language_model", "language_model.model"), ("vision_tower", "vision_tower.vision_model")):
        if name.startswith(f"{module}.") and not name.startswith(f"{portable}."):
            return portable + name.removeprefix(module)
    return name


def folder_files(config: PocketConfig | None = None) -> dict[str, str]:
    """Text files of a ``from_pretrained`` folder, by name."""
    config = config or PocketConfig()
    is_next = isinstance(config, PocketNextConfig)
    processor_class = "LlavaNextProcessor" if is_next else "LlavaProcessor"
    crops = {"do_pad": True, "image_grid_pinpoints": [list(size) for size in ANYRES_SIZES]} if is_next else {}
    vocabulary = build_vocabulary()
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    sequence = [{"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB")]
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    contents: dict[str, Any] = {
        "config.json": config.to_json(),
        "generation_config.json": {
            "bos_token_id": vocabulary[BOS],
            "eos_token_id": vocabulary[EOS],
            "max_new_tokens": 4,
            "pad_token_id": vocabulary[PAD],
        },
        "preprocessor_config.json": {
            "crop_size": size,
            "do_center_crop": False,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_processor_type": "LlavaNextImageProcessor" if is_next else "CLIPImageProcessor",
            "image_std": [0.5, 0.5, 0.5],
            "processor_class": processor_class,
            "resample": 2,  # bilinear
            "rescale_factor": 1 / 255,
            "size": size,
            **crops,
        },
        "processor_config.json": {
            "image_token": IMAGE,
            "num_additional_image_tokens": 1,  # CLS, which the "default" strategy takes off again
            "patch_size": PATCH_SIZE,
            "processor_class": processor_class,
            "vision_feature_select_strategy": "default",
        },
        "tokenizer.json": {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": vocabulary[t], "content": t, **special} for t in SPECIAL_TOKENS],
            "normalizer": {"type": "Lowercase"},
            "pre_tokenizer": {"type": "Whitespace"},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": sequence[:1],
                "pair": sequence,
                "special_tokens": {},
            },
            "decoder": None,
            "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": UNK},
        },
        "tokenizer_config.json": {
            "additional_special_tokens": [IMAGE],
            "bos_token": BOS,
            "clean_up_tokenization_spaces": False,
            "eos_token": EOS,
            "model_input_names": ["input_ids", "attention_mask"],  # 4.x would add token_type_ids, which Llama refuses
            "model_max_length": MAX_ANYRES_POSITIONS if is_next else MAX_POSITIONS,
            "pad_token": PAD,
            "padding_side": "left",
            "processor_class": processor_class,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": UNK,
        },
    }
    files = {name: json.dumps(value, indent=2) + "\n" for name, value in contents.items()}
    return {**files, "chat_template.jinja": CHAT_TEMPLATE}


def write_folder(state: dict[str, Tensor], folder: Path, config: PocketConfig | None = None) -> None:
    """Write weights and all configuration files as one ``from_pretrained`` folder.

    Parameters
    ----------
    state
        State dict of a pocket model, with the names of either transformers version or portable ones.
    folder
        Created if it does not exist; files of the same names are replaced.
    config
        Size of the model; the shipped model's when None.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {portable_name(name): value.detach().half().contiguous() for name, value in state.items()}
    path = folder / "model.safetensors"
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)  # the writer makes files only their owner can read
    for name, text in folder_files(config).items():
        (folder / name).write_text(text, encoding="utf-8")

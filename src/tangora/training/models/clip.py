"""CLIP as a classifier of images: its vision model against the text embeddings of class prompts, which are frozen."""

import math
import re
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, normalize
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    CLIPConfig,
    CLIPPreTrainedModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
)
from transformers.initialization import constant_
from transformers.modeling_outputs import ImageClassifierOutput

from tangora._checks import InputError, check_kind, shown

PROMPTS = ("a photo of a {}.",)
"""Templates of the class prompts where none are given: CLIP's own for images of any kind."""

_SIZES = {
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels", "image_size",
    "patch_size", "hidden_act", "layer_norm_eps", "attention_dropout", "initializer_range", "initializer_factor",
}  # fmt: skip


class PromptedCLIPConfig(CLIPVisionConfig):
    """The vision part of a CLIP config, with the classes, as labels (``id2label``) and as words, and prompts."""

    model_type = "prompted_clip"
    base_config_key = ""

    prompts: list[str] | tuple[str, ...] | None = None
    class_words: list[str] | tuple[str, ...] | None = None


class _FrozenProjection(nn.Module):
    # its weight is a buffer: no method trains it, and no adapter takes it for a linear layer
    def __init__(self, width: int, projected: int):
        super().__init__()
        self.weight: Tensor
        self.register_buffer("weight", torch.zeros(projected, width))

    def forward(self, hidden: Float[Tensor, "n w"]) -> Float[Tensor, "n d"]:
        return linear(hidden, self.weight)


class PromptedCLIPForImageClassification(CLIPPreTrainedModel):
    r"""CLIP's vision model, whose logits are those of CLIP for one text per class.

    $\text{logits} = e^s \frac{P v(x)}{\|P v(x)\|} T^\top$ with the vision model's pooled output $v$, CLIP's projection
    $P$ and scale $s$, and the normalized text embeddings $T$, one row per class. Only the vision model has parameters:
    the others are buffers, which no method trains.

    Source:
        Radford et al. (2021), arXiv:2103.00020, section 3.1; fine-tuned as in Ilharco et al. (2023), arXiv:2212.04089.
    """

    config: PromptedCLIPConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    config_class = PromptedCLIPConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules: ClassVar = ["CLIPEncoderLayer", "CLIPVisionEmbeddings"]

    def __init__(self, config: PromptedCLIPConfig):
        super().__init__(config)
        self.vision_model = CLIPVisionModel._from_config(config)
        self.visual_projection = _FrozenProjection(config.hidden_size, config.projection_dim)
        self.logit_scale: Tensor
        self.register_buffer("logit_scale", torch.zeros(()))
        self.text_embeddings: Tensor
        self.register_buffer(
            "text_embeddings", torch.zeros(len(config.id2label or {}), config.projection_dim)
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if (
            module is self
        ):  # CLIP's files hold no embeddings of classes: without `embed_classes` nothing may look right
            constant_(self.text_embeddings, math.nan)

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding of the patches."""
        return self.vision_model.get_input_embeddings()

    def forward(
        self,
        pixel_values: Float[Tensor, "n c h w"] | None = None,
        labels: Int[Tensor, " n"] | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput:
        """Classify images."""
        # PEFT's classifiers pass on the inputs of texts, which are None
        given = {key: value for key, value in kwargs.items() if value is not None}
        outputs = self.vision_model(pixel_values, **given)
        embedded = normalize(self.visual_projection(outputs.pooler_output), dim=-1)
        logits = self.logit_scale.exp() * embedded @ self.text_embeddings.T
        return ImageClassifierOutput(
            loss=None if labels is None else cross_entropy(logits.float(), labels),  # pyright: ignore[reportArgumentType]
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


AutoConfig.register(PromptedCLIPConfig.model_type, PromptedCLIPConfig)
AutoModelForImageClassification.register(PromptedCLIPConfig, PromptedCLIPForImageClassification)


def classifier_config(
    config: Any, name: str, labels: Sequence[str], prompts: str | Sequence[str] | None, *, named: bool
) -> PromptedCLIPConfig | None:
    """Return the config of the classifier that a CLIP model makes or is; nothing for other models.

    Without ``named`` the labels are no names that anyone gave, and only their number counts.
    """
    templates = None if prompts is None else _templates(prompts)
    if isinstance(config, PromptedCLIPConfig):
        _check_same(config, name, labels, templates, named=named)
        return config
    if not isinstance(config, CLIPConfig):
        if templates is not None:
            raise InputError(f"class_prompts are for CLIP models, and model {name!r} is none; leave them out")
        return None
    if not named:
        raise InputError(f"model {name!r} is a CLIP model, which needs labels: the classes become prompts")
    vision: Any = config.vision_config
    sizes = {key: value for key, value in vision.to_dict().items() if key in _SIZES}
    return PromptedCLIPConfig(
        **sizes,
        projection_dim=config.projection_dim or vision.projection_dim,
        prompts=list(templates or PROMPTS),
        class_words=[class_words(label) for label in labels],
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )


def _templates(prompts: str | Sequence[str]) -> tuple[str, ...]:
    templates = (prompts,) if isinstance(prompts, str) else prompts
    check_kind("prompts", templates, (list, tuple), "a template, or a list of templates")
    for template in templates or ("",):
        if (
            not isinstance(template, str)
            or template.count("{}") != 1
            or {*"{}"} & {*template.replace("{}", "")}
        ):
            raise InputError(
                f"class_prompts must be texts with one {{}} for the class, as {PROMPTS[0]!r}; got {shown(template)}"
            )
    return tuple(templates)


def _check_same(
    config: PromptedCLIPConfig,
    name: str,
    labels: Sequence[str],
    templates: Sequence[str] | None,
    *,
    named: bool,
) -> None:
    # the text model is not there any more
    known, prompts = list((config.id2label or {}).values()), list(config.prompts or ())
    wanted_labels = labels if named or len(labels) != len(known) else known
    for what, wanted, own in (("classes", wanted_labels, known), ("prompts", templates, prompts)):
        if wanted is not None and list(wanted) != own:
            raise InputError(
                f"model {name!r} was saved for the {what} {', '.join(own)}; got {', '.join(wanted)}: for others, load "
                "the CLIP model that it comes from"
            )


def class_words(label: str) -> str:
    """Write the name of a class as words.

    Examples:
        >>> class_words("AnnualCrop"), class_words("parking_lot"), class_words("stop")
        ('Annual Crop', 'parking lot', 'stop')
    """
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label.replace("_", " "))
    return " ".join(apart.split())


def embed_classes(model: Any, path: str, tokenizer: Any, name: str, new: set[str], *, local: bool) -> None:
    """Give a classifier the embeddings of its classes, from the text model beside its own weights."""
    options: dict[str, Any] = {"dtype": torch.float32, "local_files_only": local, "output_loading_info": True}
    loaded: Any = CLIPTextModelWithProjection.from_pretrained(path, **options)
    text, info = loaded
    if missing := sorted((new - {"text_embeddings"}) | {*info["missing_keys"]}):
        raise InputError(
            f"model {name!r} lacks {len(missing)} of the weights of a CLIP model, such as {missing[0]}; use one with "
            "vision and text"
        )
    words, prompts = model.config.class_words, model.config.prompts
    model.text_embeddings.copy_(text_embeddings(text.eval(), tokenizer, words, prompts))


@torch.no_grad()
def text_embeddings(
    text: CLIPTextModelWithProjection, tokenizer: Any, names: Sequence[str], prompts: Sequence[str]
) -> Float[Tensor, "k d"]:
    """Embed classes: the normalized mean over the templates of the normalized embeddings of their prompts."""
    rows = []
    for name in names:
        texts = [template.format(name) for template in prompts]
        longest = text.config.max_position_embeddings
        inputs = tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        embedded = text(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).text_embeds
        rows.append(normalize(normalize(embedded, dim=-1).mean(0), dim=0))
    return torch.stack(rows)

# SPDX-License-Identifier: Apache-2.0
"""A LLaVA-1.5 checkpoint of any size with random weights, for the benchmark and the tests.

Other families' dummies take tokenizer, sizes and weights from here.

Stock random weights give nearly constant logits, which would hide any error: they are scaled here until the
answer depends on every token. The answers mean nothing all the same.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IMAGE_TOKEN = "<image>"
SPECIAL_TOKENS = ("<s>", "</s>", "<pad>", IMAGE_TOKEN)
VOCAB_SIZE = 320  # a multiple of 64, which real vocabularies are padded to
PADDED_IDS = 8  # the last ids, which stand for no token
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@dataclass(frozen=True)
class DummySize:
    """Width and depth of the two towers.

    Attributes:
        branch_gain: width of the weights in a decoder layer but for queries and keys. The deeper the model,
            the more its layers amplify rounding errors.
        logit_gain: width of the weights that give the logits.
    """

    layers: int = 4
    hidden: int = 64
    heads: int = 2
    vision_layers: int = 2
    vision_hidden: int = 64
    max_positions: int = 4096
    branch_gain: float = 1.0
    logit_gain: float = 1.0


TINY = DummySize()
DEEP = DummySize(layers=8, branch_gain=0.7, logit_gain=1.6)  # for eviction: its last layers still matter
DEMO = DummySize(layers=6, hidden=512, heads=8, vision_layers=3, vision_hidden=128)
BENCH = DummySize(layers=12, hidden=768, heads=12, vision_layers=4, vision_hidden=128)


def make_tokenizer(special_tokens: Sequence[str] = SPECIAL_TOKENS) -> Any:
    """A byte-level tokenizer: every text can be written, and every token reads as some text of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [*special_tokens, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    # Filled up with words that are only ever generated.
    tokens += [f" w{index}" for index in range(VOCAB_SIZE - PADDED_IDS - len(tokens))]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # Not the ByteLevel decoder: random bytes are rarely valid UTF-8.
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u0120", " "), decoders.Replace("\u010a", "\n"), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=[*special_tokens[3:]],
        model_max_length=4096,
    )


def text_sizes(size: DummySize, kv_heads: int) -> dict[str, int]:
    """Of a language model's configuration what follows from its size."""
    return {
        "hidden_size": size.hidden,
        "intermediate_size": 3 * size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": size.max_positions,
    }


def make_config(size: DummySize, image_token_id: int) -> Any:
    """The LlavaConfig of a checkpoint of this size."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=size.vision_hidden,
        intermediate_size=2 * size.vision_hidden,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=4,
        image_size=336,
        patch_size=14,
        projection_dim=size.vision_hidden,
    )
    text = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        **text_sizes(size, size.heads),
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return LlavaConfig(
        architectures=["LlavaForConditionalGeneration"],
        vision_config=vision,
        text_config=text,
        image_token_index=image_token_id,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        dtype="float32",
        eos_token_id=1,
    )


def make_checkpoint(folder: Path, size: DummySize = TINY, seed: int = 0, weights: bool = True) -> Path:
    """Write config, processor and (unless `weights` is False) scaled random weights to `folder`."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    tokenizer = make_tokenizer()
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    config = make_config(size, image_token_id)
    folder.mkdir(parents=True, exist_ok=True)
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)
    config.save_pretrained(folder)
    if weights:
        _make_weights(folder, config, size, seed)
    return folder


def _make_weights(folder: Path, config: Any, size: DummySize, seed: int) -> None:
    import torch
    from transformers import LlavaForConditionalGeneration

    torch.manual_seed(seed)
    save_weights(folder, scale_weights(LlavaForConditionalGeneration(config), size))


def save_weights(folder: Path, model: Any) -> None:
    """Write the weights of a LLaVA of transformers under the names of published checkpoints."""
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous() for name, tensor in _published_names(model.state_dict())}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def save_dummy(
    folder: Path, size: DummySize, seed: int, config: Any, model_class: Any, processor: Any, weights: bool
) -> Path:
    """Write configuration and processor, and a model with scaled random weights if `weights`."""
    import torch

    if weights:
        torch.manual_seed(seed)
        scale_weights(model_class(config), size).save_pretrained(folder)
    else:
        config.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def scale_weights(model: Any, size: DummySize) -> Any:
    """Draw the weights of a vision-language model of transformers anew."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:  # biases and norms stay as initialised
                fan_in = parameter[0].numel()
                parameter.normal_(0, _standard_deviation(name, fan_in, size))
        model.lm_head.weight[-PADDED_IDS:] = 0  # what stands for no token is never the best answer
    return model


def _standard_deviation(name: str, fan_in: int, size: DummySize) -> float:
    """Wide enough that logits differ and depend on every token: sharp attention, embeddings of unit size."""
    if "embed" in name and "patch_embed.proj" not in name:
        return 1.0
    gain = 1.0
    if "language_model" in name:
        gain = 1.5 if "q_proj" in name or "k_proj" in name else size.branch_gain
    elif "lm_head" in name:
        gain = size.logit_gain
    elif "multi_modal_projector" in name or "visual.merger" in name:
        gain = 2.0
    return float(gain / fan_in**0.5)


def _published_names(state: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The names of published LLaVA checkpoints, which both transformers and vLLM read."""
    for name, tensor in state.items():
        name = name.removeprefix("model.")
        if name.startswith("vision_tower.") and not name.startswith("vision_tower.vision_model."):
            name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
        if name.startswith("language_model."):
            name = name.replace("language_model.", "language_model.model.", 1)
        yield ("language_model.lm_head.weight" if name == "lm_head.weight" else name), tensor

# SPDX-License-Identifier: Apache-2.0
"""Models that people ask for and whose images are not pruned, each with the reason."""

_READS_ALL = "it transcribes whole pages, of which no part is beside the question"
_BOTH_WAYS = (
    "the tokens of an image attend to each other in both directions, which needs all of them in every layer"
)
_LATENT = "its attention keeps compressed keys and values (MLA), whose layers are not built to lose rows here"
_FEW = "a picture has few tokens already, 64 for each slice of 448 pixels"

WHY_NOT = {
    **dict.fromkeys(
        (
            "DeepseekOCRForCausalLM",
            "DeepseekOCR2ForCausalLM",
            "GlmOcrForConditionalGeneration",
            "PaddleOCRVLForConditionalGeneration",
        ),
        _READS_ALL,
    ),
    **dict.fromkeys(("Gemma3ForConditionalGeneration", "Gemma3nForConditionalGeneration"), _BOTH_WAYS),
    "Gemma4UnifiedForConditionalGeneration": (
        f"{_BOTH_WAYS}; what vLLM has for it is a budget for each request, --mm-processor-kwargs or the "
        'request\'s mm_processor_kwargs {"max_soft_tokens": 70, 140, 280, 560 or 1120}'
    ),
    **dict.fromkeys(
        (
            "KimiVLForConditionalGeneration",
            "KimiK25ForConditionalGeneration",
            "KimiK3ForConditionalGeneration",
        ),
        _LATENT,
    ),
    **dict.fromkeys(
        (
            "MiniCPMV",
            "MiniCPMO",
            "MiniCPMV4_6ForConditionalGeneration",
            "MiniCPMV4_7ForConditionalGeneration",
        ),
        _FEW,
    ),
    "Llama4ForConditionalGeneration": "most layers look at chunks of positions, which pruning would shift",
    "PixtralForConditionalGeneration": (
        "vLLM has another renderer for Mistral's own format, which would ignore `crop`: take a checkpoint in "
        "transformers' format (Mistral3ForConditionalGeneration), and where a repository has both, say "
        "--tokenizer-mode hf --config-format hf --load-format safetensors"
    ),
}

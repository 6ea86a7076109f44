# SPDX-License-Identifier: Apache-2.0
"""What of vLLM's model files is built on; a row counts where a model of that file is served."""

from vllm_crop.compat.points.point import UpstreamPoint

MODEL_POINTS = (
    UpstreamPoint(
        "vllm.model_executor.models.llava",
        "LlavaForConditionalGeneration.embed_multimodal",
        ("self", "kwargs"),
        "returns compressed embeddings",
    ),
    UpstreamPoint(
        "vllm.model_executor.models.llava_next",
        "LlavaNextForConditionalGeneration.embed_multimodal",
        ("self", "kwargs"),
        "returns compressed embeddings",
    ),
    UpstreamPoint(
        "vllm.model_executor.models.llava_onevision",
        "LlavaOnevisionForConditionalGeneration.embed_multimodal",
        ("self", "kwargs"),
        "returns compressed embeddings",
    ),
    UpstreamPoint(
        "vllm.model_executor.models.qwen2_vl",
        "Qwen2VLForConditionalGeneration.embed_multimodal",
        ("self", "kwargs"),
        "returns compressed embeddings",
    ),
    UpstreamPoint(
        "vllm.model_executor.models.qwen2_vl",
        "Qwen2VLForConditionalGeneration.get_mrope_input_positions",
        ("self", "input_tokens", "mm_features"),
        "numbers the unpruned prompt, of which the tokens that are left keep their numbers",
    ),
    UpstreamPoint(
        "vllm.model_executor.models.qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration.embed_multimodal",
        ("self", "kwargs"),
        "returns compressed embeddings",
    ),
    UpstreamPoint(
        "vllm.model_executor.models.qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration.get_mrope_input_positions",
        ("self", "input_tokens", "mm_features"),
        "numbers the unpruned prompt, of which the tokens that are left keep their numbers",
    ),
    UpstreamPoint(
        "vllm.model_executor.models.qwen3_vl",
        "Qwen3VLForConditionalGeneration.embed_multimodal",
        ("self", "kwargs"),
        "returns compressed embeddings, deepstack features beside them",
    ),
    UpstreamPoint(
        "vllm.model_executor.models.qwen3_vl",
        "Qwen3VLForConditionalGeneration.get_mrope_input_positions",
        ("self", "input_tokens", "mm_features"),
        "numbers the unpruned prompt, of which the tokens that are left keep their numbers",
    ),
    UpstreamPoint(
        "vllm.model_executor.models.qwen2_vl",
        "Qwen2VisionTransformer.forward",
        ("self", "x", "grid_thw", "encoder_metadata"),
        "encodes pieces of images with the metadata of their places",
    ),
    UpstreamPoint(
        "vllm.model_executor.models.qwen2_vl",
        "Qwen2VisionTransformer.prepare_encoder_metadata",
        ("self", "grid_thw"),
        "gives pieces all but the places they have in the whole image",
    ),
    UpstreamPoint(
        "vllm.model_executor.models.qwen2_5_vl",
        "Qwen2_5_VisionTransformer.forward",
        ("self", "x", "grid_thw", "encoder_metadata"),
        "encodes pieces of images with the metadata of their places",
    ),
    UpstreamPoint(
        "vllm.model_executor.models.qwen2_5_vl",
        "Qwen2_5_VisionTransformer.prepare_encoder_metadata",
        ("self", "grid_thw"),
        "gives pieces all but the places they have in the whole image",
    ),
    UpstreamPoint(
        "vllm.model_executor.models.qwen3_vl",
        "Qwen3_VisionTransformer.forward",
        ("self", "x", "grid_thw", "encoder_metadata"),
        "encodes pieces of images with the metadata of their places",
    ),
    UpstreamPoint(
        "vllm.model_executor.models.qwen3_vl",
        "Qwen3_VisionTransformer.prepare_encoder_metadata",
        ("self", "grid_thw_list"),
        "gives pieces all but the places they have in the whole image",
    ),
    UpstreamPoint(
        "vllm.model_executor.models.llava_next",
        "LlavaNextForConditionalGeneration._process_image_pixels",
        ("self", "inputs"),
        "encodes the tiles that are seen of an image",
    ),
    UpstreamPoint(
        "vllm.model_executor.models.llava_next",
        "LlavaNextForConditionalGeneration._merge_image_patch_embeddings",
        ("self", "image_size", "patch_embeddings"),
        "puts tiles together, those that were not seen from the whole image's",
        also_required=("strategy",),
    ),
    UpstreamPoint(
        "vllm.model_executor.models.llava_onevision",
        "LlavaOnevisionForConditionalGeneration._process_image_pixels",
        ("self", "inputs"),
        "encodes the tiles that are seen of an image",
    ),
    UpstreamPoint(
        "vllm.model_executor.models.llava_onevision",
        "LlavaOnevisionForConditionalGeneration._merge_image_patch_embeddings",
        ("self", "image_size", "patch_embeddings"),
        "puts tiles together, those that were not seen from the whole image's",
        also_required=("strategy",),
    ),
)

# SPDX-License-Identifier: Apache-2.0
"""What of vLLM's model files is built on; a row counts where a model of that file is served."""

from vllm_crop.compat.points.point import UpstreamPoint

_MODELS = "vllm.model_executor.models"
# Of each file, the model that ours is made of and the processor of its images.
_FAMILIES = (
    ("llava", "LlavaForConditionalGeneration", "LlavaMultiModalProcessor"),
    ("llava_next", "LlavaNextForConditionalGeneration", "LlavaNextMultiModalProcessor"),
    ("llava_onevision", "LlavaOnevisionForConditionalGeneration", "LlavaOnevisionMultiModalProcessor"),
    ("qwen2_vl", "Qwen2VLForConditionalGeneration", "Qwen2VLMultiModalProcessor"),
    ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLMultiModalProcessor"),
    ("qwen3_vl", "Qwen3VLForConditionalGeneration", "Qwen3VLMultiModalProcessor"),
    ("interns1", "InternS1ForConditionalGeneration", "InternS1MultiModalProcessor"),
    ("mistral3", "Mistral3ForConditionalGeneration", "Mistral3MultiModalProcessor"),
    ("internvl", "InternVLChatModel", "InternVLMultiModalProcessor"),
    ("qwen3_5", "Qwen3_5ForConditionalGeneration", "Qwen3VLMultiModalProcessor"),
    ("glm4_1v", "Glm4vForConditionalGeneration", "Glm4vMultiModalProcessor"),
)
# Files of which we have the processor alone, and the stock model.
_PROCESSORS = (("gemma4_mm", "Gemma4MultiModalProcessor"),)
_OF_MODELS = (
    ("embed_multimodal", "self kwargs", "returns compressed embeddings"),
    (
        "forward",
        "self input_ids positions intermediate_tensors inputs_embeds",
        "runs in stages, watched where somebody asks for a map",
    ),
    ("compute_logits", "self hidden_states", "gives maps in the place of logits"),
    ("load_weights", "self weights", "forgets features that older weights have made"),
)
# As server.py has them, of the classes that a family's processor really is.
_OF_PROCESSORS = (
    ("_get_mm_hashes", "self inputs", "keys caches by image and region"),
    ("_get_cache_missing_processor_kwargs", "self inputs mm_is_cached", "gives each image its own plan"),
    ("_apply_hf_processor_main", "self mm_items hf_kwargs", "sends the plan beside the pixels"),
    ("_get_mm_fields_config", "self hf_inputs hf_processor_mm_kwargs", "declares the plan's tensors"),
    (
        "_get_prompt_updates",
        "self mm_items hf_processor_mm_kwargs out_mm_kwargs",
        "puts the planned number of placeholders into the prompt",
    ),
)

MODEL_POINTS = (
    *(
        UpstreamPoint(f"{_MODELS}.{module}", f"{of}.{method}", tuple(parameters.split()), reason)
        for module, model, processor in _FAMILIES
        for of, methods in ((model, _OF_MODELS), (processor, _OF_PROCESSORS))
        for method, parameters, reason in methods
    ),
    *(
        UpstreamPoint(f"{_MODELS}.{module}", f"{processor}.{method}", tuple(parameters.split()), reason)
        for module, processor in _PROCESSORS
        for method, parameters, reason in _OF_PROCESSORS
    ),
    UpstreamPoint(
        "vllm.model_executor.models.qwen2_vl",
        "Qwen2VLForConditionalGeneration.get_mrope_input_positions",
        ("self", "input_tokens", "mm_features"),
        "numbers the unpruned prompt, of which the tokens that are left keep their numbers",
    ),
    UpstreamPoint(
        "vllm.model_executor.models.qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration.get_mrope_input_positions",
        ("self", "input_tokens", "mm_features"),
        "numbers the unpruned prompt, of which the tokens that are left keep their numbers",
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
        "vllm.model_executor.models.glm4_1v",
        "Glm4vForConditionalGeneration.get_mrope_input_positions",
        ("self", "input_tokens", "mm_features"),
        "numbers the unpruned prompt, of which the tokens that are left keep their numbers",
    ),
    UpstreamPoint(
        "vllm.model_executor.models.glm4_1v",
        "Glm4vVisionTransformer.forward",
        ("self", "x", "grid_thw", "encoder_metadata"),
        "encodes pieces of images with the metadata of their places",
    ),
    UpstreamPoint(
        "vllm.model_executor.models.glm4_1v",
        "Glm4vVisionTransformer.prepare_encoder_metadata",
        ("self", "grid_thw_list"),
        "gives pieces all but the places they have in the whole image",
    ),
    UpstreamPoint(
        "vllm.model_executor.models.glm4_1v",
        "Glm4vVisionEmbeddings.forward",
        ("self", "embeddings", "lengths", "image_shapes", "h_coords", "w_coords"),
        "gives pieces the learned embeddings of their places in the whole image",
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
        given=("strategy",),
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
        given=("strategy",),
    ),
)

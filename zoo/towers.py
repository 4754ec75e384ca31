"""Exceptions of models that hear, and of models that have a tower for pictures or sounds."""

from typing import Any

# The projector takes four frames of 48 features for one of this size.
_FOUR_FRAMES = {"intermediate_size": 192}

TOWERS: dict[str, dict[str, Any]] = {
    "glmasr_encoder": _FOUR_FRAMES,
    "got_ocr2_vision": {"output_channels": 12, "window_size": 2, "global_attn_indexes": [1]},
    "granite_speech_encoder": {
        "input_dim": 16, "hidden_dim": 48, "context_size": 6, "max_pos_emb": 8,
        "conv_kernel_size": 5, "output_dim": 20,
    },
    "granite_speech_plus_encoder": {
        "input_dim": 16, "hidden_dim": 48, "context_size": 6, "max_pos_emb": 8,
        "conv_kernel_size": 5, "output_dim": 20,
    },
    "granite_speech": {"window_size": 4, "downsample_rate": 2},
    "granite_speech_plus": {"window_size": 4, "downsample_rate": 2},
    "nemotron3_diarization": {
        "head_config": {"audio_hidden_size": 48, "hidden_size": 20},
    },
    "phi4_multimodal_audio": {
        "nemo_conv_channels": 12, "ext_pw_out_channel": 48, "depthwise_separable_out_channel": 48,
        "num_blocks": 2, "input_size": 16, "audio_token_id": 4, "chunk_size": -1,
    },
    "phi4_multimodal_vision": {"crop_size": 32},
    "qwen3_asr_encoder": {"downsample_hidden_size": 12, "n_window": 50, "n_window_infer": 100},
    "siglip_vision_model": {"vision_use_head": False},
    "t5gemma2_encoder": {"mm_tokens_per_image": 4},
    "vibevoice_acoustic_tokenizer_encoder": {
        "num_filters": 4, "depths": [1, 1, 2], "downsampling_ratios": [2, 2],
    },
    "voxtral": {"audio_token_id": 3},
    "voxtral_encoder": _FOUR_FRAMES,
}  # fmt: skip

"""Exceptions of models that hear, and of models that have a tower for pictures or sounds."""

from typing import Any

_AUDIO_HIDDEN = 48

TOWERS: dict[str, dict[str, Any]] = {
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
        "head_config": {"audio_hidden_size": _AUDIO_HIDDEN, "hidden_size": 20},
    },
    "phi4_multimodal_audio": {
        "nemo_conv_channels": 12, "ext_pw_out_channel": 20, "depthwise_separable_out_channel": 48,
        "num_blocks": 2, "input_size": 16,
    },
    "phi4_multimodal_vision": {"crop_size": 32},
    "qwen3_asr_encoder": {"downsample_hidden_size": 12, "n_window": 4, "n_window_infer": 8},
    "vibevoice_acoustic_tokenizer_encoder": {
        "num_filters": 4, "depths": [1, 1, 2], "downsampling_ratios": [2, 2],
    },
}  # fmt: skip

"""Sizes of the tiniest models of many architectures, for the configurations of transformers."""

VOCABULARY = 40
LAYERS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
TEXT_MODEL = {"vocab_size": VOCABULARY, "initializer_range": 0.5, **LAYERS}
IMAGE_MODEL = {"image_size": 16, "patch_size": 4, "num_labels": 3, **LAYERS}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "init_std": 0.5,
    **{f"{side}_layers": 1 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 24 for side in ("encoder", "decoder")},
    "max_position_embeddings": 32,
    "decoder_start_token_id": 2,
}
T5 = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 1, "n_head": 2}
XLM = {"vocab_size": VOCABULARY, "emb_dim": 16, "n_layers": 1, "n_heads": 2, "init_std": 0.5}
AUDIO_MODEL = {
    "vocab_size": 12,
    "conv_dim": (8, 8),
    "conv_stride": (2, 2),
    "conv_kernel": (3, 3),
    **LAYERS,
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
    "initializer_range": 0.3,
}
SEGFORMER = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "sr_ratios": [2, 1],
    "hidden_sizes": [8, 8],
    "patch_sizes": [3, 3],
    "strides": [2, 2],
    "num_attention_heads": [1, 1],
    "mlp_ratios": [2, 2],
    "decoder_hidden_size": 8,
    "num_labels": 3,
}
CLIP = {
    "text_config": {"vocab_size": VOCABULARY, "eos_token_id": 2, "max_position_embeddings": 16, **LAYERS},
    "vision_config": IMAGE_MODEL,
    "projection_dim": 8,
}

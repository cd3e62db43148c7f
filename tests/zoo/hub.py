"""Architectures of the transformers library, random weights, small widths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zoo.registry import entry

try:
    import transformers as T
except ImportError:  # the rest of the zoo does without
    T = None

H: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
KV: dict[str, Any] = {**H, "num_key_value_heads": 2}
SEEN: dict[str, Any] = {k: v for k, v in H.items() if k != "vocab_size"}


def ids(length: int = 7) -> Tensor:
    return torch.randint(5, 90, (2, length))


def text() -> dict[str, Any]:
    tokens = ids()
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def pair() -> dict[str, Any]:
    return {"input_ids": ids(), "decoder_input_ids": ids(5)}


def pixels(size: int = 32) -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, size, size)}


def hub(name: str, model: str, config: Callable[[], Any], example: Callable[[], Any] = text) -> None:
    """Register one configuration under `name`; it is built when it is asked for."""

    if T is None:
        return

    def make() -> tuple[nn.Module, Any]:
        made = config()
        if hasattr(made, "use_cache"):
            made.use_cache = False
        return getattr(T, model)(made), example()

    entry(name, quick=False)(make)


hub("bert", "BertForSequenceClassification", lambda: T.BertConfig(**H))
hub(
    "distilbert",
    "DistilBertForSequenceClassification",
    lambda: T.DistilBertConfig(vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=48),
)
hub("roberta", "RobertaForSequenceClassification", lambda: T.RobertaConfig(**H))
hub("gpt2", "GPT2LMHeadModel", lambda: T.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4))
hub("llama", "LlamaForCausalLM", lambda: T.LlamaConfig(**KV))
hub(
    "opt",
    "OPTForCausalLM",
    lambda: T.OPTConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, ffn_dim=48, num_attention_heads=4, word_embed_proj_dim=32
    ),
)
hub(
    "t5",
    "T5ForConditionalGeneration",
    lambda: T.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
    lambda: dict(input_ids=ids(), decoder_input_ids=ids(5)),
)
hub("vit", "ViTForImageClassification", lambda: T.ViTConfig(**SEEN, image_size=32, patch_size=8), pixels)
hub(
    "swin",
    "SwinForImageClassification",
    lambda: T.SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4),
    pixels,
)
hub("mixtral", "MixtralForCausalLM", lambda: T.MixtralConfig(**KV, num_local_experts=4))
hub("albert", "AlbertForSequenceClassification", lambda: T.AlbertConfig(**H, embedding_size=16))
hub("electra", "ElectraForSequenceClassification", lambda: T.ElectraConfig(**H, embedding_size=16))
hub(
    "deberta",
    "DebertaForSequenceClassification",
    lambda: T.DebertaConfig(**H, relative_attention=True, pos_att_type=["c2p", "p2c"]),
)
hub(
    "debertav2",
    "DebertaV2ForSequenceClassification",
    lambda: T.DebertaV2Config(**H, relative_attention=True, pos_att_type=["c2p", "p2c"]),
)
hub("mpnet", "MPNetForSequenceClassification", lambda: T.MPNetConfig(**H))
hub("neox", "GPTNeoXForCausalLM", lambda: T.GPTNeoXConfig(**H))
hub(
    "gptneo",
    "GPTNeoForCausalLM",
    lambda: T.GPTNeoConfig(
        vocab_size=99,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        intermediate_size=48,
    ),
)
hub("gptj", "GPTJForCausalLM", lambda: T.GPTJConfig(vocab_size=99, n_embd=32, n_layer=2, n_head=4, rotary_dim=4))
hub("bloom", "BloomForCausalLM", lambda: T.BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4))
hub("phi", "PhiForCausalLM", lambda: T.PhiConfig(**H))
hub("phi3", "Phi3ForCausalLM", lambda: T.Phi3Config(**KV, pad_token_id=0))
hub("mistral", "MistralForCausalLM", lambda: T.MistralConfig(**KV))
hub("qwen2", "Qwen2ForCausalLM", lambda: T.Qwen2Config(**KV))
hub("qwen3", "Qwen3ForCausalLM", lambda: T.Qwen3Config(**KV, head_dim=8))
hub(
    "qwen3moe",
    "Qwen3MoeForCausalLM",
    lambda: T.Qwen3MoeConfig(**KV, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24),
)
hub(
    "qwen2moe",
    "Qwen2MoeForCausalLM",
    lambda: T.Qwen2MoeConfig(
        **KV, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=40
    ),
)
hub("gemma", "GemmaForCausalLM", lambda: T.GemmaConfig(**H, num_key_value_heads=1, head_dim=8))
hub("gemma2", "Gemma2ForCausalLM", lambda: T.Gemma2Config(**KV, head_dim=8))
hub("gemma3", "Gemma3ForCausalLM", lambda: T.Gemma3TextConfig(**KV, head_dim=8))
hub(
    "falcon",
    "FalconForCausalLM",
    lambda: T.FalconConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=False),
)
hub(
    "falconnew",
    "FalconForCausalLM",
    lambda: T.FalconConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        new_decoder_architecture=True,
        alibi=False,
    ),
)
hub("stablelm", "StableLmForCausalLM", lambda: T.StableLmConfig(**KV))
hub("olmo", "OlmoForCausalLM", lambda: T.OlmoConfig(**H))
hub("olmo2", "Olmo2ForCausalLM", lambda: T.Olmo2Config(**H))
hub(
    "bart",
    "BartForConditionalGeneration",
    lambda: T.BartConfig(
        vocab_size=99,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
    ),
    pair,
)
hub(
    "whisper",
    "WhisperForConditionalGeneration",
    lambda: T.WhisperConfig(
        vocab_size=99,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=20,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    ),
    lambda: dict(input_features=torch.randn(2, 8, 40), decoder_input_ids=ids(5)),
)
hub(
    "wav2vec2",
    "Wav2Vec2ForSequenceClassification",
    lambda: T.Wav2Vec2Config(
        **SEEN,
        vocab_size=32,
        conv_dim=(16, 16),
        conv_kernel=(5, 3),
        conv_stride=(3, 2),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
        classifier_proj_size=16,
    ),
    lambda: dict(input_values=torch.randn(2, 400)),
)
hub(
    "mamba",
    "MambaForCausalLM",
    lambda: T.MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, state_size=4),
    lambda: dict(input_ids=ids()),
)
hub("deit", "DeiTForImageClassification", lambda: T.DeiTConfig(**SEEN, image_size=32, patch_size=8), pixels)
hub("beit", "BeitForImageClassification", lambda: T.BeitConfig(**SEEN, image_size=32, patch_size=8), pixels)
hub(
    "swinv2",
    "Swinv2ForImageClassification",
    lambda: T.Swinv2Config(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4),
    pixels,
)
hub(
    "mobilevit",
    "MobileViTForImageClassification",
    lambda: T.MobileViTConfig(
        image_size=64,
        hidden_sizes=[16, 24, 32],
        neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 32],
        num_attention_heads=4,
        expand_ratio=2.0,
    ),
    lambda: pixels(64),
)
hub(
    "mobilevitv2",
    "MobileViTV2ForImageClassification",
    lambda: T.MobileViTV2Config(image_size=64, width_multiplier=0.25),
    lambda: pixels(64),
)
hub(
    "segformer",
    "SegformerForSemanticSegmentation",
    lambda: T.SegformerConfig(
        hidden_sizes=[8, 16, 16, 32],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 2, 4],
        decoder_hidden_size=16,
        mlp_ratios=[2, 2, 2, 2],
    ),
    lambda: pixels(64),
)
hub(
    "clip",
    "CLIPModel",
    lambda: T.CLIPConfig(
        text_config=dict(**H, max_position_embeddings=20, eos_token_id=2),
        vision_config=dict(**SEEN, image_size=32, patch_size=8),
        projection_dim=24,
    ),
    lambda: dict(input_ids=ids(), pixel_values=torch.randn(2, 3, 32, 32)),
)
hub("dinov2", "Dinov2ForImageClassification", lambda: T.Dinov2Config(**SEEN, image_size=32, patch_size=8), pixels)
hub(
    "sam",
    "SamVisionModel",
    lambda: T.SamVisionConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        mlp_dim=48,
        output_channels=16,
        image_size=32,
        patch_size=4,
        window_size=4,
        global_attn_indexes=[1],
    ),
    pixels,
)
hub(
    "resnet",
    "ResNetForImageClassification",
    lambda: T.ResNetConfig(embedding_size=8, hidden_sizes=[16, 24, 32], depths=[1, 2, 1], layer_type="bottleneck"),
    pixels,
)
hub(
    "regnet",
    "RegNetForImageClassification",
    lambda: T.RegNetConfig(
        embedding_size=8, hidden_sizes=[16, 24, 32, 32], depths=[1, 2, 1, 1], groups_width=8, layer_type="y"
    ),
    pixels,
)
hub(
    "convnext",
    "ConvNextForImageClassification",
    lambda: T.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1]),
    lambda: pixels(64),
)
hub(
    "convnextv2",
    "ConvNextV2ForImageClassification",
    lambda: T.ConvNextV2Config(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1]),
    lambda: pixels(64),
)
hub("mobilenetv1", "MobileNetV1ForImageClassification", lambda: T.MobileNetV1Config(depth_multiplier=0.25), lambda: pixels(64))
hub("mobilenetv2", "MobileNetV2ForImageClassification", lambda: T.MobileNetV2Config(depth_multiplier=0.25), lambda: pixels(64))
hub(
    "efficientnet",
    "EfficientNetForImageClassification",
    lambda: T.EfficientNetConfig(width_coefficient=0.25, depth_coefficient=0.3, hidden_dim=320),
    lambda: pixels(64),
)
hub(
    "xlnet",
    "XLNetForSequenceClassification",
    lambda: T.XLNetConfig(vocab_size=99, d_model=32, n_layer=2, n_head=4, d_inner=48),
    lambda: dict(input_ids=ids()),
)
hub(
    "funnel",
    "FNetForSequenceClassification",
    lambda: T.FNetConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, intermediate_size=48),
    lambda: dict(input_ids=ids()),
)
hub("mpt", "MptForCausalLM", lambda: T.MptConfig(vocab_size=99, d_model=32, n_layers=2, n_heads=4, max_seq_len=32))
hub("codegen", "CodeGenForCausalLM", lambda: T.CodeGenConfig(vocab_size=99, n_embd=32, n_layer=2, n_head=4, rotary_dim=4))
hub("cohere", "CohereForCausalLM", lambda: T.CohereConfig(**KV))
hub("starcoder2", "Starcoder2ForCausalLM", lambda: T.Starcoder2Config(**KV))
hub(
    "mamba2",
    "Mamba2ForCausalLM",
    lambda: T.Mamba2Config(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, state_size=4, num_heads=8, head_dim=8, n_groups=2, chunk_size=4
    ),
    lambda: dict(input_ids=ids()),
)
hub(
    "deepseek2",
    "DeepseekV2ForCausalLM",
    lambda: T.DeepseekV2Config(
        **H,
        num_key_value_heads=4,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        topk_method="greedy",
    ),
)
